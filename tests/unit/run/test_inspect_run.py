"""The report of a run folder: right figures, in any state of the run."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarpt.errors import ConfigError, DataError, ExtensionError, MegarptError
from megarpt.run import inspect_run
from megarpt.train.metrics_file import MetricsFile
from megarpt.train.run_report import read_run

START = 1_700_000_000.0


def at(seconds: float) -> str:
    """A time stamp as exit.json has it, seconds after the first start."""

    return datetime.fromtimestamp(START + seconds, UTC).isoformat(timespec="seconds")


def record(restarts: int, status: str, started: float, ended: float | None, step: int) -> dict[str, Any]:
    return {
        "status": status,
        "exit_code": {"finished": 0, "resumable": 75}.get(status),
        "message": "on SIGUSR1" if status == "resumable" else "",
        "step": step,
        "restarts": restarts,
        "host": f"node{restarts}",
        "started": at(started),
        "ended": None if ended is None else at(ended),
    }


def train_line(step: int, restarts: int, unix_s: float, step_s: float, **tags: float) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "samples": 8 * step,
        "tokens/seen": 80 * step,
        "tokens/trained": 48 * step,
        "train/loss_nats": 6.0 - 0.1 * step,
        "perf/tokens_per_s": 80.0 / step_s,
        "time/step_s": step_s,
        "time/forward_s": 0.75 * step_s,
        "time/other_s": 0.25 * step_s,
        "optim/skipped_total": 1.0,
        "sys/restarts": float(restarts),
        "time/unix_s": START + unix_s,
        **tags,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 20 steps of 2 s with a line every two steps. Killed after step 14, with a checkpoint at 10; stopped by a signal
    at 18 after 100 s without a machine; finished. Steps 11 to 14 were done twice."""
    kept, discarded = MetricsFile(tmp_path / "metrics.jsonl"), MetricsFile(tmp_path / "metrics.discarded.jsonl")
    valid = {"kind": "valid", "step": 0, "tokens/seen": 0, "sys/restarts": 0.0, "time/unix_s": START + 6}
    kept.append({**valid, "valid/clean/loss_nats": 6.0, "time/valid/clean_s": 3.0})
    for step in range(2, 11, 2):
        kept.append(train_line(step, 0, 6 + 2 * step, 2.0))
    for step in (12, 14):
        discarded.append(train_line(step, 0, 9 + 2 * step, 2.0))
    slow = {"time/slowest_rank": 3.0, "time/slowest_rank_s": 2.0, "time/rank_median_s": 1.0, "time/rank_spread": 2.0}
    even = slow | {"time/slowest_rank": 1.0, "time/rank_spread": 1.1}
    for step in (12, 14, 16, 18):
        kept.append(train_line(step, 1, 145 + 2 * (step - 10), 2.0, **(even if step == 16 else slow)))
    selected = {"select/kept_fraction": 0.6, "select/kept_loss_nats": 4.0, "select/threshold": 0.5, "time/save_stall_s": 5.0}
    kept.append(train_line(20, 2, 178, 2.0, **selected))
    kept.append(
        {**valid, "sys/restarts": 2.0, "step": 20, "tokens/seen": 1600, "valid/clean/loss_nats": 4.0, "time/valid/clean_s": 3.0}
    )
    attempts = [record(0, "running", 0, None, 10), record(1, "resumable", 137, 165, 18)]
    newest = {**record(2, "finished", 170, 190, 20), "attempts": attempts}
    (tmp_path / "exit.json").write_text(json.dumps(newest))
    (tmp_path / "environment.json").write_text(json.dumps({"hosts": {"nodeA": [0, 1], "nodeB": [2, 3]}}))
    config = {"batch": {"global_batch_size": 8}, "data": {"seq_length": 10}, "train": {"train_tokens": 1600}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run.lock").touch()
    for name in ("step_00000018", "step_00000010.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "dumps").mkdir()
    (tmp_path / "dumps" / "step_00000007_rank0.json").touch()
    return tmp_path


def test_the_time_is_accounted_for(folder: Path) -> None:
    good = read_run(folder).goodput
    assert good is not None
    assert good.wall_s == 190.0
    assert good.useful_s == 40.0  # 20 steps of 2 s, although a line stands for two
    assert good.redone_s == 8.0  # 11 to 14
    assert good.between_s == (137 - (9 + 28)) + (170 - 165)  # the killed attempt ends with its last line
    assert (good.evaluation_s, good.save_s) == (6.0, 5.0)
    parts = good.useful_s + good.redone_s + good.between_s + good.evaluation_s + good.save_s + good.other_s
    assert parts == pytest.approx(good.wall_s)
    assert good.share == pytest.approx(40 / 190)


def test_attempts_say_how_they_ended_and_a_silent_one_was_killed(folder: Path) -> None:
    report = read_run(folder)
    assert [a.status for a in report.attempts] == ["killed", "resumable", "finished"]
    assert [a.step for a in report.attempts] == [14, 18, 20]  # also beyond the last checkpoint
    assert report.status == "finished" and not report.is_alive
    assert (report.progress["step"], report.total_steps) == (20, 20)


def test_curve_speed_selection_and_stragglers(folder: Path) -> None:
    report = read_run(folder)
    assert [step for step, _, _ in report.curve] == list(range(2, 21, 2))
    assert report.curve[-1] == (20, 1600, pytest.approx(4.0))
    assert report.valid == {"clean": [(0, 0, 6.0), (20, 1600, 4.0)]}
    assert report.speed["perf/tokens_per_s"] == 40.0 and report.step_parts == {"forward": 1.5, "other": 0.5}
    assert report.selection == {"kept_fraction": 0.6, "threshold": 0.5, "kept_loss_nats": 4.0}
    assert report.stragglers["most_often"] == {"rank": 3, "host": "nodeB", "times": 3}
    assert report.stragglers["last"] == {"rank": 3, "host": "nodeB", "spread": 2.0, "step": 18}
    assert report.totals == {"optim/skipped_total": 1.0} and report.num_dumps == 1
    assert [(c.step, c.num_bytes) for c in report.checkpoints] == [(18, None)]
    assert report.set_aside == ["step_00000010.damaged"]
    assert any("manifest.json is missing" in problem for problem in report.problems)


def test_the_report_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_run.run(str(folder)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        f"{folder}: finished",
        "step 20 of 20 (100%), 1.6k tokens seen",
        "█▇▆▆▅▄▃▃▂▁ first 5.8000, last 4.0000, mean of the last 10 4.9000 nats/token",
        "clean: first 6.0000, last 4.0000 at step 20",
        "forward 75.0%",
        "goodput 21.1%: 0:00:40 of useful steps in 0:03:10",
        "steps done again 4.2%",
        "3, 2 restarts",
        "on node1, resumable (exit code 75) at step 18: on SIGUSR1",
        "most often rank 3 on nodeB, 3 times",
        "kept 60.0%; threshold 0.5; loss of kept 4.0000",
        "skipped 1, 1 dumped batches",
        "step_00000018: manifest damaged",
    ):
        assert part in shown, part


def test_the_report_for_programs_is_strict_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_line(21, 2, 180, 2.0) | {"train/loss_nats": "nan"}) + "\n")
    assert inspect_run.run(str(folder), as_json=True) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert report["status"] == "finished" and report["goodput"]["share"] > 0 and report["curve"][-1] == [21, 1680, None]


