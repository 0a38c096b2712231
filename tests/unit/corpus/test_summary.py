from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megarpt.corpus import indexed
from megarpt.corpus.indexed import CorpusIndex, CorpusWriter
from megarpt.corpus.summary import sample_documents, show_document, summarize_lengths
from megarpt.corpus.tokenizers import load_tokenizer


class Note:
    def to_json(self) -> bytes:
        return b"{}"


def index_of(prefix: Path, documents: list[list[int]]) -> CorpusIndex:
    writer = CorpusWriter(prefix, np.uint16)
    for document in documents:
        writer.append(np.array(document, dtype=np.uint16))
    writer.finish()
    writer.publish(Note())
    return CorpusIndex(prefix)


@pytest.mark.parametrize("block", [1, 3, 1 << 18])
def test_histogram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    index = index_of(tmp_path / "c", [[0] * n for n in (0, 1, 2, 3, 4, 7, 8, 40, 0)])
    monkeypatch.setattr(indexed, "_BLOCK", block)
    lengths = summarize_lengths(index)
    assert (lengths.shortest, lengths.longest, lengths.num_empty) == (0, 40, 2) and lengths.mean == pytest.approx(65 / 9)
    assert lengths.histogram == [(0, 0, 2), (1, 1, 1), (2, 3, 2), (4, 7, 2), (8, 15, 1), (16, 31, 0), (32, 63, 1)]


def test_nothing_to_summarize(tmp_path: Path) -> None:
    lengths = summarize_lengths(index_of(tmp_path / "c", []))
    assert (lengths.shortest, lengths.longest, lengths.mean, lengths.histogram) == (0, 0, 0.0, [])


def test_samples(tmp_path: Path) -> None:
    index = index_of(tmp_path / "c", [list(f"document {n} ".encode() * 60) for n in range(20)])
    chosen = sample_documents(index, 5, seed=3)
    assert (
        chosen == sorted(set(chosen)) == sample_documents(index, 5, seed=3) and len(sample_documents(index, 99, seed=0)) == 20
    )
    assert show_document(index, 7, load_tokenizer("bytes"), characters=22) == "document 7 document 7  ..."
    assert show_document(index, 7, None, characters=18) == "100 111 99 ..."
