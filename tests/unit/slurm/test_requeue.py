from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megarpt import errors
from megarpt.train.rundir import EXIT_CODES

SCRIPT = Path(__file__).parents[3] / "slurm" / "requeue.py"


class Job:
    """Attempts of one job, played through."""

    def __init__(self, requeue: ModuleType, folder: Path, *, has_run: bool = True) -> None:
        self.requeue, self.folder, self.run = requeue, folder / "job", folder / "run" if has_run else None
        self.folder.mkdir()
        (folder / "run" / "checkpoints").mkdir(parents=True)
        self.attempt, self.opened = -1, -1

    @property
    def where(self) -> dict[str, Any]:
        return {"attempt": self.attempt, "run_dir": str(self.run or "")}

    def begin(self) -> None:
        self.attempt += 1
        self.requeue.begin(str(self.folder), **self.where)

    def record(self, status: str, exit_code: int | None) -> None:
        """What the run writes about itself."""
        assert self.run is not None
        self.opened += 1
        content = {"status": status, "exit_code": exit_code, "message": "m", "step": 7, "restarts": self.opened}
        (self.run / "exit.json").write_text(json.dumps(content))

    def save(self, step: int) -> None:
        assert self.run is not None
        (self.run / "checkpoints" / "latest").write_text(f"step_{step:08}\n")

    def end(self, exit_code: int, **more: Any) -> Any:
        return self.requeue.decide(str(self.folder), exit_code=exit_code, **self.where, **more)[0]

    def crash(self) -> Any:
        self.begin()
        self.record("running", None)
        return self.end(1)


@pytest.fixture
def job(requeue: ModuleType, tmp_path: Path) -> Job:
    return Job(requeue, tmp_path)


@pytest.mark.parametrize(
    ("status", "code"), [*EXIT_CODES.items(), ("failed", errors.EXIT_DATA), ("failed", errors.EXIT_ENVIRONMENT)]
)
def test_what_the_run_says_decides(job: Job, status: str, code: int) -> None:
    job.begin()
    job.record(status, code)
    again = status in ("resumable", "hung") or (status == "failed" and code != errors.EXIT_DATA)
    assert job.end(0 if code in (0, 75) else 1) == ("requeue" if again else code)


def test_the_codes_are_those_of_the_package(requeue: ModuleType) -> None:
    assert set(requeue.FINAL) == {errors.EXIT_UNSTABLE, errors.EXIT_CONFIG, errors.EXIT_DATA}
    assert (requeue.OK, requeue.RESUMABLE, requeue.PREFLIGHT) == (
        errors.EXIT_OK,
        errors.EXIT_RESUMABLE,
        errors.EXIT_ENVIRONMENT,
    )


def test_what_an_earlier_attempt_said_does_not_count(job: Job) -> None:
    job.begin()
    job.record("resumable", 75)
    assert job.end(0) == "requeue"
    job.begin()  # ends before it opens the run folder
    assert [job.end(1, max_failures=1), job.requeue.read(str(job.folder))[-1]["code"]] == [1, 1]


@pytest.mark.parametrize("code", [76, 78, 79])
def test_a_mistake_found_before_the_run_folder_is_opened(job: Job, tmp_path: Path, code: int) -> None:
    (tmp_path / "exit").write_text(json.dumps({"exit_code": code, "rank": 0, "error": "ConfigError: x"}))
    job.begin()
    assert job.end(1, exit_file=str(tmp_path / "exit")) == code


def test_a_job_without_a_run_folder(requeue: ModuleType, tmp_path: Path) -> None:
    job = Job(requeue, tmp_path, has_run=False)
    job.begin()
    (tmp_path / "exit").write_text(json.dumps({"exit_code": 75, "rank": 0, "error": "StopRequested: x"}))
    assert job.end(0, exit_file=str(tmp_path / "exit")) == "requeue"
    job.begin()
    assert job.end(0, exit_file=str(tmp_path / "none")) == 0
    job.begin()
    assert job.end(137, exit_file=str(tmp_path / "none")) == "requeue"


def test_failures_without_a_new_checkpoint_end(job: Job) -> None:
    assert [job.crash() for _ in range(3)] == ["requeue", "requeue", 1]


def test_a_new_checkpoint_starts_the_count_again(job: Job) -> None:
    assert [job.crash(), job.crash()] == ["requeue", "requeue"]
    job.begin()
    job.record("running", None)
    job.save(10)
    assert job.end(1) == "requeue"
    assert [job.crash(), job.crash(), job.crash()] == ["requeue", "requeue", 1]


def test_a_checkpoint_that_was_made_again_is_not_new(job: Job) -> None:
    job.save(20)
    job.begin()
    job.record("running", None)
    job.save(10)  # the newest was damaged, and the run went back
    job.end(1)
    job.begin()
    job.record("running", None)
    job.save(20)
    assert job.end(1, max_failures=2) == 1


def test_a_stop_on_a_signal_starts_the_count_again(job: Job) -> None:
    assert [job.crash(), job.crash()] == ["requeue", "requeue"]
    job.begin()
    job.record("resumable", 75)
    assert job.end(0) == "requeue"
    assert [job.crash(), job.crash(), job.crash()] == ["requeue", "requeue", 1]


def test_an_attempt_that_lost_its_node_counts(job: Job) -> None:
    job.begin()
    job.record("running", None)
    job.begin()
    job.record("running", None)
    assert job.crash() == 1


def test_a_failed_preflight_is_tried_elsewhere_and_counts(job: Job) -> None:
    for expected in ("requeue", "requeue", 80):
        job.begin()
        assert job.end(80, exclude="n1,n2") == expected
    assert job.requeue.read(str(job.folder))[-1]["why"].startswith("the preflight failed on n1,n2")


def test_half_a_line_does_not_hide_the_rest(job: Job) -> None:
    job.crash()
    with open(job.folder / "attempts.jsonl", "a") as file:
        file.write('{"event": "be')
    job.crash()
    assert len(job.requeue.read(str(job.folder))) == 4


def test_as_the_batch_script_calls_it(tmp_path: Path) -> None:
    def run(verb: str, *arguments: str) -> str:
        command = ["python3", "-I", str(SCRIPT), verb, str(tmp_path), "--attempt", "0", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert run("begin", "--nodes", "a,b") == ""
    assert run("decide", "--exit-code", "78") == "78\n"
    assert run("decide", "--exit-code", "139", "--max-failures", "2") == "requeue\n"
