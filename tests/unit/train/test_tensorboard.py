"""What TensorBoard reads back, and what it no longer shows after a restart."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from megarpt.config.schema import PretrainConfig
from megarpt.errors import ExtensionError
from megarpt.structs import Progress
from megarpt.train.metrics import MetricLog
from megarpt.train.reports import EvaluationResult
from megarpt.train.rundir import RunDir
from megarpt.train.tensorboard import TensorBoardSink, hyperparameters
from megarpt.train.wandb_sink import WandbSink

MakeConfig = Callable[..., PretrainConfig]
RESULT = EvaluationResult(loss_sum_nats=200.0, num_tokens=100, num_correct=25, bytes_per_token=4.0, seconds=1.5)


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def text_of(accumulator: EventAccumulator, tag: str) -> str:
    return str(accumulator.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode())


def attempt(config: PretrainConfig, steps: range, resume: Progress | None, report_at: Any, progress_at: Any, work: Any) -> None:
    with RunDir.open(config, has_checkpoint=resume is not None) as run, MetricLog.open(run, config, resume=resume) as log:
        if resume is None:
            log.evaluation({"clean": RESULT}, Progress())
        for step in steps:
            log.step(report_at(step), progress_at(step))
            if log.wants_tokens(step):
                log.tokens(*work, lambda ids: bytes(ids).decode(errors="replace"), progress_at(step))
        log.evaluation({"clean": RESULT}, progress_at(steps[-1]))
        run.finish("finished")


def test_a_run_shows_scalars_histograms_texts_layout_and_hparams(
    make_config: MakeConfig, report_at: Any, progress_at: Any, token_work: Any
) -> None:
    config = make_config(logging={"histogram_interval_steps": 5})
    attempt(config, range(1, 11), None, report_at, progress_at, token_work)
    board = read(Path(config.run.dir) / "tensorboard")

    loss = board.Scalars("train/loss_nats")
    assert [e.step for e in loss] == list(range(1, 11)) and loss[0].value == 5.0
    assert [e.step for e in board.Scalars("valid/clean/loss_nats")] == [0, 10]
    assert [h.step for h in board.Histograms("select/excess_nats_histogram")] == [5, 10]
    assert board.Histograms("train/token_loss_nats_histogram")[0].histogram_value.num == 10
    assert "train_tokens: 6400" in text_of(board, "run/config") and "packages" in text_of(board, "run/environment")
    assert "tokens kept (bold)" in text_of(board, "samples/kept_tokens")

    layout = layout_pb2.Layout.FromString(board.Tensors(metadata.CONFIG_SUMMARY_TAG)[-1].tensor_proto.string_val[0])
    assert [c.title for c in layout.category] == ["loss", "selection", "reinforcement", "health"]
    (margin,) = [c.margin.series[0] for c in layout.category[1].chart if c.HasField("margin")]
    assert board.Scalars(margin.value) and board.Scalars(margin.lower) and board.Scalars(margin.upper)

    by_tokens = read(Path(config.run.dir) / "tensorboard" / "by_tokens")
    assert [e.step for e in by_tokens.Scalars("train/loss_nats")] == [64 * s for s in range(1, 11)]
    assert all(tag.split("/")[0] in ("train", "valid", "select", "data") for tag in by_tokens.Tags()["scalars"])

    content = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["optimizer.lr"].number_value == pytest.approx(3e-4)
    assert "_hparams_/session_end_info" in board.summary_metadata


@pytest.mark.parametrize("torn_bytes", [0, 7])
def test_no_curve_runs_back_after_a_restart(
    make_config: MakeConfig, report_at: Any, progress_at: Any, token_work: Any, torn_bytes: int
) -> None:
    config = make_config(logging={"histogram_interval_steps": 2})
    attempt(config, range(1, 9), None, report_at, progress_at, token_work)
    folder = Path(config.run.dir) / "tensorboard"
    if torn_bytes:
        for first in [*folder.glob("events*"), *folder.glob("by_tokens/events*")]:
            first.write_bytes(first.read_bytes()[:-torn_bytes])
    attempt(config, range(5, 13), progress_at(4), report_at, progress_at, token_work)
    board, by_tokens = read(folder), read(folder / "by_tokens")
    assert [e.step for e in board.Scalars("train/loss_nats")] == list(range(1, 13))
    assert [e.step for e in board.Scalars("valid/clean/loss_nats")] == [0, 12]
    assert [e.step for e in board.Histograms("train/token_loss_nats_histogram")] == [2, 4, 6, 8, 10, 12]
    assert [e.step for e in by_tokens.Scalars("train/loss_nats")] == [64 * s for s in range(1, 13)]


def test_without_the_purge_the_curve_would_run_back(tmp_path: Path) -> None:
    """The control of the test above: the same restart with writers that are not told where it resumes."""
    for steps in (range(1, 9), range(5, 13)):
        with SummaryWriter(str(tmp_path)) as writer:
            for step in steps:
                writer.add_scalar("train/loss_nats", 1.0, step)
    assert [e.step for e in read(tmp_path).Scalars("train/loss_nats")] == [*range(1, 9), *range(5, 13)]


def test_going_back_in_a_run_hides_the_steps_that_are_done_again(tmp_path: Path, progress_at: Any) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in range(1, 9):
        sink.scalars({"train/loss_nats": 1.0}, progress_at(step))
    sink.rewind(progress_at(4))
    for step in range(5, 11):
        sink.scalars({"train/loss_nats": 2.0}, progress_at(step))
    sink.close(False)
    for folder, unit in ((tmp_path, 1), (tmp_path / "by_tokens", 64)):
        shown = [(e.step, e.value) for e in read(folder).Scalars("train/loss_nats")]
        assert shown == [(step * unit, 1.0 if step < 5 else 2.0) for step in range(1, 11)]


def test_a_fresh_start_in_an_old_folder_hides_the_old_run(tmp_path: Path, progress_at: Any) -> None:
    for steps in (range(1, 9), range(1, 3)):
        sink = TensorBoardSink(tmp_path)
        for step in steps:
            sink.scalars({"train/loss_nats": 1.0}, progress_at(step))
        sink.close(False)
    assert [e.step for e in read(tmp_path).Scalars("train/loss_nats")] == [1, 2]


def test_extreme_numbers_are_written(tmp_path: Path, progress_at: Any) -> None:
    values = {"a": math.nan, "b": math.inf, "c": 1e300, "d": -1e300}
    sink = TensorBoardSink(tmp_path)
    sink.scalars(values, progress_at(1))
    sink.histogram("h", np.array([1.0]), progress_at(1))
    sink.histogram("same", np.full(100, 2.0), progress_at(1))
    sink.close(False)
    board = read(tmp_path)
    assert math.isnan(board.Scalars("a")[0].value)
    assert [board.Scalars(tag)[0].value for tag in "bcd"] == [math.inf, math.inf, -math.inf]
    assert board.Histograms("same")[0].histogram_value.num == 100


def test_tokens_beyond_32_bits_keep_their_step(tmp_path: Path) -> None:
    progress = Progress(step=1, tokens_seen=15_000_000_000_000)
    sink = TensorBoardSink(tmp_path, resume=Progress(step=0, tokens_seen=14_999_999_999_999))
    sink.scalars({"train/loss_nats": 1.0}, progress)
    sink.close(False)
    assert read(tmp_path / "by_tokens").Scalars("train/loss_nats")[0].step == 15_000_000_000_000


def test_only_a_finished_run_is_a_success(make_config: MakeConfig) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        RunDir.open(make_config(), has_checkpoint=False) as run,
        MetricLog.open(run, make_config(), resume=None),
    ):
        raise KeyboardInterrupt
    metadata_read = read(run.tensorboard_dir).summary_metadata
    assert "_hparams_/session_start_info" in metadata_read and "_hparams_/session_end_info" not in metadata_read


def test_hyperparameters_are_flat_and_printable() -> None:
    config = {
        "run": {"seed": 1, "dir": "x"},
        "model": {"preset": "tiny", "vocab_size": None, "mcore": {"a": 1}},
        "data": {"train": []},
    }
    assert hyperparameters(config) == {"run.seed": 1, "model.preset": "tiny", "model.mcore": '{"a": 1}'}


def test_tensorboard_is_imported_when_a_sink_is_made_and_not_before() -> None:
    script = "import sys, megarpt.train.metrics; sys.exit('tensorboard' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_dashboard_that_was_asked_for_is_an_error(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name or m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExtensionError, match=rf"{name} cannot be imported.*pip install"):
        if name == "tensorboard":
            TensorBoardSink(tmp_path)
        else:
            WandbSink(tmp_path, "project", {})


def test_wandb_gets_our_steps_and_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress_at: Any) -> None:
    calls: list[tuple[str, Any]] = []

    class Run:
        def define_metric(self, *names: str, **_: str) -> None:
            calls.append(("define", names[0]))

        def log(self, values: dict[str, Any]) -> None:
            calls.append(("log", values))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: (calls.append(("init", kwargs)), Run())[1]  # type: ignore[attr-defined]
    fake.Histogram = lambda values: ("histogram", len(values))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        sink = WandbSink(tmp_path, "project", {"a": 1})
        sink.scalars({"train/loss_nats": 2.0}, progress_at(3))
        sink.histogram("h", np.zeros(4), progress_at(3))
        sink.flush()
        sink.close(is_finished=True)
    inits = [kwargs for name, kwargs in calls if name == "init"]
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["mode"] == "offline" and inits[0]["resume"] == "allow"
    assert ("log", {"train/loss_nats": 2.0, "step": 3, "tokens/seen": 192}) in calls
    assert ("log", {"h": ("histogram", 4), "step": 3}) in calls and ("finish", 0) in calls
