"""A process that stands still is ended, with its stacks on file; one that moves is left alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megarpt.errors import EXIT_HANG
from megarpt.train.failures import Failure, Peers
from megarpt.train.rundir import RunDir
from megarpt.train.watchdog import Watchdog, rank_list

GONE = Failure(rank=1, host="h", pid=7, time="now", error="ValueError: a", traceback="t", exit_code=79)


class Ends:
    """Stands in for leaving the process: notes the code."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.happened = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.happened.set()


@pytest.fixture
def run(make_config: Callable[..., Any]) -> Iterator[RunDir]:
    with RunDir.open(make_config(), has_checkpoint=False) as run:
        yield run
        run.finish("finished")


def watch(run: RunDir, ends: Ends, peers: Peers | None = None, **options: Any) -> Watchdog:
    peers = peers or Peers(run.faults_dir(0), 0, 1)
    return Watchdog(run, peers, **{"hang_timeout_s": 0.3, "poll_s": 0.02, "grace_s": 0.3, "end": ends, **options})


def test_standing_still_ends_the_process_and_says_where(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    ends = Ends()
    with watch(run, ends, flight_record=lambda: b"[]") as watchdog:
        watchdog.beat("step 7")
        assert ends.happened.wait(60)
    assert ends.codes == [EXIT_HANG]
    record = json.loads((run.path / "exit.json").read_text())
    assert (record["status"], record["exit_code"]) == ("hung", EXIT_HANG)
    assert "rank 0 in step 7" in record["message"] and "rank 0 in step 7" in caplog.text
    stacks = (run.faults_dir(0) / "rank_0.stacks.txt").read_text()
    assert "test_standing_still_ends_the_process" in stacks and "_watch" in stacks  # every thread
    assert (run.faults_dir(0) / "rank_0.collectives.json").read_bytes() == b"[]"


def test_a_process_that_moves_is_left_alone(run: RunDir) -> None:
    ends = Ends()
    with watch(run, ends, hang_timeout_s=2.0) as watchdog:
        for step in range(25):
            watchdog.beat(f"step {step}")
            time.sleep(0.1)
    assert ends.codes == [] and not run.faults_dir(0).exists()


def test_switched_off_it_waits_for_ever(run: RunDir) -> None:
    ends = Ends()
    with watch(run, ends, hang_timeout_s=0.0):
        assert not ends.happened.wait(0.5)


def test_a_rank_follows_the_one_that_failed_when_it_cannot_end_by_itself(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    ends, peers = Ends(), Peers(run.faults_dir(0), 0, 1)
    peers._report(GONE)
    with watch(run, ends, peers, hang_timeout_s=0.0):
        assert ends.happened.wait(60)
    assert ends.codes[0] == 79
    record = json.loads((run.path / "exit.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 79)
    assert "rank 0 ended because rank 1 (host h, pid 7) failed: ValueError: a" in record["message"]


def test_the_hang_of_another_rank_is_reported_by_all(run: RunDir) -> None:
    ends, folder = Ends(), run.faults_dir(0)
    folder.mkdir(parents=True)
    (folder / "hang").touch()
    with watch(run, ends, hang_timeout_s=1000.0):
        assert ends.happened.wait(60)
    assert ends.codes == [EXIT_HANG] and (folder / "rank_0.hang.json").exists()


def test_a_rank_that_does_not_answer_is_named(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, peers = Ends(), Peers(run.faults_dir(0), 0, 1)
    peers.world_size = 3
    monkeypatch.setattr(peers, "failure", lambda: None)
    with watch(run, ends, peers):
        assert ends.happened.wait(60)
    message = json.loads((run.path / "exit.json").read_text())["message"]
    assert "ranks 1-2 did not answer" in message


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1, 2, 7], "ranks 0-2, 7"), ([0, 2], "ranks 0, 2"), ([4, 5], "ranks 4-5")]
)
def test_ranks_in_few_words(ranks: list[int], text: str) -> None:
    assert rank_list(ranks) == text


def test_stacks_go_where_they_can(run: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    ends = Ends()
    with watch(run, ends, Peers(blocked, 0, 1)):
        assert ends.happened.wait(60)
    assert ends.codes == [EXIT_HANG] and "cannot be written" in caplog.text
