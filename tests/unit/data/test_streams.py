from pathlib import Path

import numpy as np
import pytest

from megarpt.corpus.manifest import SidecarManifest
from megarpt.data.windows import WindowDataset
from megarpt.errors import DataError
from megarpt.testing.tiny import label_values, write_corpus, write_sidecar

DOCUMENTS = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12]]


def corpus(tmp_path: Path, name: str = "c", documents: list[list[int]] = DOCUMENTS, separate: bool = True) -> WindowDataset:
    write_corpus(tmp_path / name, documents, vocab_size=256)
    return WindowDataset(str(tmp_path / name), seq_length=5, separate_documents=separate, vocab_size=256)


def sidecar(tmp_path: Path, dataset: WindowDataset, values: list[list[float]], **different: object) -> str:
    prefix = str(tmp_path / "nll")
    arguments = {"seq_length": dataset.seq_length, "separate_documents": dataset.separate_documents} | different
    write_sidecar(prefix, dataset.prefix, values, **arguments)
    return prefix


def test_a_row_is_the_labels_of_its_window(tmp_path: Path) -> None:
    dataset = corpus(tmp_path)
    dataset.add_stream("ref_nll", sidecar(tmp_path, dataset, label_values(DOCUMENTS)))
    window = dataset[1]
    assert window.labels.tolist() == [7, 8, 9, 10, 11]
    assert window.loss_mask.tolist() == [True, False, True, True, True]
    assert window.streams["ref_nll"].tolist() == [6.5, 0.0, 8.5, 9.5, 10.5]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_value_where_a_token_trains(tmp_path: Path, value: float) -> None:
    dataset = corpus(tmp_path)
    values = label_values(DOCUMENTS)
    values[1][2] = value
    dataset.add_stream("ref_nll", sidecar(tmp_path, dataset, values))
    with pytest.raises(DataError, match=rf"nll\.bin: stream 'ref_nll' has the value {value} at position 6"):
        dataset[1]
    assert dataset[0].loss_mask.any() and dataset[2].loss_mask.any()


def test_first_tokens_need_values_when_documents_are_not_kept_apart(tmp_path: Path) -> None:
    dataset = corpus(tmp_path, separate=False)
    dataset.add_stream("ref_nll", sidecar(tmp_path, dataset, label_values(DOCUMENTS, separate_documents=False)))
    assert dataset[0].streams["ref_nll"].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5]
    dataset.add_stream("ref_nll", sidecar(tmp_path, dataset, label_values(DOCUMENTS)))
    with pytest.raises(DataError, match="position 4"):
        dataset[0]


@pytest.mark.parametrize("different", [{"seq_length": 6}, {"separate_documents": False}])
def test_sidecar_made_for_other_windows(tmp_path: Path, different: dict) -> None:
    dataset = corpus(tmp_path)
    prefix = sidecar(tmp_path, dataset, label_values(DOCUMENTS), **different)
    with pytest.raises(DataError, match=rf"nll\.json: .*{next(iter(different))}: got"):
        dataset.add_stream("ref_nll", prefix)


def test_sidecar_of_another_corpus(tmp_path: Path) -> None:
    other = corpus(tmp_path, "other", [[9, 9, 9, 9], [5, 6, 7], [8, 9, 10, 11, 12]])
    prefix = sidecar(tmp_path, other, label_values(DOCUMENTS))
    dataset = corpus(tmp_path)
    with pytest.raises(DataError, match=r"nll\.json: .*corpus_bin_sha256: got"):
        dataset.add_stream("ref_nll", prefix)


def test_sidecar_of_another_tokenizer(tmp_path: Path) -> None:
    dataset = corpus(tmp_path)
    prefix = sidecar(tmp_path, dataset, label_values(DOCUMENTS))
    SidecarManifest.load(prefix).model_copy(update={"tokenizer_sha256": "0" * 64}).save(prefix)
    with pytest.raises(DataError, match=r"nll\.json: .*tokenizer_sha256: got 000000000000"):
        dataset.add_stream("ref_nll", prefix)


def test_sidecar_with_other_lengths(tmp_path: Path) -> None:
    """The manifest fits, the files do not: as many values, cut differently, and then too few."""
    dataset = corpus(tmp_path)
    values = [value for document in label_values(DOCUMENTS) for value in document]
    with pytest.raises(DataError, match=r"got length 5 for sequence 0, expected 4"):
        dataset.add_stream("ref_nll", sidecar(tmp_path, dataset, [values[:5], values[5:7], values[7:]]))
    with pytest.raises(DataError, match="got 2 sequences, expected 3"):
        dataset.add_stream("ref_nll", sidecar(tmp_path, dataset, [values[:7], [], values[7:]]))


def test_sidecar_that_is_not_fp32(tmp_path: Path) -> None:
    dataset = corpus(tmp_path)
    with pytest.raises(DataError, match="expected float32"):
        dataset.add_stream("ref_nll", sidecar(tmp_path, dataset, label_values(DOCUMENTS), dtype=np.float64))


def test_sidecar_of_another_stream(tmp_path: Path) -> None:
    dataset = corpus(tmp_path)
    with pytest.raises(DataError, match="got a sidecar of stream 'ref_nll', expected 'rpt_mask'"):
        dataset.add_stream("rpt_mask", sidecar(tmp_path, dataset, label_values(DOCUMENTS)))


def test_truncated_sidecar(tmp_path: Path) -> None:
    dataset = corpus(tmp_path)
    prefix = Path(sidecar(tmp_path, dataset, label_values(DOCUMENTS)))
    whole = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"nll\.bin: got 44 bytes, expected 48"):
        dataset.add_stream("ref_nll", str(prefix))


def test_missing_sidecar(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        corpus(tmp_path).add_stream("ref_nll", str(tmp_path / "absent"))
