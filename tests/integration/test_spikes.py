"""Loss spikes in whole runs: reported, skipped, or rolled back with the data that caused them left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarpt.config.schema import PretrainConfig
from megarpt.data.batches import TokenBatches
from megarpt.device.runtime import Runtime
from megarpt.errors import NumericsError, StopRequested
from megarpt.run import pretrain
from megarpt.train.checkpoint_files import list_checkpoints
from megarpt.train.metrics_file import read_metrics
from megarpt.train.reports import comparable
from megarpt.train.signals import StopSignal
from megarpt.train.step import TrainStep

STEP_TOKENS, SAMPLES = 8 * 64, 8
STEPS = 20
BAD_STEP = 11  # counted from 0: the step whose samples are bad

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Steps whose first sample is in `bad` spike, whenever they come; `read` lists (step, first sample) as they are done."""
    data = SimpleNamespace(bad={BAD_STEP * SAMPLES}, read=[])
    call, reduce = TrainStep.__call__, TrainStep._reduce_metrics

    def noted(self: TrainStep, batches: Any, progress: Any) -> Any:
        data.read.append((progress.step, int(batches[0].sample_index[0])))
        return call(self, batches, progress)

    def spiking(self: TrainStep, settled: Any) -> Any:
        sums = reduce(self, settled)
        if int(self.outputs[0][0].sample_index[0]) in data.bad:
            sums["loss_sum"] = (20.0 * sums["loss_sum"][0], sums["loss_sum"][1])
        return sums

    monkeypatch.setattr(TrainStep, "__call__", noted)
    monkeypatch.setattr(TrainStep, "_reduce_metrics", spiking)
    return data


@pytest.fixture
def make(make_config: MakeConfig) -> MakeConfig:
    def config(on_spike: str, **overrides: Any) -> PretrainConfig:
        return make_config(
            **{
                "train.train_tokens": STEPS * STEP_TOKENS,
                "stability": {"spike_threshold": 40.0, "spike_window_steps": 8, "on_spike": on_spike},
                "checkpoint.interval_steps": 5,
                "evaluation.at_start": False,
            }
            | overrides
        )

    return config


def lines(cfg: PretrainConfig) -> list[dict[str, Any]]:
    return [comparable(line) for line in read_metrics(Path(cfg.run.dir) / "metrics.jsonl", "train")]


def exit_record(cfg: PretrainConfig) -> dict[str, Any]:
    return json.loads((Path(cfg.run.dir) / "exit.json").read_text())


