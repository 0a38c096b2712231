r"""Files of prompts, and the order in which they come.

A file is JSON Lines. A record is one of two kinds, told apart by their keys:

Next-token records, with `continuation`, as tools/build_rpt_prompts.py writes them (`next_token_record`):

    {"id": "12-340", "document": 12, "position": 340, "context": [5, 81, ...], "continuation": "IHRoZSBxdWlj...",
     "boundaries": [4, 10, ...], "entropy": 1.83, "band": "hard", "tokenizer": "9f86d081884c"}

`context` are token ids, the last of them before the token that is to be predicted. `continuation` is what follows, its bytes in
base64, since a token may be a part of a character. `boundaries` are the cumulative lengths of its tokens in bytes. `tokenizer`
is the beginning of the tokenizer's sha256. `document`, `position`, `entropy`, `band` and `tokenizer` may be missing.

Question records, with `question`, `problem` or `Question`, as they are published:

    {"question": "...", "answer": "... #### 42"}                     GSM8K: what follows the last `####`
    {"body": "...", "question": "...", "answer": "9 (apples)"}       ASDiv: the unit is no part of the answer
    {"Body": "...", "Question": "...", "Answer": 145.0}              SVAMP: 145
    {"problem": "...", "solution": "... \boxed{42}"}                 the last box of it, where there is no `answer`
    {"question": "...", "choices": ["a", "b"], "answer": "B"}        or the number of the choice, from 0

Other keys are ignored. What a record becomes in `Prompt.answer` says `_question_answer`. An `id` is a text or a number; a
record without one is called by its line.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from megarpt.corpus.records import read_records, shorten
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import CheckpointError, ConfigError, DataError
from megarpt.rl.answers import LETTERS, last_box
from megarpt.rl.structs import Prompt
from megarpt.rl.templates import PromptTemplate

logger = logging.getLogger(__name__)

TOKENIZER_DIGITS = 12  # of its sha256, in every next-token record

_QUESTION_KEYS = ("question", "problem", "Question")
_BODY_KEYS = ("body", "Body")
_ANSWER_KEYS = ("answer", "Answer", "solution")
_UNIT = re.compile(r"([-+]?[\d.,:/]+)\s*\([^()]*\)")  # `9 (apples)`


def next_token_record(
    *,
    document: int,
    position: int,
    context: Sequence[int],
    continuation: bytes,
    boundaries: Sequence[int],
    entropy: float,
    band: str,
    tokenizer_sha256: str,
) -> dict[str, Any]:
    """A record of a prompt file, to be written as a line of JSON.

    Args:
        document: its number in the corpus.
        position: of the token to be predicted, in its document.
        context: ids of the tokens before it, as many as are kept.
        continuation: bytes from that token on.
        boundaries: the cumulative lengths of its tokens in bytes.
        entropy: of the proxy model at that position, in nats.
        band: how difficult that makes it.
        tokenizer_sha256: of the tokenizer that made the ids.
    """
    return {
        "id": f"{document}-{position}",
        "document": document,
        "position": position,
        "context": list(context),
        "continuation": base64.b64encode(continuation).decode("ascii"),
        "boundaries": list(boundaries),
        "entropy": entropy,
        "band": band,
        "tokenizer": tokenizer_sha256[:TOKENIZER_DIGITS],
    }


def load_prompts(path: str | Path, tokenizer: Tokenizer, *, template: str, max_prompt_tokens: int) -> list[Prompt]:
    """The prompts of a file, in its order.

    A context that is too long loses tokens on its left. A question that is too long is left out; how many were is logged.

    Args:
        path: of the file; see the module for what is in it.
        tokenizer: of the policy.
        template: the name of a built-in one, or a text with a placeholder (megarpt/rl/templates.py).
        max_prompt_tokens: of a whole prompt.

    Raises:
        ConfigError: the template is none, is made for the other kind of record, or leaves no room for a context.
        DataError: the file cannot be read, a record is wrong, two have the same id, or no prompt is left.
    """
    path = Path(path)
    form = PromptTemplate(template, tokenizer)
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    num_too_long = 0
    for number, record in read_records(path, what="prompts"):
        where = f"{path}:{number}"
        name = _id(record, number, where)
        if name in line_of:
            raise DataError(f"{where}: the id {name!r} is that of line {line_of[name]} too; expected ids that differ")
        line_of[name] = number
        make = _next_token_prompt if "continuation" in record else _question_prompt
        prompt = make(record, name, where, form, tokenizer, max_prompt_tokens)
        if prompt is None:
            num_too_long += 1
        else:
            prompts.append(prompt)
    if not prompts:
        why = f"all {num_too_long} questions need more than {max_prompt_tokens} tokens" if num_too_long else "it has no record"
        raise DataError(f"{path}: no prompt is left, since {why}; raise max_prompt_tokens, or use another file")
    if num_too_long:
        logger.info(
            "%s: left out %d of %d questions, which need more than %d tokens",
            path,
            num_too_long,
            len(line_of),
            max_prompt_tokens,
        )
    return prompts


class PromptStream:
    """Prompts without end, in another order each epoch.

    The order follows from seed, epoch and the prompts' ids. Within an epoch every prompt comes once. Where a call reaches into
    the next epoch, what it holds already is put off to the end of that epoch: no call holds a prompt twice that asks for no
    more than there are, since two groups of the same prompt would be drawn with the same seeds.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        """
        Raises:
            DataError: there are none.
        """
        if not prompts:
            raise DataError("prompts: got none, expected at least one")
        self.prompts = tuple(prompts)
        self.seed = seed
        self.fingerprint = fingerprint(prompts)
        self.epoch = 0
        self.position = 0  # in the epoch
        self.put_off: list[int] = []  # places of the prompts that come last in this epoch
        self._order = self._order_now()

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        taken: list[int] = []
        while len(taken) < n:
            if self.position == len(self.prompts):
                self.epoch, self.position, self.put_off = self.epoch + 1, 0, sorted(set(taken))
                self._order = self._order_now()
            part = self._order[self.position : self.position + n - len(taken)]
            taken += part
            self.position += len(part)
        return [self.prompts[place] for place in taken]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain values."""
        return {
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "epoch": self.epoch,
            "position": self.position,
            "put_off": list(self.put_off),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a stream of the same prompts stood.

        Raises:
            CheckpointError: it was of other prompts or another seed, or the state is damaged.
        """
        for name, own in (("fingerprint", self.fingerprint), ("seed", self.seed)):
            if state.get(name) != own:
                raise CheckpointError(
                    f"prompts: the checkpoint has {name} {shorten(state.get(name))}, expected {shorten(own)} as of the prompts "
                    "that were given; resume with the file, template, max_prompt_tokens and seed of the run, or start another"
                )
        epoch, position, put_off = state.get("epoch"), state.get("position"), state.get("put_off")
        count = len(self.prompts)
        if (
            not (type(epoch) is int and epoch >= 0 and type(position) is int and 0 <= position <= count)
            or not _are_ints(put_off)
            or len({each for each in put_off if 0 <= each < count}) < len(put_off)
        ):
            raise CheckpointError(
                f"prompts: the checkpoint has epoch {epoch!r}, position {position!r} and put_off {shorten(put_off)}, expected "
                f"0 or more, a position from 0 to {count}, and different places below that; it is damaged: resume from another"
            )
        self.epoch, self.position, self.put_off = epoch, position, list(put_off)
        self._order = self._order_now()

    def _order_now(self) -> list[int]:
        """Of the epoch: by a hash, so that it is the same with every version of every library."""
        last = set(self.put_off)
        keys = [
            (place in last, _digest(f"{self.seed}/{self.epoch}/{prompt.id}".encode()))
            for place, prompt in enumerate(self.prompts)
        ]
        return sorted(range(len(keys)), key=keys.__getitem__)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of all that prompts hold, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(_digest(repr((prompt.id, prompt.tokens, sorted(prompt.answer.items()))).encode("utf-8", "surrogatepass")))
    return digest.hexdigest()


