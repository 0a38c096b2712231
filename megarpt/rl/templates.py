r"""What is put around a context or a question to make a prompt.

A template is a text with one placeholder: `{context}` for the beginning of a document, `{question}` for a question, or
`{prompt}` for either. Every other brace means itself. A context goes in as the token ids it has, since ids that are made again
from its text may differ at its ends; a question is text, and is tokenized together with what stands around it.

Special tokens are written by their names: `<|im_start|>user\n{question}<|im_end|>\n`. Of a Hugging Face `tokenizer.json` these
are its added tokens, of a sentencepiece model its control and user-defined symbols (`<s>`, `</s>`), of `bytes` `<|eod|>`. They
are looked for in the template alone, but the libraries also read added tokens and user-defined symbols in any text that they
are given, questions included. No special token is added unasked, at the beginning neither.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from megarpt.corpus.markers import MarkedText
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import ConfigError

PLACEHOLDERS = ("context", "question", "prompt")

_PLACEHOLDER = re.compile(r"\{(" + "|".join(PLACEHOLDERS) + r")\}")

# The first seven vary what RPT's appendix D varies (whether a passage is to be continued or a prediction to be made, of one
# token or of words, whether the thought is opened for the policy, how the answer is to be given), in words of our own.
TEMPLATES = {
    "v0": (
        "Continue the passage under the heading Context. First think about how it goes on, between <think> and </think>. Then "
        "give the next token alone in \\boxed{}. Keep a blank that the token begins with, and use no macros for text.\n\n"
        "### Context\n{context}"
    ),
    "v1": (
        "Below is the beginning of a passage. Work out which token comes next. Think between <think> and </think>: what has "
        "been said, what the author is about to say, which spellings are possible. Then write the token, with its leading "
        "blank if it has one, as \\boxed{token}.\n\n### Context\n{context}\n\n### Next token\n<think>\n"
    ),
    "v2": (
        "Complete the passage under the heading Context. Think aloud between <think> and </think>, then write only the word or "
        "the words that follow it directly in \\boxed{}, beginning with a blank where the passage goes on with one.\n\n"
        "### Context\n{context}"
    ),
    "v3": (
        "Complete this passage. Reason about what its author writes next, and put the words that follow directly, with the "
        "blank before them if there is one, in \\boxed{} once the thought is closed with </think>.\n\n"
        "### Passage\n{context}\n\n### Thought\n<think>\n"
    ),
    "v4": (
        "You predict text. For the context below, consider several tokens that may come next, weigh them against each other "
        "between <think> and </think>, and settle on one. The last line of your answer is that token in \\boxed{}, exactly as "
        "it would be written in the text, blanks included.\n\n### Context\n{context}\n\n### Prediction\n"
    ),
    "v5": (
        "What comes directly after this text? Think step by step between <think> and </think>. Answer with the next token in "
        "\\boxed{}, a leading blank included.\n\n{context}"
    ),
    "v6": (
        "A text was cut off; recover how it went on. List what the context fixes (the topic, the grammar, the quantities, the "
        "layout), draw the conclusion, close the thought with </think>, and give the next words, at least one token, in "
        "\\boxed{}. Start inside the box with the blank or line end that comes first, if any.\n\n"
        "### Context\n{context}\n\n### Reasoning\n<think>\n"
    ),
    "minimal": "{context}<think>",  # for small models, which learn the format by examples instead of reading about it
    "plain": "{prompt}",  # nothing around it: what plain next-token prediction is asked
    "question": (
        "{question}\n\nThink step by step between <think> and </think>. Then give the final answer alone in \\boxed{}.\n"
    ),
    "question_think": (
        "{question}\n\nThink step by step. Close the thought with </think>, then give the final answer alone in \\boxed{}.\n"
        "<think>\n"
    ),
    "choice": (
        "{question}\n\nExactly one of the choices is right. Think step by step between <think> and </think>. Then give its "
        "letter alone in \\boxed{}.\n"
    ),
    "question_minimal": "{question}\n<think>",
}


def find_template(value: str, *, where: str = "template") -> str:
    """The text of a template.

    Args:
        value: the name of a built-in one, or a text with a placeholder.
        where: the name of the option, for messages.

    Raises:
        ConfigError: it has no placeholder and is no name, or it has several.
    """
    found = [match[0] for match in _PLACEHOLDER.finditer(value)]
    if len(found) == 1:
        return value
    if found:
        raise ConfigError(f"{where}: got {len(found)} placeholders ({', '.join(found)}), expected exactly one: {_known()}")
    if value in TEMPLATES:
        return TEMPLATES[value]
    near = difflib.get_close_matches(value, TEMPLATES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{where}: got {value if len(value) <= 80 else value[:77] + '...'!r}, expected one of {', '.join(TEMPLATES)}, or a "
        f"text with one of {_known()}{hint}"
    )


class PromptTemplate:
    """A template, tokenized once."""

    def __init__(self, template: str, tokenizer: Tokenizer, *, where: str = "template") -> None:
        """
        Args:
            template: the name of a built-in one, or a text with a placeholder.
            tokenizer: of the policy.
            where: the name of the option, for messages.

        Raises:
            ConfigError: it is none.
        """
        self.text = find_template(template, where=where)
        match = _PLACEHOLDER.search(self.text)
        assert match is not None
        self.placeholder = match[1]
        self._marked = MarkedText(tokenizer)
        self._before = self._marked.split(self.text[: match.start()])
        self._after = self._marked.split(self.text[match.end() :])
        self._ids_before = self._marked.encode(self._before, is_first=True)
        self._ids_after = self._marked.encode(self._after, is_first=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of the template alone, around a context."""
        return len(self._ids_before) + len(self._ids_after)

    def takes(self, placeholder: str) -> bool:
        """Whether it is made for a `context` or a `question`."""
        return self.placeholder in (placeholder, "prompt")

    def around_context(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The prompt of a context: its ids as they are."""
        return (*self._ids_before, *ids, *self._ids_after)

    def around_question(self, question: str) -> tuple[int, ...]:
        """The prompt of a question, tokenized together with the text around it up to the next special token."""
        *parts, head = self._before
        tail, *rest = self._after
        assert isinstance(head, str) and isinstance(tail, str)
        return tuple(self._marked.encode([*parts, head + question + tail, *rest], is_first=True))


def _known() -> str:
    return ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
