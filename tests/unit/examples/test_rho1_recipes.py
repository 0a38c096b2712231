"""The recipes load, fit the machines they are made for, and hold the numbers of the paper."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megarpt.cli import main
from megarpt.config.load import load_config
from megarpt.config.schema import PretrainConfig

RHO1 = Path(__file__).parents[3] / "examples" / "rho1"
SIZES = {"tinyllama-1.1b": (2048, 5e-5, 8e-5, 0.6), "mistral-7b": (4096, 1e-5, 2e-5, 0.7)}
"""Sequence length, learning rate of the reference model and of the students, kept share: what the paper says."""

WORLD = 4 * 8  # the README's --nodes 4, with 8 GPUs each
RECIPES = [f"{size}/{name}" for size in SIZES for name in ("reference", "clm", "slm")]


def recipe(name: str) -> PretrainConfig:
    return load_config(RHO1 / f"{name}.yaml", world_size=WORLD)


def test_every_recipe_is_tested() -> None:
    assert sorted(RECIPES) == sorted(str(path.relative_to(RHO1).with_suffix("")) for path in RHO1.rglob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_accepted_for_its_machines_and_refused_for_others(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(RHO1 / f"{name}.yaml")
    assert main(["show-config", path, "--world-size", str(WORLD)]) == 0
    assert f"dir: {recipe(name).run.dir}" in capsys.readouterr().out
    assert main(["show-config", path, "--world-size", str(WORLD - 2)]) == 78  # no whole number of samples for each


@pytest.mark.parametrize("size", SIZES)
def test_numbers_of_the_paper(size: str) -> None:
    seq_length, reference_lr, student_lr, fraction = SIZES[size]
    reference, clm, slm = (recipe(f"{size}/{name}") for name in ("reference", "clm", "slm"))
    for config in (reference, clm, slm):
        assert config.data.seq_length == seq_length and config.train.precision == "bf16"
        assert config.model.preset == size and config.model.init_from == f"models/{size}"
        assert config.optimizer.lr_decay_style == "cosine"
    assert reference.optimizer.lr == reference_lr
    assert clm.optimizer.lr == slm.optimizer.lr == student_lr
    assert clm.batch.global_batch_size * seq_length == slm.batch.global_batch_size * seq_length == 2**20
    assert slm.train.train_tokens == clm.train.train_tokens == 15_000_000_000
    assert (slm.objective.scorer, slm.objective.weighting, slm.objective.fraction) == ("excess_loss", "top_fraction", fraction)
    assert clm.objective.scorer == "none" and clm.objective.weighting == "uniform"


@pytest.mark.parametrize("size", SIZES)
def test_students_differ_in_what_counts_alone(size: str) -> None:
    clm, slm = (recipe(f"{size}/{name}").model_dump() for name in ("clm", "slm"))
    assert slm["data"]["train"][0].pop("streams") == {"ref_nll": f"data/{size}/owm_ref_nll"}
    assert clm["data"]["train"][0].pop("streams") == {}
    for section, key in (("run", "dir"),):
        assert slm[section].pop(key) != clm[section].pop(key)
    assert slm.pop("objective") != clm.pop("objective")
    assert slm == clm


def commands() -> list[list[str]]:
    lines = (RHO1 / "README.md").read_text().replace("\\\n", "").splitlines()
    return [shlex.split(line) for line in lines if re.match(r"megarpt (pretrain|submit) examples", line)]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_commands_of_the_readme_are_valid(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RHO1.parents[1])
    overrides = [word for word in command[3:] if re.match(r"[a-z_]+\.", word)]
    config = load_config(command[2], overrides, world_size=WORLD)
    assert config.run.dir.startswith("runs/")
    if command[1] == "submit":
        assert command[command.index("--nodes") + 1] == "4"


def test_the_commands_of_the_readme_name_files_that_exist() -> None:
    text = (RHO1 / "README.md").read_text()
    named = set(re.findall(r"examples/rho1/[\w.-]+(?:/[\w.-]+)*\.(?:yaml|py)", text))
    assert {f"examples/rho1/{name}.yaml" for name in RECIPES} <= named
    for path in named:
        assert (RHO1.parents[1] / path).is_file(), path
