"""What one iteration of rollouts says of the policy, as numbers that can be added over ranks.

Every mean is kept as its numerator and denominator until all ranks are together, because a mean of means is none where ranks
judged different numbers of completions. A mean over nothing has no value and is left out. Everything is of the rollouts as they
were drawn, before groups are dropped or drawn anew: what is trained on looks better than the policy is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from megarpt.errors import ShapeError
from megarpt.rl.advantages import EQUAL_WITHIN, Advantages, as_rewards, is_dead
from megarpt.rl.structs import Completion, Reward, RolloutGroup, StopReason

_SQUARES = "rl/reward_squares"  # of which the deviation is made; not itself a metric


class RolloutStatistics(NamedTuple):
    """Of some groups of one iteration: a rank's, or all of them. Numbers that `merge` adds, but for the last."""

    means: Mapping[str, tuple[float, float]]  # tag -> (numerator, denominator)
    counts: Mapping[str, float]  # tag -> a whole number
    maxima: Mapping[str, float]  # tag -> the largest


def rollout_statistics(
    groups: Sequence[RolloutGroup],
    rewards: Sequence[Sequence[Reward]],
    advantages: Sequence[Advantages],
    *,
    max_new_tokens: int,
    right_reward: float = 1.0,
) -> RolloutStatistics:
    """Sums over groups; `summary` makes metrics of them.

    Args:
        groups: all that were drawn.
        rewards: for each group one for each completion, as the verifier gave them.
        advantages: for each group, [g].
        max_new_tokens: what `Sampling` allowed a completion.
        right_reward: the reward of a completion that is right in everything; 0 is that of a wrong one.

    Raises:
        ShapeError: groups, rewards and advantages do not belong together.
    """
    _check(groups, rewards, advantages)
    means: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(tag: str, value: float, weight: float = 1.0) -> None:
        means[tag][0] += value
        means[tag][1] += weight

    for (_, completions), said, worth in zip(groups, rewards, advantages, strict=True):
        known = [reward.value for reward in said if reward.value is not None]
        add("rl/dead_groups", float(is_dead(as_rewards([reward.value for reward in said]))))
        add("rl/all_wrong_groups", float(bool(known) and max(known) <= EQUAL_WITHIN))
        add("rl/all_right_groups", float(bool(known) and min(known) >= right_reward - EQUAL_WITHIN))
        for completion, reward in zip(completions, said, strict=True):
            for tag, value in _of_completion(completion, reward, max_new_tokens):
                add(tag, value)
        for value, trains in zip(worth.value.tolist(), worth.trains.tolist(), strict=True):
            add("rl/left_out_share", float(not trains))
            if trains:
                add("rl/advantage_abs_mean", abs(value))
    lengths = [len(completion.tokens) for _, completions in groups for completion in completions]
    return RolloutStatistics(
        {tag: (numerator, denominator) for tag, (numerator, denominator) in means.items()},
        {"rl/groups": float(len(groups)), "rl/completions": float(len(lengths)), "rl/sampled_tokens": float(sum(lengths))},
        {"rl/length_max_tokens": float(max(lengths))} if lengths else {},
    )


def merge(parts: Iterable[RolloutStatistics]) -> RolloutStatistics:
    """The statistics of all groups together, from those of each rank; the ranks need not have the same tags."""
    means: dict[str, tuple[float, float]] = {}
    counts: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for part in parts:
        for tag, (numerator, denominator) in part.means.items():
            before = means.get(tag, (0.0, 0.0))
            means[tag] = (before[0] + numerator, before[1] + denominator)
        for tag, count in part.counts.items():
            counts[tag] = counts.get(tag, 0.0) + count
        for tag, largest in part.maxima.items():
            maxima[tag] = max(maxima.get(tag, -math.inf), largest)
    return RolloutStatistics(means, counts, maxima)


def summary(statistics: RolloutStatistics) -> dict[str, float]:
    """The metrics, by tag.

    rl/reward_mean, rl/reward_std            over the completions that were judged; the deviation of all of them, not of groups
    rl/format_rate                           completions in the format that the verifiers ask for, of those they looked at
    rl/unknown_share                         completions that were not judged
    rl/dead_groups                           share of groups whose known rewards are all equal: they teach nothing
    rl/all_wrong_groups, rl/all_right_groups   share of groups; those not judged at all are neither
    rl/length_mean_tokens, rl/length_max_tokens
    rl/truncated_share                       completions that were cut off, for whatever reason
    rl/no_room_share                         of all, those cut off before their limit, because the context was full
    rl/matched_tokens_mean                   tokens that a right prediction of next tokens has
    rl/part/<name>                           mean of each part that the verifiers report
    rl/left_out_share                        completions that the loss does not see
    rl/advantage_abs_mean                    of those it does see
    rl/groups, rl/completions, rl/sampled_tokens   how many
    """
    metrics = {tag: numerator / denominator for tag, (numerator, denominator) in statistics.means.items() if denominator}
    if _SQUARES in metrics:
        # rounding can make the difference of two equal numbers a little less than 0
        metrics["rl/reward_std"] = math.sqrt(max(0.0, metrics.pop(_SQUARES) - metrics["rl/reward_mean"] ** 2))
    return metrics | dict(statistics.counts) | dict(statistics.maxima)


def _of_completion(completion: Completion, reward: Reward, max_new_tokens: int) -> Iterable[tuple[str, float]]:
    length, is_cut = len(completion.tokens), completion.stop is StopReason.LENGTH
    yield "rl/length_mean_tokens", float(length)
    yield "rl/truncated_share", float(is_cut)
    yield "rl/no_room_share", float(is_cut and length < max_new_tokens)
    yield "rl/unknown_share", float(not reward.is_known)
    if reward.value is not None:
        yield "rl/reward_mean", reward.value
        yield _SQUARES, reward.value**2
    formats = [value for name, value in reward.parts.items() if _is_called(name, "format")]
    if formats:
        yield "rl/format_rate", min(formats)
    for name, value in reward.parts.items():
        yield f"rl/part/{name}", value
        if _is_called(name, "matched_tokens") and value > 0.0:
            yield "rl/matched_tokens_mean", value


def _is_called(name: str, part: str) -> bool:
    """Whether a part has this name, by itself or within a sum of verifiers."""
    return name == part or name.endswith(f"/{part}")


def _check(groups: Sequence[RolloutGroup], rewards: Sequence[Sequence[Reward]], advantages: Sequence[Advantages]) -> None:
    sizes = [len(completions) for _, completions in groups]
    found = {"rewards": [len(said) for said in rewards], "advantages": [worth.value.numel() for worth in advantages]}
    for name, got in found.items():
        if got != sizes:
            raise ShapeError(
                f"rollout statistics: got {name} for {sum(got)} completions in {len(got)} groups, expected one for each of "
                f"{sum(sizes)} in {len(sizes)}"
            )
