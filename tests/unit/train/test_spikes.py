"""Loss spikes: the score by hand, and what the guard does with it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from megarpt.config.schema import StabilityConfig
from megarpt.train.spikes import SpikeGuard, robust_zscore

CALM = [2.0, 2.1, 1.9, 2.05, 1.95, 2.02, 1.98, 2.0]


def guard(on_spike: str = "skip", threshold: float = 6.0, **more: object) -> SpikeGuard:
    cfg = StabilityConfig.model_validate({"spike_threshold": threshold, "spike_window_steps": 8, "on_spike": on_spike})
    return SpikeGuard(cfg, **{"agree": lambda flag: flag, **more})  # type: ignore[arg-type]


def feed(guard: SpikeGuard, losses: Sequence[float], norm: float = 1.0) -> list[bool]:
    return [guard(loss, norm) for loss in losses]


def test_the_score_by_hand() -> None:
    history = [1.0, 2.0, 3.0, 4.0, 100.0]  # median 3, deviations 2 1 0 1 97, their median 1
    assert robust_zscore(5.0, history) == pytest.approx(2.0 / 1.4826)
    assert robust_zscore(1.0, history) == pytest.approx(-2.0 / 1.4826)
    assert robust_zscore(2.004, [2.0] * 8) == pytest.approx(2.0)  # a thousandth of the median is the smallest deviation
    assert robust_zscore(0.0, [0.0] * 8) == 0.0


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    steps = guard()
    assert feed(steps, [*CALM[:7], 50.0]) == [False] * 8
    assert not steps.take_verdict().scores


def test_a_spike_is_held_and_does_not_enter_the_window(caplog: pytest.LogCaptureFixture) -> None:
    steps = guard()
    feed(steps, CALM)
    assert steps(9.0, 1.0)
    verdict = steps.take_verdict()
    assert verdict.is_spike and verdict.is_held and verdict.scores["optim/loss_zscore"] > 6.0
    assert verdict.scores["optim/grad_norm_zscore"] == 0.0
    assert sorted(steps.state_dict()["loss"]) == sorted(CALM)
    assert not steps(2.03, 1.0) and "spike: loss 9" in caplog.text
    assert not steps.take_verdict().is_spike


def test_the_gradient_norm_alone_is_enough_and_falling_is_none() -> None:
    steps = guard()
    feed(steps, CALM)
    assert steps(2.0, 30.0)
    assert not steps(0.01, 0.001)


def test_reporting_trains_on_and_a_new_level_becomes_normal() -> None:
    steps = guard("report")
    feed(steps, CALM)
    found = []
    for loss in (9.0, 9.1, 8.9, 9.05, 8.95, 9.0, 9.1, 9.0, 9.0):
        assert not steps(loss, 1.0)
        found.append(steps.take_verdict().is_spike)
    assert found[0] and not any(found[5:])


def test_a_threshold_that_is_not_reached_finds_nothing() -> None:
    assert not any(feed(guard(threshold=1e6), [*CALM, 50.0]))


def test_one_rank_decides_for_all() -> None:
    steps = guard(agree=lambda flag: True)
    assert feed(steps, CALM[:1]) == [True]


def test_only_one_rank_speaks(caplog: pytest.LogCaptureFixture) -> None:
    steps = guard(shows=False)
    with caplog.at_level(logging.DEBUG):
        assert feed(steps, [*CALM, 50.0])[-1]
    assert not caplog.text


def test_a_step_that_was_not_finite_has_an_empty_verdict() -> None:
    steps = guard()
    feed(steps, [*CALM, 50.0])
    assert steps.take_verdict().is_held
    assert not steps.take_verdict().is_held


def test_the_window_is_part_of_the_state() -> None:
    first, second = guard(), guard()
    feed(first, [*CALM, 2.2])
    second.load_state_dict(first.state_dict())
    for loss in (2.1, 2.4, 9.0, 2.0):
        assert first(loss, 1.0) == second(loss, 1.0)
        assert first.take_verdict() == second.take_verdict()
    second.load_state_dict({})  # a checkpoint of a run that looked for none
    assert second.state_dict() == {"loss": [], "grad_norm": []}