def _id(record: Mapping[str, Any], number: int, where: str) -> str:
    name = record.get("id", record.get("ID", f"line-{number}"))
    if type(name) not in (str, int) or name == "":
        raise DataError(f"{where}: id: got {shorten(name)}, expected a text or a number")
    return str(name)


def _next_token_prompt(
    record: Mapping[str, Any], name: str, where: str, form: PromptTemplate, tokenizer: Tokenizer, max_prompt_tokens: int
) -> Prompt:
    _check_template(form, "context", where)
    made_by = record.get("tokenizer", tokenizer.sha256[:TOKENIZER_DIGITS])
    if made_by != tokenizer.sha256[:TOKENIZER_DIGITS]:
        raise DataError(
            f"{where}: made with tokenizer {shorten(made_by)}, expected the policy's, {tokenizer.sha256[:TOKENIZER_DIGITS]} "
            f"({tokenizer.name}); mine the prompts with it (tools/build_rpt_prompts.py)"
        )
    context = record.get("context")
    if not _are_ints(context) or not all(0 <= each < tokenizer.vocab_size for each in context):
        raise DataError(f"{where}: context: got {shorten(context)}, expected ids from 0 to {tokenizer.vocab_size - 1}")
    room = max_prompt_tokens - form.num_tokens
    if room < 1:
        raise ConfigError(
            f"max_prompt_tokens: got {max_prompt_tokens}, expected more than {form.num_tokens}, the tokens of the template "
            "alone; raise it, or take a shorter template"
        )
    answer = {"continuation": _continuation(record, where), "boundaries": _boundaries(record, where)}
    if answer["boundaries"][-1] > len(answer["continuation"]):
        raise DataError(
            f"{where}: boundaries: got {answer['boundaries'][-1]} as the last, expected at most the "
            f"{len(answer['continuation'])} bytes of the continuation"
        )
    known = {key: record[key] for key in ("document", "position", "entropy", "band") if key in record}
    return Prompt(id=name, tokens=form.around_context(context[-room:]), answer=answer | known)