def test_a_live_run_is_told_from_a_killed_one(folder: Path) -> None:
    newest = json.loads((folder / "exit.json").read_text())
    (folder / "exit.json").write_text(json.dumps(newest | {"status": "running", "ended": None, "exit_code": None}))
    assert read_run(folder).status == "killed"
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "run.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        report = read_run(folder, now=START + 200)
        assert report.is_alive and report.status == "running" and report.attempts[-1].ended == START + 200
    finally:
        holder.kill()
        holder.wait()
    assert read_run(folder).status == "killed"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no run"),
        (lambda path: path.write_text(""), "is not a folder"),
    ],
)
def test_what_is_no_run_folder_is_an_error(tmp_path: Path, prepare: Callable[[Path], object], message: str) -> None:
    prepare(tmp_path / "x")
    with pytest.raises(ConfigError, match=f"{message}; expected a run folder"):
        inspect_run.run(str(tmp_path / "x"))


def test_a_run_that_never_made_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "exit.json").write_text(json.dumps(record(0, "config_error", 0, 1, 0)))
    assert inspect_run.run(str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "config_error" in shown and "no metrics line yet" in shown and "config.yaml is missing" in shown


def test_damaged_lines_are_named_and_passed_over(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for number in (2, 4, 5, 6, 7):
        lines[number] = lines[number][:30]
    path.write_text("\n".join(lines) + "\n")
    report = read_run(folder)
    assert [problem.split(": ")[0] for problem in report.problems[:3]] == [f"{path}, line {n}" for n in (3, 5, 6)]
    assert f"{path}: 2 more damaged lines" in report.problems
    assert len(report.curve) == 5


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_broken_the_report_says_it_and_goes_on(folder: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes flipped, cut off or removed in random files: a report or one of our errors, nothing else."""
    rng = random.Random(seed)
    for path in rng.sample(sorted(p for p in folder.iterdir() if p.is_file()), 3):
        content = bytearray(path.read_bytes())
        match rng.choice(["flip", "cut", "remove", "type"]):
            case "flip" if content:
                for _ in range(20):
                    content[rng.randrange(len(content))] = rng.randrange(256)
                path.write_bytes(content)
            case "cut":
                path.write_bytes(content[: rng.randrange(len(content) + 1)])
            case "type":
                path.write_bytes(content.replace(b'"', b"", 2 * rng.randrange(3)).replace(b"2", b"[2]", rng.randrange(4)))
            case _:
                path.unlink()
    try:
        inspect_run.run(str(folder))
        inspect_run.run(str(folder), as_json=True)
    except MegarptError as error:
        assert "holds no run" in str(error)


def test_a_plot_is_drawn(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    inspect_run.run(str(folder), as_json=True, plot=str(folder / "plot.png"))
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="cannot write"):
        inspect_run.run(str(folder), plot=str(folder / "absent" / "plot.png"))


def test_a_plot_without_matplotlib_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ExtensionError, match=r"pip install -e \.\[demo\]"):
        inspect_run.run(str(folder), plot=str(folder / "plot.png"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 7.0, math.nan, 3.0], "▁█×▄"),
        ([float(i // 100) for i in range(800)], "▁▂▃▄▅▆▇█"),
    ],
)
def test_a_curve_in_one_line(values: list[float], expected: str) -> None:
    assert inspect_run.sparkline(values, width=8) == expected


def test_it_loads_neither_torch_nor_megatron(folder: Path) -> None:
    code = (
        "import sys\nfrom megarpt.cli import main\n"
        "code = main(['inspect-run', sys.argv[1], '--json'])\n"
        "heavy = {name.split('.')[0] for name in sys.modules} & {'torch', 'megatron', 'matplotlib'}\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
