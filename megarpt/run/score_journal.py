"""How far a scoring job has come, so that a killed one goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarpt.corpus.atomic import atomic_write_json
from megarpt.corpus.indexed import CorpusWriter
from megarpt.corpus.manifest import SidecarManifest

logger = logging.getLogger(__name__)

_VOLATILE = {"bin_sha256", "idx_sha256", "created", "tool_version", "reference"}


class Journal:
    """`<prefix>.progress.json`: which windows are on disk, for which corpus and reference model."""

    def __init__(self, prefix: str, manifests: Sequence[SidecarManifest]) -> None:
        self.path = Path(f"{prefix}.progress.json")
        self._job: list[dict[str, Any]] = [manifest.model_dump(mode="json", exclude=_VOLATILE) for manifest in manifests]

    def read(self) -> int:
        """Windows that are durable; 0 when there is no job to go on with, or it was another one."""
        try:
            content = json.loads(self.path.read_bytes())
            job, windows = content["job"], int(content["windows"])
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%r): scoring starts from the beginning", self.path, error)
            return 0
        if job != self._job:
            logger.warning(
                "%s belongs to another corpus, reference model or setting: scoring starts from the beginning", self.path
            )
            return 0
        logger.info("going on behind window %d", windows)
        return windows

    def write(self, writers: Sequence[CorpusWriter], windows: int) -> None:
        """Make the values durable, then say so."""
        for writer in writers:
            writer.flush()
        atomic_write_json(self.path, {"job": self._job, "windows": windows})

    def remove(self) -> None:
        """The job is done."""
        self.path.unlink(missing_ok=True)
