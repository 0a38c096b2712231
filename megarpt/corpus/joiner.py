"""Joins finished shards in order, durably: what is joined is saved now and then, and only then are its shards removed."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megarpt.corpus.atomic import atomic_write_json
from megarpt.corpus.indexed import CorpusWriter
from megarpt.corpus.worker import MALFORMED_KEPT, ShardResult, read_shard_result, shard_paths
from megarpt.errors import DataError

JOINED = "joined.json"
_COPY_BYTES = 1 << 22
_SAVE_EVERY_S = 1.0


@dataclass(slots=True)
class Joined:
    """What the joined part of the corpus holds; saved as joined.json."""

    documents_by_file: list[int]
    num_shards: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    text_bytes: int = 0
    bin_sha256: str = ""
    num_malformed: int = 0
    malformed: list[tuple[int, int, str]] = field(default_factory=list)  # file, line, reason; the first ones

    def add(self, shard: ShardResult) -> None:
        """Count a shard."""
        self.num_shards += 1
        self.num_documents += shard.num_documents
        self.num_tokens += shard.num_tokens
        self.text_bytes += shard.text_bytes
        for file, count in shard.documents_by_file.items():
            self.documents_by_file[file] += count
        self.num_malformed += shard.num_malformed
        self.malformed += shard.malformed[: MALFORMED_KEPT - len(self.malformed)]


class Joiner:
    """The corpus of a job in the making.

    Raises:
        DataError: what an interrupted run joined was changed since.
    """

    def __init__(self, prefix: Path, folder: Path, dtype: np.dtype[Any], *, num_files: int) -> None:
        self.folder = folder
        self.pending: dict[int, ShardResult] = {}  # finished, not joined
        self.joined = self._read(num_files)
        resume = (self.joined.num_tokens, self.joined.num_documents)
        self.writer = CorpusWriter(prefix, dtype, folder=folder, resume=resume)
        if self.joined.num_shards and self.writer.hexdigest() != self.joined.bin_sha256:
            raise DataError(f"{folder}: the joined part was changed since it was written; pass --restart to begin again")
        self._saved_at = time.monotonic()
        self._to_remove: list[int] = []

    @property
    def num_finished(self) -> int:
        """Shards that need not be made again."""
        return self.joined.num_shards + len(self.pending)

    @property
    def num_tokens(self) -> int:
        """Tokens of finished shards."""
        return self.joined.num_tokens + sum(result.num_tokens for result in self.pending.values())

    def find_finished(self, num_shards: int, job_sha256: str) -> dict[int, ShardResult]:
        """Shards an interrupted run left behind, checked against their hashes."""
        found = {}
        for shard in range(self.joined.num_shards, num_shards):
            result = read_shard_result(self.folder, shard, job_sha256)
            if result is not None and _hash(shard_paths(self.folder, shard)[0]) == result.bin_sha256:
                found[shard] = result
        return found

    def join(self) -> None:
        """Append the pending shards that come next.

        Raises:
            DataError: a shard was changed, or the file system refused.
        """
        while (result := self.pending.pop(self.joined.num_shards, None)) is not None:
            values, lengths, _commit = shard_paths(self.folder, result.shard)
            with open(values, "rb", buffering=0) as file:
                while block := file.read(_COPY_BYTES):
                    self.writer.append_raw(block, b"")
            self.writer.append_raw(b"", lengths.read_bytes())
            self.joined.add(result)
            if (self.writer.num_values, self.writer.num_documents) != (self.joined.num_tokens, self.joined.num_documents):
                raise DataError(f"{values}: holds other values than its result says; pass --restart to begin again")
            self._to_remove.append(result.shard)
            if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
                self._save()

    def close(self) -> None:
        """Close the files and leave them where they are."""
        self.writer.close()

    def _read(self, num_files: int) -> Joined:
        path = self.folder / JOINED
        if not path.exists():
            return Joined([0] * num_files)
        try:
            return Joined(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); pass --restart to begin again") from error

    def _save(self) -> None:
        self.writer.flush()
        self.joined.bin_sha256 = self.writer.hexdigest()
        atomic_write_json(self.folder / JOINED, asdict(self.joined))
        for shard in self._to_remove:
            for path in shard_paths(self.folder, shard):
                path.unlink(missing_ok=True)
        self._to_remove = []
        self._saved_at = time.monotonic()


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()
