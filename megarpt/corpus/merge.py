"""Several corpora joined into one, every byte checked on the way.

Error: equals preprocessing all inputs in one run, byte for byte (tests/integration/test_corpus_tools.py).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megarpt.corpus.atomic import require_free_bytes, write_errors
from megarpt.corpus.console import ProgressLine, StopSignal
from megarpt.corpus.indexed import CorpusIndex, HashingFile, bin_path, idx_path, manifest_path, publish_ready, write_index
from megarpt.corpus.manifest import CorpusManifest, verify_corpus
from megarpt.corpus.preprocess import JOB, locked_folder
from megarpt.corpus.worker import MALFORMED_KEPT
from megarpt.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_COPY_BYTES = 1 << 22


def merge(prefixes: Sequence[str], output_prefix: str, stop: StopSignal, *, overwrite: bool = False) -> CorpusManifest:
    """Join corpora in the order given.

    Raises:
        ConfigError: fewer than two, the same twice, an existing output, or corpora that do not go together.
        DataError: an input is damaged, or the output cannot be written.
        Stopped: a signal came; nothing is left behind.
    """
    _check_names(prefixes, output_prefix, overwrite=overwrite)
    manifests = [verify_corpus(prefix) for prefix in prefixes]
    _check_compatible(prefixes, manifests)
    output = Path(output_prefix)
    total = sum(bin_path(prefix).stat().st_size for prefix in prefixes)
    with write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    require_free_bytes(output, total + sum(idx_path(prefix).stat().st_size for prefix in prefixes))
    folder = Path(f"{output}.partial")
    with write_errors(folder):
        folder.mkdir(exist_ok=True)
    with write_errors(folder), locked_folder(folder):
        names = {part: folder / f"{output.name}.{part}" for part in ("bin.tmp", "idx.tmp", "json.ready")}
        try:
            with ProgressLine("merging", total) as progress:
                bin_sha256 = _copy_values(prefixes, manifests, names["bin.tmp"], stop, progress)
            idx_sha256 = _join_indexes(prefixes, manifests, names["idx.tmp"])
            merged = _merged_manifest(manifests, bin_sha256, idx_sha256)
            with open(names["json.ready"], "wb") as file:
                file.write(merged.to_json())
                file.flush()
                os.fsync(file.fileno())
            publish_ready(output, folder)
        finally:
            for path in (*names.values(), folder / "lock"):
                path.unlink(missing_ok=True)
            folder.rmdir()
    logger.info(
        "%s: %s documents and %s tokens of %d corpora",
        output,
        f"{merged.num_documents:,}",
        f"{merged.num_tokens:,}",
        len(prefixes),
    )
    return merged


def _check_names(prefixes: Sequence[str], output_prefix: str, *, overwrite: bool) -> None:
    if len(prefixes) < 2:
        raise ConfigError(f"--input: got {len(prefixes)} corpus, expected two or more prefixes")
    seen: dict[str, str] = {}
    for prefix in prefixes:
        real = os.path.realpath(bin_path(prefix))
        if real in seen:
            raise ConfigError(f"--input {prefix}: this corpus is given twice (also as {seen[real]}); give it once")
        seen[real] = prefix
    if os.path.realpath(bin_path(output_prefix)) in seen:
        raise ConfigError(f"--output-prefix {output_prefix}: this is one of the inputs; choose another name")
    there = [path for path in (bin_path(output_prefix), idx_path(output_prefix), manifest_path(output_prefix)) if path.exists()]
    if there and not overwrite:
        raise ConfigError(f"{there[0]}: is there already; choose another --output-prefix, or pass --overwrite")
    if Path(f"{output_prefix}.partial", JOB).exists():  # without it, it is what a killed merge has left: made anew
        raise ConfigError(
            f"{output_prefix}.partial: an unfinished job is in the way; finish it with the command that began it, or remove it"
        )


def _check_compatible(prefixes: Sequence[str], manifests: Sequence[CorpusManifest]) -> None:
    """All corpora must be ids of one vocabulary, ended the same way."""
    first = manifests[0]
    for prefix, manifest in zip(prefixes[1:], manifests[1:], strict=True):
        wrong = [
            f"{name}: {prefixes[0]} has {ours}, {prefix} has {theirs}"
            for name, ours, theirs in (
                ("tokenizer", _tokenizer(first), _tokenizer(manifest)),
                ("type", first.dtype, manifest.dtype),
                ("eod token", first.tokenizer.eod, manifest.tokenizer.eod),
                ("append_eod", first.append_eod, manifest.append_eod),
            )
            if ours != theirs
        ]
        if wrong:
            raise ConfigError(f"these corpora do not go together: {'; '.join(wrong)}; tokenize them again in the same way")


def _tokenizer(manifest: CorpusManifest) -> str:
    return f"{manifest.tokenizer.name} ({manifest.tokenizer.sha256[:12]})"


def _copy_values(
    prefixes: Sequence[str], manifests: Sequence[CorpusManifest], target: Path, stop: StopSignal, progress: ProgressLine
) -> str:
    """Copy all values, checking each input's hash; the hash of the whole."""
    output = HashingFile(target)
    try:
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            digest = hashlib.sha256()
            with open(bin_path(prefix), "rb", buffering=0) as file:
                while block := file.read(_COPY_BYTES):
                    stop.check("nothing is left behind, run the same command again")
                    digest.update(block)
                    output.write(block)
                    progress.update(output.size, prefix)
            if digest.hexdigest() != manifest.bin_sha256:
                raise DataError(
                    f"{bin_path(prefix)}: got sha256 {digest.hexdigest()}, expected {manifest.bin_sha256} as in its manifest; "
                    "the content was changed: copy or make it again"
                )
        output.sync()
    finally:
        output.close()
    return output.hexdigest()


