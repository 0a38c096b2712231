"""Rewards of a group of completions of the same prompt to advantages, and what becomes of completions that are too long.

A reward that is not known is NaN here. It takes no part in means and deviations; its advantage is 0 and its mask False, so that
it can be left out of the loss: an advantage of 0 alone would still let KL and entropy terms act, and count in the division.
Ragged groups are padded with NaN. Everything is computed in fp64.

Dims: g completions of one prompt; leading dimensions, written [..., g], are further prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megarpt.errors import ConfigError

EQUAL_WITHIN = 1e-6  # rewards no further apart than this are equal: sums of parts differ in their last digits


class Advantages(NamedTuple):
    """What the completions of groups are worth against each other."""

    value: Tensor  # [..., g] fp32, 0 where `trains` is False and in dead groups
    trains: Tensor  # [..., g] bool, False where the completion is to be left out of the loss


def as_rewards(rewards: Sequence[float | None], device: torch.device | None = None) -> Tensor:
    """Rewards of a group, None for unknown.

    Shapes: -> [g] fp64, NaN for unknown.
    """
    values = [torch.nan if reward is None else reward for reward in rewards]
    return torch.tensor(values, dtype=torch.float64, device=device)


def is_dead(reward: Tensor) -> Tensor:
    """Whether a group teaches nothing: its known rewards are all equal, or fewer than two are known.

    Every estimator gives it advantages of exactly 0. Whether to drop such groups (and draw others instead, which is DAPO's
    dynamic sampling) is up to the caller, who should ask about the raw rewards: a length penalty makes equal rewards differ.

    Shapes: [..., g] -> [...] bool.
    Source: DAPO (arXiv 2503.14476), equation 11, for rewards of two values.
    """
    known, filled = _known(reward)
    largest = torch.where(known, filled, -torch.inf).amax(dim=-1)
    smallest = torch.where(known, filled, torch.inf).amin(dim=-1)
    return (known.sum(dim=-1) < 2) | (largest - smallest <= EQUAL_WITHIN)


def group_mean(reward: Tensor) -> Advantages:
    """Reward minus the mean of its group, without a division by the deviation.

    Shapes: [..., g] -> [..., g].
    Source: Dr. GRPO (arXiv 2503.20783).
    """
    known, filled = _known(reward)
    return _advantages(reward, filled - filled.sum(dim=-1, keepdim=True) / _count(known))


def group_zscore(reward: Tensor, eps: float = 1e-6) -> Advantages:
    """Reward minus the mean of its group, divided by their standard deviation + eps.

    The deviation is that of a sample, with n - 1 in the denominator for n known rewards. Published code differs in this, which
    is a factor of sqrt(n / (n - 1)) on all advantages of the group.

    Args:
        eps: added to the deviation; 0 or more.
    Raises:
        ConfigError: eps is negative.

    Shapes: [..., g] -> [..., g].
    Source: GRPO (arXiv 2402.03300), section 4.1.2; ProRL (arXiv 2505.24864), equation 2.
    """
    if not eps >= 0.0:
        raise ConfigError(f"advantage eps: got {eps}, expected 0 or more")
    known, filled = _known(reward)
    difference = torch.where(known, filled - filled.sum(dim=-1, keepdim=True) / _count(known), 0.0)
    variance = difference.square().sum(dim=-1, keepdim=True) / (_count(known) - 1.0).clamp(min=1.0)
    return _advantages(reward, difference / (variance.sqrt() + eps))


def leave_one_out(reward: Tensor) -> Advantages:
    """Reward minus the mean of the other rewards of its group, which makes the baseline independent of the completion.

    It is `group_mean` times n / (n - 1), for n known rewards.

    Shapes: [..., g] -> [..., g].
    Source: RLOO (arXiv 2402.14740).
    """
    known, filled = _known(reward)
    others = filled.sum(dim=-1, keepdim=True) - filled
    return _advantages(reward, filled - others / (_count(known) - 1.0).clamp(min=1.0))


def length_weighted(reward: Tensor, length: Tensor) -> Advantages:
    """Reward minus the mean of its group in which every reward weighs as many tokens as its completion has.

    Args:
        length: tokens of the completions, at least 1 where the reward is known.

    Shapes: [..., g], [..., g] -> [..., g].
    Source: OPO (arXiv 2505.23585): the baseline of least variance when all tokens have gradients of the same size.
    """
    known, filled = _known(reward)
    weight = torch.where(known, length.double(), 0.0)
    baseline = (weight * filled).sum(dim=-1, keepdim=True) / weight.sum(dim=-1, keepdim=True).clamp(min=1.0)
    return _advantages(reward, filled - baseline)


# Rewards and lengths of the completions, both [..., g]. A new estimator is a function and one line here.
ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Advantages]] = {
    "group_mean": lambda reward, length: group_mean(reward),
    "group_zscore": lambda reward, length: group_zscore(reward),
    "leave_one_out": lambda reward, length: leave_one_out(reward),
    "length_weighted": length_weighted,
}


def overlong_penalty(length: Tensor, limit: int, buffer: int) -> Tensor:
    """What is added to the reward of a long completion: 0 up to limit - buffer tokens, then linearly down to -1 at the limit.

    Args:
        length: tokens of the completions.
        limit: the length from which on it is -1.
        buffer: over how many tokens it grows. With 0 it is a step, and a completion of `limit` tokens has none yet.
    Raises:
        ConfigError: the buffer does not lie within the limit.

    Shapes: any -> the same, fp32 in [-1, 0].
    Source: DAPO (arXiv 2503.14476), equation 13.
    """
    if not 0 <= buffer <= limit:
        raise ConfigError(f"overlong buffer: got {buffer}, expected a number of tokens from 0 to the limit of {limit}")
    spare = (limit - buffer - length).double()
    return (spare / max(buffer, 1)).clamp(-1.0, 0.0).float()


def without_truncated(advantages: Advantages, truncated: Tensor) -> Advantages:
    """Leave truncated completions out of the loss, instead of penalising them.

    Their rewards were a part of the baseline of the others. To take them out of that too, make them NaN beforehand.

    Args:
        truncated: [..., g] bool, whether the completion used up its tokens (`StopReason.LENGTH`).

    Shapes: [..., g], [..., g] -> [..., g].
    Source: DAPO (arXiv 2503.14476), section 3.4, there called overlong filtering.
    """
    return Advantages(torch.where(truncated, 0.0, advantages.value), advantages.trains & ~truncated)


def _known(reward: Tensor) -> tuple[Tensor, Tensor]:
    """(which rewards are known, the rewards in fp64 with 0 for the unknown)."""
    known = ~reward.isnan()
    return known, torch.where(known, reward.double(), 0.0)


def _count(known: Tensor) -> Tensor:
    return known.sum(dim=-1, keepdim=True).double().clamp(min=1.0)


def _advantages(reward: Tensor, value: Tensor) -> Advantages:
    """Exactly 0 in a dead group, where rounding would leave something that a division by eps makes large."""
    known = ~reward.isnan()
    return Advantages(torch.where(known & ~is_dead(reward)[..., None], value, 0.0).float(), known)
