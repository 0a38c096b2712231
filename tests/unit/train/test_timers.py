"""Where the time of a step goes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import megatron.core
import pytest

from megarpt.device.clock import HostClock
from megarpt.train.perf import PerfMeter
from megarpt.train.phases import OWN_WORK
from megarpt.train.timers import IGNORED, PHASE_OF, StepTimers


class LaggingClock:
    """A device whose queue is behind: a mark passes only when the test says so."""

    def __init__(self) -> None:
        self.now, self.done_until = 0.0, 0.0
        self.recycled: list[float] = []

    def mark(self) -> float:
        return self.now

    def has_passed(self, mark: float) -> bool:
        return mark <= self.done_until

    def seconds(self, start: float, end: float) -> float:
        assert self.has_passed(end), "asked for a time the device has not reached"
        return end - start

    def recycle(self, marks: Iterable[float]) -> None:
        self.recycled += marks


@pytest.fixture
def clock() -> LaggingClock:
    return LaggingClock()


def one_step(timers: StepTimers, clock: LaggingClock) -> None:
    """As megatron-core calls: forward 4 s with 1 s of selection inside, backward 8 s, the rest 2 s."""
    with timers.step():
        clock.now += 1
        timers("forward-backward", log_level=1).start(barrier=True)
        timers("forward-compute", log_level=2).start()
        clock.now += 2
        with timers.phase("select"):
            clock.now += 1
        clock.now += 2
        timers("forward-compute").stop()
        timers("backward-compute", log_level=2).start()
        clock.now += 8
        timers("backward-compute").stop()
        timers("forward-backward").stop()
        clock.now += 1


def test_phases_do_not_overlap_and_add_up_to_the_step(clock: LaggingClock) -> None:
    timers = StepTimers(clock)
    one_step(timers, clock)
    clock.done_until = clock.now
    (step,) = timers.finished()
    assert step == {"other": 2.0, "forward": 4.0, "select": 1.0, "backward": 8.0}
    assert sum(step.values()) == clock.now
    assert timers.finished() == []


def test_a_step_is_told_when_the_device_has_finished_it_and_never_waited_for(clock: LaggingClock) -> None:
    timers = StepTimers(clock)
    one_step(timers, clock)
    first = clock.now
    one_step(timers, clock)
    assert timers.finished() == [] and clock.recycled == []
    clock.done_until = first + 5.0  # in the middle of the second step
    assert len(timers.finished()) == 1
    clock.done_until = clock.now
    assert len(timers.finished()) == 1
    assert len(clock.recycled) == 2 * 8  # all marks of both steps, each once


def test_outside_a_step_nothing_is_measured(clock: LaggingClock) -> None:
    timers = StepTimers(clock)
    timers("forward-compute", log_level=2).start()
    clock.now += 100
    timers("forward-compute").stop()
    one_step(timers, clock)
    with timers.phase("forward"):
        clock.now += 100
    clock.done_until = clock.now
    assert timers.finished() == [{"other": 2.0, "forward": 4.0, "select": 1.0, "backward": 8.0}]


def test_a_step_that_failed_half_way_leaves_the_next_one_alone(clock: LaggingClock) -> None:
    timers = StepTimers(clock)
    with pytest.raises(ValueError), timers.step():
        timers("forward-compute").start()
        raise ValueError
    one_step(timers, clock)
    clock.done_until = clock.now
    assert timers.finished() == [{"other": 2.0, "forward": 4.0, "select": 1.0, "backward": 8.0}]


def test_every_name_of_megatron_core_is_known() -> None:
    root, names = Path(megatron.core.__path__[0]), set()
    for part in ("pipeline_parallel", "distributed", "optimizer"):
        for path in (root / part).rglob("*.py"):
            names |= set(re.findall(r"timers\(\s*'([a-z-]+)'", path.read_text(encoding="utf-8")))
    assert {"forward-compute", "all-grads-sync", "params-all-gather", "forward-recv"} <= names
    assert names == PHASE_OF.keys() | IGNORED
    assert set(PHASE_OF.values()) & OWN_WORK == {"forward", "backward", "optimizer"}


def test_the_meter_averages_the_parts_over_the_steps_that_are_finished(clock: LaggingClock) -> None:
    timers, host = StepTimers(clock), iter(range(1000))
    meter = PerfMeter(timers=timers, clock=lambda: float(next(host)))

    def step(seconds: float) -> None:
        with meter.step():
            with meter.data_wait():
                clock.now += 0.5
            timers("optimizer-inner-step", log_level=1).start(barrier=True)
            clock.now += seconds
            timers("optimizer-inner-step").stop()
            with timers.phase("grad_norm"):
                clock.now += 10.0

    step(1.0)
    assert "time/step_s" in (tags := meter.scalars()) and "time/optimizer_s" not in tags
    clock.done_until = clock.now
    step(99.0)
    step(99.0)
    tags = meter.scalars()
    assert (tags["time/optimizer_s"], tags["time/data_wait_s"], tags["time/grad_norm_s"]) == (1.0, 0.5, 10.0)
    assert meter.own_seconds() == 1.5  # the gradient norm waits for others
    clock.done_until = clock.now
    step(7.0)
    assert meter.scalars()["time/optimizer_s"] == 99.0
    assert meter.own_seconds() == 99.5 and meter.own_seconds() == 0.0


def test_rates_count_steps_only() -> None:
    now = 0.0
    meter = PerfMeter(
        world_size=2, flops_per_token=10.0, peak_flops=1e3, clock=lambda: now, timers=StepTimers(HostClock(lambda: now))
    )
    for _ in range(2):
        with meter.step():
            now += 2.0
        meter.count_tokens(100)
    with meter.phase("evaluation"):
        now += 4.0
    tags = meter.scalars()
    assert tags["time/step_s"] == 2.0 and tags["time/evaluation_s"] == 4.0 and tags["time/other_s"] == 2.0
    assert tags["perf/tokens_per_s"] == 50.0 and tags["perf/tokens_per_s_per_device"] == 25.0
    assert tags["perf/tflops_per_device"] == 250e-12 and tags["perf/mfu"] == 0.25
    assert tags["sys/goodput_share"] == 0.5
    assert "time/step_s" not in meter.scalars()
