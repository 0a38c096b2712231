"""Which checkpoint a run goes on from: the newest whole one. All ranks ask together and get the same answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megarpt.corpus.atomic import atomic_write_bytes
from megarpt.errors import CheckpointError
from megarpt.train.checkpoint_files import (
    LATEST,
    Manifest,
    check_files,
    list_checkpoints,
    list_damaged,
    read_manifest,
    set_aside,
)
from megarpt.train.sharded import from_rank_0, gathered, on_rank_0

logger = logging.getLogger(__name__)


def newest_whole(directory: Path) -> tuple[Path, Manifest] | None:
    """The newest whole checkpoint in a folder, None where there never was one; damaged ones that are newer are set aside.

    Cost: reads every file of the checkpoint, shared among the ranks. Collectives: a few gathers of objects over all ranks.

    Raises:
        CheckpointError: there are checkpoints and none is whole. A run never begins again in silence where one has been.
    """
    damaged: dict[Path, list[str]] = {}
    for checkpoint in from_rank_0(list_checkpoints(directory)):
        manifest, problems = _check(checkpoint)
        if manifest is not None and not problems:
            on_rank_0(partial(_set_aside, damaged, checkpoint))
            return checkpoint, manifest
        damaged[checkpoint] = problems
    if damaged:
        lines = "".join(f"\n  {problem}" for problems in damaged.values() for problem in problems)
        raise CheckpointError(
            f"{directory}: none of the {len(damaged)} checkpoints is whole:{lines}\n"
            "restore one from a copy, or move the folder away to begin again"
        )
    aside = from_rank_0(list_damaged(directory))
    if aside:
        raise CheckpointError(
            f"{directory} holds only checkpoints that were set aside as damaged ({', '.join(p.name for p in aside)}), "
            "expected a whole one; restore one from a copy, or move the folder away to begin again"
        )
    return None


def _check(checkpoint: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest and what is wrong, equal on every rank; ranks share the files."""
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(checkpoint)
        problems = check_files(checkpoint, manifest, sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()])
    except CheckpointError as error:
        problems = [str(error)]
    everyone = gathered(problems)
    return manifest, list(dict.fromkeys(problem for each in everyone for problem in each))


def _set_aside(damaged: Mapping[Path, list[str]], whole: Path) -> None:
    for checkpoint, problems in damaged.items():
        lines = "".join(f"\n  {problem}" for problem in problems)
        logger.warning("%s is damaged and set aside as %s:%s", checkpoint, set_aside(checkpoint).name, lines)
    if damaged:
        logger.warning("going back to %s", whole)
    atomic_write_bytes(whole.parent / LATEST, f"{whole.name}\n".encode())
