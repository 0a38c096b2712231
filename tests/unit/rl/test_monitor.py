"""The monitor: one line an iteration, a progress line in a fixed order, times that add up."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarpt.config.schema import LoggingConfig
from megarpt.errors import ConfigError
from megarpt.rl.monitor import PHASES, RlMonitor, combined, fields
from megarpt.structs import Progress, StepReport
from megarpt.train.metrics import MetricLog
from megarpt.train.metrics_file import read_metrics
from megarpt.train.perf import PerfMeter
from megarpt.train.progress import ProgressLine
from megarpt.train.rundir import RunDir

OBJECTIVE = {
    "policy/entropy_nats": 1.234,
    "policy/kl_ref_nats": 0.00215,
    "policy/kl_old_k3_nats": 0.5,
    "policy/clipped_low": 0.001,
    "policy/clipped_high": 0.003,
    "policy/sampler_gap_nats": 1.23e-4,
}
ROLLOUTS = {
    "rl/reward_mean": 0.41234,
    "rl/format_rate": 0.97,
    "rl/length_mean_tokens": 214.6,
    "rl/dead_groups": 0.311,
    "rl/truncated_share": 0.04,
    "rl/sampled_tokens": 1000.0,
}
SECONDS = {"generate": 6.2, "verify": 0.3, "score": 0.8, "train": 2.2, "rest": 0.5}


def report(**changed: Any) -> StepReport:
    values = {
        "loss_nats": 0.5,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "num_tokens": 10,
        "skipped": False,
        "metrics": OBJECTIVE,
    }
    return StepReport(**values | changed)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[RlMonitor, MetricLog, ProgressLine]]:
    def open_monitor(interval: int = 1, perf: PerfMeter | None = None) -> tuple[RlMonitor, MetricLog, ProgressLine]:
        log = MetricLog(RunDir(tmp_path, is_writer=True), LoggingConfig(interval_steps=interval))
        line = ProgressLine("rl", 20, unit="steps", interval_s=0.0)
        return RlMonitor(log, line, perf), log, line

    return open_monitor


def test_the_progress_line_shows_everything_in_one_order() -> None:
    shown = fields({**ROLLOUTS, **OBJECTIVE}, SECONDS)
    assert [f"{name} {value}" for name, value in shown.items()] == [
        "reward 0.412",
        "format 97%",
        "length 215",
        "entropy 1.23",
        "kl 0.0022",
        "clip 0.4%",
        "dead 31%",
        "cut 4%",
        "gap 1.2e-04",
        "generate/verify/score/train 62/3/8/22%",
    ]


def test_what_is_not_known_has_a_dash_and_keeps_its_place() -> None:
    nothing = fields({}, {})
    assert list(nothing) == list(fields({**ROLLOUTS, **OBJECTIVE}, SECONDS)) and set(nothing.values()) == {"-"}
    assert fields({"policy/kl_old_k3_nats": 0.5}, {})["kl"] == "0.5"  # without a reference


def test_an_iteration_is_a_line(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor, log, line = make()
    with caplog.at_level(logging.INFO, logger="megarpt.train.progress"), log, line:
        monitor.step([report()], Progress(step=1, tokens_seen=64), ROLLOUTS, SECONDS)
    (found,) = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert found["step"] == 1 and found["train/loss_nats"] == 0.5 and found["tokens/seen"] == 64
    for tag, value in {**ROLLOUTS, **OBJECTIVE}.items():
        assert found[tag] == value
    assert {name: found[f"time/{name}_s"] for name in SECONDS} == SECONDS
    assert found["time/iteration_s"] == pytest.approx(10.0)
    assert found["perf/sampled_tokens_per_s"] == pytest.approx(1000.0 / 6.2)
    assert "reward 0.412  format 97%" in caplog.text and "generate/verify/score/train 62/3/8/22%  1/20 steps" in caplog.text


def test_times_are_means_since_the_last_line_and_the_line_has_the_last_metrics(make: Any, tmp_path: Path) -> None:
    monitor, log, line = make(interval=2)
    with log, line:
        for step in range(1, 5):
            metrics = ROLLOUTS | {"rl/reward_mean": step / 10, "rl/sampled_tokens": 100.0 * step}
            monitor.step([report()], Progress(step=step), metrics, {"generate": float(step), "train": 1.0})
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["step"], first["rl/reward_mean"], second["step"], second["rl/reward_mean"]) == (2, 0.2, 4, 0.4)
    assert first["time/generate_s"] == 1.5 and second["time/generate_s"] == 3.5 and second["time/train_s"] == 1.0
    assert first["perf/sampled_tokens_per_s"] == second["perf/sampled_tokens_per_s"] == pytest.approx(100.0)


def test_a_skipped_update_is_always_written(make: Any, tmp_path: Path) -> None:
    monitor, log, line = make(interval=100)
    with log, line:
        monitor.step([report(), report(skipped=True, loss_nats=math.nan)], Progress(step=3), {}, SECONDS)
    (found,) = read_metrics(tmp_path / "metrics.jsonl")
    assert found["optim/skipped"] == 1.0 and math.isnan(float(found["train/loss_nats"]))


def test_the_rates_of_updates_join_the_line(make: Any, tmp_path: Path) -> None:
    clock = Clock()
    perf = PerfMeter(clock=clock)
    monitor, log, line = make(perf=perf)
    with log, line:
        with perf.step():
            clock.now += 2.0
        monitor.step([report()], Progress(step=1), ROLLOUTS, SECONDS, tokens=640)
    (found,) = read_metrics(tmp_path / "metrics.jsonl")
    assert found["time/step_s"] == 2.0 and found["perf/tokens_per_s"] == 320.0


def test_updates_of_an_iteration_are_one_report() -> None:
    found = combined(
        [
            report(loss_nats=1.0, num_tokens=10, grad_norm=3.0, metrics={"a": 1.0, "b": 2.0}),
            report(loss_nats=2.0, num_tokens=30, grad_norm=1.0, learning_rate=5e-4, metrics={"a": 3.0}),
        ]
    )
    assert found == StepReport(1.75, 3.0, 5e-4, 40, False, {"a": 2.5, "b": 2.0})
    assert combined([report()]) == report()
    assert math.isnan(combined([report(grad_norm=math.nan), report(grad_norm=2.0)]).grad_norm)
    assert combined([report(num_tokens=0), report(num_tokens=0, loss_nats=1.5)]).loss_nats == 1.0


def test_mistakes_are_named(make: Any) -> None:
    monitor, log, line = make()
    with log, line:
        with pytest.raises(ConfigError, match=r"got times of sleep, expected those of generate, verify, score, train, rest"):
            monitor.step([report()], Progress(step=1), {}, {"sleep": 1.0})
        with pytest.raises(ConfigError, match="no report of an optimizer step"):
            monitor.step([], Progress(step=1), {}, dict.fromkeys(PHASES, 1.0))
