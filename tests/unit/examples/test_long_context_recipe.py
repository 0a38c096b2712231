"""The long-context example: its files load, its commands are valid, and its README's table is what the plan says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megarpt.config.load import load_config
from megarpt.run.plan import PlanOptions, plan
from megarpt.streaming.activations import Way
from megarpt.streaming.plan import GB

EXAMPLE = Path(__file__).parents[3] / "examples" / "streambp_long_context"
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")
WORLD, VOCAB = 16, 128_256


def row(name: str) -> list[float]:
    """The numbers of a row of the README's table of gigabytes."""
    line = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,.]+", line.split("|", 2)[2])]


def test_every_file_loads_and_every_command_is_valid() -> None:
    assert sorted(path.name for path in EXAMPLE.glob("*.yaml")) == ["llama-3-8b-64k.yaml", "small.yaml"]
    commands = [shlex.split(line, comments=True) for line in README.splitlines() if line.startswith("megarpt ")]
    commands = [words for words in commands if words[1] in ("plan", "pretrain", "submit")]
    assert len(commands) == 5
    for words in commands:
        path = EXAMPLE / Path(words[2]).name
        overrides = [word for word in words[3:] if re.match(r"[a-z_]+\.[a-z_.]+=", word)]
        is_recipe = "llama" in path.name
        load_config(path, overrides, world_size=WORLD if is_recipe else 1)
        if words[1] == "submit":
            assert 8 * int(words[words.index("--nodes") + 1]) == WORLD


def test_the_recomputation_that_the_readme_names_is_valid() -> None:
    named = re.findall(r"model\.mcore\.recompute_\w+=\w+", README)
    assert len(named) == 3
    cfg = load_config(EXAMPLE / "small.yaml", ["stream.layers=false", "stream.chunk_tokens=null", *named], world_size=1)
    assert cfg.model.mcore["recompute_granularity"] == "full"


@pytest.mark.parametrize(("column", "way"), list(enumerate(("plain", "recomputed", "streamed"))))
def test_the_table_is_the_plan(column: int, way: Way) -> None:
    cfg = load_config(EXAMPLE / "llama-3-8b-64k.yaml", [f"model.vocab_size={VOCAB}"], world_size=WORLD)
    report = plan(cfg, PlanOptions(card_gb=80.0, world_size=WORLD, device="cuda")).ways[way]
    memory = report.memory
    assert row("parameters, gradients, optimizer")[column] == pytest.approx(memory.static / GB, rel=0.01)
    assert row("kept from forward to backward")[column] == pytest.approx(memory.layer_inputs / GB, rel=0.01)
    assert row("working set of a layer, head")[column] == pytest.approx((memory.layer_working_set + memory.head) / GB, rel=0.02)
    assert row("total")[column] == pytest.approx(memory.total / GB, rel=0.01)
    assert row("longest sequence on 80 GB")[column] == report.largest_sequence
    assert (memory.total < 76 * GB) == (way == "streamed")
