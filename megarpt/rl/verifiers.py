"""Rewards that can be checked: what a completion is worth, by its text alone.

A verifier is pure: the same completions get the same rewards on every rank. It reads what follows the last close of the
thinking, and there the last box. A completion that was cut off gets nothing, since its answer may not be its last word. One
that cannot be judged, because the judge took too long, died or failed, has no value: that is not the same as a wrong one.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from megarpt.errors import ConfigError, DataError
from megarpt.rl.answers import LETTERS, THINK_CLOSE, after_thinking, choice_in_box, last_box, stated_choice
from megarpt.rl.judging import GIB, Failed, Judges, NotJudged, TimedOut
from megarpt.rl.structs import Completion, Prompt, Reward, RolloutGroup, StopReason

logger = logging.getLogger(__name__)


class Verifier(Protocol):
    """Says what completions are worth."""

    @property
    def name(self) -> str:
        """Of its value among the parts of a sum, and in the log."""
        ...

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[Reward]]:
        """One reward for every completion, in their order."""
        ...


@runtime_checkable
class Closeable(Protocol):
    """A verifier that keeps something open."""

    def close(self) -> None:
        """Let go of it."""
        ...


class _OneByOne:
    """Judges every completion by itself. `require_thinking`: without a close of the thinking there is no answer."""

    def __init__(self, name: str, *, think_close: bytes, require_thinking: bool) -> None:
        if not name:
            raise ConfigError("verifier: the name is empty; give it one, by which its value is logged")
        if not think_close:
            raise ConfigError(
                f"verifier {name}: think_close is empty, expected the bytes that end the thinking, such as {THINK_CLOSE!r}; "
                "for a policy that does not think set require_thinking to false"
            )
        self.name = name
        self.think_close = think_close
        self.require_thinking = require_thinking

    def answer_part(self, completion: Completion) -> bytes | None:
        """Where the answer has to be; None where there can be none."""
        if completion.stop is StopReason.LENGTH:
            return None
        after = after_thinking(completion.text, self.think_close)
        return completion.text if after is None and not self.require_thinking else after


class NextToken(_OneByOne):
    r"""Whether the box predicts how the document goes on, byte by byte.

    1 if the content of the box equals the beginning of the true continuation and ends where one of its tokens does, else 0.
    Blanks count. So a prediction may have several tokens, however they are split, but no part of one.

    The prompt's answer holds `continuation`, bytes, and `boundaries`, the cumulative lengths of its tokens in bytes. Keep more
    of the continuation than a policy may predict: what goes past it is wrong.

    Parts, 0 or 1 but for the second:
        format: there is a box, not empty, after the thinking, of a completion that was not cut off
        matched_tokens: tokens that were predicted, 0 of a wrong prediction
        near_space: wrong, and right but for blanks at its ends
        near_escape: wrong, and right if backslash escapes are read the other way than `unescape` says, blanks aside
        past_end: wrong, and begins with all of the continuation that was kept

    Source: RPT (arXiv 2506.08007), equation 3; `first_token_only` is a variant of its appendix A. How the paper reads escapes,
    it does not say.
    """

    def __init__(
        self,
        *,
        name: str = "next_token",
        think_close: bytes = THINK_CLOSE,
        require_thinking: bool = True,
        unescape: bool = False,
        first_token_only: bool = False,
    ) -> None:
        """
        Args:
            name: of its value in the log.
            think_close: ends the thinking.
            require_thinking: without that there is no answer.
            unescape: read escapes as LaTeX does; see `last_box`.
            first_token_only: exactly the first token is right, nothing longer.

        Raises:
            ConfigError: the name or `think_close` is empty.
        """
        super().__init__(name, think_close=think_close, require_thinking=require_thinking)
        self.unescape = unescape
        self.first_token_only = first_token_only

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[Reward]]:
        """
        Raises:
            DataError: an answer lacks a key, or its boundaries do not belong to its continuation.
        """
        rewards = []
        for prompt, completions in groups:
            continuation, boundaries = self._answer(prompt)
            rewards.append([self._judge(each, continuation, boundaries) for each in completions])
        return rewards

    def _answer(self, prompt: Prompt) -> tuple[bytes, tuple[int, ...]]:
        continuation: bytes = _wanted(self, prompt, "continuation", bytes)
        boundaries = tuple(_wanted(self, prompt, "boundaries", (tuple, list)))
        rise = boundaries and all(type(end) is int for end in boundaries) and all(a < b for a, b in pairwise((0, *boundaries)))
        if not rise or boundaries[-1] > len(continuation):
            raise DataError(
                f"prompt {prompt.id}: answer['boundaries'] is {_short(boundaries)}, expected rising lengths from 1 to at most "
                f"the {len(continuation):,} bytes of answer['continuation']: the end of each token, in bytes"
            )
        return continuation, boundaries[:1] if self.first_token_only else boundaries

    def _judge(self, completion: Completion, continuation: bytes, boundaries: tuple[int, ...]) -> Reward:
        parts = dict.fromkeys(("format", "matched_tokens", "near_space", "near_escape", "past_end"), 0.0)
        text = self.answer_part(completion)
        if text is None:
            return Reward(0.0, parts)
        said = last_box(text, unescape=self.unescape)
        parts["format"] = float(bool(said))
        if matched := _matched(said, continuation, boundaries):
            parts["matched_tokens"] = float(matched)
            return Reward(1.0, parts)
        trimmed = {continuation[:end].strip() for end in boundaries} - {b""}
        if said is not None:
            parts["near_space"] = float(said.strip() in trimmed)
            parts["past_end"] = float(len(said) > len(continuation) and said.startswith(continuation))
        if b"\\" in text and not parts["near_space"]:
            other = last_box(text, unescape=not self.unescape)
            is_near = other is not None and (_matched(other, continuation, boundaries) > 0 or other.strip() in trimmed)
            parts["near_escape"] = float(is_near)
        return Reward(0.0, parts)


class Math(_OneByOne):
    r"""Whether the answer equals a solution, as mathematics: `\frac12` is `0.5`.

    The prompt's answer holds `solution`, text, in a box, between dollars or bare. The answer is the last box after the
    thinking; without a box, what the text after the thinking ends with.

    math-verify judges in processes of their own, which are killed when they pass a limit. Such an answer has no value, neither
    has one on which math-verify fails, nor one whose solution cannot be read. Close the verifier after use, or use it as a
    context manager.

    Parts, each 0 or 1:
        format: there is a box, not empty, after the thinking, of a completion that was not cut off
        no_answer: wrong, since nothing that was said reads as mathematics, or the box is too large
        timed_out: not judged, for want of time
        crashed: not judged, since the process died
        failed: not judged, since math-verify raised an error or took too much memory
        no_solution: not judged, since the solution cannot be read
    """

    def __init__(
        self,
        *,
        name: str = "math",
        think_close: bytes = THINK_CLOSE,
        require_thinking: bool = True,
        require_box: bool = False,
        workers: int = 2,
        limit_s: float = 5.0,
        memory_bytes: int = 2 * GIB,
        max_answer_bytes: int = 1 << 14,
    ) -> None:
        """
        Args:
            name: of its value in the log.
            think_close: ends the thinking.
            require_thinking: without that there is no answer.
            require_box: without a box there is no answer either.
            workers: processes at most.
            limit_s: seconds for one answer.
            memory_bytes: of one process, see `Judges`.
            max_answer_bytes: a box that holds more is wrong; of a text without a box its last so many bytes are looked at.

        Raises:
            ConfigError: math-verify is not installed, or a value is out of range.
        """
        super().__init__(name, think_close=think_close, require_thinking=require_thinking)
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(f"verifier {name}: needs math-verify, which is not installed: pip install 'megarpt[rl]'")
        if max_answer_bytes < 1:
            raise ConfigError(f"verifier {name}: max_answer_bytes is {max_answer_bytes}, expected at least 1")
        self.require_box = require_box
        self.max_answer_bytes = max_answer_bytes
        self.judges = Judges(
            "megarpt.rl.math_judge:judge_math",
            workers=workers,
            limit_s=limit_s,
            memory_bytes=memory_bytes,
            max_item_bytes=(1 << 20) + 4 * max_answer_bytes,
        )
        self._unread: set[str] = set()  # ids of prompts whose solution cannot be read

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        self.judges.close()

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[Reward]]:
        """
        Raises:
            DataError: an answer lacks its solution, or that is empty or absurdly long.
            ExtensionError: the processes do not start.
        """
        asked: list[tuple[str, str]] = []
        found: list[list[tuple[bool, int | None]]] = []  # whether there is a box, and the number of the question
        for prompt, completions in groups:
            solution = self._solution(prompt)
            row: list[tuple[bool, int | None]] = []
            for completion in completions:
                has_box, answer = self._said(completion)
                row.append((has_box, None if answer is None else len(asked)))
                if answer is not None:
                    asked.append((solution, answer))
            found.append(row)
        unique = list(dict.fromkeys(asked))
        verdicts = dict(zip(unique, self.judges.judge(unique), strict=True))
        return [
            [self._reward(prompt, has_box, None if number is None else verdicts[asked[number]]) for has_box, number in row]
            for (prompt, _), row in zip(groups, found, strict=True)
        ]

    def _solution(self, prompt: Prompt) -> str:
        solution: str = _wanted(self, prompt, "solution", str)
        if not solution.strip() or len(solution) > 1 << 16:
            raise DataError(
                f"prompt {prompt.id}: answer['solution'] has {len(solution):,} characters, expected 1 to {1 << 16:,} that are "
                "not all blank"
            )
        box = last_box(solution.encode("utf-8", "replace"))
        if box is not None:
            solution = box.decode("utf-8", "replace")
        return solution if any(mark in solution for mark in ("$", "\\(", "\\[")) else f"\\boxed{{{solution}}}"

    def _said(self, completion: Completion) -> tuple[bool, str | None]:
        """Whether there is a box, and what to judge."""
        text = self.answer_part(completion)
        if text is None:
            return False, None
        box = last_box(text)
        if box is None:
            text = text[-self.max_answer_bytes :]
            return False, None if self.require_box or not text.strip() else text.decode("utf-8", "replace")
        if not box.strip() or len(box) > self.max_answer_bytes:
            return bool(box), None
        return True, f"\\boxed{{{box.decode('utf-8', 'replace')}}}"

    def _reward(self, prompt: Prompt, has_box: bool, verdict: str | NotJudged | None) -> Reward:
        parts = dict.fromkeys(("format", "no_answer", "timed_out", "crashed", "failed", "no_solution"), 0.0)
        parts["format"] = float(has_box)
        if isinstance(verdict, NotJudged):
            kind = {TimedOut: "timed_out", Failed: "failed"}.get(type(verdict), "crashed")
            parts[kind] = 1.0
            return Reward(None, parts)
        if verdict == "no solution":
            parts["no_solution"] = 1.0
            if prompt.id not in self._unread:
                self._unread.add(prompt.id)
                logger.warning(
                    "verifier %s: prompt %s: math-verify cannot read answer['solution'] %s: its completions are not judged; "
                    "give the solution as LaTeX or a number, or leave the prompt out",
                    self.name,
                    prompt.id,
                    _short(prompt.answer["solution"]),
                )
            return Reward(None, parts)
        parts["no_answer"] = float(verdict in (None, "no answer"))
        return Reward(float(verdict == "right"), parts)


class MultipleChoice(_OneByOne):
    r"""Whether the right letter, A to J, was chosen.

    The last box after the thinking says which, as in `C`, `(C)`, `\text{C}` or `C. 42`; without a box the last statement such
    as `the answer is (C)`. Two different letters are wrong.

    The prompt's answer holds `choice`, a letter.

    Parts, 0 or 1:
        format: one letter was chosen, of a completion that was not cut off
    """

    def __init__(
        self,
        *,
        name: str = "multiple_choice",
        think_close: bytes = THINK_CLOSE,
        require_thinking: bool = True,
        require_box: bool = False,
    ) -> None:
        """
        Args:
            name: of its value in the log.
            think_close: ends the thinking.
            require_thinking: without that there is no answer.
            require_box: without a box there is no answer either.

        Raises:
            ConfigError: the name or `think_close` is empty.
        """
        super().__init__(name, think_close=think_close, require_thinking=require_thinking)
        self.require_box = require_box

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[Reward]]:
        """
        Raises:
            DataError: an answer lacks its choice, or that is no letter A to J.
        """
        rewards = []
        for prompt, completions in groups:
            right = _wanted(self, prompt, "choice", str)
            if len(right) != 1 or right not in LETTERS:
                raise DataError(f"prompt {prompt.id}: answer['choice'] is {_short(right)}, expected one letter of {LETTERS}")
            chosen = [self._chosen(each) for each in completions]
            rewards.append([Reward(float(each == right), {"format": float(each is not None)}) for each in chosen])
        return rewards

    def _chosen(self, completion: Completion) -> str | None:
        text = self.answer_part(completion)
        if text is None:
            return None
        box = last_box(text)
        if box is not None:
            return choice_in_box(box)
        return None if self.require_box else stated_choice(text)


class Exact(_OneByOne):
    """Whether the last box after the thinking holds a given text.

    The prompt's answer holds `text`, a string or bytes; a string is compared as UTF-8.

    Parts, 0 or 1:
        format: there is a box, not empty, after the thinking, of a completion that was not cut off
    """

    def __init__(
        self,
        *,
        name: str = "exact",
        think_close: bytes = THINK_CLOSE,
        require_thinking: bool = True,
        unescape: bool = False,
        any_blanks: bool = True,
    ) -> None:
        """
        Args:
            name: of its value in the log.
            think_close: ends the thinking.
            require_thinking: without that there is no answer.
            unescape: read escapes as LaTeX does; see `last_box`.
            any_blanks: runs of ASCII blanks are one, and those at the ends none.

        Raises:
            ConfigError: the name or `think_close` is empty.
        """
        super().__init__(name, think_close=think_close, require_thinking=require_thinking)
        self.unescape = unescape
        self.any_blanks = any_blanks

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[Reward]]:
        """
        Raises:
            DataError: an answer lacks its text, or that is empty.
        """
        rewards = []
        for prompt, completions in groups:
            text = _wanted(self, prompt, "text", (str, bytes))
            right = self._normal(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
            if not right:
                raise DataError(f"prompt {prompt.id}: answer['text'] is {_short(text)}, expected a text that is not blank")
            rewards.append([self._judge(each, right) for each in completions])
        return rewards

    def _judge(self, completion: Completion, right: bytes) -> Reward:
        text = self.answer_part(completion)
        box = None if text is None else last_box(text, unescape=self.unescape)
        return Reward(float(box is not None and self._normal(box) == right), {"format": float(bool(box))})

    def _normal(self, text: bytes) -> bytes:
        return b" ".join(text.split()) if self.any_blanks else text


class Format:
    """Whether the whole completion, thinking included, matches a regular expression.

    Matching may take exponential time, so it ends at a limit and gives no value then. A completion that was cut off is matched
    like any other. Bytes that are not UTF-8 count as characters that only a class of everything, such as `.`, matches.

    Parts, 0 or 1:
        timed_out: not judged, for want of time
        too_large: not judged, since the text is larger than any that was expected
    """

    def __init__(self, pattern: str, *, name: str = "format", limit_s: float = 1.0, max_bytes: int = 1 << 22) -> None:
        """
        Args:
            pattern: of the library `regex`, which knows those of `re`; begin it with `(?s)` for a `.` that matches line ends.
            name: of its value in the log.
            limit_s: seconds for one completion.
            max_bytes: a larger completion is not matched: what matching remembers grows with the text, up to a
                hundred times of it.

        Raises:
            ConfigError: `regex` is not installed, the pattern is none, or a value is out of range.
        """
        if not name:
            raise ConfigError("verifier: the name is empty; give it one, by which its value is logged")
        if not (math.isfinite(limit_s) and limit_s > 0):
            raise ConfigError(f"verifier {name}: limit_s is {limit_s}, expected a finite number of seconds above 0")
        if max_bytes < 1:
            raise ConfigError(f"verifier {name}: max_bytes is {max_bytes}, expected at least 1")
        if importlib.util.find_spec("regex") is None:
            raise ConfigError(f"verifier {name}: needs the library regex, which is not installed: pip install 'megarpt[rl]'")
        import regex

        try:
            self._match: Callable[..., Any] = regex.compile(pattern).fullmatch
        except regex.error as error:
            raise ConfigError(f"verifier {name}: {_short(pattern)} is no regular expression: {error}") from error
        self.name = name
        self.limit_s = limit_s
        self.max_bytes = max_bytes
        self._was_late = False

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[Reward]]:
        return [[self._judge(prompt, each) for each in completions] for prompt, completions in groups]

    def _judge(self, prompt: Prompt, completion: Completion) -> Reward:
        if len(completion.text) > self.max_bytes:
            return Reward(None, {"timed_out": 0.0, "too_large": 1.0})
        text = completion.text.decode("utf-8", "surrogateescape")
        try:
            matches = self._match(text, timeout=self.limit_s, concurrent=True) is not None
        except TimeoutError:
            if not self._was_late:
                self._was_late = True
                logger.warning(
                    "verifier %s: a completion of prompt %s took longer than %g s and has no value; the pattern may backtrack "
                    "without end, possessive quantifiers prevent that; this is said once, and counted after",
                    self.name,
                    prompt.id,
                    self.limit_s,
                )
            return Reward(None, {"timed_out": 1.0, "too_large": 0.0})
        return Reward(float(matches), {"timed_out": 0.0, "too_large": 0.0})


class WeightedSum:
    """What several verifiers say, each times its weight.

    Where one whose weight is not zero has no value, the sum has none. One of weight zero is only logged. Parts hold the value
    of each verifier under its name, left out where there is none, and its parts as `name/part`. Closing it closes its
    verifiers.
    """

    def __init__(self, weighted: Sequence[tuple[Verifier, float]], *, name: str = "sum") -> None:
        """
        Args:
            weighted: verifiers, of different names, with their weights.
            name: of its value in the log.

        Raises:
            ConfigError: there is none, two have the same name, or a weight is not finite; or all weights are zero.
        """
        names = [verifier.name for verifier, _ in weighted]
        if not names or not all(names) or len(set(names)) < len(names):
            raise ConfigError(
                f"verifier {name}: the names of its verifiers are {names}, expected one or more different ones; give name= to "
                "those of a kind"
            )
        weights = [weight for _, weight in weighted]
        if not all(map(math.isfinite, weights)) or not any(weights):
            raise ConfigError(f"verifier {name}: the weights are {weights}, expected finite numbers, not all of them zero")
        self.name = name
        self.weighted = tuple(weighted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the verifiers that can be."""
        with ExitStack() as stack:
            for verifier, _ in self.weighted:
                if isinstance(verifier, Closeable):
                    stack.callback(verifier.close)

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[Reward]]:
        """
        Raises:
            ConfigError: a verifier did not give one reward for each completion.
            DataError: as the verifiers do.
        """
        said = [verifier(groups) for verifier, _ in self.weighted]
        sizes = [len(completions) for _, completions in groups]
        for (verifier, _), rewards in zip(self.weighted, said, strict=True):
            if [len(row) for row in rewards] != sizes:
                raise ConfigError(
                    f"verifier {self.name}: {verifier.name} gave rewards for {sum(map(len, rewards))} completions in "
                    f"{len(rewards)} groups, expected one for each of {sum(sizes)} in {len(sizes)}: a verifier leaves none out"
                )
        return [[self._sum([rewards[g][c] for rewards in said]) for c in range(size)] for g, size in enumerate(sizes)]

    def _sum(self, rewards: Sequence[Reward]) -> Reward:
        total: float | None = 0.0
        parts: dict[str, float] = {}
        for (verifier, weight), reward in zip(self.weighted, rewards, strict=True):
            parts.update({f"{verifier.name}/{part}": value for part, value in reward.parts.items()})
            if reward.value is not None:
                parts[verifier.name] = reward.value
            if weight != 0:
                total = None if total is None or reward.value is None else total + weight * reward.value
        return Reward(total, parts)


def _matched(said: bytes | None, continuation: bytes, boundaries: Sequence[int]) -> int:
    """How many tokens are predicted, 0 if not rightly."""
    if not said or len(said) not in boundaries or not continuation.startswith(said):
        return 0
    return boundaries.index(len(said)) + 1


def _wanted(verifier: Verifier, prompt: Prompt, key: str, kind: type | tuple[type, ...]) -> Any:
    """What the verifier has to know of the answer."""
    value = prompt.answer.get(key)
    if not isinstance(value, kind):
        kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        got = f"{type(value).__name__} {_short(value)}" if key in prompt.answer else f"the keys {sorted(prompt.answer)}"
        raise DataError(
            f"prompt {prompt.id}: the verifier {verifier.name} needs answer[{key!r}] as {kinds}, got {got}; add it to the "
            "prompts, or choose the verifier their answers are for"
        )
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
