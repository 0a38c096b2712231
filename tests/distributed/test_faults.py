"""Signals and failures on one of two ranks: both act on them at the same place."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megarpt.config.schema import EvaluateOptions, PretrainConfig, ScoreOptions
from megarpt.device import runtime
from megarpt.errors import MegarptError
from megarpt.run import evaluate, pretrain, score
from megarpt.testing.configs import tiny_config
from megarpt.testing.distributed import spawn
from megarpt.testing.tiny import text_documents, write_text_corpus
from megarpt.train.checkpoint_files import latest_checkpoint
from megarpt.train.failures import Peers, together
from megarpt.train.rundir import RunDir
from megarpt.train.signals import StopSignal
from megarpt.train.step import TrainStep
from megarpt.train.watchdog import Watchdog

SMALL = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 2, "ffn_hidden_size": 48}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_text_corpus(folder / "train", text_documents(60, seed=1))
    write_text_corpus(folder / "held", text_documents(20, seed=2))
    return folder


@pytest.fixture
def cfg(corpora: Path, tmp_path: Path) -> PretrainConfig:
    return tiny_config(
        **{
            "run.dir": str(tmp_path / "run"),
            "run.device": "cpu",
            "model.mcore": SMALL,
            "data.train": [{"path": str(corpora / "train")}],
            "data.valid": {"held": str(corpora / "held")},
            "batch": {"micro_batch_size": 2, "global_batch_size": 4},
            "train.train_tokens": 6 * 4 * 64,
            "logging.tensorboard": False,
        }
    )


def outcome(job: Any, *arguments: Any) -> tuple[str, str]:
    """Type and message of what a job of this rank ends with."""
    try:
        job(*arguments, runtime.start("cpu"))
    except (MegarptError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


def signalled(job: Any, options: Any, where: str, count: int) -> tuple[str, str]:
    """Rank 1 gets SIGUSR1 when it comes to a safe point for the `count`th time; rank 0 gets nothing."""
    reached, check = [], StopSignal.check

    def check_there(self: StopSignal, place: str) -> None:
        reached.append(place)
        if dist.get_rank() == 1 and reached.count(where) == count:
            os.kill(os.getpid(), signal.SIGUSR1)
        check(self, place)

    StopSignal.check = check_there  # type: ignore[method-assign]  # the process ends with the test
    return outcome(job, options)


@pytest.mark.parametrize(
    ("where", "count", "saved"),
    [("before opening the data", 1, None), ("in the evaluation after step 0", 2, 0), ("at step 3", 1, 3)],
)
def test_a_signal_on_one_rank_stops_both_at_the_same_place(
    cfg: PretrainConfig, where: str, count: int, saved: int | None
) -> None:
    there, here = spawn(2, signalled, pretrain.run, cfg, where, count)
    assert there == here == ("StopRequested", f"stopped on SIGUSR1 {where}; run the same command again")
    record = json.loads((Path(cfg.run.dir) / "exit.json").read_text())
    assert (record["status"], record["exit_code"]) == ("resumable", 75)
    newest = latest_checkpoint(f"{cfg.run.dir}/checkpoints")
    assert (None if newest is None else int(newest.name[5:])) == saved
    assert not (Path(cfg.run.dir) / "faults").exists()
    if saved:
        assert spawn(2, signalled, pretrain.run, cfg, "nowhere", 1) == [("", "")] * 2


def test_a_signal_on_one_rank_stops_an_evaluation(cfg: PretrainConfig) -> None:
    assert spawn(1, signalled, pretrain.run, cfg, "nowhere", 1) == [("", "")]
    options = EvaluateOptions(checkpoint=cfg.run.dir, micro_batch_size=2, device="cpu")
    there, here = spawn(2, signalled, evaluate.run, options, "in the evaluation", 2)
    assert there == here == ("StopRequested", "stopped on SIGUSR1 in the evaluation; run the same command again")


def signalled_score(options: ScoreOptions, count: int) -> tuple[str, str]:
    reached, agreed = [], StopSignal.agreed

    def agreed_there(self: StopSignal) -> bool:
        reached.append(1)
        if dist.get_rank() == 1 and len(reached) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(self)

    StopSignal.agreed = agreed_there  # type: ignore[method-assign]
    return outcome(score.run, options)


@pytest.mark.parametrize(("count", "where"), [(2, "before opening the corpus"), (6, "after 12 windows")])
def test_a_signal_on_one_rank_stops_scoring(cfg: PretrainConfig, tmp_path: Path, count: int, where: str) -> None:
    assert spawn(1, signalled, pretrain.run, cfg, "nowhere", 1) == [("", "")]
    prefix = tmp_path / "scored"
    options = ScoreOptions(
        reference=cfg.run.dir, corpus=cfg.data.train[0].path, output_prefix=str(prefix), micro_batch_size=2, device="cpu"
    )
    there, here = spawn(2, signalled_score, options, count)
    assert there == here == ("StopRequested", f"stopped on SIGTERM {where}; run the same command again")
    assert not Path(f"{prefix}.json").exists()
    assert spawn(2, signalled_score, options, 1 << 30) == [("", "")] * 2
    assert Path(f"{prefix}.json").exists()


def failing_run(cfg: PretrainConfig, rank: int) -> tuple[str, str]:
    original = TrainStep.__call__

    def failing(self: TrainStep, batches: Any, progress: Any) -> Any:
        if progress.step == 3 and dist.get_rank() == rank:
            raise ValueError("as planned")
        return original(self, batches, progress)

    TrainStep.__call__ = failing  # type: ignore[method-assign]
    return outcome(pretrain.run, cfg)


def test_the_rank_that_writes_fails(cfg: PretrainConfig) -> None:
    there, here = spawn(2, failing_run, cfg, 0)
    assert there == ("ValueError", "as planned")
    assert here[0] == "PeerFailedError"
    assert here[1].startswith("rank 1 ended because rank 0 (host ") and "failed: ValueError: as planned" in here[1]
    record = json.loads((Path(cfg.run.dir) / "exit.json").read_text())
    assert record["message"].startswith("ValueError: as planned; on rank 0 of 2")


def test_a_run_folder_that_cannot_be_opened_ends_both(cfg: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked = cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(tmp_path / "file" / "run")})})
    first, second = spawn(2, signalled, pretrain.run, blocked, "nowhere", 1)
    assert first == second and first[0] == "ConfigError" and "cannot make the folder" in first[1]


def hold_the_interpreter(folder: Path) -> None:
    run = RunDir(folder, is_writer=True)
    peers = Peers(folder / "faults" / "attempt_0", 0, 1)
    with Watchdog(run, peers, hang_timeout_s=0.5, poll_s=0.05, grace_s=0.1):
        time.sleep(0.2)
        ctypes.PyDLL(None).sleep(1000)  # unlike CDLL it does not let other threads run


def test_native_code_that_holds_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0 of 1 died without a word"):
        spawn(1, hold_the_interpreter, tmp_path)


def raise_on(rank: int) -> str:
    def action() -> str:
        if dist.get_rank() == rank:
            raise MegarptError(f"on rank {rank}")
        return "fine"

    try:
        return together(action)
    except MegarptError as error:
        return str(error)


@pytest.mark.parametrize(("rank", "result"), [(0, "on rank 0"), (1, "on rank 1"), (2, "fine")])
def test_together_or_not_at_all(rank: int, result: str) -> None:
    assert spawn(2, raise_on, rank) == [result, result]
