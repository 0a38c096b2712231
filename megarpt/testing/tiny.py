"""Small corpora, sidecars and texts for tests, tools and examples."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megarpt.corpus.indexed import CorpusWriter, IndexedTotals, token_dtype
from megarpt.corpus.manifest import CorpusManifest, SidecarManifest, TokenizerRecord
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer

_VOCABULARY = """
the a of and to in is that it was for on are with as they at be this from have by one word but not what all were when we there
can an your which their said if do will each about how up out them then she many some so these would other into has
"""


def byte_tokenizer() -> Tokenizer:
    """The tokenizer that needs no file."""
    return load_tokenizer("bytes")


def text_documents(count: int, *, seed: int = 0, max_sentences: int = 8) -> list[str]:
    """Texts a small model can learn something from: sentences of common words with a fixed taste for what follows what."""
    rng = random.Random(seed)
    vocabulary = _VOCABULARY.split()
    texts = []
    for _ in range(count):
        sentences = []
        for _ in range(rng.randint(1, max_sentences)):
            word = rng.randrange(len(vocabulary))
            words = []
            for _ in range(rng.randint(3, 12)):
                words.append(vocabulary[word])
                word = (word * 7 + rng.choice((1, 1, 1, 3, 11))) % len(vocabulary)
            sentences.append(" ".join(words).capitalize() + ".")
        texts.append(" ".join(sentences))
    return texts


def random_documents(count: int, *, max_length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Documents of random ids and lengths from 0 to `max_length`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=rng.integers(0, max_length + 1)).tolist() for _ in range(count)]


def write_text_corpus(
    prefix: str | Path, texts: Sequence[str], tokenizer: Tokenizer | None = None, *, append_eod: bool = True
) -> list[list[int]]:
    """Tokenize texts (by default to bytes), write them as a corpus, and return the documents as written."""
    tokenizer = tokenizer or byte_tokenizer()
    end = [tokenizer.eod] if append_eod and tokenizer.eod is not None else []
    documents = [[*tokenizer.encode(text), *end] if text else [] for text in texts]
    write_corpus(
        prefix,
        documents,
        tokenizer=TokenizerRecord.of(tokenizer),
        text_bytes=sum(len(text.encode()) for text in texts),
        append_eod=bool(end),
    )
    return documents


def write_corpus(
    prefix: str | Path,
    documents: Sequence[Sequence[int] | npt.NDArray[np.integer]],
    *,
    vocab_size: int = 257,
    dtype: npt.DTypeLike | None = None,
    tokenizer: TokenizerRecord | None = None,
    text_bytes: int | None = None,
    append_eod: bool = False,
) -> None:
    """Write ids as a corpus with its manifest. Ids are not checked, so that tests can write wrong ones.

    Without a `tokenizer` the manifest names an invented one of `vocab_size` ids.
    """
    if tokenizer is None:
        digest = hashlib.sha256(b"invented, %d ids" % vocab_size).hexdigest()
        tokenizer = TokenizerRecord(name="invented", sha256=digest, vocab_size=vocab_size, eod=None)
    writer, totals = _write(prefix, documents, np.dtype(dtype or token_dtype(tokenizer.vocab_size)))
    manifest = CorpusManifest(
        num_documents=totals.num_documents,
        num_tokens=totals.num_values,
        dtype=writer.dtype.name,
        bin_sha256=totals.bin_sha256,
        idx_sha256=totals.idx_sha256,
        text_bytes=totals.num_values if text_bytes is None else text_bytes,
        append_eod=append_eod,
        tokenizer=tokenizer,
        inputs=[],
    )
    writer.publish(manifest)


def label_values(documents: Sequence[Sequence[int]], *, separate_documents: bool = True) -> list[list[float]]:
    """Sidecar values that tell where they belong: position + 0.5, NaN where a token is never predicted."""
    values, position = [], 0
    for document in documents:
        values.append([position + i + 0.5 for i in range(len(document))])
        if document and (separate_documents or position == 0):
            values[-1][0] = float("nan")
        position += len(document)
    return values


def write_sidecar(
    prefix: str | Path,
    corpus_prefix: str | Path,
    values: Sequence[Sequence[float] | npt.NDArray[np.floating]],
    *,
    seq_length: int,
    separate_documents: bool,
    stream: str = "ref_nll",
    dtype: npt.DTypeLike = np.float32,
) -> None:
    """Write one value per token of a corpus, by document, as a sidecar that belongs to it."""
    corpus = CorpusManifest.load(corpus_prefix)
    writer, totals = _write(prefix, values, np.dtype(dtype))
    manifest = SidecarManifest(
        num_documents=totals.num_documents,
        num_tokens=totals.num_values,
        dtype=writer.dtype.name,
        bin_sha256=totals.bin_sha256,
        idx_sha256=totals.idx_sha256,
        stream=stream,
        corpus_bin_sha256=corpus.bin_sha256,
        corpus_idx_sha256=corpus.idx_sha256,
        tokenizer_sha256=corpus.tokenizer.sha256,
        seq_length=seq_length,
        separate_documents=separate_documents,
        reference="invented",
        reference_sha256="",
    )
    writer.publish(manifest)


def _write(
    prefix: str | Path,
    documents: Sequence[Sequence[int] | Sequence[float] | npt.NDArray[np.generic]],
    dtype: np.dtype[np.generic],
) -> tuple[CorpusWriter, IndexedTotals]:
    writer = CorpusWriter(prefix, dtype)
    for document in documents:
        writer.append(np.asarray(document, dtype=dtype))
    return writer, writer.finish()
