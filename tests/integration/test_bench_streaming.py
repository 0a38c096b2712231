"""The benchmark of streamed layers on a model that takes seconds, as a command; and how it looks for the longest sequence."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megarpt.device.runtime import Runtime

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "bench_streaming.py"
SMALL = ("--layers", 2, "--hidden", 64, "--heads", 4, "--ffn", 96, "--vocab", 1000, "--chunks", 64, 32, "--device", "cpu")
CONTENDERS = ("none", "recompute", "selective", "recompute_head", "streamed 64", "streamed 32")


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_streaming_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(TOOL), "--device", "cpu"])
        sys.modules[spec.name] = module  # where its dataclasses look for their annotations
        spec.loader.exec_module(module)
    return module


def test_contenders_agree_and_need_ever_less(tmp_path: Path) -> None:
    done = run(
        *(*SMALL, "--lengths", 256, 512, "--objective", "lm", "policy", "--rounds", 1),
        *("--json", tmp_path / "figures.json", "--plot", tmp_path / "peaks.png"),
    )
    assert done.returncode == 0, done.stderr
    assert "| full recompute + chunked head" in done.stdout and "clipped policy gradient" in done.stdout
    assert (tmp_path / "peaks.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "figures.json").read_bytes())["rows"]
    by_key = {(row["objective"], row["tokens"], row["contender"]): row for row in rows}
    assert list(by_key) == list(itertools.product(("lm", "policy"), (256, 512), (*CONTENDERS, "limit")))
    for objective, tokens in itertools.product(("lm", "policy"), (256, 512)):
        of = {name: by_key[objective, tokens, name] for name in (*CONTENDERS, "limit")}
        assert all(of[name]["loss_difference"] <= 1e-6 and of[name]["median_s"] > 0 for name in CONTENDERS)
        # Recomputing saves activations, the chunked head logits, streaming activations once more.
        order = ("none", "selective", "recompute", "recompute_head", "streamed 64", "limit")
        peaks = [of[name]["peak_bytes"] for name in order]
        assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
        assert of["limit"]["peak_bytes"] == 2 * tokens * 64 * 4
        assert of["streamed 64"]["peak_over_recompute"] == peaks[4] / peaks[2] < 0.5
        logits = tokens * 1000 * 4
        assert of["recompute"]["peak_bytes"] > 2 * logits and of["streamed 64"]["peak_bytes"] < 2 * logits
        # A loss of about log(1000) nats, and a policy's that is not zero: there is something to agree on.
        assert abs(of["none"]["loss"]) > 0.5 and of["none"]["loss"] != by_key[objective, 768 - tokens, "none"]["loss"]


def test_longest_sequence_under_a_cap(tmp_path: Path) -> None:
    contenders = ("--contenders", "recompute,recompute_head,streamed", "--cap-mb", 9, "--max-length", 1536)
    done = run(*SMALL, *contenders, "--json", tmp_path / "figures.json", "--plot", tmp_path / "peaks.png")
    assert done.returncode == 0, done.stderr
    assert "longest sequence under 9 MB" in done.stdout and (tmp_path / "peaks.png").exists()
    rows = {row["contender"]: row for row in json.loads((tmp_path / "figures.json").read_bytes())["longest"]}
    longest = {name: row["longest"] for name, row in rows.items()}
    assert longest["recompute"] < longest["recompute_head"] < longest["streamed 64"]
    for name in ("recompute", "recompute_head"):
        row = rows[name]
        assert row["peak_bytes"][str(row["longest"])] <= 9e6 < row["peak_bytes"][str(row["next"])]
        assert row["next"] <= max(1.06 * row["longest"], row["longest"] + 64)
    assert rows["recompute_head"]["over_recompute"] == longest["recompute_head"] / longest["recompute"]


PEAKS: dict[str, Callable[[int], float]] = {
    "linear": lambda n: 3e6 + 5e4 * n,
    "quadratic": lambda n: 1e6 + 3.0 * n * n,
    "steps": lambda n: 1e5 * n if n < 2000 else 2e8 + 1e4 * n,
    "runs out": lambda n: 1e4 * n if n < 5000 else float("inf"),
    "constant": lambda n: 1e6,
    "too much at once": lambda n: 1e9,
}


@pytest.mark.parametrize(("shape", "cap"), list(itertools.product(PEAKS, (1.5e7, 3e8))))
def test_search_brackets_the_cap_in_few_steps(tool: ModuleType, cpu_runtime: Runtime, shape: str, cap: float) -> None:
    measured = tool.longest_sequence(PEAKS[shape], cap, 65_536)
    assert len(measured) <= 16
    fits = max((n for n, size in measured.items() if size <= cap), default=0)
    above = min((n for n, size in measured.items() if size > cap), default=None)
    assert all(size <= cap for n, size in measured.items() if n <= fits)
    if above is None:
        assert fits == 65_536
    else:
        assert above <= max(1.06 * fits, fits + 64)


def test_mistakes_are_named(tmp_path: Path) -> None:
    wrong = run(*SMALL, "--contenders", "none,streamt")
    assert wrong.returncode == 2 and "--contenders: got streamt; expected some of none" in wrong.stderr
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not installed')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, str(TOOL), "--plot", "peaks.png"]
    without = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert without.returncode == 2 and "--plot needs matplotlib" in without.stderr