def _continuation(record: Mapping[str, Any], where: str) -> bytes:
    try:
        return base64.b64decode(record["continuation"], validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise DataError(f"{where}: continuation: got {shorten(record['continuation'])}, expected bytes in base64") from error


def _boundaries(record: Mapping[str, Any], where: str) -> tuple[int, ...]:
    ends = record.get("boundaries")
    if not _are_ints(ends) or not ends or not all(a < b for a, b in pairwise((0, *ends))):
        raise DataError(f"{where}: boundaries: got {shorten(ends)}, expected rising lengths in bytes, from 1")
    return tuple(ends)


def _question_prompt(
    record: Mapping[str, Any], name: str, where: str, form: PromptTemplate, tokenizer: Tokenizer, max_prompt_tokens: int
) -> Prompt | None:
    """None where it is too long."""
    _check_template(form, "question", where)
    question = _first(record, _QUESTION_KEYS, where)
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: question: got {shorten(question)}, expected a text")
    body = next((record[key] for key in _BODY_KEYS if key in record), None)
    if body is not None:
        body = str(body).rstrip()
        question = f"{body}{'' if body.endswith(('.', '!', '?')) else '.'} {question}"
    choices = record.get("choices")
    if choices is not None:
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise DataError(f"{where}: choices: got {shorten(choices)}, expected a list of 2 to {len(LETTERS)} texts")
        question += "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    try:
        tokens = form.around_question(question)
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: question: half of a surrogate pair at character {error.start}; repair the text") from error
    answer = _question_answer(_first(record, _ANSWER_KEYS, where), choices, where)
    answer |= {key: record[key] for key in ("band", "source") if key in record}
    return Prompt(id=name, tokens=tokens, answer=answer) if len(tokens) <= max_prompt_tokens else None


def _question_answer(given: Any, choices: Sequence[Any] | None, where: str) -> dict[str, Any]:
    """What verifiers have to know: `choice` of a question with choices (MultipleChoice), else `solution` (Math) and `text`
    (Exact), which are the same."""
    if choices is not None:
        letters = LETTERS[: len(choices)]
        letter = letters[given] if type(given) is int and 0 <= given < len(letters) else given
        if not isinstance(letter, str) or len(letter) != 1 or letter not in letters:
            raise DataError(
                f"{where}: answer: got {shorten(given)}, expected a letter from A to {letters[-1]}, or the number of a choice"
            )
        return {"choice": letter}
    if type(given) is float and given.is_integer():
        given = int(given)
    if type(given) not in (str, int, float) or not str(given).strip():
        raise DataError(f"{where}: answer: got {shorten(given)}, expected a text or a number")
    text = str(given)
    box = last_box(text.encode("utf-8", "surrogatepass"))
    if box is not None:
        text = box.decode("utf-8", "surrogatepass")
    elif "####" in text:
        text = text.rpartition("####")[2]
    text = text.strip()
    with_unit = _UNIT.fullmatch(text)
    text = with_unit[1] if with_unit else text
    if not text:
        raise DataError(f"{where}: answer: got {shorten(given)}, expected something after #### or in the box")
    return {"solution": text, "text": text}


def _first(record: Mapping[str, Any], keys: Sequence[str], where: str) -> Any:
    for key in keys:
        if key in record:
            return record[key]
    raise DataError(
        f"{where}: got the keys {shorten(sorted(record))}, expected `continuation` of a next-token record, or one of "
        f"{', '.join(keys)}"
    )


def _check_template(form: PromptTemplate, placeholder: str, where: str) -> None:
    if not form.takes(placeholder):
        raise ConfigError(
            f"template: got one with {{{form.placeholder}}}, expected one with {{{placeholder}}}, which is what {where} is; "
            "choose another template"
        )


def _are_ints(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
