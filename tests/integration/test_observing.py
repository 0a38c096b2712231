"""What a run says about itself while it goes: the split of its steps, traces, reports."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megarpt.config.schema import PretrainConfig
from megarpt.device import runtime
from megarpt.device.runtime import Runtime
from megarpt.errors import DataError, StopRequested
from megarpt.run import pretrain
from megarpt.testing.distributed import spawn
from megarpt.train.metrics_file import read_metrics
from megarpt.train.run_report import read_run
from megarpt.train.signals import StopSignal

STEP_TOKENS = 8 * 64
SELECTION = {"scorer": "random", "weighting": "top_fraction", "fraction": 0.6}


def test_the_parts_of_a_step_are_its_whole(make_config, train) -> None:
    lines = train(make_config(**{"objective": SELECTION}))
    parts = ("data_wait", "forward", "select", "backward", "grad_reduce", "grad_norm", "optimizer", "other")
    for line in lines:
        seconds = {part: line[f"time/{part}_s"] for part in parts}
        assert all(value > 0 for value in seconds.values()), seconds
        assert sum(seconds.values()) == pytest.approx(line["time/step_s"], rel=0.05, abs=1e-3)
        assert "time/reference_s" not in line and "time/pipeline_wait_s" not in line


def traces(cfg: Any) -> dict[str, list[dict[str, Any]]]:
    """Trace file -> its events."""
    files = sorted(Path(cfg.run.dir, "profile").iterdir())
    return {path.name: json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] for path in files}


def ranges(events: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    """The named ranges of a phase on the host."""
    return [e for e in events if e.get("name") == f"megarpt.{phase}" and e.get("cat") == "user_annotation"]


def test_a_trace_has_the_steps_asked_for_with_their_phases(make_config, train, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="megarpt.train.profiler")
    cfg = make_config(**{"profile": {"steps": [4, 5], "record": ["shapes"]}})
    train(cfg)
    ((name, events),) = traces(cfg).items()
    assert name == "steps_00000004-00000005_rank0.pt.trace.json.gz"
    assert f"{cfg.run.dir}/profile/{name}" in caplog.text and "ui.perfetto.dev" in caplog.text
    names = [str(event.get("name")) for event in events]
    assert "aten::mm" in names and len({each for each in names if each.startswith("ProfilerStep#")}) == 2
    micro_batches = 2
    for phase, times in {"data_wait": 1, "forward": micro_batches, "backward": micro_batches, "grad_norm": 1}.items():
        assert len(ranges(events, phase)) == 2 * times, phase
    assert ranges(events, "grad_reduce") and ranges(events, "optimizer")
    forward = ranges(events, "forward")[0]
    embeddings = [e for e in events if e.get("name") == "aten::embedding"]
    inside = [e for e in embeddings if forward["ts"] <= e["ts"] <= forward["ts"] + forward["dur"]]
    assert inside and "Input Dims" in inside[0]["args"]


@pytest.mark.parametrize("step", [2, 12])
def test_traces_at_the_ends_of_a_run(make_config, train, step: int) -> None:
    cfg = make_config(**{"profile": {"steps": [step, step]}})
    train(cfg)
    ((name, events),) = traces(cfg).items()
    assert f"steps_{step:08d}-{step:08d}" in name
    assert len(ranges(events, "data_wait")) == 1
    assert not any("Input Dims" in event.get("args", {}) for event in events)


def test_a_resumed_run_records_what_is_left_and_says_so_when_nothing_is(
    make_config, train, cpu_runtime: Runtime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"profile": {"steps": [4, 9]}, "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "lr_decay_tokens": 12 * STEP_TOKENS}}
    cfg = make_config(**settings)

    def stop_at_step_6(self: StopSignal, where: str) -> None:
        if where == "at step 6":
            raise StopRequested(where)

    with monkeypatch.context() as patch, pytest.raises(StopRequested):
        patch.setattr(StopSignal, "check", stop_at_step_6)
        pretrain.run(cfg, cpu_runtime)
    assert "ended before step 9" in caplog.text and not Path(cfg.run.dir, "profile").exists()
    train(make_config(**settings, **{"train.train_tokens": 9 * STEP_TOKENS}))
    assert list(traces(cfg)) == ["steps_00000008-00000009_rank0.pt.trace.json.gz"]
    assert "are behind" not in caplog.text
    train(cfg)
    assert "profile.steps [4, 9] are behind: the run goes on from step 9" in caplog.text


def test_a_trace_that_cannot_be_written_is_an_error_that_names_it(make_config, cpu_runtime: Runtime) -> None:
    cfg = make_config(**{"profile": {"steps": [4, 5]}})
    Path(cfg.run.dir).mkdir()
    Path(cfg.run.dir, "profile").touch()
    with pytest.raises(DataError, match=r"cannot write .*/profile/steps_00000004-00000005_rank0"):
        pretrain.run(cfg, cpu_runtime)


def pretrain_rank(cfg: PretrainConfig) -> int:
    return pretrain.run(cfg, runtime.start("cpu"))


def test_two_ranks_are_compared_and_traced_and_reported(make_config) -> None:
    settings = {"logging": {"straggler_interval_steps": 4, "interval_steps": 3}, "profile": {"steps": [3, 4], "ranks": [1]}}
    cfg = make_config(**settings)
    assert spawn(2, pretrain_rank, cfg) == [0, 0]
    assert list(traces(cfg)) == ["steps_00000003-00000004_rank1.pt.trace.json.gz"]
    lines = list(read_metrics(Path(cfg.run.dir) / "metrics.jsonl", "train"))
    compared = [line for line in lines if "time/rank_spread" in line]
    assert [line["step"] for line in compared] == [6, 9, 12]  # of the comparisons at 4, 8 and 12
    assert all(line["time/rank_spread"] >= 1.0 and line["time/slowest_rank"] in (0.0, 1.0) for line in compared)
    (hosts,) = json.loads(Path(cfg.run.dir, "environment.json").read_text())["hosts"].values()
    assert hosts == [0, 1]
    report = read_run(Path(cfg.run.dir))
    assert report.status == "finished" and report.problems == [] and report.stragglers["comparisons"] == 3
    assert report.goodput is not None and 0.0 < report.goodput.share < 1.0
    assert report.goodput.useful_s == pytest.approx(3 * sum(line["time/step_s"] for line in lines))
    assert [c.step for c in report.checkpoints] == [12] and report.checkpoints[0].num_bytes


def test_without_profile_steps_there_is_no_trace(make_config, train) -> None:
    cfg = make_config()
    train(cfg)
    assert not Path(cfg.run.dir, "profile").exists()
