from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megarpt.corpus.manifest import CorpusManifest, hash_file
from megarpt.data.windows import Window, WindowDataset
from megarpt.errors import DataError
from megarpt.testing.tiny import label_values, write_corpus, write_sidecar

VOCAB = 300

DOCUMENTS = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=14), min_size=1, max_size=9).filter(
    lambda documents: sum(map(len, documents)) >= 2
)


def naive_window(documents: list[list[int]], s: int, number: int, separate: bool) -> dict[str, list]:
    """A window as its definition says it, one token at a time."""
    text = [token for document in documents for token in document]
    begins = [False] * len(text)
    position = 0
    for document in documents:
        if document:
            begins[position] = True
        position += len(document)
    tokens, labels, mask, positions = [], [], [], []
    for i in range(number * s, number * s + s):
        predicts = i + 1 < len(text)
        tokens.append(text[i] if predicts else 0)
        labels.append(text[i + 1] if predicts else 0)
        mask.append(predicts and not (separate and begins[i + 1]))
        fresh = not positions or (separate and predicts and begins[i])
        positions.append(0 if fresh else positions[-1] + 1)
    starts = [i for i, place in enumerate(positions) if place == 0]
    lengths = np.diff([*starts, s]).tolist()
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions, "segment_lengths": lengths}


def as_lists(window: Window) -> dict[str, list]:
    return {name: value.tolist() for name, value in window._asdict().items() if name != "streams"}


def open_windows(prefix: Path, s: int, separate: bool = True, vocab_size: int = VOCAB) -> WindowDataset:
    return WindowDataset(str(prefix), seq_length=s, separate_documents=separate, vocab_size=vocab_size)


@settings(max_examples=80, deadline=None)
@given(documents=DOCUMENTS, s=st.integers(1, 11), separate=st.booleans(), dtype=st.sampled_from([np.uint16, np.int32]))
def test_windows_equal_their_definition(tmp_path_factory, documents, s, separate, dtype) -> None:
    prefix = tmp_path_factory.mktemp("corpus") / "c"
    write_corpus(prefix, documents, vocab_size=VOCAB, dtype=dtype)
    nll = label_values(documents, separate_documents=separate)
    write_sidecar(f"{prefix}_nll", prefix, nll, seq_length=s, separate_documents=separate)
    dataset = open_windows(prefix, s, separate)
    dataset.add_stream("ref_nll", f"{prefix}_nll")
    total = sum(map(len, documents))
    assert len(dataset) == -(-(total - 1) // s)
    values = [value for document in nll for value in document]
    predicted = []
    for number in range(len(dataset)):
        window = dataset[number]
        assert as_lists(window) == naive_window(documents, s, number, separate)
        # The stream is aligned with labels: place i of the window holds the value of token number * s + i + 1.
        for i in np.flatnonzero(window.loss_mask).tolist():
            assert window.streams["ref_nll"][i] == np.float32(values[number * s + i + 1])
            predicted.append(number * s + i + 1)
        assert not window.streams["ref_nll"][~window.loss_mask].any()
    if not separate:
        assert predicted == list(range(1, total))


def test_document_longer_than_the_sequence(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [list(range(20))], vocab_size=VOCAB)
    dataset = open_windows(tmp_path / "c", 8)
    assert [dataset[j].segment_lengths.tolist() for j in range(3)] == [[8], [8], [8]]
    assert dataset[1].tokens.tolist() == list(range(8, 16)) and dataset[1].position_ids.tolist() == list(range(8))
    assert dataset[2].loss_mask.tolist() == [True] * 3 + [False] * 5


def test_document_that_begins_with_a_window(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [[1] * 4, [2] * 4, [3]], vocab_size=VOCAB)
    dataset = open_windows(tmp_path / "c", 4)
    assert dataset[0].labels[-1] == 2 and not dataset[0].loss_mask[-1]
    assert dataset[1].segment_lengths.tolist() == [4] and not dataset[1].loss_mask[-1]


def test_several_sequences_per_document_are_one_document(tmp_path: Path) -> None:
    """Megatron's --split-sentences writes such files; sentences of a document are not kept apart."""
    documents, lengths = [[1, 2, 3, 4, 5], [6, 7, 8, 9], []], [[2, 3], [1, 3], []]
    write_corpus(tmp_path / "c", documents, vocab_size=VOCAB)
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.uint16)
    for document, parts in zip(documents, lengths, strict=True):
        builder.add_document(np.array(document), parts)
    builder.finalize(str(tmp_path / "c.idx"))
    digest = {"idx_sha256": hash_file(tmp_path / "c.idx")}
    CorpusManifest.load(tmp_path / "c").model_copy(update=digest).save(tmp_path / "c")
    assert open_windows(tmp_path / "c", 8)[0].segment_lengths.tolist() == [5, 3]


def test_windows_out_of_range_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [[1, 2, 3]], vocab_size=VOCAB)
    dataset = open_windows(tmp_path / "c", 2)
    for number in (-1, 1):
        with pytest.raises(IndexError, match="expected 0 to 0"):
            dataset[number]


@pytest.mark.parametrize("documents", [[], [[]], [[5]]])
def test_corpus_with_nothing_to_predict(tmp_path: Path, documents: list[list[int]]) -> None:
    write_corpus(tmp_path / "c", documents, vocab_size=VOCAB)
    with pytest.raises(DataError, match="expected at least 2"):
        open_windows(tmp_path / "c", 4)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_token_id_beyond_the_vocabulary(tmp_path: Path, dtype: type) -> None:
    write_corpus(tmp_path / "c", [[1, 2, 3], [4, 299, 5, 6]], vocab_size=VOCAB, dtype=dtype)
    dataset = open_windows(tmp_path / "c", 3, vocab_size=299)
    assert dataset[0].labels.tolist() == [2, 3, 4]
    with pytest.raises(DataError, match=r"c\.bin: got token id 299 at position 4, expected 0 to 298"):
        dataset[1]


def test_negative_token_id(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [[1, 2, -7]], vocab_size=VOCAB, dtype=np.int32)
    with pytest.raises(DataError, match="got token id -7 at position 2"):
        open_windows(tmp_path / "c", 2)[0]


def test_truncated_bin(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [list(range(50))], vocab_size=VOCAB)
    bin_path = tmp_path / "c.bin"
    bin_path.write_bytes(bin_path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"c\.bin"):
        open_windows(tmp_path / "c", 8)


def test_index_of_another_corpus(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [list(range(50))], vocab_size=VOCAB)
    write_corpus(tmp_path / "d", [list(range(20)), list(range(31))], vocab_size=VOCAB)
    (tmp_path / "c.idx").write_bytes((tmp_path / "d.idx").read_bytes())
    with pytest.raises(DataError, match=r"c\.(idx|bin)"):
        open_windows(tmp_path / "c", 8)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing"):
        open_windows(tmp_path / "nothing", 8)
