"""The demo from end to end, very small: every command is run as a user would type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("corpus", "tokenizer", "tokenize", "base", "reference", "score", "students", "evaluate")


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/demo/run.py", "--scale", "tiny", "--device", "cpu", "--out", str(out), *arguments]
    environment = os.environ | {"COLUMNS": "160"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "run"
    result = demo(out)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return out, result.stdout


def test_verdict(finished: tuple[Path, str]) -> None:
    out, _ = finished
    verdict = json.loads((out / "verdict.json").read_text())
    share = verdict["tokens_share_to_match"]
    assert share is None or 0.0 <= share <= 1.0
    assert set(verdict["seconds"]) == set(STAGES)
    for name in ("clm", "slm"):
        assert 0.0 < verdict[f"{name}_final_nats"] < 20.0
        assert 0.0 <= verdict[f"{name}_final_top1"] <= 1.0
    reached = verdict["slm_final_nats"] <= verdict["clm_final_nats"]
    assert share is not None if reached else True


def test_students_saw_the_same_tokens_and_started_alike(finished: tuple[Path, str]) -> None:
    out, _ = finished
    lines = {
        name: [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()] for name in ("clm", "slm")
    }
    valid = {name: [line for line in each if line["kind"] == "valid"] for name, each in lines.items()}
    assert [line["tokens/seen"] for line in valid["clm"]] == [line["tokens/seen"] for line in valid["slm"]]
    assert valid["clm"][0]["valid/heldout/loss_nats"] == valid["slm"][0]["valid/heldout/loss_nats"]
    assert valid["clm"][-1]["tokens/trained"] > valid["slm"][-1]["tokens/trained"]


def test_everything_promised_is_there(finished: tuple[Path, str]) -> None:
    out, shown = finished
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "<span class=" in (out / "selection.html").read_text(encoding="utf-8")
    assert f"tensorboard --logdir {out}" in shown
    for part in ("$ megarpt pretrain", "$ megarpt score", "$ python tools/preprocess_corpus.py", "verdict", "SLM student"):
        assert part in shown


def test_running_it_again_does_nothing_twice(finished: tuple[Path, str]) -> None:
    out, _ = finished
    before = (out / "slm" / "metrics.jsonl").stat().st_mtime_ns
    result = demo(out)
    assert result.returncode == 0, result.stdout[-4000:]
    assert result.stdout.count("already done") == len(STAGES) and "$ " not in result.stdout
    assert (out / "slm" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_failing_stage_passes_its_exit_code_on(finished: tuple[Path, str]) -> None:
    out, _ = finished
    with (out / "corpus" / "mix.jsonl").open("a") as stream:
        stream.write("not json\n")
    (out / "stages" / "tokenize.json").unlink()
    result = demo(out)
    assert result.returncode == 79, result.stdout[-4000:]
    assert "ended with exit code 79" in result.stdout and "mix.jsonl" in result.stdout
    assert "megarpt pretrain" not in result.stdout
