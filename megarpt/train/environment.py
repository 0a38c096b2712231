"""What a run was made with: versions, commit, host, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import megarpt

_PACKAGES = (
    "torch",
    "megatron-core",
    "numpy",
    "transformer-engine",
    "apex",
    "flash-attn",
    "triton",
    "tokenizers",
    "sentencepiece",
    "gigatoken",
    "tensorboard",
    "pydantic",
)


def describe_environment(command: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that `environment.json` holds; `facts` are entries only the caller knows, such as the device's name.

    Cost: a few milliseconds; reads package metadata without importing the packages.
    """
    return {
        "megarpt": megarpt.__version__,
        "git": git_state(Path(megarpt.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "command": list(command) or sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout whose files are in `folder` and whether tracked files were edited; None when it is no checkout."""
    # An installed package may lie inside the checkout of another project: only tracked files count.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    sha = _git(folder, "rev-parse", "HEAD")
    if sha is None:
        return None
    return {"sha": sha, "is_dirty": _git(folder, "diff-index", "--quiet", "HEAD") is None}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
