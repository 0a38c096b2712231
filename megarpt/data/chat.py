"""Prompts with answers as token ids: what stands around them, and which tokens are to be learned.

A prompt and its answer are tokenized apart, so that where one ends and the other begins is the end of a token, as it is when
the model is asked. The prompt of a conversation is all that stands before an answer: it is tokenized in one go, save for the
special tokens of the template, which are looked for in the template alone. (The libraries also read added tokens and
user-defined symbols in any text that they are given.)

Dims: n tokens of a record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megarpt.config.schema import ChatConfig
from megarpt.corpus.markers import MarkedText, Parts
from megarpt.corpus.records import shorten
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import ConfigError, DataError

ASSISTANT = "assistant"

_CONTENT = "{content}"


class ChatTemplate(NamedTuple):
    """What stands around the messages of a conversation."""

    roles: Mapping[str, str]  # role -> text with {content} in it
    begin: str = ""
    answer_end: str = ""  # empty: the tokenizer's end of a document
    special: tuple[str, ...] = ()  # tokens that the tokenizer must have


# The last three as the models of these families were published with them; their trimming of contents is left out.
TEMPLATES: Mapping[str, ChatTemplate] = {
    "plain": ChatTemplate(
        {
            "system": "{content}\n\n",
            "user": "User:\n{content}\n\n",
            ASSISTANT: "Assistant:\n{content}\n\n",
        }
    ),
    "chatml": ChatTemplate(
        {
            "system": "<|im_start|>system\n{content}<|im_end|>\n",
            "user": "<|im_start|>user\n{content}<|im_end|>\n",
            ASSISTANT: "<|im_start|>assistant\n{content}\n",
        },
        answer_end="<|im_end|>",
        special=("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": ChatTemplate(
        {
            "system": "<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
            "user": "<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
            ASSISTANT: "<|start_header_id|>assistant<|end_header_id|>\n\n{content}",
        },
        begin="<|begin_of_text|>",
        answer_end="<|eot_id|>",
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": ChatTemplate(
        {
            "user": "<start_of_turn>user\n{content}<end_of_turn>\n",
            ASSISTANT: "<start_of_turn>model\n{content}\n",
        },
        begin="<bos>",
        answer_end="<end_of_turn>",
        special=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    ),
}


class Answered(NamedTuple):
    """One record."""

    tokens: npt.NDArray[np.int32]  # [n]
    is_answer: npt.NDArray[np.bool_]  # [n], False for the first
    answer_bytes: int  # of the texts of the answers, without what ends them


class AnswerFormat:
    """How the records of a run become token ids."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatConfig) -> None:
        """
        Raises:
            ConfigError: the tokenizer has no token that ends an answer or lacks those of the template, or a role's text has
                no place for the content.
        """
        if tokenizer.eod is None:
            raise ConfigError(
                f"data.tokenizer: {tokenizer.name} has no token that ends a document, expected one: it ends every answer, and "
                "without it the model would never learn to stop. Name one as eos_token in a tokenizer_config.json beside it"
            )
        template = TEMPLATES[chat.template]
        self._eod = tokenizer.eod
        self._marked = MarkedText(tokenizer)
        missing = [name for name in template.special if len(self._marked.encode(self._marked.split(name), is_first=False)) != 1]
        if missing:
            raise ConfigError(
                f"data.chat.template: {chat.template} needs the special token {missing[0]}, which {tokenizer.name} lacks; take "
                "the template plain, or one of the model's own with data.chat.roles"
            )
        self._begin = self._marked.split(template.begin if chat.begin is None else chat.begin)
        end = template.answer_end if chat.answer_end is None else chat.answer_end
        self._answer_end: Parts = self._marked.split(end) if end else [self._eod]
        self._roles = {role: self._around(role, text) for role, text in {**template.roles, **chat.roles}.items()}

    def pair(self, record: Mapping[str, Any], *, where: str) -> Answered:
        """A record with a `prompt` and a `completion`, both taken as they are.

        Raises:
            DataError: one of them is no text, or an empty one.
        """
        prompt = _text(record, "prompt", where, "")
        completion = _text(record, "completion", where, "")
        return self._tokenized([([prompt], False), ([completion], True)], len(completion.encode()), where)

    def conversation(self, record: Mapping[str, Any], *, where: str) -> Answered:
        """A record with `messages`, each with its `role` and `content`, of which those of the assistant are learned.

        Raises:
            DataError: they are not, a role is none of the template's, or the last message is not the assistant's.
        """
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: messages: got {shorten(messages)}, expected a list of objects with role and content")
        turns: list[tuple[Parts, bool]] = []
        prompt, answer_bytes = list(self._begin), 0
        for number, message in enumerate(messages):
            at = f"messages[{number}]"
            role = self._role(message, where, at)
            before, after = self._roles[role]
            content = _text(message, "content", where, f"{at}.")
            if role != ASSISTANT:
                prompt += [*before, content, *after]
                continue
            answer_bytes += len(content.encode())
            turns += [([*prompt, *before], False), ([content], True), (self._answer_end, True)]
            prompt = list(after)
        if role != ASSISTANT:
            raise DataError(
                f"{where}: messages: the last one is of role {role!r}, expected {ASSISTANT!r}: nothing is learned from what "
                "no answer follows"
            )
        return self._tokenized(turns, answer_bytes, where)

    def _around(self, role: str, text: str) -> tuple[Parts, Parts]:
        """What stands before and after the content of a message."""
        before, content, after = text.partition(_CONTENT)
        if not content or _CONTENT in after:
            raise ConfigError(f"data.chat.roles.{role}: got {shorten(text)}, expected a text with {_CONTENT} in it once")
        return self._marked.split(before), self._marked.split(after)

    def _role(self, message: Any, where: str, at: str) -> str:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise DataError(f"{where}: {at}: got {shorten(message)}, expected an object with role and content")
        if role not in self._roles:
            raise DataError(
                f"{where}: {at}.role: got {shorten(role)}, expected one of {', '.join(self._roles)}; another one needs its "
                "text in data.chat.roles"
            )
        return role

    def _tokenized(self, turns: Sequence[tuple[Parts, bool]], answer_bytes: int, where: str) -> Answered:
        tokens: list[int] = []
        is_answer: list[bool] = []
        is_first = True
        for parts, is_learned in turns:
            joined = _joined(parts)
            ids = self._marked.encode(joined, is_first=is_first and not is_learned)
            is_first = is_first and not any(isinstance(part, str) for part in joined)
            tokens += ids
            is_answer += [is_learned] * len(ids)
        if tokens[-1] != self._eod:
            tokens.append(self._eod)
            is_answer.append(True)
        if is_answer[0]:
            raise DataError(f"{where}: nothing comes before the answer, expected at least one token of a prompt")
        return Answered(np.array(tokens, np.int32), np.array(is_answer, np.bool_), answer_bytes)


def _joined(parts: Sequence[str | int]) -> Parts:
    """Neighbouring texts as one, without empty ones."""
    joined: Parts = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def _text(record: Mapping[str, Any], key: str, where: str, at: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        got = f"got {shorten(value)}" if key in record else f"missing, got the keys {shorten(sorted(record))}"
        raise DataError(f"{where}: {at}{key}: {got}, expected a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {at}{key}: half of a surrogate pair at character {error.start}; repair the text") from error
    return value
