"""Against megatron-core's own builder and reader."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megarpt.corpus import indexed
from megarpt.corpus.indexed import DTYPE_CODES, CorpusIndex, CorpusWriter, bin_path, idx_path, publish_ready, token_dtype
from megarpt.errors import DataError


class Note:
    """The least a manifest can be."""

    def to_json(self) -> bytes:
        return b"{}"


def documents(seed: int, dtype: Any = np.uint16, count: int = 60) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 60000, size=int(random.integers(0, 30)) * (i % 7 > 0)).astype(dtype) for i in range(count)]


def write(prefix: Path, texts: list[np.ndarray], dtype: Any, **kwargs: Any) -> None:
    writer = CorpusWriter(prefix, dtype, **kwargs)
    for text in texts:
        writer.append(text)
    totals = writer.finish()
    writer.publish(Note())
    for path, digest in ((bin_path(prefix), totals.bin_sha256), (idx_path(prefix), totals.idx_sha256)):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert totals.num_documents == len(texts) and totals.num_values == sum(map(len, texts))


def build_with_mcore(prefix: Path, texts: list[np.ndarray], dtype: Any) -> None:
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for text in texts:  # as Megatron's preprocessing does: an empty document has no sequence
        builder.add_document(
            torch.from_numpy(text.astype(np.float32 if dtype is np.float32 else np.int64)), [len(text)] * bool(len(text))
        )
    builder.finalize(str(idx_path(prefix)))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_bytes_equal_mcores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, block: int) -> None:
    monkeypatch.setattr(indexed, "_BLOCK", block)
    texts = documents(0, dtype)
    write(tmp_path / "ours", texts, dtype)
    build_with_mcore(tmp_path / "theirs", texts, dtype)
    for path in (bin_path, idx_path):
        assert path(tmp_path / "ours").read_bytes() == path(tmp_path / "theirs").read_bytes()
    dataset = IndexedDataset(str(tmp_path / "ours"))
    kept = [text for text in texts if len(text)]
    assert len(dataset) == len(kept) and len(dataset.document_indices) == len(texts) + 1
    assert all(np.array_equal(dataset[i], text) for i, text in enumerate(kept))


def test_empty_ends_and_nothing(tmp_path: Path) -> None:
    empty = np.empty(0, dtype=np.uint16)
    for name, texts in {"ends": [empty, np.arange(3, dtype=np.uint16), empty], "none": [], "empty": [empty, empty]}.items():
        write(tmp_path / name, texts, np.uint16)
        build_with_mcore(tmp_path / "theirs", texts, np.uint16)
        assert idx_path(tmp_path / name).read_bytes() == idx_path(tmp_path / "theirs").read_bytes()
        index = CorpusIndex(tmp_path / name)
        assert index.check() == sum(map(len, texts)) and index.num_documents == len(texts)


def test_types_are_mcores() -> None:
    assert {code: dtype.type for code, dtype in DTYPE_CODES.items()} == {
        code.value: DType.dtype_from_code(code.value) for code in DType
    }
    for size in (257, 32000, 65499, 65500, 131072):
        assert token_dtype(size) == DType.optimal_dtype(size)


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
def test_reading_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    texts = documents(1)
    write(tmp_path / "c", texts, np.uint16)
    monkeypatch.setattr(indexed, "_BLOCK", block)
    index = CorpusIndex(tmp_path / "c")
    assert np.concatenate(list(index.document_lengths())).tolist() == [len(text) for text in texts]
    assert all(np.array_equal(index.read_document(i), text) for i, text in enumerate(texts))


def test_interrupted_writer_goes_on(tmp_path: Path) -> None:
    texts = documents(2)
    write(tmp_path / "whole", texts, np.uint16)
    writer = CorpusWriter(tmp_path / "parts", np.uint16)
    for text in texts[:20]:
        writer.append(text)
    kept = writer.flush()
    digest = writer.hexdigest()
    writer.append(np.arange(5))  # written after the flush: lost
    writer.close()
    assert not idx_path(tmp_path / "parts").exists()
    again = CorpusWriter(tmp_path / "parts", np.uint16, resume=kept)
    assert again.hexdigest() == digest and again.num_documents == 20
    again.append_documents(np.concatenate(texts[20:]), np.array([len(text) for text in texts[20:]]))
    again.finish()
    again.publish(Note())
    for path in (bin_path, idx_path):
        assert path(tmp_path / "parts").read_bytes() == path(tmp_path / "whole").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("parts*")) == ["parts.bin", "parts.idx", "parts.json"]


def test_resume_with_too_little(tmp_path: Path) -> None:
    writer = CorpusWriter(tmp_path / "c", np.uint16)
    writer.append(np.arange(5))
    writer.close()
    with pytest.raises(DataError, match="got 10 bytes, expected at least 12"):
        CorpusWriter(tmp_path / "c", np.uint16, resume=(6, 1))


@pytest.mark.parametrize("killed_after", range(5))
def test_publication_interrupted_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int) -> None:
    """After any number of steps there is no manifest, or the old corpus is whole; and the next run finishes."""
    write(tmp_path / "c", documents(3), np.uint16)
    (tmp_path / "c.json").write_text("old")
    writer = CorpusWriter(tmp_path / "c", np.uint16)
    writer.append(np.arange(5))
    writer.finish()
    steps = 0

    def step(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            if steps == killed_after:
                raise KeyboardInterrupt
            steps += 1
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(indexed.os, "replace", step(indexed.os.replace))
        patch.setattr(Path, "unlink", step(Path.unlink))
        try:
            writer.publish(Note())
            killed = False
        except KeyboardInterrupt:
            killed = True
    old_files = idx_path(tmp_path / "c").stat().st_size == 34 + 12 * 60 + 8  # never: only tells which index is there
    if (tmp_path / "c.json").exists() and killed:
        assert (tmp_path / "c.json").read_text() == "old" or not old_files
    if (tmp_path / "c.json.ready").exists():
        assert publish_ready(tmp_path / "c", tmp_path)
    if not killed or (tmp_path / "c.json").read_text() != "old":
        assert (tmp_path / "c.json").read_bytes() == b"{}" and CorpusIndex(tmp_path / "c").check() == 5


def patch_bytes(path: Path, at: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "cannot read"),
        (lambda p: p.write_bytes(b""), "at its start"),
        (lambda p: p.write_bytes(b"\x00" * 100), "at its start"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes, expected"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes, expected"),
        (lambda p: patch_bytes(p, 9, struct.pack("<Q", 2)), "version 2"),
        (lambda p: patch_bytes(p, 17, b"\x63"), "dtype code 99"),
        (lambda p: patch_bytes(p, 34, struct.pack("<i", 10**6)), "has length"),
        (lambda p: patch_bytes(p, 34, struct.pack("<i", -5)), "has length"),
        (lambda p: patch_bytes(p, len(p.read_bytes()) - 8, struct.pack("<q", 3)), "document"),
        (lambda p: patch_bytes(p, len(p.read_bytes()) - 16, struct.pack("<q", 10**9)), "backwards"),
    ],
)
def test_damaged_index(tmp_path: Path, damage: Any, message: str) -> None:
    write(tmp_path / "c", [text for text in documents(4) if len(text)], np.uint16)
    damage(idx_path(tmp_path / "c"))
    with pytest.raises(DataError, match=message):
        CorpusIndex(tmp_path / "c").check()


def test_short_values_are_noticed_on_reading(tmp_path: Path) -> None:
    write(tmp_path / "c", [np.arange(9)], np.uint16)
    bin_path(tmp_path / "c").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="got 1 values of document 0, expected 9"):
        CorpusIndex(tmp_path / "c").read_document(0)


def test_abort_leaves_nothing(tmp_path: Path) -> None:
    writer = CorpusWriter(tmp_path / "c", np.uint16)
    writer.append(np.arange(9))
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*no_such_folder"):
        CorpusWriter(tmp_path / "no_such_folder" / "c", np.uint16)
