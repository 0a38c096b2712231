"""`tools/show_rollouts.py` and `tools/fit_scaling_law.py` as commands, on the folder of a run."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import ConfigError, DataError
from megarpt.rl.advantages import as_rewards, group_mean
from megarpt.rl.rollout_log import RolloutLog
from megarpt.rl.structs import Completion, Prompt, Reward, RolloutGroup, StopReason
from megarpt.train.metrics_file import MetricsFile

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_tool", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


show_rollouts, fit_scaling_law = load("show_rollouts"), load("fit_scaling_law")


def law(compute: float, limit: float = 0.6) -> float:
    return limit - 4.0 / compute**0.4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of 30 iterations whose reward follows the law of their tokens."""
    folder = tmp_path_factory.mktemp("run")
    log = RolloutLog(folder, load_tokenizer("bytes"), interval_steps=10)
    file = MetricsFile(folder / "metrics.jsonl")
    file.append({"kind": "valid", "step": 0, "tokens/seen": 0, "valid/hard/accuracy": 0.1})
    for step in range(1, 31):
        values = {"rl/reward_mean": law(1000 * step), "rl/format_rate": 1.0, "rl/sampled_tokens": 500.0}
        file.append({"kind": "train", "step": step, "tokens/seen": 1000 * step, **values})
        if step % 5 == 0:
            file.append({"kind": "valid", "step": step, "tokens/seen": 1000 * step, "valid/hard/accuracy": law(step, 0.9)})
        if log.is_due(step - 1, step):
            text = f"<think>{step}</think>\\boxed{{4}}<script>alert({step})</script>".encode()
            made = [
                Completion(tokens=(1,), logprobs=(-1.0,), text=text, stop=StopReason.STOP, policy_version=step)
                for _ in range(2)
            ]
            group = RolloutGroup(Prompt(id=str(step), tokens=(50,)), made)
            log.write(step, [group], [[Reward(1.0), Reward(0.0)]], [group_mean(as_rewards([1.0, 0.0]))])
    file.close()
    return folder


