"""What is in a corpus: counts, a histogram of document lengths, decoded samples."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from megarpt.corpus.indexed import CorpusIndex
from megarpt.corpus.tokenizers import Tokenizer

_TEXT_TOKENS = 400  # tokens decoded for a sample at most


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Document lengths in tokens."""

    shortest: int
    longest: int
    mean: float
    num_empty: int
    histogram: list[tuple[int, int, int]]  # first length, last length, documents; doubling bins without the empty ends


def summarize_lengths(index: CorpusIndex) -> LengthSummary:
    """One pass over the index, in blocks."""
    bins = np.zeros(64, dtype=np.int64)
    shortest, longest, total, empty = np.iinfo(np.int64).max, 0, 0, 0
    for lengths in index.document_lengths():
        empty += int(np.count_nonzero(lengths == 0))
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
        total += int(lengths.sum())
        bins += np.bincount(np.frexp(lengths)[1], minlength=64)  # bin k holds [2^(k-1), 2^k)
    used = np.flatnonzero(bins)
    first, last = (int(used[0]), int(used[-1])) if used.size else (0, -1)
    histogram = [(1 << k >> 1, max((1 << k) - 1, 0), int(bins[k])) for k in range(first, last + 1)]
    count = index.num_documents
    return LengthSummary(shortest if count else 0, longest, total / max(count, 1), empty, histogram)


def sample_documents(index: CorpusIndex, count: int, seed: int) -> list[int]:
    """Numbers of some documents, in order."""
    return sorted(random.Random(seed).sample(range(index.num_documents), min(count, index.num_documents)))


def show_document(index: CorpusIndex, number: int, tokenizer: Tokenizer | None, *, characters: int) -> str:
    """The beginning of a document, decoded, or its ids when there is no tokenizer."""
    ids = index.read_document(number)
    if tokenizer is None:
        return " ".join(map(str, ids[: characters // 6])) + (" ..." if len(ids) > characters // 6 else "")
    text = tokenizer.decode(ids[:_TEXT_TOKENS])
    return text[:characters] + (" ..." if len(text) > characters or len(ids) > _TEXT_TOKENS else "")
