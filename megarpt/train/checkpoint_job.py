"""One checkpoint on its way to the disk: the part of a save that no rank needs another for, so that any thread can do it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from megarpt.config.schema import CheckpointConfig
from megarpt.corpus.atomic import atomic_write_bytes, fsync_directory
from megarpt.train.checkpoint_files import CONFIG, LATEST, Manifest, describe_file, remove_checkpoint, surplus
from megarpt.train.sharded_save import Part, Written, complete

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankFiles:
    """What one rank wrote."""

    written: Mapping[str, Written]  # folder name -> index entries
    files: Mapping[str, Mapping[str, Any]]  # path inside the checkpoint -> size and hash


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """Everything a checkpoint consists of, frozen. No collectives, no CUDA."""

    final: Path
    temporary: Path
    manifest: Manifest  # all but its files
    config: str
    parts: Mapping[str, Part]  # folder name -> this rank's share
    rank: int
    given_up: Event

    def write(self) -> RankFiles:
        """Write and hash what is this rank's.

        Raises:
            OSError: the file system refused, or the save was given up.
        """
        written = {}
        for name, part in self.parts.items():
            (self.temporary / name).mkdir(parents=True, exist_ok=True)
            written[name] = part.write(self.temporary / name, self.rank, self.given_up.is_set)
        own = [path for name in self.parts for path in (self.temporary / name).glob(f"__{self.rank}_*")]
        return RankFiles(written, self._describe(own))

    def complete(self, everyone: Sequence[RankFiles], retention: CheckpointConfig) -> Manifest:
        """On the writer, when all ranks have written: index, manifest, and the name that makes it a checkpoint.

        Raises:
            OSError, DataError: the file system refused.
        """
        atomic_write_bytes(self.temporary / CONFIG, self.config.encode())
        for name in self.parts:
            complete(self.temporary / name, [each.written[name] for each in everyone])
            fsync_directory(self.temporary / name)
        files = {path: entry for each in everyone for path, entry in each.files.items()}
        present = {str(path.relative_to(self.temporary)): path for path in self.temporary.rglob("*") if path.is_file()}
        files |= self._describe([path for name, path in present.items() if name not in files])
        manifest = replace(self.manifest, files=dict(sorted(files.items())))
        manifest.write(self.temporary)
        self.temporary.rename(self.final)
        fsync_directory(self.final.parent)
        atomic_write_bytes(self.final.parent / LATEST, f"{self.final.name}\n".encode())
        _retain(self.final.parent, retention)
        return manifest

    def _describe(self, paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
        return {str(path.relative_to(self.temporary)): describe_file(path) for path in paths}


def _retain(directory: Path, options: CheckpointConfig) -> None:
    for checkpoint in surplus(directory, keep_last=options.keep_last, keep_every_steps=options.keep_every_steps):
        try:
            remove_checkpoint(checkpoint)
        except OSError as error:
            logger.warning("%s is not needed any more and cannot be removed: %s", checkpoint, error)
