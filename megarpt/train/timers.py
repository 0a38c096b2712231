"""Where the time of a step goes, measured on the device without making it wait.

megatron-core's schedules and optimizers call `config.timers(name).start()` and `.stop()` around their parts. Its own timers
synchronize the device at each of these calls. `StepTimers` keeps the contract and marks moments on the device's timeline
instead; they are read one step later or more, when the device has passed them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from megarpt.device.clock import DeviceClock, HostClock
from megarpt.train.phases import Phase

PHASE_OF: Mapping[str, Phase] = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    **dict.fromkeys(
        (
            "forward-recv",
            "forward-send",
            "backward-recv",
            "backward-send",
            "forward-send-backward-recv",
            "backward-send-forward-recv",
            "forward-send-forward-recv",
            "backward-send-backward-recv",
            "forward-backward-send-forward-backward-recv",
        ),
        "pipeline_wait",
    ),
    **dict.fromkeys(
        (
            "all-grads-sync",
            "conditional-embedder-grads-all-reduce",
            "non-tensor-parallel-grads-all-reduce",
            "embedding-grads-all-reduce",
        ),
        "grad_reduce",
    ),
    **dict.fromkeys(
        (
            "optimizer-copy-to-main-grad",
            "optimizer-unscale-and-check-inf",
            "optimizer-clip-main-grad",
            "optimizer-count-zeros",
            "optimizer-inner-step",
            "optimizer-copy-main-to-model-params",
        ),
        "optimizer",
    ),
    "params-all-gather": "param_gather",
}
"""megatron-core's names."""

IGNORED = frozenset({"forward-backward"})  # encloses the others


class PhaseTimer:
    """What megatron-core gets for a name."""

    __slots__ = ("_owner", "_phase")

    def __init__(self, owner: StepTimers, phase: Phase) -> None:
        self._owner, self._phase = owner, phase

    def start(self, barrier: bool = False) -> None:
        """Begin; `barrier` is what megatron-core would do before a measurement, and costs a step what it measures."""
        self._owner.enter(self._phase)

    def stop(self, barrier: bool = False) -> None:
        """End."""
        self._owner.leave()


class _NoTimer:
    __slots__ = ()

    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass


class StepTimers:
    """Splits every step into phases that do not overlap: a phase inside another is not part of the other.

    Outside `step` nothing is measured, so that an evaluation through the same schedules leaves no trace.
    """

    def __init__(self, clock: DeviceClock[Any] | None = None) -> None:
        """`clock` of the device; without one, the host's."""
        self._clock: DeviceClock[Any] = clock or HostClock()
        self._timers = {name: PhaseTimer(self, phase) for name, phase in PHASE_OF.items()}
        self._no_timer = _NoTimer()
        self._stack: list[Phase] = []  # empty outside a step
        self._ranges: list[record_function] = []
        self._marks: list[Any] = []  # of the open step
        self._phases: list[Phase] = []  # what lies between a mark and the next
        self._waiting: deque[tuple[list[Phase], list[Any]]] = deque()
        self.is_profiled = False  # whether a profiler wants the phases as named ranges

    def __call__(self, name: str, log_level: int | None = None) -> PhaseTimer | _NoTimer:
        """The timer of megatron-core's `name`."""
        return self._timers.get(name, self._no_timer)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimizer step."""
        self._stack, self._ranges, self._phases, self._marks = ["other"], [], [], [self._clock.mark()]
        try:
            yield
            self._mark(self._stack.pop())
            self._waiting.append((self._phases, self._marks))
        finally:
            self._stack = []

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Around a part of a step that megatron-core does not time."""
        self.enter(phase)
        yield
        self.leave()

    def enter(self, phase: Phase) -> None:
        """From here on the time belongs to `phase`."""
        if not self._stack:
            return
        self._mark(self._stack[-1])
        self._stack.append(phase)
        if self.is_profiled:
            self._ranges.append(record_function(f"megarpt.{phase}"))
            self._ranges[-1].__enter__()

    def leave(self) -> None:
        """From here on the time belongs to what encloses the phase."""
        if not self._stack:
            return
        self._mark(self._stack.pop())
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)

    def finished(self) -> list[dict[Phase, float]]:
        """Seconds by phase of each step that the device has finished since the last call. Never waits: on CUDA the newest
        step is usually still under way."""
        steps = []
        while self._waiting and self._clock.has_passed(self._waiting[0][1][-1]):
            phases, marks = self._waiting.popleft()
            seconds: dict[Phase, float] = {}
            for i, phase in enumerate(phases):
                seconds[phase] = seconds.get(phase, 0.0) + self._clock.seconds(marks[i], marks[i + 1])
            self._clock.recycle(marks)
            steps.append(seconds)
        return steps

    def _mark(self, phase: Phase) -> None:
        self._phases.append(phase)
        self._marks.append(self._clock.mark())


def attach(timers: StepTimers, models: Sequence[torch.nn.Module], optimizer: Any) -> None:
    """Have megatron-core's schedules, gradient finalization and optimizer report to `timers`."""
    for config in [*(model.config for model in models), optimizer.config]:
        config.timers = timers
