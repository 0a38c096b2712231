"""What a mining job is, where its files lie, and how far it has come, so that a killed one goes on."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megarpt.corpus.atomic import atomic_write_json, fsync_directory, write_errors
from megarpt.corpus.indexed import HashingFile
from megarpt.corpus.manifest import CorpusManifest, hash_file
from megarpt.errors import ConfigError, DataError
from megarpt.rl.mining import Thresholds
from megarpt.run.pretrained import Pretrained
from megarpt.train.weights import checkpoint_hash

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")
CANDIDATE = np.dtype([("document", "<i8"), ("position", "<i4"), ("entropy", "<f4"), ("key", "<u8")])


@dataclass(frozen=True, slots=True, kw_only=True)
class MiningOptions:
    """What is asked of a corpus."""

    proxy: str  # run folder or checkpoint
    corpus: str  # prefix
    output_prefix: str
    thresholds: Thresholds = field(default_factory=Thresholds)
    keep_easy: bool = False  # also keep what is below the first threshold
    max_per_document: int = 64  # positions
    max_prompts: int = 100_000  # of the training split
    max_valid_prompts: int = 1000
    valid_fraction: float = 0.05  # of documents
    min_context_tokens: int = 1
    max_context_tokens: int = 1024
    continuation_bytes: int = 64
    seed: int = 0
    seq_length: int | None = None  # tokens that the proxy reads at once; None takes its run's
    micro_batch_size: int = 8
    restart: bool = False

    def check(self) -> None:
        """
        Raises:
            ConfigError: values that cannot be meant.
        """
        self.thresholds.check()
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ConfigError(f"--valid-fraction: got {self.valid_fraction}, expected 0 or more and less than 1")
        if self.min_context_tokens > self.max_context_tokens:
            raise ConfigError(
                f"--min-context-tokens: got {self.min_context_tokens}, expected at most --max-context-tokens "
                f"({self.max_context_tokens})"
            )


class MiningJob(NamedTuple):
    """What the outputs follow from, where they lie, and how far their making has come."""

    prefix: str
    source: dict[str, Any]

    @classmethod
    def of(cls, options: MiningOptions, proxy: Pretrained, corpus: CorpusManifest) -> MiningJob:
        own = asdict(options)
        for volatile in ("proxy", "corpus", "output_prefix", "restart"):
            del own[volatile]
        source = own | {
            "thresholds": options.thresholds._asdict(),
            "seq_length": proxy.config.data.seq_length,
            "proxy_sha256": checkpoint_hash(proxy.checkpoint),
            "corpus_bin_sha256": corpus.bin_sha256,
            "corpus_idx_sha256": corpus.idx_sha256,
            "tokenizer_sha256": corpus.tokenizer.sha256,
        }
        return cls(options.output_prefix, source)

    @property
    def manifest_path(self) -> Path:
        return Path(f"{self.prefix}.json")

    @property
    def candidates_path(self) -> Path:
        return Path(f"{self.prefix}.candidates.tmp")

    @property
    def journal_path(self) -> Path:
        return Path(f"{self.prefix}.progress.json")

    def output_path(self, split: str) -> Path:
        return Path(f"{self.prefix}_{split}.jsonl")

    def temporary_path(self, split: str) -> Path:
        """Where an output lies until it is published."""
        path = self.output_path(split)
        return path.with_name(f".{path.name}.tmp")

    def finished(self, *, restart: bool) -> dict[str, Any] | None:
        """The manifest of this job, if it has ended before. `restart` throws away what is there.

        Raises:
            DataError: what is there belongs to another job, or was changed.
        """
        if restart:
            self.clean_up()
            self.manifest_path.unlink(missing_ok=True)
        again = "choose another --output-prefix, or replace it with --restart"
        try:
            manifest: dict[str, Any] = json.loads(self.manifest_path.read_bytes())
            hashes, is_same = dict(manifest["sha256"]), manifest["job"] == self.source
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.manifest_path}: this is no manifest of prompts ({error!r}); {again}") from error
        if not is_same:
            differences = ", ".join(self._differences(manifest))
            raise DataError(f"{self.manifest_path}: got prompts of another job, which differs in {differences}; {again}")
        for split in SPLITS:
            path = self.output_path(split)
            if not path.exists():
                return None
            if hash_file(path) != hashes.get(split):
                raise DataError(f"{path}: the content is not what {self.manifest_path.name} says: it was changed; {again}")
        return manifest

    def _differences(self, manifest: dict[str, Any]) -> list[str]:
        other = manifest["job"] if isinstance(manifest["job"], dict) else {}
        return sorted(name for name in self.source.keys() | other.keys() if self.source.get(name) != other.get(name))

    def read_journal(self) -> tuple[int, int]:
        """(documents, candidates) that are on disk; none when there is no job to go on with, or it was another one."""
        try:
            content = json.loads(self.journal_path.read_bytes())
            source, documents, candidates = content["job"], int(content["documents"]), int(content["candidates"])
        except FileNotFoundError:
            return 0, 0
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%r): mining starts from the beginning", self.journal_path, error)
            return 0, 0
        if source != self.source:
            logger.warning("%s belongs to another job: mining starts from the beginning", self.journal_path)
            return 0, 0
        logger.info("going on behind document %d", documents)
        return documents, candidates

    def write_journal(self, documents: int, file: HashingFile) -> None:
        """Make the candidates durable, then say so."""
        with write_errors(self.candidates_path):
            file.sync()
        atomic_write_json(
            self.journal_path,
            {"job": self.source, "documents": documents, "candidates": file.size // CANDIDATE.itemsize},
        )

    def publish(self, manifest: dict[str, Any]) -> None:
        """Give the outputs their names. The old manifest goes first and the new one comes last.

        Raises:
            DataError: the file system refused.
        """
        with write_errors(self.manifest_path):
            self.manifest_path.unlink(missing_ok=True)
            fsync_directory(self.manifest_path.absolute().parent)
            for split in SPLITS:
                os.replace(self.temporary_path(split), self.output_path(split))
        atomic_write_json(self.manifest_path, manifest)
        self.clean_up()

    def clean_up(self) -> None:
        """Remove what a job needs only until it ends."""
        self.journal_path.unlink(missing_ok=True)
        self.candidates_path.unlink(missing_ok=True)