def command(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_the_page_lies_in_the_run_folder(run: Path) -> None:
    result = command("show_rollouts", run)
    assert result.returncode == 0, result.stderr
    assert "written: " in result.stdout and "0.500" in result.stdout
    page = (run / "rollouts.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count("<section") == 4 and "<script" not in page
    assert "&lt;script&gt;alert(30)" in page and "<polyline" in page
    refused = command("show_rollouts", run / "rollouts")
    assert refused.returncode == 78 and "error: " in refused.stderr and "Traceback" not in refused.stderr


def test_options_of_the_page(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "late.html"
    show_rollouts.main([str(run), "--output", str(output), "--first", "15", "--ranges", "2", "--prompts", "1"])
    page = output.read_text(encoding="utf-8")
    assert page.count("<section") == 2 and "step 20 <small>" in page and "step 10 <small>" not in page
    show_rollouts.main([str(run), "--output", str(output), "--right-reward", "2", "--think-close", "boxed"])
    assert "best: partly right" in output.read_text(encoding="utf-8")
    for wrong in (["--right-reward", "0"], ["--think-close", ""], ["--ranges", "0"]):
        with pytest.raises(SystemExit):
            show_rollouts.parse([str(run), *wrong])


def test_showing_rollouts_loads_no_torch(run: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import show_rollouts\n"
        f"show_rollouts.main([{str(run)!r}]); assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_the_law_of_a_run(run: Path, tmp_path: Path) -> None:
    result = command("fit_scaling_law", run, "--json", tmp_path / "law.json", "--bins", "0", "--bootstrap", "20")
    assert result.returncode == 0, result.stderr
    assert "rl/reward_mean" in result.stdout and (run / "scaling_law.png").read_bytes().startswith(b"\x89PNG")
    (found,) = json.loads((tmp_path / "law.json").read_text())["laws"]
    assert found["score"] == "rl/reward_mean" and found["num_points"] == 30 and found["r_squared"] > 0.999
    assert found["limit"] == pytest.approx(0.6, abs=1e-6) and found["alpha"] == pytest.approx(0.4, abs=1e-5)
    assert found["a"] == pytest.approx(-4.0, rel=1e-3)


def test_other_scores_and_other_computes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "law.json"
    options = ["--json", str(output), "--no-plot", "--bootstrap", "20", "--bins", "6"]
    tags = ["--score", "valid/hard/accuracy", "--score", "rl/reward_mean"]
    fit_scaling_law.main([str(run), *options, *tags, "--compute", "step", "--scale", "6e3"])
    hard, reward = json.loads(output.read_text())["laws"]
    assert hard["num_points"] == 6 and hard["limit"] == pytest.approx(0.9, abs=1e-5)
    assert hard["a"] == pytest.approx(-4.0 * 6e3**0.4, rel=1e-3) and reward["num_points"] == 6 and reward["r_squared"] > 0.99
    assert "1 point of valid/hard/accuracy is left out" in capsys.readouterr().out
    assert not (run / "scaling_law.json").exists() and output.stat().st_size > 0
    fit_scaling_law.main([str(run), *options, "--compute", "rl/sampled_tokens", "--cumulative"])
    (found,) = json.loads(output.read_text())["laws"]
    assert found["points"][-1][0] == pytest.approx(500.0 * 30, rel=0.3) and found["num_points"] == 6


def test_early_points_can_be_left_out(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", str(tmp_path / "o.json"), "--no-plot", "--bootstrap", "20", "--scale", "2", "--limit", "0,0.58"]
    fit_scaling_law.main([str(run), *options, "--least", "20000"])
    (found,) = json.loads((tmp_path / "o.json").read_text())["laws"]
    assert found["num_points"] == 21 and found["points"][0][0] == pytest.approx(20000.0)
    shown = capsys.readouterr().out
    assert "9 points of rl/reward_mean are left out: less than 20000 was spent" in shown
    assert found["limit"] == 0.58 and found["is_limit_at_edge"] and "P* lies at the end of the range" in shown


def test_the_law_of_a_table(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["flops", "easy", "hard"])
        table.writerows([[c, law(c), "" if c == 500 else law(c, 0.3)] for c in (100, 200, 400, 500, 800, 1600)])
    fit_scaling_law.main([str(tmp_path / "t.csv"), "--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png")])
    easy, hard = json.loads((tmp_path / "o.json").read_text())["laws"]
    assert (easy["score"], easy["num_points"], hard["score"], hard["num_points"]) == ("easy", 6, "hard", 5)
    assert easy["limit"] == pytest.approx(0.6, abs=1e-5) and hard["limit"] == pytest.approx(0.3, abs=1e-5)
    assert (tmp_path / "o.png").stat().st_size > 5000


def test_points_without_a_bend_are_said_to_determine_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{c},{0.1 * math.log(c)}\n" for c in (1, 2, 4, 8, 16, 32))
    (tmp_path / "t.csv").write_text("compute,score\n" + rows)
    fit_scaling_law.main([str(tmp_path / "t.csv"), "--no-plot", "--limit", "free"])
    assert "do not determine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no header"),
        ("compute\n1\n", "expected a column of computes and at least one of scores"),
        ("compute,score\n1,x\n", r"t\.csv, line 2: got 'x', expected a number"),
        ("compute,score\n1,2,3\n", r"t\.csv, line 2: got 3 cells, expected 2"),
        ("compute,score\n1,2\n2,3\n", "got 2 points, expected at least 5"),
    ],
)
def test_tables_that_cannot_be_read_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        fit_scaling_law.main([str(tmp_path / "t.csv"), "--no-plot"])


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no line has both tokens/seen and rl/missing.*it has .*rl/reward_mean"):
        fit_scaling_law.main([str(run), "--score", "rl/missing"])
    with pytest.raises(ConfigError, match="neither a run folder, nor a metrics file, nor a table"):
        fit_scaling_law.main([str(tmp_path / "missing")])
    for wrong in (["--limit", "1,0"], ["--limit", "x"], ["--scale", "0"], ["--bootstrap", "0"]):
        with pytest.raises(SystemExit):
            fit_scaling_law.parse([str(run), *wrong])
