"""The import contracts of pyproject.toml hold, and each of them fires when it is broken."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

VIOLATIONS = [
    ("objectives/base.py", "import megarpt.train", "layers"),
    ("data/__init__.py", "import megarpt.model", "layers"),
    ("structs.py", "import megarpt.ops", "layers"),
    ("utils.py", "", "layers"),  # a new module without a place in the layers
    ("config/schema.py", "import torch", "configuration and corpus tools load neither torch nor megatron"),
    ("corpus/__init__.py", "import megatron", "configuration and corpus tools load neither torch nor megatron"),
    ("objectives/base.py", "import megatron.core", "megatron-core is touched only at the seams"),
    ("train/__init__.py", "import megarpt.testing", "nothing ships on its own test kit"),
]


def lint_imports(folder):
    command = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--no-logo"], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "megarpt", tmp_path / "megarpt", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_all_contracts_are_kept(copy):
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("file", "line", "contract"), VIOLATIONS, ids=[f"{file}: {line}" for file, line, _ in VIOLATIONS])
def test_a_violation_is_caught(copy, file, line, contract):
    with (copy / "megarpt" / file).open("a") as out:
        out.write(f"\n{line}\n")
    result = lint_imports(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(rf"^{re.escape(contract)} BROKEN$", result.stdout, re.MULTILINE), result.stdout
