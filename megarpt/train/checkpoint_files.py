"""A checkpoint as a folder of files: names, manifest, hashes. Needs neither torch nor megatron-core.

    step_00000100/
      manifest.json   written last: size and sha256 of every other file, and what the checkpoint is of
      config.yaml     the resolved configuration of the run
      model/          the weights, in megatron-core's torch_dist format
      training/       optimizer, schedule, position and random states, in the same format
    latest            the name of the newest complete checkpoint, for people and scripts

A folder called `step_<digits>` was complete when it got that name. `.tmp-<n>` is one being written, `.deleting` one being
removed, `.damaged` one that failed its check and was set aside.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from megarpt.config.load import config_from_dict
from megarpt.config.schema import TrainingConfig
from megarpt.corpus.atomic import atomic_write_json, fsync_directory
from megarpt.errors import CheckpointError

MODEL, TRAINING, REFERENCE = "model", "training", "reference"
CONFIG, MANIFEST, LATEST = "config.yaml", "manifest.json", "latest"
FORMAT = 1

_COMPLETE = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"step_\d{8,}\.(tmp-\d+|deleting)")
_DAMAGED = re.compile(r"step_\d{8,}\.damaged.*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint is of, and what its files must be."""

    step: int
    progress: Mapping[str, int | str]
    config_sha256: str
    tokenizer_sha256: str
    model: Mapping[str, Any]  # configuration key -> value, of all that decides the shape and the meaning of the weights
    has_optimizer_state: bool  # False before the first successful step
    layout: Mapping[str, int]  # world size and parallel sizes of the run that wrote it
    versions: Mapping[str, Any]
    created: str
    files: Mapping[str, Mapping[str, Any]]  # path inside the checkpoint -> {"bytes", "sha256"}

    @property
    def num_bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.files.values())

    @property
    def has_training_state(self) -> bool:
        """False for weights that were exported: a run can begin from them, not continue."""
        return any(name.startswith(f"{TRAINING}/") for name in self.files)

    def write(self, checkpoint: Path) -> None:
        """Make the folder a complete checkpoint."""
        content = {"format": FORMAT, **asdict(self)}
        atomic_write_json(checkpoint / MANIFEST, {**content, "manifest_sha256": _hash_json(content)})


def read_manifest(checkpoint: Path) -> Manifest:
    """The checked manifest of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        stored = content.pop("manifest_sha256")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; expected it in every complete checkpoint. Use another one, or restore it from a copy"
        ) from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); use another checkpoint, or restore it from a copy") from error
    if stored != _hash_json(content):
        raise CheckpointError(
            f"{path} is damaged: got sha256 {_hash_json(content)}, expected {stored}; "
            "use another checkpoint, or restore it from a copy"
        )
    version = content.pop("format", None)
    if version != FORMAT or set(content) != {f.name for f in fields(Manifest)}:
        raise CheckpointError(
            f"{path}: got checkpoint format {version!r}, expected {FORMAT}; "
            "it was written by another version of megarpt: use that one"
        )
    return Manifest(**content)


def step_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Folders that were complete once, newest first; their files are not looked at."""
    return sorted(_matching(directory, _COMPLETE), key=_step, reverse=True)


def list_damaged(directory: Path) -> list[Path]:
    """Checkpoints that were set aside."""
    return sorted(_matching(directory, _DAMAGED))


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest checkpoint with a whole manifest; None when there is none."""
    return next((path for path in list_checkpoints(Path(directory)) if _has_manifest(path)), None)


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest in a `checkpoints` folder or a run folder.

    Raises:
        CheckpointError: there is none.
    """
    given = Path(path)
    if (given / MANIFEST).is_file():
        return given
    for folder in (given, given / "checkpoints"):
        checkpoint = latest_checkpoint(folder)
        if checkpoint is not None:
            return checkpoint
    what = "does not exist" if not given.exists() else "holds no complete checkpoint"
    raise CheckpointError(f"{given} {what}; expected a run folder, its checkpoints folder, or one checkpoint (step_00000100)")


def read_config(path: str | Path) -> TrainingConfig:
    """The configuration stored inside a checkpoint; `path` as in `resolve_checkpoint`.

    Raises:
        CheckpointError: there is no checkpoint, or its configuration is not the one that was stored.
        ConfigError: this version of megarpt does not accept the configuration.
    """
    checkpoint = resolve_checkpoint(path)
    problems = check_files(checkpoint, read_manifest(checkpoint), [CONFIG])
    if problems:
        raise CheckpointError("\n".join(problems))
    return config_from_dict(yaml.safe_load((checkpoint / CONFIG).read_text(encoding="utf-8")))


def describe_file(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, after making sure that it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def check_files(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """One message for each file that is not what the manifest says. Cost: reads the files."""
    advice = "use another checkpoint, or restore the file from a copy"
    problems = []
    for name in names:
        path, expected = checkpoint / name, manifest.files.get(name)
        if expected is None:
            problems.append(f"{path} is not listed in {MANIFEST}; {advice}")
            continue
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                problems.append(f"{path}: got {size} bytes, expected {expected['bytes']}; {advice}")
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            problems.append(f"{path} is missing, expected {expected['bytes']} bytes; {advice}")
            continue
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror}); {advice}")
            continue
        if digest != expected["sha256"]:
            problems.append(f"{path}: got sha256 {digest}, expected {expected['sha256']}; {advice}")
    return problems


def remove_leftovers(directory: Path) -> list[str]:
    """Remove what a killed process was writing or deleting; the names. Only for the process that owns the folder."""
    folders = _matching(directory, _LEFTOVER)
    for folder in folders:
        shutil.rmtree(folder)
    pointers = list(directory.glob(f".{LATEST}.tmp"))
    for pointer in pointers:
        pointer.unlink()
    return sorted(path.name for path in folders + pointers)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint such that a kill on the way leaves nothing that looks complete."""
    doomed = checkpoint.with_name(checkpoint.name + ".deleting")
    checkpoint.rename(doomed)
    fsync_directory(checkpoint.parent)
    shutil.rmtree(doomed)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for a good one; where it lies now."""
    target, attempt = checkpoint.with_name(checkpoint.name + ".damaged"), 1
    while target.exists():
        attempt += 1
        target = checkpoint.with_name(f"{checkpoint.name}.damaged-{attempt}")
    checkpoint.rename(target)
    fsync_directory(checkpoint.parent)
    return target


def surplus(directory: Path, *, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Checkpoints that the retention rule lets go of, oldest first. Only those with a whole manifest count, or go."""
    old = [path for path in list_checkpoints(directory) if _has_manifest(path)][keep_last:]
    return [path for path in reversed(old) if not keep_every_steps or _step(path) % keep_every_steps]


def _matching(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]


def _has_manifest(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False  # whoever loads the folder names the damage
    return True


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _hash_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
