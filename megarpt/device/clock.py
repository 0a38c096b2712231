"""Moments on the device's own timeline, taken without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import torch

Mark = TypeVar("Mark")


class DeviceClock(Protocol[Mark]):
    """Marks moments now, tells the seconds between them later."""

    def mark(self) -> Mark:
        """This moment, behind everything that was queued so far."""
        ...

    def has_passed(self, mark: Mark) -> bool:
        """Whether the device has got there."""
        ...

    def seconds(self, start: Mark, end: Mark) -> float:
        """Between two marks that have passed."""
        ...

    def recycle(self, marks: Iterable[Mark]) -> None:
        """Take back marks that nobody asks about any more."""
        ...


class HostClock:
    """For a device that computes before a call returns: a CPU."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def mark(self) -> float:
        return self._now()

    def has_passed(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def recycle(self, marks: Iterable[float]) -> None:
        pass


class CudaClock:
    """CUDA events on the current stream. Cost: a few microseconds of the host for a mark, none of the device."""

    def __init__(self) -> None:
        self._spare: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def recycle(self, marks: Iterable[torch.cuda.Event]) -> None:
        self._spare.extend(marks)
