"""Who failed first, who is gone, and what the others say; neighbours are processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megarpt.errors import DataError, PeerFailedError, StopRequested
from megarpt.train import failures
from megarpt.train.failures import Peers, is_broken_connection

BROKEN = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:65206")


@pytest.fixture(autouse=True)
def _no_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: None)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts rank 1 of two in a process that does as told, and returns once it is in its context."""
    context = multiprocessing.get_context("fork")
    processes = []

    def run(error: BaseException | None, ready: Any, go: Any) -> None:
        with Peers(tmp_path / "faults" / "attempt_0", 1, 2):
            ready.set()
            go.wait(60)
            if error is not None:
                raise error

    def begin(error: BaseException | None = None) -> Any:
        ready, go = context.Event(), context.Event()
        process = context.Process(target=run, args=(error, ready, go))
        process.start()
        processes.append(process)
        assert ready.wait(60)

        def end(number: int | None = None) -> int:
            if number is None:
                go.set()
            else:
                os.kill(process.pid, number)
            process.join(60)
            return process.pid

        return end

    yield begin
    for process in processes:
        process.kill()
        process.join()


def test_the_error_of_the_rank_that_failed_takes_the_place_of_a_broken_connection(start: Any, tmp_path: Path) -> None:
    end = start(DataError("the corpus is truncated"))
    with pytest.raises(PeerFailedError) as caught, Peers(tmp_path / "faults" / "attempt_0", 0, 2) as peers:
        assert peers.failure() is None
        pid = end()
        raise BROKEN
    assert f"rank 0 ended because rank 1 (host {os.uname().nodename}, pid {pid}) failed: DataError: the corpus is" in str(
        caught.value
    )
    assert caught.value.exit_code == DataError.exit_code and caught.value.__cause__ is BROKEN
    record = json.loads((tmp_path / "faults" / "attempt_0" / "failure.json").read_text())
    assert record["rank"] == 1 and "raise error" in record["traceback"] and record["summary"] in str(caught.value)


def test_a_killed_neighbour_is_found_by_its_lock(start: Any, tmp_path: Path) -> None:
    end = start()
    with pytest.raises(PeerFailedError) as caught, Peers(tmp_path / "faults" / "attempt_0", 0, 2) as peers:
        assert peers.failure() is None
        pid = end(signal.SIGKILL)
        raise BROKEN
    assert f"pid {pid}) is gone: killed" in str(caught.value) and caught.value.exit_code == 1


def test_a_neighbour_that_ends_well_is_not_gone(start: Any, tmp_path: Path) -> None:
    end = start(StopRequested("stopped"))
    with Peers(tmp_path / "faults" / "attempt_0", 0, 2) as peers:
        end()
        assert peers.failure() is None
    assert list(tmp_path.iterdir()) == []  # a good end leaves nothing behind


def test_the_first_failure_counts_and_its_own_error_stays(start: Any, tmp_path: Path) -> None:
    end = start(ValueError("second"))
    with pytest.raises(KeyError) as caught, Peers(tmp_path / "faults" / "attempt_0", 0, 2):
        raise KeyError("first")
    end()
    assert "on rank 0 of 2" in caught.value.__notes__[0]
    assert json.loads((tmp_path / "faults" / "attempt_0" / "failure.json").read_text())["error"] == "KeyError: 'first'"


def test_a_broken_connection_while_everyone_lives_is_a_failure_of_this_rank(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    monkeypatch.setattr(failures, "_WAIT_S", 0.2)
    with pytest.raises(RuntimeError, match="Connection closed"), Peers(tmp_path / "faults" / "attempt_0", 0, 2):
        raise BROKEN
    assert json.loads((tmp_path / "faults" / "attempt_0" / "failure.json").read_text())["rank"] == 0


def test_alone_a_failure_is_written_down_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="as planned"), Peers(tmp_path / "faults" / "attempt_0", 0, 1):
        raise ValueError("as planned")
    assert "as planned" in json.loads((tmp_path / "faults" / "attempt_0" / "failure.json").read_text())["traceback"]


def test_a_folder_that_cannot_be_written_does_not_hide_the_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "faults").touch()
    with pytest.raises(ValueError, match="as planned"), Peers(tmp_path / "faults" / "attempt_0", 0, 1):
        raise ValueError("as planned")
    assert "cannot be written" in caplog.text


def test_which_errors_come_from_a_peer() -> None:
    try:
        try:
            raise BROKEN
        except RuntimeError as error:
            raise OSError("the save failed") from error
    except OSError as error:
        assert is_broken_connection(error)
    assert is_broken_connection(dist.DistBackendError("NCCL error"))
    assert not is_broken_connection(RuntimeError("shape mismatch")) and not is_broken_connection(KeyboardInterrupt())
