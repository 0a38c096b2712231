"""`megarpt score`: what a reference model thinks of every token of a corpus, written beside the corpus.

Windows are scored in order, so a sidecar grows like a file that is appended to. A killed job goes on where it last made its
output durable, and ends with the same bytes; the sidecar gets its name only when it is whole.

Dims: b micro-batch, s sequence length.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megarpt.config.schema import ScoreOptions
from megarpt.config.validate import sequence_fits_the_preset
from megarpt.corpus.indexed import CorpusIndex, CorpusWriter, publish_ready
from megarpt.corpus.manifest import SidecarManifest
from megarpt.data.batches import evaluation_batches
from megarpt.data.build import open_corpus
from megarpt.data.windows import WindowDataset
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_OK, ConfigError, StopRequested
from megarpt.log import terminal
from megarpt.model.forward import token_stats
from megarpt.parallel.collectives import from_speaker
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.run.contents import verify_contents
from megarpt.run.pretrained import Pretrained, load_pretrained
from megarpt.run.score_journal import Journal
from megarpt.train.evaluation import in_pipeline_loads
from megarpt.train.progress import ProgressLine
from megarpt.train.signals import StopSignal
from megarpt.train.weights import checkpoint_hash

logger = logging.getLogger(__name__)

_DURABLE_EVERY_S = 20.0


@dataclass(frozen=True, slots=True)
class _Target:
    """One sidecar to be written."""

    stream: str
    prefix: str
    manifest: SidecarManifest  # as it will be, but for the hashes of its own files


def run(options: ScoreOptions, runtime: Runtime) -> int:
    """Score the corpus with the reference model; sidecars that are already there, made by the same model, stay.

    Raises:
        DataError: the corpus is damaged, was made with another tokenizer, or the output cannot be written.
        StopRequested: a signal asked for it; what was scored is kept.
    """
    with StopSignal(runtime) as stop:
        return _run(options, runtime, stop)


def _run(options: ScoreOptions, runtime: Runtime, stop: StopSignal) -> int:
    layout = ParallelLayout.resolve(options.parallel, runtime.world_size)
    groups = layout.initialize(seed=0)
    stop.check("before reading the reference model")
    reference = load_pretrained(
        options.reference,
        runtime,
        layout,
        groups,
        options.parallel,
        micro_batch_size=options.micro_batch_size,
        seq_length=options.seq_length,
    )
    stop.check("before opening the corpus")
    data = reference.config.data.model_copy(update={"separate_documents": options.separate_documents})
    cfg = reference.config.model_copy(update={"data": data})
    too_long = sequence_fits_the_preset(cfg)
    if too_long:
        raise ConfigError(f"--seq-length: {too_long}")
    dataset = open_corpus(cfg, reference.tokenizer, options.corpus, where="--corpus")
    targets = _unfinished(options, reference, dataset)
    verify_contents([dataset], runtime, on_block=partial(stop.check_here, "while reading the corpus"))
    stop.check("before the first window")
    if targets:
        _score(options, runtime, groups, reference, dataset, targets, stop)
    return EXIT_OK


def _unfinished(options: ScoreOptions, reference: Pretrained, dataset: WindowDataset) -> list[_Target]:
    reference_sha256 = checkpoint_hash(reference.checkpoint)
    targets = []
    for stream, prefix in options.prefixes().items():
        corpus = dataset.manifest
        manifest = SidecarManifest(
            num_documents=corpus.num_documents,
            num_tokens=corpus.num_tokens,
            dtype="float32",
            bin_sha256="0" * 64,
            idx_sha256="0" * 64,
            stream=stream,
            corpus_bin_sha256=corpus.bin_sha256,
            corpus_idx_sha256=corpus.idx_sha256,
            tokenizer_sha256=corpus.tokenizer_sha256,
            seq_length=dataset.seq_length,
            separate_documents=dataset.separate_documents,
            reference=f"{reference.config.run.dir} ({reference.checkpoint.name})",
            reference_sha256=reference_sha256,
        )
        publish_ready(prefix, Path(prefix).absolute().parent)
        if Path(f"{prefix}.json").exists() and _same_source(SidecarManifest.load(prefix), manifest):
            logger.info("%s is already there, made by the same model from the same corpus", prefix)
            Journal(prefix, []).remove()  # of a job that ended between two of its sidecars
        else:
            targets.append(_Target(stream, prefix, manifest))
    return targets


def _same_source(old: SidecarManifest, new: SidecarManifest) -> bool:
    own = {"bin_sha256", "idx_sha256", "created", "tool_version", "reference"}
    return old.model_dump(exclude=own) == new.model_dump(exclude=own)


@torch.no_grad()
def _score(
    options: ScoreOptions,
    runtime: Runtime,
    groups: ProcessGroups,
    reference: Pretrained,
    dataset: WindowDataset,
    targets: list[_Target],
    stop: StopSignal,
) -> None:
    """Score all windows that are not on disk yet. Collectives: a gather of [b, s] values per stream and micro-batch."""
    is_writer, s = groups.speaks_for_the_loss, dataset.seq_length
    journal = Journal(targets[0].prefix, [t.manifest for t in targets])
    windows_done = from_speaker(journal.read() if is_writer else 0, groups)
    writers = [_open_writer(t, dataset, windows_done) for t in targets] if is_writer else []
    wants_entropy = any(t.stream == "ref_entropy" for t in targets)
    durable_at = time.monotonic()
    per_batch = options.micro_batch_size * groups.dp_size
    batches = evaluation_batches(
        dataset,
        micro_batch_size=options.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        device=runtime.device,
        first_window=windows_done,
    )
    is_first = runtime.rank == 0
    with ProgressLine("score", dataset.num_tokens, completed=windows_done * s, console=terminal(), is_writer=is_first) as line:
        for together in in_pipeline_loads(batches, groups):
            all_stats = token_stats([reference.network], together, groups, entropy=wants_entropy)
            for batch, stats in zip(together, all_stats, strict=False):  # no statistics before the last stage
                streams = {"ref_nll": -stats.logprob, "ref_entropy": stats.entropy}
                for i, target in enumerate(targets):
                    value = streams[target.stream]
                    assert value is not None
                    rows = _gather(torch.where(batch.loss_mask, value, torch.nan), groups)
                    if is_writer:
                        room = dataset.num_tokens - writers[i].num_values
                        writers[i].append_raw(rows.reshape(-1)[:room].tobytes(), b"")
            windows_done = min(windows_done + len(together) * per_batch, dataset.num_windows)
            line.update(min(windows_done * s, dataset.num_tokens))
            stopping = stop.agreed()
            if is_writer and (stopping or time.monotonic() - durable_at > _DURABLE_EVERY_S):
                journal.write(writers, windows_done)
                durable_at = time.monotonic()
            if stopping:
                raise StopRequested(f"stopped on {stop.name} after {windows_done} windows; run the same command again")
    for target, writer in zip(targets, writers, strict=False):
        totals = writer.finish()
        hashes = {"bin_sha256": totals.bin_sha256, "idx_sha256": totals.idx_sha256}
        writer.publish(target.manifest.model_copy(update=hashes))
    if is_writer:
        journal.remove()
    dist.barrier()
    for target in targets:
        logger.info("wrote %s: %s of %d tokens", target.prefix, target.stream, dataset.num_tokens)


def _open_writer(target: _Target, dataset: WindowDataset, windows_done: int) -> CorpusWriter:
    """A writer that stands behind the last durable window; all document lengths go in at the beginning."""
    if windows_done:
        values = min(1 + windows_done * dataset.seq_length, dataset.num_tokens)
        return CorpusWriter(target.prefix, np.float32, resume=(values, dataset.manifest.num_documents))
    writer = CorpusWriter(target.prefix, np.float32)
    for lengths in CorpusIndex(dataset.prefix).document_lengths():
        writer.append_raw(b"", lengths.astype(np.int32).tobytes())
    writer.append_raw(np.array([np.nan], dtype=np.float32).tobytes(), b"")  # nothing predicts the first token
    return writer


def _gather(rows: torch.Tensor, groups: ProcessGroups) -> np.ndarray:
    """[b, s] of all data-parallel ranks in window order, on the first of them."""
    rows = rows.float().contiguous()
    if groups.dp_size == 1:
        return rows.cpu().numpy()
    parts = [torch.empty_like(rows) for _ in range(groups.dp_size)] if groups.dp_rank == 0 else None
    dist.gather(rows, parts, dst=dist.get_global_rank(groups.dp, 0), group=groups.dp)
    return torch.cat(parts).cpu().numpy() if parts else np.empty(0, dtype=np.float32)