def test_reported_only(make: MakeConfig, train: Any, data: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    cfg = make("report")
    train(cfg)
    got = lines(cfg)
    assert [line["optim/spikes_total"] for line in got] == [float(step >= BAD_STEP) for step in range(STEPS)]
    assert not any(line["optim/skipped"] for line in got)
    assert got[BAD_STEP]["optim/loss_zscore"] > 40.0 > got[BAD_STEP]["optim/grad_norm_zscore"]
    assert "optim/loss_zscore" not in got[7] and "optim/loss_zscore" in got[8]
    assert "spike: loss" in caplog.text and exit_record(cfg)["spikes"] == 1
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert [tag for tag in got[-1] if tag.startswith("optim/") and f"| `{tag}` |" not in documented] == []


def test_a_skipped_spike_changes_nothing_and_is_dumped(make: MakeConfig, train: Any, data: SimpleNamespace) -> None:
    cfg = make("skip")
    train(cfg)
    got = lines(cfg)
    assert [line["optim/skipped"] for line in got] == [float(step == BAD_STEP) for step in range(STEPS)]
    assert got[-1]["optim/spikes_total"] == 1.0 and got[-1]["optim/rollbacks_total"] == 0.0
    assert got[BAD_STEP]["tokens/trained"] == got[BAD_STEP - 1]["tokens/trained"]
    assert {key: exit_record(cfg)[key] for key in ("skipped_steps", "spikes", "rollbacks")} == {
        "skipped_steps": 1,
        "spikes": 1,
        "rollbacks": 0,
    }
    assert list(Path(cfg.run.dir, "dumps").glob(f"step_{BAD_STEP + 1:08d}*.json"))


def test_skipping_for_ever_ends_the_run(make: MakeConfig, cpu_runtime: Runtime, data: SimpleNamespace) -> None:
    data.bad = set(range(BAD_STEP * SAMPLES, 1000))
    with pytest.raises(NumericsError, match=r"4 steps in a row \(up to step 15\)"):
        pretrain.run(make("skip", **{"train.max_skipped_steps": 3}), cpu_runtime)


def test_rolled_back_the_data_since_the_checkpoint_are_left_out(
    make: MakeConfig, train: Any, data: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = make("rollback", **{"data.valid": {}})
    caplog.set_level("INFO")
    train(cfg)
    # Step 12 spikes: back to the checkpoint of step 10, and on with the samples behind the spike.
    once = [(step, step * SAMPLES) for step in range(BAD_STEP + 1)]
    assert data.read == once + [(step, (step + 2) * SAMPLES) for step in range(10, STEPS)]
    got = lines(cfg)
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    assert [line["optim/rollbacks_total"] for line in got] == [float(step > 10) for step in range(1, STEPS + 1)]
    assert "rolled back from step 12 to 10; samples 80 to 95 are left out (rollback 1 of at most 3)" in caplog.text
    record = exit_record(cfg)
    assert (record["status"], record["spikes"], record["rollbacks"], record["step"]) == ("finished", 1, 1, STEPS)
    discarded = (Path(cfg.run.dir) / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [11, 12]


def test_a_rollback_equals_a_run_that_moved_on_by_itself(
    make: MakeConfig, train: Any, data: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps, then the rest on the later samples: the same numbers without any rollback."""
    rolled, plain = make("rollback"), make("report", **{"run.dir": str(tmp_path / "plain")})
    train(rolled)
    data.bad, move = set(), TokenBatches.next_step

    def moving(self: TokenBatches) -> Any:
        if self.consumed_samples == 10 * SAMPLES:
            self.move_to(12 * SAMPLES)
        return move(self)

    monkeypatch.setattr(TokenBatches, "next_step", moving)
    train(plain)
    for a, b in zip(lines(rolled), lines(plain), strict=True):
        for key in ("train/loss_nats", "optim/grad_norm", "optim/learning_rate", "samples", "tokens/seen"):
            assert a[key] == b[key], (a["step"], key)


@pytest.mark.parametrize("stopped_at", [7, 15])
def test_a_rollback_survives_a_resume(
    make: MakeConfig,
    train: Any,
    data: SimpleNamespace,
    cpu_runtime: Runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_at: int,
) -> None:
    """The window of past losses and the samples left out are in the checkpoint: going on is as if nothing had happened."""
    straight, stopped = make("rollback", **{"run.dir": str(tmp_path / "straight")}), make("rollback")
    train(straight)
    check = StopSignal.check

    def stop_there(self: StopSignal, where: str) -> None:
        if where == f"at step {stopped_at}":
            raise StopRequested(where)
        check(self, where)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "check", stop_there)
        with pytest.raises(StopRequested):
            pretrain.run(stopped, cpu_runtime)
    train(stopped)
    assert lines(stopped) == lines(straight)
    assert exit_record(stopped)["rollbacks"] == 1


def test_too_many_rollbacks_end_the_run(make: MakeConfig, cpu_runtime: Runtime, data: SimpleNamespace) -> None:
    data.bad = set(range(BAD_STEP * SAMPLES, 1000))
    cfg = make("rollback")
    with pytest.raises(NumericsError, match=r"step 11 is a spike after 3 rollbacks.*max_rollbacks = 3"):
        pretrain.run(cfg, cpu_runtime)
    assert (exit_record(cfg)["status"], exit_record(cfg)["exit_code"], exit_record(cfg)["rollbacks"]) == ("unstable", 76, 3)
    assert list_checkpoints(Path(cfg.run.dir) / "checkpoints")[0].name == "step_00000010"


def test_before_the_first_checkpoint_a_spike_is_skipped(make: MakeConfig, train: Any, data: SimpleNamespace) -> None:
    cfg = make("rollback", **{"checkpoint.interval_steps": 15})
    train(cfg)
    assert [line["optim/skipped"] for line in lines(cfg)] == [float(step == BAD_STEP) for step in range(STEPS)]
    assert exit_record(cfg)["rollbacks"] == 0
