"""Advantages of groups: against plain formulas, with unknown rewards, dead groups and completions that are too long."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarpt.errors import ConfigError
from megarpt.rl.advantages import (
    ADVANTAGES,
    Advantages,
    as_rewards,
    group_mean,
    group_zscore,
    is_dead,
    leave_one_out,
    length_weighted,
    overlong_penalty,
    without_truncated,
)

NAN = float("nan")
REWARDS = [1.0, 0.0, 0.0, 0.5]
LENGTHS = [10, 40, 20, 30]


def plain(name: str, reward: list[float], length: list[int]) -> list[float]:
    """The formulas as they are printed, of a group without unknown rewards."""
    n, mean = len(reward), statistics.fmean(reward)
    if name == "group_mean":
        return [r - mean for r in reward]
    if name == "group_zscore":
        return [(r - mean) / (statistics.stdev(reward) + 1e-6) for r in reward]
    if name == "leave_one_out":
        return [r - (sum(reward) - r) / (n - 1) for r in reward]
    baseline = sum(r * w for r, w in zip(reward, length, strict=True)) / sum(length)
    return [r - baseline for r in reward]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_the_printed_ones(name) -> None:
    found = ADVANTAGES[name](as_rewards(REWARDS), torch.tensor(LENGTHS))
    assert found.value.tolist() == pytest.approx(plain(name, REWARDS, LENGTHS), rel=1e-6)
    assert found.value.dtype == torch.float32 and found.trains.tolist() == [True] * 4


def test_numbers_by_hand() -> None:
    reward = as_rewards([1.0, 0.0, 0.0, 0.0])
    assert group_mean(reward).value.tolist() == [0.75, -0.25, -0.25, -0.25]
    assert group_zscore(reward, eps=0.0).value.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])  # deviation 1/2, with n - 1
    assert leave_one_out(reward).value.tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert length_weighted(reward, torch.tensor([3, 1, 1, 1])).value.tolist() == [0.5, -0.5, -0.5, -0.5]


@pytest.mark.parametrize("name", ADVANTAGES)
@given(
    reward=st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.7, 1.0]), st.floats(-5, 5)), min_size=1, max_size=8),
    data=st.data(),
)
def test_unknown_rewards_take_no_part(name, reward, data) -> None:
    """The others get what they would get in a group of their own; of the unknown nothing is said."""
    length = data.draw(st.lists(st.integers(1, 50), min_size=len(reward), max_size=len(reward)))
    found = ADVANTAGES[name](as_rewards(reward), torch.tensor(length))
    known = [i for i, r in enumerate(reward) if r is not None]
    assert found.trains.tolist() == [r is not None for r in reward]
    assert torch.isfinite(found.value).all() and (found.value[~found.trains] == 0.0).all()
    of_known = [reward[i] for i in known]
    if bool(is_dead(as_rewards(reward))):
        assert len(known) < 2 or max(of_known) - min(of_known) <= 1e-6
        assert (found.value == 0.0).all()
        return
    assert found.value[known].tolist() == pytest.approx(plain(name, of_known, [length[i] for i in known]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_groups_are_computed_side_by_side(name) -> None:
    """Many groups at once, ragged ones padded with NaN, are what each is alone."""
    groups = [[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, NAN, NAN], [1.0, 1.0, 1.0, 1.0], [NAN, 0.3, 0.2, 0.1]]
    reward, length = torch.tensor(groups, dtype=torch.float64), torch.tensor([LENGTHS] * 4)
    together = ADVANTAGES[name](reward, length)
    for i, each in enumerate(reward):
        alone = ADVANTAGES[name](each, length[i])
        assert torch.equal(together.value[i], alone.value) and torch.equal(together.trains[i], alone.trains)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ([1.0, 1.0, 1.0], True),
        ([0.0, 0.0, 1.0], False),
        ([0.1 + 0.2, 0.3, 0.3], True),  # equal but for rounding
        ([0.3, 0.3001], False),
        ([1.0, None, 1.0], True),
        ([1.0, None, 0.0], False),
        ([1.0, None, None], True),
        ([None, None], True),
        ([0.7], True),
    ],
)
def test_dead_groups(reward, expected) -> None:
    assert bool(is_dead(as_rewards(reward))) is expected


def test_a_dead_group_has_no_advantage_that_rounding_left() -> None:
    """The mean of equal numbers need not be the number, and a division by eps alone makes the rest large."""
    reward = as_rewards([0.1 + 0.2, 0.3, 0.3])
    assert (reward - reward.mean()).abs().max() > 0.0
    for name in ADVANTAGES:
        found = ADVANTAGES[name](reward, torch.ones(3))
        assert (found.value == 0.0).all() and found.trains.all()
    assert (group_zscore(reward, eps=0.0).value == 0.0).all()


def test_a_baseline_that_sums_to_nothing() -> None:
    """Group mean and z-score sum to 0; the length-weighted sum of OPO's advantages does. A wrong count would be seen."""
    reward, length = as_rewards([*REWARDS, None]), torch.tensor([*LENGTHS, 1000])
    for found in (group_mean(reward), group_zscore(reward), leave_one_out(reward)):
        assert float(found.value.sum()) == pytest.approx(0.0, abs=1e-6)
    assert float((length * length_weighted(reward, length).value).sum()) == pytest.approx(0.0, abs=1e-4)
    wrong = torch.where(reward.isnan(), 0.0, reward - reward.nan_to_num().mean())  # the unknown one counted as 0
    assert abs(float(wrong.sum())) > 0.1


def test_rewards_are_computed_in_double_precision() -> None:
    """A common offset of any size does not wash the differences out."""
    reward = as_rewards([1e7 + r for r in REWARDS])
    assert group_mean(reward).value.tolist() == pytest.approx(plain("group_mean", REWARDS, LENGTHS), rel=1e-6)


def test_soft_punishment() -> None:
    found = overlong_penalty(torch.tensor([1, 80, 81, 90, 99, 100, 120]), limit=100, buffer=20)
    assert found.tolist() == pytest.approx([0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0])
    assert found.dtype == torch.float32 and not torch.signbit(found[:2]).any()
    assert overlong_penalty(torch.tensor([99, 100, 101]), limit=100, buffer=0).tolist() == [0.0, 0.0, -1.0]
    assert overlong_penalty(torch.tensor([[0, 50]]), limit=100, buffer=100).tolist() == [[0.0, -0.5]]
    for buffer in (-1, 101):
        with pytest.raises(ConfigError, match="overlong buffer: got"):
            overlong_penalty(torch.tensor([1]), limit=100, buffer=buffer)


def test_truncated_completions_can_be_left_out() -> None:
    advantages = group_mean(as_rewards([1.0, 0.0, None, 0.0]))
    truncated = torch.tensor([False, True, True, False])
    found = without_truncated(advantages, truncated)
    assert isinstance(found, Advantages)
    assert found.trains.tolist() == [True, False, False, True]
    assert found.value.tolist() == pytest.approx([2 / 3, 0.0, 0.0, -1 / 3])  # its reward was a part of the baseline
    assert torch.equal(without_truncated(advantages, torch.zeros(4, dtype=torch.bool)).value, advantages.value)


def test_a_negative_or_missing_eps_is_refused() -> None:
    for eps in (-1e-6, math.nan):
        with pytest.raises(ConfigError, match="eps"):
            group_zscore(as_rewards(REWARDS), eps=eps)
