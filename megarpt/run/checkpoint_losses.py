"""The loss of every token of one corpus at each of several checkpoints, scored once and kept in a folder.

Each checkpoint's losses are a sidecar as `megarpt score` writes it, named by the hash of the checkpoint's weights: what is
there is not computed again, whatever else is asked for later, and a job that was killed goes on where it stood.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megarpt.config.schema import Device, ScoreOptions
from megarpt.corpus.indexed import bin_path, manifest_path
from megarpt.corpus.manifest import CorpusManifest, SidecarManifest, verify_files
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError, DataError
from megarpt.run import score
from megarpt.train.checkpoint_files import list_checkpoints, read_config, read_manifest, resolve_checkpoint
from megarpt.train.sharded import from_rank_0
from megarpt.train.weights import checkpoint_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointLosses:
    """What one checkpoint thinks of every token."""

    name: str  # of the checkpoint or sidecar
    step: int | None  # None for a sidecar that does not say
    tokens_seen: int | None
    checkpoint: Path | None  # None for a sidecar
    prefix: str  # of the sidecar
    values: npt.NDArray[np.float32]  # [tokens of the corpus], memory-mapped; NaN where a token is never predicted


def find_sources(paths: Sequence[str]) -> list[Path]:
    """Checkpoints and sidecars in order: all of a run folder, oldest first, or what is named one by one.

    Raises:
        ConfigError: there are fewer than three.
        CheckpointError: a path is neither.
    """
    found: list[Path] = []
    for path in paths:
        several = [] if _is_sidecar(path) else list_checkpoints(Path(path) / "checkpoints") or list_checkpoints(Path(path))
        found += several[::-1] if several else [Path(path) if _is_sidecar(path) else resolve_checkpoint(path)]
    if len(found) < 3:
        got = ", ".join(path.name for path in found)
        raise ConfigError(
            f"got {len(found)} checkpoint{'s' if len(found) != 1 else ''} ({got}), expected at least 3 to fit a line to; a run "
            "keeps its newest ones only: train with checkpoint.interval_steps=N and checkpoint.keep_every_steps=N, or with a "
            "larger checkpoint.keep_last, or name more checkpoints"
        )
    return found


def score_sources(
    sources: Sequence[Path], corpus: str, folder: Path, runtime: Runtime, *, micro_batch_size: int, device: Device = "auto"
) -> list[CheckpointLosses]:
    """The losses of every source on `corpus`; those that are not in `folder` yet are computed. All ranks call it.

    Raises:
        DataError: the sources do not belong to one corpus and one way of cutting it into windows.
        StopRequested: a signal asked for it; what was scored is kept.
    """
    losses, corpus_manifest = [], CorpusManifest.load(corpus)
    first: SidecarManifest | None = None
    for number, source in enumerate(sources, start=1):
        if _is_sidecar(source):
            name, step, tokens, prefix = source.name, None, None, str(source)
        else:
            about = read_manifest(source)
            name, step, tokens = source.name, about.step, int(about.progress.get("tokens_seen", 0))
            identity = from_rank_0(checkpoint_hash(source) if runtime.rank == 0 else None)
            prefix = str(folder / f"{identity[:16]}_on_{corpus_manifest.bin_sha256[:8]}")
            if _is_there(prefix, identity, corpus_manifest):
                logger.info("%s (%d of %d) is scored already", source, number, len(sources))
            else:
                logger.info("scoring %s (%d of %d)", source, number, len(sources))
                data = read_config(source).data
                folder.mkdir(parents=True, exist_ok=True)
                options = ScoreOptions(
                    reference=str(source),
                    corpus=corpus,
                    output_prefix=prefix,
                    seq_length=data.seq_length,
                    separate_documents=data.separate_documents,
                    micro_batch_size=micro_batch_size,
                    device=device,
                )
                score.run(options, runtime)
        manifest = SidecarManifest.load(prefix)
        first = first or manifest
        manifest.check_belongs(corpus_manifest, seq_length=first.seq_length, separate_documents=first.separate_documents)
        if manifest.stream != "ref_nll":
            raise DataError(f"{prefix}: got a sidecar of stream {manifest.stream!r}, expected losses, which are 'ref_nll'")
        verify_files(prefix, manifest)
        values = np.memmap(bin_path(prefix), mode="r", dtype=np.float32)
        losses.append(CheckpointLosses(name, step, tokens, None if _is_sidecar(source) else source, prefix, values))
    return losses


def places(losses: Sequence[CheckpointLosses]) -> tuple[list[float], str]:
    """Where the checkpoints lie on the axis a line is fitted over, and what the axis is called.

    Tokens seen when every source says and they ascend, else their number in the row.
    """
    seen = [each.tokens_seen for each in losses]
    known = [float(tokens) for tokens in seen if tokens is not None]
    if len(known) == len(losses) and all(a < b for a, b in pairwise(known)):
        return known, "tokens seen"
    return [float(number) for number in range(len(losses))], "checkpoint"


def _is_sidecar(path: str | Path) -> bool:
    return manifest_path(path).is_file() and not Path(path).is_dir()


def _is_there(prefix: str, identity: str, corpus: CorpusManifest) -> bool:
    if not manifest_path(prefix).exists():
        return False
    manifest = SidecarManifest.load(prefix)
    return (manifest.reference_sha256, manifest.corpus_bin_sha256) == (identity, corpus.bin_sha256)
