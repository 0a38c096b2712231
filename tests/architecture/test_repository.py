"""What the files of the repository promise each other."""

import importlib.metadata
import os
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement

from megarpt.config.fields import iter_fields
from megarpt.config.load import dump_resolved, load_config
from megarpt.config.presets import PRESETS
from megarpt.config.schema import (
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    ObjectiveConfig,
    PlanOptions,
    PretrainConfig,
    ScoreOptions,
    SubmitOptions,
    VerifyResumeOptions,
)
from megarpt.config.validate import STREAM_OF_SCORER
from megarpt.objectives.build import SCORERS, WEIGHTINGS
from megarpt.run.doctor import MEGATRON_CORE

ROOT = Path(__file__).parents[2]
VERBS = (
    "pretrain",
    "score",
    "evaluate",
    "generate",
    "export",
    "verify-resume",
    "inspect-run",
    "show-config",
    "plan",
    "submit",
    "doctor",
)


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {normal(each.name): str(each.specifier).removeprefix("==") for each in requirements}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def make_targets():
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def examples():
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.yaml"))


@pytest.mark.parametrize(
    "model",
    [
        PretrainConfig,
        ScoreOptions,
        EvaluateOptions,
        GenerateOptions,
        ExportOptions,
        PlanOptions,
        SubmitOptions,
        VerifyResumeOptions,
    ],
)
def test_every_config_field_has_a_documentation_line(model):
    assert [field.key for field in iter_fields(model) if not field.doc.endswith((".", ")", "`"))] == []


@pytest.mark.parametrize("path", examples())
def test_every_example_is_a_valid_configuration(path):
    cfg = load_config(ROOT / path)
    assert dump_resolved(cfg)


def test_examples_use_presets_that_exist():
    assert {load_config(ROOT / path).model.preset for path in examples()} <= set(PRESETS)


def test_the_schema_names_exactly_what_can_be_built():
    choices = {name: set(get_args(field.annotation)) for name, field in ObjectiveConfig.model_fields.items()}
    assert choices["scorer"] == set(SCORERS) and choices["weighting"] == set(WEIGHTINGS)


def test_the_rules_know_which_stream_a_scorer_reads():
    streams = {name: make(0).streams for name, make in SCORERS.items() if name != "none"}
    assert {name: (stream,) for name, stream in STREAM_OF_SCORER.items()} == {k: v for k, v in streams.items() if v}


def test_there_are_examples():
    assert examples()


def test_the_readme_names_the_commands_and_only_targets_that_exist():
    readme = (ROOT / "README.md").read_text()
    for verb in VERBS:
        assert f"megarpt {verb}" in readme
    assert {"demo", "test"} <= set(re.findall(r"\bmake ([a-z]+)", readme)) <= make_targets()


def test_ci_runs_lint_and_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"make lint", "make test"} <= set(script.read_text().splitlines())


def test_pins_agree_with_what_is_declared():
    pinned = pins()
    declared = project()["dependencies"] + [
        each for extra in ("dev", "demo", "fast", "parquet", "hf") for each in project()["optional-dependencies"][extra]
    ]
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(pinned[normal(requirement.name)]), requirement
    assert pinned["megatron-core"] == MEGATRON_CORE
    assert f"torch=={pinned['torch']}" in (ROOT / "Makefile").read_text()


def test_what_is_installed_is_what_is_pinned():
    """Figures and golden curves are only worth something with these versions."""
    for name in ("torch", "megatron-core", "numpy", "pydantic", "sentencepiece", "tokenizers"):
        assert importlib.metadata.version(name).partition("+")[0] == pins()[name]


def test_the_licence_is_complete():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text.splitlines()) > 195


def test_the_changelog_has_an_unreleased_section():
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
