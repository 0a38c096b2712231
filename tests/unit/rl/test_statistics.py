"""Statistics of an iteration: against numbers by hand, and whatever way the groups are shared among ranks."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from megarpt.errors import ShapeError
from megarpt.rl.advantages import Advantages, as_rewards, group_mean, without_truncated
from megarpt.rl.statistics import merge, rollout_statistics, summary
from megarpt.rl.structs import Completion, Prompt, Reward, RolloutGroup, StopReason

LIMIT = 8


def completion(length: int, stop: StopReason = StopReason.STOP) -> Completion:
    return Completion(tokens=(1,) * length, logprobs=(-1.0,) * length, text=b"x", stop=stop, policy_version=0)


def group(name: str, lengths: list[int], cut: tuple[int, ...] = ()) -> RolloutGroup:
    stops = [StopReason.LENGTH if i in cut else StopReason.STOP for i in range(len(lengths))]
    return RolloutGroup(Prompt(id=name, tokens=(1, 2)), [completion(n, stop) for n, stop in zip(lengths, stops, strict=True)])


GROUPS = [group("a", [2, 4, 8, 5], cut=(2, 3)), group("b", [3, 3]), group("c", [1, 1, 1]), group("d", [2, 2])]
REWARDS = [
    [Reward(1.0, {"format": 1.0, "matched_tokens": 3.0}), Reward(0.0, {"format": 1.0, "matched_tokens": 0.0})]
    + [Reward(0.0, {"format": 0.0, "matched_tokens": 0.0})] * 2,
    [Reward(1.0, {"format": 1.0, "matched_tokens": 1.0})] * 2,
    [Reward(0.0, {"format": 0.0, "matched_tokens": 0.0}), Reward(0.0, {"format": 0.0}), Reward(None, {"timed_out": 1.0})],
    [Reward(None), Reward(None)],
]


def advantages(rewards: list[list[Reward]]) -> list[Advantages]:
    return [group_mean(as_rewards([reward.value for reward in said])) for said in rewards]


def test_numbers_by_hand() -> None:
    worth = advantages(REWARDS)
    worth[0] = without_truncated(worth[0], torch.tensor([False, False, True, True]))
    found = summary(rollout_statistics(GROUPS, REWARDS, worth, max_new_tokens=LIMIT))
    known = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert found == pytest.approx(
        {
            "rl/reward_mean": 3 / 8,
            "rl/reward_std": statistics.pstdev(known),
            "rl/format_rate": 4 / 8,
            "rl/unknown_share": 3 / 11,
            "rl/dead_groups": 3 / 4,
            "rl/all_wrong_groups": 1 / 4,
            "rl/all_right_groups": 1 / 4,
            "rl/length_mean_tokens": 32 / 11,
            "rl/length_max_tokens": 8.0,
            "rl/truncated_share": 2 / 11,
            "rl/no_room_share": 1 / 11,
            "rl/matched_tokens_mean": 5 / 3,
            "rl/part/format": 4 / 8,
            "rl/part/matched_tokens": 5 / 7,
            "rl/part/timed_out": 1.0,
            "rl/left_out_share": 5 / 11,
            "rl/advantage_abs_mean": 1.0 / 6,
            "rl/groups": 4.0,
            "rl/completions": 11.0,
            "rl/sampled_tokens": 32.0,
        }
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_it_does_not_matter_how_groups_are_shared_among_ranks(ranks: int) -> None:
    rng = random.Random(ranks)
    groups, rewards = [], []
    for number in range(12):
        size = rng.randint(1, 6)
        groups.append(group(str(number), [rng.randint(1, LIMIT) for _ in range(size)], cut=(0,) if rng.random() < 0.3 else ()))
        values = [rng.choice([None, 0.0, 1.0, 0.25]) for _ in range(size)]
        rewards.append([Reward(value, {} if value is None else {"format": value}) for value in values])
    worth = advantages(rewards)
    whole = summary(rollout_statistics(groups, rewards, worth, max_new_tokens=LIMIT))
    parts = [
        rollout_statistics(groups[r::ranks], rewards[r::ranks], worth[r::ranks], max_new_tokens=LIMIT) for r in range(ranks)
    ]
    idle = rollout_statistics([], [], [], max_new_tokens=LIMIT)  # a rank that got no prompt
    assert summary(merge([idle, *parts])) == pytest.approx(whole)
    # ... while a mean of the ranks' means is another number
    if ranks == 7:
        means = [summary(part)["rl/length_mean_tokens"] for part in parts]
        assert statistics.fmean(means) != pytest.approx(whole["rl/length_mean_tokens"])


def test_a_mean_over_nothing_is_left_out() -> None:
    nothing = summary(rollout_statistics([], [], [], max_new_tokens=LIMIT))
    assert nothing == {"rl/groups": 0.0, "rl/completions": 0.0, "rl/sampled_tokens": 0.0}
    unknown = summary(rollout_statistics(GROUPS[3:], REWARDS[3:], advantages(REWARDS[3:]), max_new_tokens=LIMIT))
    assert not {"rl/reward_mean", "rl/reward_std", "rl/format_rate", "rl/matched_tokens_mean"} & set(unknown)
    assert unknown["rl/unknown_share"] == unknown["rl/dead_groups"] == 1.0
    assert unknown["rl/all_wrong_groups"] == unknown["rl/all_right_groups"] == 0.0


def test_parts_of_a_sum_of_verifiers_count_like_those_of_one() -> None:
    parts = [
        {
            "next_token": 1.0,
            "next_token/format": 1.0,
            "next_token/matched_tokens": 2.0,
            "shape/format": 0.0,
            "no/formatting": 9.0,
        },
        {"next_token/format": 1.0, "next_token/matched_tokens": 0.0, "shape/format": 1.0},
    ]
    rewards = [[Reward(1.1, parts[0]), Reward(0.1, parts[1])]]
    found = summary(rollout_statistics(GROUPS[1:2], rewards, advantages(rewards), max_new_tokens=LIMIT, right_reward=1.1))
    assert found["rl/format_rate"] == 0.5  # where two verifiers look at the format, both have to find it
    assert found["rl/matched_tokens_mean"] == 2.0
    assert found["rl/part/next_token/format"] == 1.0 and found["rl/part/shape/format"] == 0.5


@pytest.mark.parametrize(("right", "share"), [(1.0, 1.0), (1.1, 1.0), (1.2, 0.0)])
def test_what_is_right_depends_on_the_largest_reward(right: float, share: float) -> None:
    rewards = [[Reward(1.1), Reward(1.1000000001)]]
    found = summary(rollout_statistics(GROUPS[1:2], rewards, advantages(rewards), max_new_tokens=LIMIT, right_reward=right))
    assert found["rl/all_right_groups"] == share and found["rl/dead_groups"] == 1.0
    assert found["rl/reward_std"] < 1e-6 and not math.isnan(found["rl/reward_std"])


def test_what_does_not_belong_together_is_refused() -> None:
    worth = advantages(REWARDS)
    with pytest.raises(ShapeError, match="rewards for 9 completions in 3 groups, expected one for each of 11 in 4"):
        rollout_statistics(GROUPS, REWARDS[:3], worth, max_new_tokens=LIMIT)
    with pytest.raises(ShapeError, match="advantages for 11 completions in 4 groups"):
        rollout_statistics([*GROUPS[1:], GROUPS[0]], [*REWARDS[1:], REWARDS[0]], worth, max_new_tokens=LIMIT)
