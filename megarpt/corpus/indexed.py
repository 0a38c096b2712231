"""Megatron's indexed files: `.bin` holds the values of all documents in a row, `.idx` says where each begins.

The index (MMIDIDX, version 1, little endian) is: 9 bytes of magic, version u64, dtype code u8, number of sequences u64, number
of document boundaries u64, then the sequence lengths (i32), their byte offsets (i64) and the document boundaries as sequence
numbers (i64, the first is 0). A document of this package is one sequence; an empty one has a boundary and no sequence, as
Megatron's own preprocessing writes it.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from megarpt.corpus.atomic import atomic_write_bytes, fsync_directory, write_errors
from megarpt.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1)
}
_BLOCK = 1 << 18  # index entries in memory at a time
_REMEDY = "the file is damaged, incomplete or not a corpus index: make the corpus again or copy it again"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type Megatron stores ids of this vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    """The file of values."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """The manifest, written last."""
    return Path(f"{prefix}.json")


class CorpusIndex:
    """An open index, memory-mapped and checked for size; arrays are views of the file.

    Raises:
        DataError: the file is missing, is no index, or is shorter or longer than its header says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.path = idx_path(prefix)
        try:
            with open(self.path, "rb") as file:
                header = file.read(HEADER_BYTES)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}; check the corpus prefix") from error
        if len(header) < HEADER_BYTES or header[:9] != MAGIC:
            raise DataError(f"{self.path}: got {header[:9]!r} at its start, expected {MAGIC!r}; {_REMEDY}")
        version, code, self.num_sequences, boundaries = struct.unpack("<QBQQ", header[9:])
        if version != 1 or code not in DTYPE_CODES:
            raise DataError(f"{self.path}: got version {version} and dtype code {code}, expected 1 and one of 1-8; {_REMEDY}")
        self.dtype = DTYPE_CODES[code]
        self.num_documents = boundaries - 1
        expected = HEADER_BYTES + 12 * self.num_sequences + 8 * boundaries
        if size != expected or boundaries < 1:
            raise DataError(
                f"{self.path}: got {size:,} bytes, expected {expected:,} for {self.num_sequences:,} sequences and "
                f"{self.num_documents:,} documents; {_REMEDY}"
            )
        whole = np.memmap(self.path, mode="r", dtype=np.uint8)
        at = HEADER_BYTES
        self.lengths: npt.NDArray[np.int32] = whole[at : at + 4 * self.num_sequences].view(np.int32)
        at += 4 * self.num_sequences
        self.pointers: npt.NDArray[np.int64] = whole[at : at + 8 * self.num_sequences].view(np.int64)
        at += 8 * self.num_sequences
        self.boundaries: npt.NDArray[np.int64] = whole[at:].view(np.int64)  # [num_documents + 1]

    def blocks(self, array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
        """An array of the index piece by piece, so that an index larger than memory can be walked."""
        for start in range(0, len(array), _BLOCK):
            yield np.asarray(array[start : start + _BLOCK])

    def check(self) -> int:
        """Check that lengths, offsets and document boundaries agree; return the number of values.

        Raises:
            DataError: they do not.
        """
        total = 0
        for start in range(0, self.num_sequences, _BLOCK):
            lengths = np.asarray(self.lengths[start : start + _BLOCK], dtype=np.int64)
            expected = total + np.concatenate(([0], np.cumsum(lengths)))
            wrong = np.flatnonzero(
                (self.pointers[start : start + _BLOCK] != expected[:-1] * self.dtype.itemsize) | (lengths < 0)
            )
            if wrong.size:
                at = int(wrong[0])
                raise DataError(
                    f"{self.path}: sequence {start + at} has length {lengths[at]} and byte offset {self.pointers[start + at]}, "
                    f"expected offset {expected[at] * self.dtype.itemsize}; {_REMEDY}"
                )
            total = int(expected[-1])
        previous = 0
        for block in self.blocks(self.boundaries):
            if (previous > block[0]) or np.any(np.diff(block) < 0):
                raise DataError(f"{self.path}: document boundaries run backwards near sequence {previous}; {_REMEDY}")
            previous = int(block[-1])
        if int(self.boundaries[0]) != 0 or previous != self.num_sequences:
            raise DataError(
                f"{self.path}: documents span sequences {int(self.boundaries[0])} to {previous}, expected 0 to "
                f"{self.num_sequences}; {_REMEDY}"
            )
        return total

    def document_lengths(self) -> Iterator[npt.NDArray[np.int64]]:
        """Tokens of each document, block by block."""
        for start in range(0, self.num_documents, _BLOCK):
            ends = np.asarray(self.boundaries[start : start + _BLOCK + 1])
            sums = np.concatenate(([0], np.cumsum(self.lengths[ends[0] : ends[-1]], dtype=np.int64)))
            yield np.diff(sums[ends - ends[0]])

    def read_document(self, number: int) -> npt.NDArray[Any]:
        """The values of one document.

        Raises:
            DataError: the `.bin` ends before them.
        """
        first, last = int(self.boundaries[number]), int(self.boundaries[number + 1])
        count = int(np.sum(self.lengths[first:last], dtype=np.int64))
        if not count:
            return np.empty(0, dtype=self.dtype)
        path = self.path.with_suffix(".bin")
        with open(path, "rb") as file:
            file.seek(int(self.pointers[first]))
            values = np.frombuffer(file.read(count * self.dtype.itemsize), dtype=self.dtype)
        if len(values) != count:
            raise DataError(f"{path}: got {len(values)} values of document {number}, expected {count}; {_REMEDY}")
        return values


class HashingFile:
    """A file opened for writing whose sha256 is known when it is closed."""

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        """`keep_bytes` of an existing file stay and are read once for the hash; what follows them is cut off."""
        self.path = path
        self._hash = hashlib.sha256()
        self._file: IO[bytes] = open(path, "r+b" if keep_bytes else "wb", buffering=0)  # noqa: SIM115
        self.size = 0
        while self.size < keep_bytes:
            block = self._file.read(min(1 << 20, keep_bytes - self.size))
            if not block:
                self._file.close()
                raise DataError(
                    f"{path}: got {self.size:,} bytes, expected at least {keep_bytes:,} from the interrupted run; start again "
                    "from the beginning (--restart)"
                )
            self._hash.update(block)
            self.size += len(block)
        self._file.truncate(keep_bytes)

    def write(self, content: bytes | memoryview) -> None:
        """Append."""
        self._hash.update(content)
        view = memoryview(content)
        self.size += len(view)
        while len(view):  # an unbuffered write may be partial
            view = view[self._file.write(view) :]

    def sync(self) -> None:
        """Return when what was written is on the disk."""
        os.fsync(self._file.fileno())

    def hexdigest(self) -> str:
        """The sha256 of everything written so far."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close without syncing."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class IndexedTotals:
    """What was written."""

    num_documents: int
    num_values: int
    bin_sha256: str
    idx_sha256: str


class Manifest(Protocol):
    """What `CorpusWriter.publish` needs of a manifest."""

    def to_json(self) -> bytes:
        """The file's content."""


class CorpusWriter:
    """Writes an indexed corpus document by document under temporary names and gives it its names when it is whole.

    Memory does not grow with the corpus: document lengths wait in a file until the index is written. `flush` makes what was
    appended durable and returns (values, documents); a later writer given these as `resume` goes on from there.

    Error: bytes equal what megatron-core's IndexedDatasetBuilder writes (tests/unit/corpus/test_indexed.py).
    """

    def __init__(
        self, prefix: str | Path, dtype: npt.DTypeLike, *, folder: Path | None = None, resume: tuple[int, int] = (0, 0)
    ) -> None:
        """`folder` holds the temporary files, by default beside the result; it must be on the same file system.

        Raises:
            DataError: the files cannot be written, or hold less than `resume` says.
        """
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        folder = folder or self.prefix.absolute().parent
        name = self.prefix.name
        self._bin_path, self._idx_path, self._lengths_path = (
            folder / f"{name}.{part}.tmp" for part in ("bin", "idx", "lengths")
        )
        self.num_values, self.num_documents = resume
        with write_errors(self.prefix):
            self._values = HashingFile(self._bin_path, keep_bytes=self.num_values * self.dtype.itemsize)
            self._lengths = HashingFile(self._lengths_path, keep_bytes=self.num_documents * 4)

    def append(self, values: npt.NDArray[Any]) -> None:
        """Append one document; an empty one counts as a document without a sequence."""
        self.append_documents(values, np.array([len(values)]))

    def append_documents(self, values: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> None:
        """Append several documents whose values lie in a row.

        Raises:
            DataError: the file system refused.
        """
        self.append_raw(
            np.ascontiguousarray(values, dtype=self.dtype).data.cast("B") if len(values) else b"",
            np.ascontiguousarray(lengths, dtype=np.int32).data.cast("B") if len(lengths) else b"",
        )

    def append_raw(self, values: bytes | memoryview, lengths: bytes | memoryview) -> None:
        """Append values and document lengths (int32) that are already in file form."""
        with write_errors(bin_path(self.prefix)):
            self._values.write(values)
            self._lengths.write(lengths)
        self.num_values = self._values.size // self.dtype.itemsize
        self.num_documents = self._lengths.size // 4

    def flush(self) -> tuple[int, int]:
        """Make everything appended durable; return what a resumed writer needs: (values, documents)."""
        with write_errors(bin_path(self.prefix)):
            self._values.sync()
            self._lengths.sync()
        return self.num_values, self.num_documents

    def hexdigest(self) -> str:
        """The sha256 of the values so far."""
        return self._values.hexdigest()

    def finish(self) -> IndexedTotals:
        """Write the index and make all files durable, still under temporary names.

        Raises:
            DataError: the file system refused.
        """
        self.flush()
        self.close()
        with write_errors(idx_path(self.prefix), needed=12 * self.num_documents):
            idx_sha256 = _write_index(self._idx_path, self._lengths_path, self.dtype)
        return IndexedTotals(self.num_documents, self.num_values, self.hexdigest(), idx_sha256)

    def publish(self, manifest: Manifest) -> None:
        """Give the finished files their names, the manifest last; an older corpus of this name is replaced.

        Raises:
            DataError: the file system refused.
        """
        atomic_write_bytes(self._bin_path.with_name(f"{self.prefix.name}.json.ready"), manifest.to_json())
        publish_ready(self.prefix, self._bin_path.parent)

    def close(self) -> None:
        """Close the files and leave them where they are."""
        self._values.close()
        self._lengths.close()

    def abort(self) -> None:
        """Close and remove the temporary files."""
        self.close()
        for path in (self._bin_path, self._idx_path, self._lengths_path):
            path.unlink(missing_ok=True)


def publish_ready(prefix: str | Path, folder: Path) -> bool:
    """Finish a publication, begun or interrupted at any point; False when there is none to finish.

    The old manifest goes first and the new one comes last, so a corpus with a manifest is always whole.

    Raises:
        DataError: the file system refused.
    """
    prefix = Path(prefix)
    ready = folder / f"{prefix.name}.json.ready"
    if not ready.exists():
        return False
    with write_errors(prefix):
        waiting = [
            (source, target)
            for source, target in ((folder / f"{prefix.name}.{part}.tmp", Path(f"{prefix}.{part}")) for part in ("bin", "idx"))
            if source.exists()
        ]
        if waiting:
            manifest_path(prefix).unlink(missing_ok=True)
            fsync_directory(prefix.absolute().parent)
        for source, target in waiting:
            os.replace(source, target)
        os.replace(ready, manifest_path(prefix))
        fsync_directory(prefix.absolute().parent)
        (folder / f"{prefix.name}.lengths.tmp").unlink(missing_ok=True)
    return True


def write_index(
    path: Path,
    dtype: np.dtype[Any],
    counts: tuple[int, int],
    parts: Iterable[Iterable[npt.NDArray[Any]]],
) -> str:
    """Write an index from blocks of its three arrays and return its sha256; `counts` is (sequences, documents)."""
    code = next(code for code, each in DTYPE_CODES.items() if each == dtype)
    file = HashingFile(path)
    try:
        file.write(MAGIC + struct.pack("<QBQQ", 1, code, counts[0], counts[1] + 1))
        for blocks, kind in zip(parts, (np.int32, np.int64, np.int64), strict=True):
            for block in blocks:
                file.write(np.ascontiguousarray(block, dtype=kind).tobytes())
        file.sync()
    finally:
        file.close()
    return file.hexdigest()


def _write_index(path: Path, lengths_path: Path, dtype: np.dtype[Any]) -> str:
    """The index of documents of one sequence each, from the file of their lengths."""
    documents = lengths_path.stat().st_size // 4
    sequences = sum(int(np.count_nonzero(block)) for block in _lengths(lengths_path))

    def pointers() -> Iterator[npt.NDArray[np.int64]]:
        total = 0
        for block in _lengths(lengths_path):
            ends = np.cumsum(block[block > 0], dtype=np.int64) * dtype.itemsize + total
            if ends.size:
                yield np.concatenate((np.array([total]), ends[:-1]))
                total = int(ends[-1])

    def boundaries() -> Iterator[npt.NDArray[np.int64]]:
        yield np.zeros(1, dtype=np.int64)
        total = 0
        for block in _lengths(lengths_path):
            ends = np.cumsum(block > 0, dtype=np.int64) + total
            yield ends
            total = int(ends[-1])

    sizes = (block[block > 0] for block in _lengths(lengths_path))
    return write_index(path, dtype, (sequences, documents), (sizes, pointers(), boundaries()))


def _lengths(path: Path) -> Iterator[npt.NDArray[np.int32]]:
    with open(path, "rb", buffering=io.DEFAULT_BUFFER_SIZE) as file:
        while block := file.read(4 * _BLOCK):
            yield np.frombuffer(block, dtype=np.int32)
