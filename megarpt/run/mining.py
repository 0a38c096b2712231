"""`tools/build_rpt_prompts.py`: hard positions of a corpus, found with a proxy model, as files of prompts.

It works in two passes. The first walks the corpus with the proxy and keeps, as a file, the positions that may be chosen; a
killed job goes on behind the last documents that are on disk. The second, which takes seconds, chooses among them and writes
the prompts. Outputs get their names when they are whole, the manifest last.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from megarpt import __version__
from megarpt.config.schema import ParallelConfig
from megarpt.config.validate import sequence_fits_the_preset
from megarpt.corpus.atomic import write_errors
from megarpt.corpus.indexed import CorpusIndex, HashingFile
from megarpt.corpus.manifest import CorpusManifest, verify_corpus, verify_values
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError, DataError, NumericsError, StopRequested
from megarpt.log import terminal
from megarpt.parallel.layout import ParallelLayout
from megarpt.rl.mining import (
    BANDS,
    TRIVIAL,
    Continuations,
    Thresholds,
    Window,
    is_validation,
    next_token_entropy,
    position_keys,
    windows,
)
from megarpt.rl.prompts import next_token_record
from megarpt.run.mining_job import CANDIDATE, MiningJob, MiningOptions
from megarpt.run.pretrained import Pretrained, load_pretrained
from megarpt.train.progress import ProgressLine
from megarpt.train.signals import StopSignal

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

_DURABLE_EVERY_S = 20.0

Candidates = npt.NDArray[np.void]  # of dtype CANDIDATE
Ids = npt.NDArray[Any]


def mine(options: MiningOptions, runtime: Runtime) -> dict[str, Any]:
    """Write the prompts of a corpus and return their manifest; prompts that are already there, of the same job, stay.

    Raises:
        ConfigError: options that cannot be meant, or several ranks.
        CheckpointError: the proxy cannot be read.
        DataError: the corpus is damaged, empty or made with another tokenizer than the proxy's; outputs of another job are in
            the way; no position is hard enough; or nothing can be written.
        NumericsError: the proxy gives numbers that are not finite.
        StopRequested: a signal asked for it; what was done is kept.
    """
    options.check()
    if runtime.world_size > 1:
        raise ConfigError(f"got a world of {runtime.world_size} ranks, expected one process; start it without torchrun")
    with StopSignal(runtime) as stop:
        layout, parallel = ParallelLayout(), ParallelConfig()
        proxy = load_pretrained(
            options.proxy,
            runtime,
            layout,
            layout.initialize(seed=0),
            parallel,
            micro_batch_size=options.micro_batch_size,
            seq_length=options.seq_length,
        )
        too_long = sequence_fits_the_preset(proxy.config)
        if too_long:
            raise ConfigError(f"--seq-length: {too_long}")
        corpus = _open_corpus(options, proxy)
        job = MiningJob.of(options, proxy, corpus)
        finished = job.finished(restart=options.restart)
        if finished is not None:
            logger.info("%s is already there, of the same job", job.manifest_path)
            return finished
        verify_values(options.corpus, corpus, on_block=partial(stop.check_here, "while reading the corpus"))
        candidates = _find_candidates(options, job, proxy, corpus, runtime, stop)
        return _write_prompts(options, job, proxy, candidates, stop)


def _open_corpus(options: MiningOptions, proxy: Pretrained) -> CorpusManifest:
    corpus = verify_corpus(options.corpus)
    if corpus.tokenizer.sha256 != proxy.tokenizer.sha256:
        raise DataError(
            f"--corpus: {options.corpus} was tokenized with {corpus.tokenizer.name} ({corpus.tokenizer.sha256[:12]}), expected "
            f"{proxy.tokenizer.name} ({proxy.tokenizer.sha256[:12]}), the proxy's; entropies of other tokens mean nothing: "
            "tokenize the text again with the proxy's, or take another proxy"
        )
    return corpus


def _find_candidates(
    options: MiningOptions, job: MiningJob, proxy: Pretrained, corpus: CorpusManifest, runtime: Runtime, stop: StopSignal
) -> Candidates:
    """The first pass: positions that may be chosen, in their order."""
    index = CorpusIndex(options.corpus)
    done, num_candidates = job.read_journal()
    continuations = Continuations(proxy.tokenizer, options.continuation_bytes)
    tokens_done = int(index.lengths[: index.boundaries[done]].sum(dtype=np.int64))
    with write_errors(job.candidates_path):
        job.candidates_path.absolute().parent.mkdir(parents=True, exist_ok=True)
        file = HashingFile(job.candidates_path, keep_bytes=num_candidates * CANDIDATE.itemsize)
    durable_at = time.monotonic()
    line = ProgressLine("mine", corpus.num_tokens, completed=tokens_done, console=terminal())
    try:
        for group in _groups(index, done, proxy.config.data.seq_length, options.micro_batch_size):
            for number, document, entropy in _entropies(group, proxy, options.micro_batch_size, runtime, stop):
                chosen = _choose_in_document(options, number, document, entropy, continuations)
                with write_errors(job.candidates_path):
                    file.write(chosen.tobytes())
                tokens_done += len(document)
            done = group[-1][0] + 1
            line.update(tokens_done, {"kept": str(file.size // CANDIDATE.itemsize)})
            if time.monotonic() - durable_at > _DURABLE_EVERY_S or stop.agreed():
                job.write_journal(done, file)
                durable_at = time.monotonic()
                if stop.agreed():
                    raise StopRequested(f"stopped on {stop.name} after {done} documents; run the same command again")
        job.write_journal(done, file)
    finally:
        line.close()
        file.close()
    return np.fromfile(job.candidates_path, dtype=CANDIDATE)


def _groups(index: CorpusIndex, first: int, seq_length: int, size: int) -> Iterator[list[tuple[int, Ids, list[Window]]]]:
    """Neighbouring documents that have up to `size` windows together, or one that has more.

    Where a group begins depends on the documents alone, so a resumed job computes the same batches.
    """
    group: list[tuple[int, Ids, list[Window]]] = []
    count = 0
    for number in range(first, index.num_documents):
        document = index.read_document(number)
        parts = windows(len(document), seq_length)
        if group and count + len(parts) > size:
            yield group
            group, count = [], 0
        group.append((number, document, parts))
        count += len(parts)
    if group:
        yield group


def _entropies(
    group: list[tuple[int, Ids, list[Window]]], proxy: Pretrained, size: int, runtime: Runtime, stop: StopSignal
) -> Iterator[tuple[int, Ids, npt.NDArray[np.float32]]]:
    """(number, document, entropy of each of its tokens before it is read); NaN of the first token, which nothing predicts."""
    parts = [(document[each.start : each.end], each) for _, document, found in group for each in found]
    rows: list[npt.NDArray[np.float32]] = []
    for begin in range(0, len(parts), size):
        stop.check_here("within a document")  # what a long one has cost so far is lost
        batch = parts[begin : begin + size]
        found = next_token_entropy(proxy.network, [ids for ids, _ in batch], runtime.device)
        if not all(bool(values.isfinite().all()) for values in found):
            raise NumericsError(
                f"{proxy.checkpoint}: the proxy's entropies are not finite in document {group[0][0]} or behind it, expected "
                "numbers; take another checkpoint, or compute in fp32"
            )
        rows += [values.numpy()[window.first_row :] for values, (_, window) in zip(found, batch, strict=True)]
    taken = 0
    for number, document, found_windows in group:
        own = rows[taken : taken + len(found_windows)]
        taken += len(found_windows)
        yield number, document, np.concatenate([np.full(min(1, len(document)), np.nan, dtype=np.float32), *own])


def _choose_in_document(
    options: MiningOptions, number: int, document: Ids, entropy: npt.NDArray[np.float32], continuations: Continuations
) -> Candidates:
    """The positions of a document that may be chosen, at most so many, in their order."""
    lowest = -np.inf if options.keep_easy else np.float32(options.thresholds.easy)
    position = np.arange(len(document))
    may = (entropy >= lowest) & (position >= max(1, options.min_context_tokens)) & continuations.can_be_asked(document)
    keys = position_keys(options.seed, number, len(document))
    found = np.flatnonzero(may)
    found = np.sort(found[np.argsort(keys[found], kind="stable")][: options.max_per_document])
    chosen = np.empty(len(found), dtype=CANDIDATE)
    chosen["document"], chosen["position"], chosen["entropy"], chosen["key"] = number, found, entropy[found], keys[found]
    return chosen


def _write_prompts(
    options: MiningOptions, job: MiningJob, proxy: Pretrained, candidates: Candidates, stop: StopSignal
) -> dict[str, Any]:
    """The second pass: choose, write, publish."""
    documents = np.unique(candidates["document"])
    held_out = np.array([is_validation(options.seed, each, options.valid_fraction) for each in documents.tolist()], dtype=bool)
    in_valid = held_out[np.searchsorted(documents, candidates["document"])]
    limits = {"train": options.max_prompts, "valid": options.max_valid_prompts}
    chosen = {split: _smallest_keys(candidates[in_valid == (split == "valid")], limit) for split, limit in limits.items()}
    if not len(chosen["train"]):
        raise DataError(
            f"{options.corpus}: {len(candidates)} positions reach {options.thresholds.easy} nats, and none of them is left for "
            "training; expected at least one: lower --thresholds, take a larger corpus, or another proxy"
        )
    if options.valid_fraction and not len(chosen["valid"]):
        logger.warning("%s is empty: no document with a hard position is in it", job.output_path("valid"))
    written = {split: _write_split(options, job, proxy, split, each, stop) for split, each in chosen.items()}
    manifest = {
        "kind": "rpt_prompts",
        "version": FORMAT_VERSION,
        "job": job.source,
        "proxy": f"{options.proxy} ({proxy.checkpoint.name})",
        "corpus": options.corpus,
        "positions": _by_band(options.thresholds, candidates),
        "prompts": {split: _by_band(options.thresholds, each) for split, each in chosen.items()},
        "documents": {split: len(np.unique(each["document"])) for split, each in chosen.items()},
        "sha256": written,
        "tool_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    job.publish(manifest)
    return manifest


def _smallest_keys(candidates: Candidates, limit: int) -> Candidates:
    """At most `limit` candidates, chosen by their keys, in their order. Equal keys go by position."""
    order = np.argsort(candidates["key"], kind="stable")[:limit]
    return candidates[np.sort(order)]


def _by_band(thresholds: Thresholds, candidates: Candidates) -> dict[str, int]:
    count = Counter(thresholds.band(candidates["entropy"]).tolist())
    return {band: count[place] for place, band in enumerate(BANDS) if band != TRIVIAL or count[place]}


def _write_split(
    options: MiningOptions, job: MiningJob, proxy: Pretrained, split: str, chosen: Candidates, stop: StopSignal
) -> str:
    """Write the prompts of a split under a temporary name; their sha256."""
    index = CorpusIndex(options.corpus)
    continuations = Continuations(proxy.tokenizer, options.continuation_bytes)
    bands = options.thresholds.band(chosen["entropy"])
    number, document = -1, np.empty(0, dtype=index.dtype)
    path = job.temporary_path(split)
    with write_errors(path):
        file = HashingFile(path)
        try:
            for candidate, band in zip(chosen, bands.tolist(), strict=True):
                if int(candidate["document"]) != number:
                    stop.check("while writing prompts")
                    number = int(candidate["document"])
                    document = index.read_document(number)
                position = int(candidate["position"])
                text, boundaries = continuations.after(document, position)
                record = next_token_record(
                    document=number,
                    position=position,
                    context=document[max(0, position - options.max_context_tokens) : position].tolist(),
                    continuation=text,
                    boundaries=boundaries,
                    entropy=float(candidate["entropy"]),
                    band=BANDS[band],
                    tokenizer_sha256=proxy.tokenizer.sha256,
                )
                file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            file.sync()
        finally:
            file.close()
    return file.hexdigest()
