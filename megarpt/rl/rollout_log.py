"""A sample of the rollouts of a run, to be read by people: `rollouts/step_<step>.jsonl` in the run folder.

A file holds the first prompts of one iteration, a line each, with completions and what they were worth. It is written whole or
not at all, so that a step that is done again replaces its file, and a run that goes back deletes the files beyond. Text shows
what is no text as an escape, `\\xNN` or `\\uNNNN`, and nothing else in it is changed, so that a page has to escape it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarpt.corpus.atomic import atomic_write_bytes, fsync_directory, write_errors
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import ConfigError, DataError
from megarpt.rl.structs import Completion, Prompt, Reward, RolloutGroup, StopReason

if TYPE_CHECKING:  # the page reads rollouts without loading torch
    from megarpt.rl.advantages import Advantages

logger = logging.getLogger(__name__)

FOLDER = "rollouts"
_ANSWER_BYTES = 256  # of each value that a verifier compares with
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedCompletion:
    """A completion and what it was worth."""

    sample: int  # its number in the group
    text: str
    left_out_bytes: int  # of the middle of the text, where it is too long
    num_tokens: int
    stop: str  # a value of `StopReason`
    policy_version: int
    reward: float | None
    parts: Mapping[str, float]
    advantage: float
    trains: bool

    @property
    def is_truncated(self) -> bool:
        return self.stop == StopReason.LENGTH.value


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedGroup:
    """A prompt with some of its completions."""

    step: int
    prompt_id: str
    prompt: str
    prompt_left_out_bytes: int
    num_prompt_tokens: int
    answer: Mapping[str, str]  # what the verifier knew
    rewards: tuple[float | None, ...]  # of all completions, shown or not
    completions: tuple[LoggedCompletion, ...]  # the best and the worst among them


class RolloutLog:
    """Writes the sample, on one rank; on the others every method returns at once."""

    def __init__(
        self,
        run_folder: Path,
        tokenizer: Tokenizer,
        *,
        interval_steps: int,
        num_prompts: int = 4,
        max_completions: int = 8,
        max_bytes: int = 1 << 14,
        is_writer: bool = True,
        resume_step: int | None = None,
    ) -> None:
        """Open the folder and delete what lies beyond the point of the resume.

        Args:
            run_folder: the sample lies in `rollouts` within it.
            tokenizer: of the prompts.
            interval_steps: optimizer steps between samples; 0 takes none.
            num_prompts: of each sample; bounds a file together with the next two.
            max_completions: of each prompt.
            max_bytes: of a text; of a longer one the beginning and the end are kept.
            is_writer: False on all ranks but one.
            resume_step: where the run continues; None for a fresh start, which deletes every sample.

        Raises:
            ConfigError: a bound is too small.
            DataError: the folder cannot be written.
        """
        for name, value, least in (
            ("interval_steps", interval_steps, 0),
            ("num_prompts", num_prompts, 1),
            ("max_completions", max_completions, 2),
            ("max_bytes", max_bytes, 2),
        ):
            if value < least:
                raise ConfigError(f"rollout log: {name} is {value}, expected at least {least}")
        self.folder = run_folder / FOLDER
        self._tokenizer, self._interval_steps = tokenizer, interval_steps
        self._num_prompts, self._max_completions, self._max_bytes = num_prompts, max_completions, max_bytes
        self._is_writer = is_writer
        self.rewind(-1 if resume_step is None else resume_step)

    def is_due(self, before: int, after: int) -> bool:
        """Whether the iteration that led from step `before` to step `after` is one to be sampled: the first one is, and one
        that reaches a multiple of the interval. Equal on all ranks."""
        if self._interval_steps == 0:
            return False
        return before == 0 or after // self._interval_steps > before // self._interval_steps

    def write(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        rewards: Sequence[Sequence[Reward]],
        advantages: Sequence[Advantages],
    ) -> None:
        """Write the sample of an iteration.

        Args:
            step: optimizer steps done when the iteration ended, as in its line of `metrics.jsonl`.
            groups: of this rank; the first ones are taken.
            rewards: for each group one for each completion.
            advantages: for each group, [g].

        Raises:
            DataError: the file cannot be written.
        """
        if not self._is_writer:
            return
        chosen = list(zip(groups, rewards, advantages, strict=True))[: self._num_prompts]
        lines = [json.dumps(_strict(asdict(self._logged(step, *each))), ensure_ascii=False, allow_nan=False) for each in chosen]
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self.folder / file_name(step), "".join(f"{line}\n" for line in lines).encode())

    def rewind(self, step: int) -> None:
        """Delete the samples beyond `step`: those iterations are done again.

        Raises:
            DataError: a file cannot be deleted.
        """
        if not self._is_writer:
            return
        beyond = [path for number, path in logged_steps(self.folder) if number > step]
        with write_errors(self.folder):
            for path in reversed(beyond):  # killed on the way, it leaves a sample without gaps
                path.unlink()
            if beyond:
                fsync_directory(self.folder)
                logger.info("deleted the rollouts of %d iterations beyond step %d", len(beyond), max(step, 0))

    def _logged(self, step: int, group: RolloutGroup, rewards: Sequence[Reward], advantages: Advantages) -> LoggedGroup:
        prompt = group.prompt
        text, left_out = _shortened(prompt_text(prompt, self._tokenizer), self._max_bytes)
        worth = list(zip(advantages.value.tolist(), advantages.trains.tolist(), strict=True))
        return LoggedGroup(
            step=step,
            prompt_id=prompt.id,
            prompt=text,
            prompt_left_out_bytes=left_out,
            num_prompt_tokens=len(prompt.tokens),
            answer={str(key): _shown_answer(value) for key, value in prompt.answer.items()},
            rewards=tuple(reward.value for reward in rewards),
            completions=tuple(
                self._logged_completion(number, group.completions[number], rewards[number], *worth[number])
                for number in _choice(rewards, self._max_completions)
            ),
        )

    def _logged_completion(
        self, sample: int, completion: Completion, reward: Reward, advantage: float, trains: bool
    ) -> LoggedCompletion:
        text, left_out = _shortened(completion.text, self._max_bytes)
        return LoggedCompletion(
            sample=sample,
            text=text,
            left_out_bytes=left_out,
            num_tokens=len(completion.tokens),
            stop=completion.stop.value,
            policy_version=completion.policy_version,
            reward=reward.value,
            parts=dict(reward.parts),
            advantage=advantage,
            trains=trains,
        )


def file_name(step: int) -> str:
    """Of the sample of an iteration."""
    return f"step_{step:08d}.jsonl"


def logged_steps(folder: Path) -> list[tuple[int, Path]]:
    """The samples in a folder `rollouts`, by step; none where there is no such folder."""
    found = [(path.stem.removeprefix("step_"), path) for path in folder.glob("step_*.jsonl")]
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def read_rollouts(path: Path) -> Iterator[LoggedGroup]:
    """The groups of one sample.

    Raises:
        DataError: the file cannot be read, or a line is none of `RolloutLog`.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        try:
            group = _parse(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: got {line[:80]!r}, expected a group of rollouts ({error!r}); delete the file to read "
                "the others"
            ) from error
        yield group