def _join_indexes(prefixes: Sequence[str], manifests: Sequence[CorpusManifest], target: Path) -> str:
    """The index of the whole, and its hash."""
    indexes = [CorpusIndex(prefix) for prefix in prefixes]
    dtype = indexes[0].dtype

    def lengths() -> Iterator[npt.NDArray[Any]]:
        for index in indexes:
            yield from index.blocks(index.lengths)

    def pointers() -> Iterator[npt.NDArray[Any]]:
        base = 0
        for index, manifest in zip(indexes, manifests, strict=True):
            yield from (block + base for block in index.blocks(index.pointers))
            base += manifest.num_tokens * dtype.itemsize

    def boundaries() -> Iterator[npt.NDArray[Any]]:
        base = 0
        yield np.zeros(1, dtype=np.int64)
        for index in indexes:
            yield from (block + base for block in index.blocks(index.boundaries[1:]))
            base += index.num_sequences

    counts = (sum(index.num_sequences for index in indexes), sum(index.num_documents for index in indexes))
    return write_index(target, dtype, counts, (lengths(), pointers(), boundaries()))


def _merged_manifest(manifests: Sequence[CorpusManifest], bin_sha256: str, idx_sha256: str) -> CorpusManifest:
    first = manifests[0]
    return CorpusManifest(
        num_documents=sum(manifest.num_documents for manifest in manifests),
        num_tokens=sum(manifest.num_tokens for manifest in manifests),
        dtype=first.dtype,
        bin_sha256=bin_sha256,
        idx_sha256=idx_sha256,
        text_bytes=sum(manifest.text_bytes for manifest in manifests),
        append_eod=first.append_eod,
        tokenizer=first.tokenizer,
        inputs=[record for manifest in manifests for record in manifest.inputs],
        num_malformed=sum(manifest.num_malformed for manifest in manifests),
        malformed=[record for manifest in manifests for record in manifest.malformed][:MALFORMED_KEPT],
    )
