"""`megarpt plan`: what it shows, and that it allocates nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarpt.cli import main
from megarpt.config.schema import PlanOptions
from megarpt.errors import EXIT_CONFIG, DataError, ExtensionError
from megarpt.run import plan
from megarpt.streaming.activations import WAYS
from megarpt.streaming.plan import GB
from megarpt.testing.configs import tiny_config

CONFIG = """\
run: {dir: runs/x}
model: {preset: llama-3-8b, vocab_size: 128256, gpt: {max_sequence_length: 262144}}
data: {tokenizer: absent.model, train: [{path: corpus}], seq_length: 65536}
batch: {micro_batch_size: 1, global_batch_size: 64}
train: {train_tokens: 1e9, precision: bf16}
parallel: {use_distributed_optimizer: true}
stream: {layers: true}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def planned(config: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", config, "--json", *arguments]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_the_table_says_what_is_needed_and_what_fits(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--world-size", "64", "--card-gb", "80"]) == 0
    shown = capsys.readouterr().out
    for words in ("plain", "recomputed", "streamed", "optimizer", "layer working set", "longest sequence on 80 GB", "dp 64"):
        assert words in shown
    assert "a head that makes all logits at once would take 84.05 GB" in shown  # 65536 x 128256 logits of 2 + 4 + 4 bytes
    assert "stream.chunk_tokens" in shown


def test_json_holds_bytes_that_add_up(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = planned(config, capsys, "--world-size", "64")
    assert report["layout"] == {"tp": 1, "pp": 1, "cp": 1, "dp": 64}
    for way in WAYS:
        memory = report["ways"][way]["memory"]
        classes = ("parameters", "gradients", "optimizer", "layer_inputs", "layer_working_set", "head")
        assert sum(memory[name] for name in classes) == pytest.approx(memory["total"])
        assert memory["parameters"] == pytest.approx(2 * 8_030_261_248, rel=1e-3)
    totals = [report["ways"][way]["memory"]["total"] for way in WAYS]
    assert totals == sorted(totals, reverse=True)
    longest = [report["ways"][way]["largest_sequence"] for way in WAYS]
    assert longest == sorted(longest)
    times = [report["ways"][way]["time"] for way in WAYS]
    assert 1.0 == times[0] < times[1] < times[2] < 1.4
    chunks = [each["chunk_tokens"] for each in report["chunks"]]
    assert chunks == [128 * 2**i for i in range(10)]


def test_more_ranks_need_less_each(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    def total(*arguments: str) -> float:
        needed: float = planned(config, capsys, *arguments)["ways"]["streamed"]["memory"]["total"]
        return needed

    alone = total()
    assert total("--world-size", "8") < alone  # the optimizer's state is divided
    assert total("parallel.tensor_model_parallel_size=2") < 0.6 * alone
    assert total("parallel.pipeline_model_parallel_size=2") < 0.6 * alone
    assert total("parallel.context_parallel_size=2") < alone


def test_a_budget_chooses_the_chunk(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = planned(config, capsys, "--world-size", "64", "--budget-gb", "74")
    configured = planned(config, capsys, "--world-size", "64", "stream.memory_budget_gb=74")
    assert given["chunk_within_budget"] == configured["chunk_within_budget"] > 128
    assert given["ways"]["streamed"]["memory"]["total"] <= 74 * GB
    assert given["streamed"]["chunk_tokens"] == given["chunk_within_budget"]
    assert planned(config, capsys, "--world-size", "64", "--budget-gb", "51")["chunk_within_budget"] == 0
    assert main(["plan", config, "--world-size", "64", "--budget-gb", "51"]) == 0
    assert "not even chunks of 128 tokens fit" in capsys.readouterr().out


def test_the_cpu_is_planned_for_where_the_run_is_there(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    by_option = planned(config, capsys, "--device", "cpu")
    by_config = planned(config, capsys, "run.device=cpu")
    assert by_option["ways"] == by_config["ways"] != planned(config, capsys)["ways"]


def test_the_vocabulary_is_the_tokenizers_or_must_be_said(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "model.vocab_size=null"]) == EXIT_CONFIG
    assert "model.vocab_size=32000" in capsys.readouterr().err
    report = planned(config, capsys, "model.vocab_size=null", "data.tokenizer=bytes")
    assert report["ways"]["plain"]["memory"]["parameters"] < 2 * 7.1e9


def test_a_world_that_does_not_divide_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "parallel.tensor_model_parallel_size=4", "--world-size", "6"]) == EXIT_CONFIG
    assert "a multiple of 4" in capsys.readouterr().err


def test_a_plot_is_drawn(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    planned(config, capsys, "--plot", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    report = plan.plan(tiny_config(**{"model.vocab_size": 512}), PlanOptions())
    with pytest.raises(DataError, match="cannot write"):
        plan.draw(report, tmp_path / "absent" / "plan.png", title="tiny")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = plan.plan(tiny_config(**{"model.vocab_size": 512}), PlanOptions())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ExtensionError, match=r"pip install -e \.\[demo\]"):
        plan.draw(report, tmp_path / "plan.png", title="tiny")


def test_the_stage_that_needs_most_is_shown(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "parallel.pipeline_model_parallel_size=4"]) == 0
    assert "the stage that needs most (0 of 4)" in capsys.readouterr().out
    cfg = tiny_config(**{"model.vocab_size": 512, "parallel": {"pipeline_model_parallel_size": 2}})
    situation = plan.plan(cfg, PlanOptions()).situation
    wide = replace(situation, shape=replace(situation.shape, vocab=1_000_000))  # the first and the last are then far apart
    assert wide.memory("streamed").stage in (0, 1)
    assert wide.memory("streamed").total > situation.memory("streamed").total


def test_it_loads_neither_torch_nor_megatron(config: str) -> None:
    code = (
        "import sys\nfrom megarpt.cli import main\n"
        "code = main(['plan', sys.argv[1], '--json'])\n"
        "heavy = {name.split('.')[0] for name in sys.modules} & {'torch', 'megatron', 'matplotlib'}\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["ways"]) == set(WAYS)
