"""Moments on the device's timeline."""

from __future__ import annotations

import pytest
import torch

from megarpt.device.clock import CudaClock, HostClock


def test_the_host_clock_measures_what_it_is_given() -> None:
    moments = iter([1.0, 3.5])
    clock = HostClock(lambda: next(moments))
    start, end = clock.mark(), clock.mark()
    assert clock.has_passed(end) and clock.seconds(start, end) == 2.5
    clock.recycle([start, end])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_marks_measure_the_device_without_waiting_for_it() -> None:
    clock, matrix = CudaClock(), torch.randn(8192, 8192, device="cuda")
    start = clock.mark()
    for _ in range(20):
        matrix = matrix @ matrix
    end = clock.mark()
    assert not clock.has_passed(end)
    torch.cuda.synchronize()
    assert clock.has_passed(end) and clock.seconds(start, end) > 0
    clock.recycle([start, end])
    assert clock.mark() in (start, end)