def shown_text(content: bytes) -> str:
    r"""Bytes as text that can be printed: what is no UTF-8 shows as `\xNN`, control characters but for the newline and the tab
    as `\xNN` or `\uNNNN`."""
    text = content.decode("utf-8", errors="backslashreplace")
    return "".join(letter if letter in "\n\t" or letter.isprintable() else _escaped(letter) for letter in text)


def prompt_text(prompt: Prompt, tokenizer: Tokenizer) -> bytes:
    """What a prompt says; special tokens by their name."""
    pieces = []
    for token in prompt.tokens:
        content = tokenizer.token_bytes(token)
        pieces.append(tokenizer.token_text(token).encode() if content is None else content)
    return b"".join(pieces)


def _parse(fields: dict[str, Any]) -> LoggedGroup:
    completions = tuple(
        LoggedCompletion(
            **each
            | {"reward": _number(each["reward"]), "advantage": _number(each["advantage"])}
            | {"parts": {name: _number(value) for name, value in each["parts"].items()}}
        )
        for each in fields.pop("completions")
    )
    rewards = tuple(map(_number, fields.pop("rewards")))
    group = LoggedGroup(**fields, rewards=rewards, completions=completions)
    whole = [group.step, group.prompt_left_out_bytes, group.num_prompt_tokens]
    whole += [n for each in completions for n in (each.sample, each.left_out_bytes, each.num_tokens, each.policy_version)]
    if not all(type(number) is int for number in whole):
        raise TypeError("a count is no whole number")
    return group


def _escaped(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _shortened(content: bytes, limit: int) -> tuple[str, int]:
    """The text of at most `limit` bytes, and how many were left out of its middle: the answer is at its end."""
    left_out = max(0, len(content) - limit)
    if not left_out:
        return shown_text(content), 0
    head, tail = content[: limit // 2], content[len(content) - (limit - limit // 2) :]
    return f"{shown_text(head)}\n[... {left_out:,} bytes left out ...]\n{shown_text(tail)}", left_out


def _shown_answer(value: Any) -> str:
    content = value if isinstance(value, bytes) else str(value).encode("utf-8", errors="backslashreplace")
    return shown_text(content) if len(content) <= _ANSWER_BYTES else f"{shown_text(content[:_ANSWER_BYTES])} ..."


def _choice(rewards: Sequence[Reward], limit: int) -> list[int]:
    """Numbers of the completions that are shown, rising: the best and the worst are among them."""
    if len(rewards) <= limit:
        return list(range(len(rewards)))
    known = [(reward.value, -number) for number, reward in enumerate(rewards) if reward.value is not None]
    ends = {-max(known)[1], -min(known)[1]} if known else set()
    others = [number for number in range(len(rewards)) if number not in ends]
    return sorted([*ends, *others[: limit - len(ends)]])


def _strict(value: Any) -> Any:
    """JSON has no NaN: it is written as text, as in `metrics.jsonl`."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return value


def _number(value: Any) -> float | None:
    """What `_strict` made of a number, or of None."""
    if isinstance(value, str):
        return _NON_FINITE[value]
    return None if value is None else float(value)
