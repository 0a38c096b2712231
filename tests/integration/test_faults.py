"""Two ranks under torchrun: whatever happens to one of them, both are gone soon, and log and `exit.json` say who it was."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarpt.config.load import dump_resolved
from megarpt.config.schema import PretrainConfig

FAILING_RUN = Path(__file__).with_name("failing_run.py")
LIMIT_S = 200.0
STEP_TOKENS = 8 * 64

MakeConfig = Callable[..., PretrainConfig]


def torchrun(cfg: PretrainConfig, what: str, rank: int) -> subprocess.Popen[str]:
    """Start two ranks of the run, one of which fails."""
    config = Path(cfg.run.dir).with_suffix(".yaml")
    config.write_text(dump_resolved(cfg))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return subprocess.Popen(
        [*launcher, str(FAILING_RUN), what, str(rank), "pretrain", str(config), "run.device=cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ended(process: subprocess.Popen[str]) -> str:
    """The log, once both ranks and their launcher are gone: 3 s after the event on two busy cores, 0.4 s on idle ones."""
    log, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0 and "it happens" in log, log
    return log


def exit_record(cfg: PretrainConfig) -> dict[str, Any]:
    return json.loads((Path(cfg.run.dir) / "exit.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("what", "rank"), [("raise", 1), ("kill", 1)])
def test_a_rank_takes_the_other_down_with_its_name(make_config: MakeConfig, what: str, rank: int) -> None:
    cfg = make_config(**{"evaluation.at_start": False})
    log = ended(torchrun(cfg, what, rank))
    told = f"rank {1 - rank} ended because rank {rank} "
    assert log.count("PeerFailedError") == log.count(told) == 1, log
    assert f"[rank{1 - rank}]: Traceback" not in log, log
    if what == "raise":
        assert log.index(f"[rank{rank}]: ValueError: as planned") < log.index(told), log
        assert f"on rank {rank} of 2" in log and "failing_run.py" in log
    else:
        assert re.search(r"rank 1 \(host .*, pid \d+\) is gone: killed", log), log
    record = exit_record(cfg)
    assert (record["status"], record["exit_code"], record["step"]) == ("failed", 1, 5)
    assert "rank 0 ended because rank 1 (host" in record["message"]
    assert what == "kill" or "ValueError: as planned" in record["message"]
    failure = json.loads((Path(cfg.run.dir) / "faults" / "attempt_0" / "failure.json").read_text())
    assert failure["rank"] == rank


@pytest.mark.slow
def test_a_hang_ends_with_the_place_of_every_rank(make_config: MakeConfig) -> None:
    cfg = make_config(**{"evaluation.at_start": False, "faults.hang_timeout_minutes": 0.1})
    log = ended(torchrun(cfg, "sleep", 1))
    assert re.search(r"rank 1 in step 6, \S*failing_run.py:\d+ failing", log), log
    assert re.search(r"rank 0 in step 6, .* < \w+/\w+.py:\d+ \w+", log), log
    record = exit_record(cfg)
    assert (record["status"], record["exit_code"], record["step"]) == ("hung", 81, 5)
    assert "failing_run.py" in record["message"]
    folder = Path(cfg.run.dir) / "faults" / "attempt_0"
    assert "failing_run.py" in (folder / "rank_1.stacks.txt").read_text()
    for rank in range(2):
        collectives = json.loads((folder / f"rank_{rank}.collectives.json").read_text())
        assert any("all_reduce" in entry["profiling_name"] for entry in collectives["entries"])
