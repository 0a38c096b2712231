"""How good a policy is on given prompts, whatever layout it runs under.

Prompts are divided over the data-parallel ranks. What is drawn for a prompt does not depend on where that happens, so the
numbers are those of one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import ConfigError, DataError, ShapeError
from megarpt.parallel.layout import ProcessGroups
from megarpt.rl.advantages import EQUAL_WITHIN
from megarpt.rl.mining import BANDS
from megarpt.rl.pass_at_k import FloatArray, pass_at_k
from megarpt.rl.rollout import RolloutEngine, Sampling
from megarpt.rl.structs import Completion, Prompt, Reward, RolloutGroup, StopReason
from megarpt.rl.verifiers import Format, NextToken, Verifier, WeightedSum
from megarpt.train.failures import together
from megarpt.train.sharded import gathered

PLAIN = Sampling(max_new_tokens=1, temperature=0.0)
"""How plain next-token prediction is drawn: the likeliest token."""

_COMPLETIONS_PER_CALL = 256  # of the engine, on every rank: enough to keep it busy, and memory bounded


class PlainNextToken(NextToken):
    """Whether a policy that goes on with the document, without a thought or a box, predicts it.

    The rule is `NextToken`'s, of the whole completion, cut off or not. With the likeliest token as the completion that is plain
    next-token accuracy, but for tokens with the bytes of several.

    Parts, 0 or 1 but for the first:
        matched_tokens: tokens that were predicted, 0 of a wrong prediction
        first_token: the completion has the bytes of the next token, neither more nor less
    """

    def __init__(self, *, name: str = "plain_next_token") -> None:
        super().__init__(name=name)

    def _judge(self, completion: Completion, continuation: bytes, boundaries: tuple[int, ...]) -> Reward:
        said = completion.text
        is_right = len(said) in boundaries and continuation.startswith(said)
        parts = {
            "matched_tokens": float(boundaries.index(len(said)) + 1 if is_right else 0),
            "first_token": float(is_right and len(said) == boundaries[0]),
        }
        return Reward(float(is_right), parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedPrompt:
    """What became of one prompt; one entry for each of its completions, in their order."""

    id: str
    band: str | None  # how difficult it is, or where it is from, where its record says so
    rewards: tuple[Reward, ...]
    lengths: tuple[int, ...]  # tokens
    truncated: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Completions of some prompts, counted. Means over nothing are None."""

    num_prompts: int
    num_completions: int
    num_judged: int  # known to be right or wrong
    num_right: int
    num_truncated: int
    reward_mean: float | None  # of the rewards that are known
    format_rate: float | None  # of the completions whose format was looked at
    length_mean_tokens: float | None

    @property
    def num_unknown(self) -> int:
        """Completions that could not be judged: neither right nor wrong."""
        return self.num_completions - self.num_judged

    @property
    def accuracy(self) -> float | None:
        """Right ones of those that were judged."""
        return self.num_right / self.num_judged if self.num_judged else None

    def metrics(self) -> dict[str, float]:
        """By name; means over nothing are left out."""
        n = self.num_completions
        values = {
            "reward_mean": self.reward_mean,
            "accuracy": self.accuracy,
            "format_rate": self.format_rate,
            "length_mean_tokens": self.length_mean_tokens,
            "truncated_share": self.num_truncated / n if n else None,
            "unknown_share": self.num_unknown / n if n else None,
            "prompts": float(self.num_prompts),
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class EvaluatedPrompts:
    """What became of all prompts, in their order; the same on every rank."""

    prompts: tuple[EvaluatedPrompt, ...]
    decided_by: str | None  # the part of the rewards that says what is right; None: the reward itself
    seconds: float = field(default=0.0, compare=False)

    @property
    def rewards(self) -> list[list[Reward]]:
        """Of every completion of every prompt."""
        return [list(prompt.rewards) for prompt in self.prompts]

    @property
    def bands(self) -> list[str]:
        """Those there are: those of mined positions first, from easy to hard, others by name."""
        found = {prompt.band for prompt in self.prompts if prompt.band is not None}
        return [band for band in BANDS if band in found] + sorted(found - set(BANDS))

    def of_band(self, band: str) -> EvaluatedPrompts:
        """Only the prompts of a band."""
        return replace(self, prompts=tuple(prompt for prompt in self.prompts if prompt.band == band))

    def tally(self) -> Tally:
        """All completions together."""
        rewards = [reward for prompt in self.prompts for reward in prompt.rewards]
        right = self._known(rewards)
        lengths = [length for prompt in self.prompts for length in prompt.lengths]
        return Tally(
            num_prompts=len(self.prompts),
            num_completions=len(rewards),
            num_judged=len(right),
            num_right=sum(right),
            num_truncated=sum(sum(prompt.truncated) for prompt in self.prompts),
            reward_mean=_mean(reward.value for reward in rewards if reward.value is not None),
            format_rate=_mean(value for reward in rewards if (value := _format_of(reward)) is not None),
            length_mean_tokens=_mean(lengths),
        )

    def pass_at(self, k: int) -> FloatArray:
        """The chance of each prompt that one of k completions is right. Prompts of which fewer than k completions could be
        judged are left out.

        Shapes: -> [q] fp64.

        Raises:
            ShapeError: k is not positive.
        """
        judged = [self._known(prompt.rewards) for prompt in self.prompts]
        enough = [right for right in judged if len(right) >= k]
        return pass_at_k(np.array([len(right) for right in enough], int), np.array([sum(right) for right in enough], int), k)

    def summary(self) -> dict[str, float]:
        """The metrics, by name; those of a band behind `band/<band>/`. Means over nothing are left out.

        reward_mean          over the completions that were judged
        accuracy             right ones of those that were judged
        pass_at_<k>          with several completions of each prompt: one of all k is right
        format_rate          completions in the format that the verifiers ask for, of those they looked at
        length_mean_tokens
        truncated_share      completions that were cut off
        unknown_share        completions that were not judged
        prompts              how many
        """
        metrics = self._metrics()
        for band in self.bands:
            metrics |= {f"band/{band}/{name}": value for name, value in self.of_band(band)._metrics().items()}
        return metrics

    def scalars(self, name: str) -> dict[str, float]:
        """The tags of this result for the held-out prompts `name`."""
        tags = {f"valid/{name}/{tag}": value for tag, value in self.summary().items()}
        return tags | {f"time/valid/{name}_s": self.seconds}

    def _metrics(self) -> dict[str, float]:
        metrics = self.tally().metrics()
        k = min((len(prompt.rewards) for prompt in self.prompts), default=0)
        if k > 1 and len(values := self.pass_at(k)):
            metrics[f"pass_at_{k}"] = float(values.mean())
        return metrics

    def _known(self, rewards: Sequence[Reward]) -> list[bool]:
        """Whether completions are right; those of which that is not known are left out."""
        name = self.decided_by
        values = [reward.value if name is None else reward.parts.get(name) for reward in rewards]
        return [value >= 1.0 - EQUAL_WITHIN for value in values if value is not None]


def evaluate_prompts(
    engine: RolloutEngine,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    sampling: Sampling,
    groups: ProcessGroups,
    on_prompts: Callable[[int], None] = lambda done: None,
) -> EvaluatedPrompts:
    """Draw completions of all prompts and judge them. Every rank calls it with the same prompts.

    Of a sum of verifiers, the first that is no `Format` decides what is right: where its value is 1. Of a single one its reward
    does. Of the ranks that share a copy of the model one judges, since judges with a time limit might not agree.

    Args:
        engine: of the policy.
        verifier: says what completions are worth.
        prompts: at least one, of different ids.
        group_size: completions of each prompt.
        sampling: how they are drawn.
        groups: of the layout.
        on_prompts: called after every part with the number of prompts that are done, over all ranks; equally often on each.

    Collectives: the engine's; after every part, and at the end, a gather of objects over the world.

    Raises:
        DataError: there is no prompt, or an answer is none that the verifier can read; on every rank, with the next one.
        RolloutError: the engine failed, on every rank.
        ShapeError: the group size is not positive.
    """
    if not prompts:
        raise DataError("evaluation: got no prompts, expected at least one")
    if group_size < 1:
        raise ShapeError(f"evaluation: got a group size of {group_size}, expected at least 1 completion of each prompt")
    started = time.perf_counter()
    found: dict[int, EvaluatedPrompt] = {}
    stride = groups.dp_size * max(1, _COMPLETIONS_PER_CALL // group_size)
    for first in range(0, len(prompts), stride):
        end = min(first + stride, len(prompts))
        own = range(first + groups.dp_rank, end, groups.dp_size)
        judge = verifier if groups.is_first_of_copy else None
        draw = partial(_evaluate, engine, judge, [prompts[i] for i in own], group_size, sampling)
        found.update(zip(own, together(draw), strict=False))  # who does not judge has nothing to say
        on_prompts(end)
    everyone = {number: prompt for part in gathered(found) for number, prompt in part.items()}
    in_order = tuple(everyone[number] for number in range(len(prompts)))
    return EvaluatedPrompts(in_order, _deciding(verifier), time.perf_counter() - started)


def stop_tokens(tokenizer: Tokenizer, texts: Sequence[str], *, where: str) -> tuple[int, ...]:
    """The tokens that end a completion: the end of a document, and every token with one of these texts.

    Args:
        tokenizer: of the policy.
        texts: special tokens by their names.
        where: the name of the option, for messages.

    Cost: one look at every id, where there are texts.

    Raises:
        ConfigError: no token has one of the texts, or none would end a completion.
    """
    found: dict[str, list[int]] = {text: [] for text in texts}
    for each in range(tokenizer.vocab_size) if texts else ():
        content = tokenizer.token_bytes(each)
        for text, ids in found.items():
            if (tokenizer.token_text(each) == text) if content is None else (content == text.encode()):
                ids.append(each)
    for text, ids in found.items():
        if not ids:
            raise ConfigError(
                f"{where}: got {text!r}, expected the text of a single token of {tokenizer.name}; completions end at tokens"
            )
    ends = [] if tokenizer.eod is None else [tokenizer.eod]
    if not ends and not found:
        raise ConfigError(
            f"{where}: got none, and {tokenizer.name} has no token that ends a document, so every completion would be cut off; "
            "expected the text of a token"
        )
    return tuple(dict.fromkeys([*ends, *(each for ids in found.values() for each in ids)]))


def _evaluate(
    engine: RolloutEngine, verifier: Verifier | None, prompts: Sequence[Prompt], group_size: int, sampling: Sampling
) -> list[EvaluatedPrompt]:
    """The part of this rank; nothing without a verifier."""
    drawn = engine.generate(prompts, group_size=group_size, sampling=sampling) if prompts else []
    if verifier is None or not drawn:
        return []
    return [_evaluated(group, rewards) for group, rewards in zip(drawn, verifier(drawn), strict=True)]


def _evaluated(group: RolloutGroup, rewards: Sequence[Reward]) -> EvaluatedPrompt:
    prompt, completions = group
    band = prompt.answer.get("band", prompt.answer.get("source"))
    return EvaluatedPrompt(
        id=prompt.id,
        band=None if band is None else str(band),
        rewards=tuple(Reward(value, dict(parts)) for value, parts in rewards),  # a mapping proxy cannot be sent
        lengths=tuple(len(each.tokens) for each in completions),
        truncated=tuple(each.stop is StopReason.LENGTH for each in completions),
    )


def _deciding(verifier: Verifier) -> str | None:
    """The part that says what is right; None where that is the reward."""
    if not isinstance(verifier, WeightedSum):
        return None
    names = [each.name for each, _ in verifier.weighted]
    return next((each.name for each, _ in verifier.weighted if not isinstance(each, Format)), names[0])


def _format_of(reward: Reward) -> float | None:
    """Whether the format is right, for every verifier that looked at it."""
    formats = [value for name, value in reward.parts.items() if name == "format" or name.endswith("/format")]
    return min(formats, default=None)


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None
