"""`python -m megarpt pretrain`, killed by SIGKILL again and again, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarpt.config.load import dump_resolved
from megarpt.config.schema import PretrainConfig
from megarpt.testing.configs import TWO_LAYERS
from megarpt.train.checkpoint_files import list_checkpoints, read_manifest, resolve_checkpoint
from megarpt.train.metrics_file import read_metrics
from megarpt.train.reports import comparable
from megarpt.train.sharded import content_hash
from megarpt.train.weights import checkpoint_hash

STEP_TOKENS = 8 * 64
STEPS, INTERVAL = 40, 4
LIMIT_S = 120.0

# Everything that carries state from step to step: masters, dropout, a selection that draws numbers, a schedule.
SETTINGS: dict[str, Any] = {
    "train.train_tokens": STEPS * STEP_TOKENS,
    "train.precision": "bf16",
    "model.mcore": TWO_LAYERS | {"hidden_dropout": 0.1},
    "objective": {"scorer": "random", "weighting": "top_fraction", "fraction": 0.6},
    "batch": {"micro_batch_size": 4, "global_batch_size": 8},
    "checkpoint": {"interval_steps": INTERVAL, "keep_last": 2},
    "evaluation": {"interval_steps": 10, "at_start": True},
    "logging": {"tensorboard": False},
}


def start(cfg: PretrainConfig) -> subprocess.Popen[bytes]:
    """The command a person types."""
    folder = Path(cfg.run.dir)
    config = folder.with_suffix(".yaml")
    config.write_text(dump_resolved(cfg))
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "megarpt", "pretrain", str(config)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def finish(cfg: PretrainConfig) -> None:
    """Run to the end."""
    code = start(cfg).wait(LIMIT_S)
    assert code == 0, Path(cfg.run.dir).with_suffix(".log").read_text()[-5000:]


def wait_for(process: subprocess.Popen[bytes], cfg: PretrainConfig, is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_reached():
        log = Path(cfg.run.dir).with_suffix(".log")
        assert process.poll() is None, f"ended before it could be killed: {log.read_text()[-5000:]}"
        assert time.monotonic() < deadline, f"nothing happened: {log.read_text()[-5000:]}"
        time.sleep(0.001)


def lines(cfg: PretrainConfig) -> int:
    path = Path(cfg.run.dir) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(cfg: PretrainConfig, num_lines: int, delay_s: float) -> None:
    """Kill at a moment that has to do with nothing."""
    process = start(cfg)
    before = lines(cfg)
    wait_for(process, cfg, lambda: lines(cfg) >= before + num_lines)
    time.sleep(delay_s)
    process.kill()
    process.wait()


def kill_in_a_save(cfg: PretrainConfig, after_step: int) -> None:
    """Kill while a checkpoint of a step after `after_step` is being written."""
    checkpoints = Path(cfg.run.dir) / "checkpoints"
    left = set(checkpoints.glob("step_*.tmp-*"))  # by the process that was killed before
    process = start(cfg)

    def unfinished() -> list[Path]:
        return [path for path in checkpoints.glob("step_*.tmp-*") if path not in left and int(path.name[5:13]) > after_step]

    while True:
        wait_for(process, cfg, lambda: bool(unfinished()))
        process.send_signal(signal.SIGSTOP)
        if unfinished():
            break
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    assert unfinished()


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_the_same(make_config: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    straight = make_config(**SETTINGS, **{"run.dir": str(tmp_path / "straight")})
    killed = make_config(**SETTINGS, **{"run.dir": str(tmp_path / "killed")})
    finish(straight)

    rng = random.Random(5)
    kill_in_a_save(killed, after_step=0)  # in the first one: there is nothing to go back to yet
    kill_after(killed, rng.randint(INTERVAL + 2, 3 * INTERVAL), delay_s=rng.random() * 0.05)
    last = list_checkpoints(Path(killed.run.dir) / "checkpoints")[0]
    kill_in_a_save(killed, after_step=read_manifest(last).step)
    finish(killed)

    for kind in ("train", "valid"):
        wanted, got = (list(read_metrics(Path(cfg.run.dir) / "metrics.jsonl", kind)) for cfg in (straight, killed))
        assert [comparable(line) for line in got] == [comparable(line) for line in wanted], kind
        assert len(wanted) == (STEPS if kind == "train" else STEPS // 10 + 1)
    assert checkpoint_hash(straight.run.dir) == checkpoint_hash(killed.run.dir)
    optimizers = [content_hash(resolve_checkpoint(cfg.run.dir) / "training", 1 << 30) for cfg in (straight, killed)]
    assert optimizers[0] == optimizers[1]
    record = json.loads((Path(killed.run.dir) / "exit.json").read_text())
    assert (record["status"], record["restarts"], record["step"]) == ("finished", 3, STEPS)
    left = sorted(path.name for path in (Path(killed.run.dir) / "checkpoints").iterdir())
    assert left == ["latest", "step_00000036", "step_00000040"]
