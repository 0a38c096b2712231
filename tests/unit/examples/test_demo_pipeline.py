"""The demo's stage runner: what is done is kept, what changed is done again, failures and signals pass through."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

DEMO = Path(__file__).parents[3] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

pipeline = importlib.import_module("pipeline")


def shell(out: Path, script: str, name: str = "one", **more: Any) -> Any:
    command = pipeline.Command(("sh", "-c", script), name)
    return pipeline.Stage(name, name.title(), (command,), (out / name,), **more)


def run(out: Path, *stages: Any, terminal: bool = False) -> str:
    stream = io.StringIO()
    pipeline.Pipeline(out, stages, Console(file=stream, force_terminal=terminal, width=100)).run()
    return stream.getvalue()


def test_a_finished_stage_is_kept(tmp_path: Path) -> None:
    stage = shell(tmp_path, f"date +%N > {tmp_path}/one")
    assert "$ sh -c" in run(tmp_path, stage)
    written = (tmp_path / "one").read_text()
    assert "already done" in run(tmp_path, stage)
    assert (tmp_path / "one").read_text() == written


def test_a_missing_output_is_made_again(tmp_path: Path) -> None:
    stage = shell(tmp_path, f"echo x > {tmp_path}/one")
    run(tmp_path, stage)
    (tmp_path / "one").unlink()
    run(tmp_path, stage)
    assert (tmp_path / "one").exists()


def test_a_changed_file_starts_its_stage_and_those_after_it_anew(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("a")
    count = "echo x >> {out}/{name}"
    first = shell(tmp_path, count.format(out=tmp_path, name="one"), "one", files=(config,))
    second = shell(tmp_path, count.format(out=tmp_path, name="two"), "two", needs=("one",))
    other = shell(tmp_path, count.format(out=tmp_path, name="three"), "three")
    run(tmp_path, first, second, other)
    (tmp_path / "three").write_text("kept")
    config.write_text("b")
    shown = run(tmp_path, first, second, other)
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text() == "x\n"  # removed and written once
    assert (tmp_path / "three").read_text() == "kept"
    assert shown.count("already done") == 1


def test_an_interrupted_stage_continues_on_what_it_left(tmp_path: Path) -> None:
    stage = shell(tmp_path, f"echo x >> {tmp_path}/one; test $(wc -l < {tmp_path}/one) -ge 2")
    with pytest.raises(pipeline.StageFailed):
        run(tmp_path, stage)
    run(tmp_path, stage)
    assert (tmp_path / "one").read_text() == "x\nx\n"


def test_a_failure_has_its_exit_code_and_its_log(tmp_path: Path) -> None:
    stage = shell(tmp_path, "echo the reason; exit 79")
    with pytest.raises(pipeline.StageFailed) as caught:
        run(tmp_path, stage, shell(tmp_path, "true", "two"))
    assert caught.value.code == 79
    stream = io.StringIO()
    pipeline.show_failure(Console(file=stream), caught.value)
    assert "the reason" in stream.getvalue() and "exit code 79" in stream.getvalue()
    assert not (tmp_path / "logs" / "two.log").exists()


def test_a_command_that_writes_nothing_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(pipeline.StageFailed, match="did not write"):
        run(tmp_path, shell(tmp_path, "true"))


def test_commands_side_by_side_share_the_cores_and_end_together(tmp_path: Path) -> None:
    commands = tuple(
        pipeline.Command(("sh", "-c", f"echo $OMP_NUM_THREADS > {tmp_path}/{name}; sleep {seconds}; exit {code}"), name)
        for name, seconds, code in (("slow", 60, 0), ("bad", 0, 3))
    )
    stage = pipeline.Stage("both", "Both", commands, (), side_by_side=True)
    began = time.monotonic()
    with pytest.raises(pipeline.StageFailed) as caught:
        run(tmp_path, stage)
    assert caught.value.code == 3 and time.monotonic() - began < 30
    assert int((tmp_path / "slow").read_text()) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_pipelines_at_the_same_time_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    stage = shell(tmp_path, f"echo $OMP_NUM_THREADS > {tmp_path}/one")
    pipeline.Pipeline(tmp_path, (stage,), Console(file=io.StringIO()), sharers=3).run()
    assert (tmp_path / "one").read_text() == "2\n"


def test_the_terminal_shows_every_stage(tmp_path: Path) -> None:
    shown = run(tmp_path, shell(tmp_path, f"echo x > {tmp_path}/one"), terminal=True)
    assert "One" in shown and "total" in shown


def test_standard_output_goes_where_it_is_told(tmp_path: Path) -> None:
    command = pipeline.Command(("sh", "-c", "echo out; echo log >&2"), "one", tmp_path / "results" / "out.txt")
    run(tmp_path, pipeline.Stage("one", "One", (command,), (tmp_path / "results",)))
    assert (tmp_path / "results" / "out.txt").read_text() == "out\n"
    assert (tmp_path / "logs" / "one.log").read_text() == "log\n"
    assert command.echo().endswith(f"> {tmp_path}/results/out.txt")


def test_one_demo_in_a_folder(tmp_path: Path) -> None:
    with pipeline.only_one(tmp_path) as first, pipeline.only_one(tmp_path) as second:
        assert (first, second) == (True, False)
    with pipeline.only_one(tmp_path) as again:
        assert again


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_command_finish_its_work(tmp_path: Path, signum: signal.Signals) -> None:
    script = f"trap 'echo saved > {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/up; while true; do sleep 0.05; done"
    program = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(DEMO)!r})
        from rich.console import Console
        from pipeline import Command, Pipeline, Stage, Stopped
        stage = Stage("one", "One", (Command(("sh", "-c", {script!r}), "one"),), ())
        try:
            Pipeline(Path({str(tmp_path)!r}), [stage], Console()).run()
        except Stopped as stopped:
            sys.exit(128 + stopped.signum)
    """)
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signum)
        assert process.wait(30) == 128 + signum
    finally:
        process.kill()
    assert (tmp_path / "saved").read_text() == "saved\n"
