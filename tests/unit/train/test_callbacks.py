"""Events in order, stacks of a hanging step, and what is counted as speed."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import pytest

from megarpt.structs import Progress
from megarpt.train.callbacks import Callback, CallbackList, HangWatch
from megarpt.train.perf import PerfMeter, flops_per_token, host_memory, peak_flops


def test_there_are_eight_events_and_a_list_passes_all_on(report_at: Any) -> None:
    events = [name for name, _ in inspect.getmembers(Callback, inspect.isfunction) if name.startswith("on_")]
    assert len(events) == 8
    seen: list[tuple[str, str]] = []

    def recorder(who: str) -> Callback:
        methods = {name: (lambda self, *args, name=name: seen.append((who, name))) for name in events}
        instance: Callback = type("Recorder", (Callback,), methods)()
        return instance

    both = CallbackList([recorder("a"), recorder("b")])
    report, progress = report_at(1), Progress(step=1)
    arguments: dict[str, tuple[Any, ...]] = {
        "on_step_end": (report, progress),
        "on_skipped_step": (report, progress),
        "on_evaluation": ({}, progress),
        "on_save": (Path("checkpoints/1"), progress),
        "on_error": (ValueError("x"), progress),
    }
    for event in events:
        getattr(Callback(), event)(*arguments.get(event, (progress,)))
        getattr(both, event)(*arguments.get(event, (progress,)))
    assert seen == [(who, event) for event in events for who in "ab"]


def test_a_step_that_hangs_leaves_its_stacks(tmp_path: Path, report_at: Any) -> None:
    path = tmp_path / "stacks_rank0.txt"
    watch = HangWatch(path, timeout_s=0.15)
    watch.on_fit_start(Progress())
    for _ in range(5):
        time.sleep(0.05)
        watch.on_step_end(report_at(1), Progress(step=1))
    assert path.read_text() == ""
    time.sleep(0.4)
    watch.on_fit_end(Progress(step=1))
    assert "test_a_step_that_hangs_leaves_its_stacks" in path.read_text()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rates_count_steps_only() -> None:
    clock = Clock()
    meter = PerfMeter(world_size=2, flops_per_token=1e9, peak_flops=1e12, memory=lambda: {"mem/peak_bytes": 5.0}, clock=clock)
    for _ in range(4):
        with meter.step():
            with meter.data_wait():
                clock.now += 0.5
            clock.now += 1.5
        meter.count_tokens(1000)
    with meter.phase("evaluation"):
        clock.now += 8.0
    tags = meter.scalars()
    assert tags == {
        "time/step_s": 2.0,
        "time/data_wait_s": 0.5,
        "time/evaluation_s": 8.0,
        "perf/tokens_per_s": 500.0,
        "perf/tokens_per_s_per_device": 250.0,
        "perf/tflops_per_device": 0.25,
        "perf/mfu": 0.25,
        "sys/goodput_share": 0.5,
        "mem/peak_bytes": 5.0,
    }
    assert set(meter.scalars()) == {"sys/goodput_share", "mem/peak_bytes"}


def test_no_mfu_without_a_known_peak() -> None:
    clock = Clock()
    meter = PerfMeter(flops_per_token=1e9, clock=clock)
    with meter.step():
        clock.now += 1.0
    assert "perf/mfu" not in meter.scalars()


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("cpu (2 threads)", "bf16", None),
    ],
)
def test_peaks(name: str, precision: str, peak: float | None) -> None:
    assert peak_flops(name, precision) == peak


def test_flops_of_a_known_shape() -> None:
    # 7e9 parameters, 32 layers, width 4096, 2048 tokens: attention adds 1.6e9 to 4.2e10.
    assert flops_per_token(7_000_000_000, 32, 4096, 2048) == 6 * 7e9 + 6 * 32 * 4096 * 2048


def test_memory_of_the_host(tmp_path: Path) -> None:
    memory = host_memory(tmp_path)
    assert memory["mem/host_rss_bytes"] > 1e6 and memory["mem/disk_free_bytes"] > 0
