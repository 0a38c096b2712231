"""The files a corpus is made of: finding them, recognising them again, opening them."""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

from megarpt.errors import ConfigError, DataError, ExtensionError

Format = Literal["jsonl", "text", "parquet"]
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".parquet": "parquet",
}
_READ = 1 << 20  # bytes per read
_ZST_READ = 1 << 13  # small, because zstandard's output for one input piece is unbounded
_FINGERPRINT_BLOCKS, _FINGERPRINT_BLOCK = 64, 1 << 16


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input, as it was when the job began."""

    path: str  # absolute
    format: Format
    compression: Literal["", "gz", "zst"]
    size: int
    mtime_ns: int
    fingerprint: str

    @property
    def name(self) -> str:
        """Base name."""
        return os.path.basename(self.path)

    @property
    def is_cuttable(self) -> bool:
        """Whether a range of its bytes can be read by itself (given that its documents are lines)."""
        return not self.compression and self.format != "parquet"


def find_inputs(patterns: Sequence[str], *, format: Format | None = None) -> list[InputFile]:
    """Resolve paths and glob patterns, in the order given (matches of a pattern sorted), and look at each file once.

    Raises:
        ConfigError: a file is given twice, or its format cannot be told from its name.
        DataError: a file is missing or cannot be read.
    """
    files: list[InputFile] = []
    seen: dict[str, str] = {}
    for pattern in patterns:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise DataError(f"--input {pattern}: no such file; check the path (a pattern such as 'data/*.gz' may be quoted)")
        for path in paths:
            real = os.path.realpath(path)
            if real in seen:
                raise ConfigError(
                    f"--input {path}: this file is given twice (also as {seen[real]}), so its text would count twice"
                )
            seen[real] = path
            files.append(_look_at(path, format))
    return files


def _look_at(path: str, format: Format | None) -> InputFile:
    if os.path.isdir(path):
        raise ConfigError(f"--input {path}: got a folder, expected a file; give a pattern such as '{path}/*.jsonl'")
    stem, suffix = os.path.splitext(path.lower())
    compression: Literal["", "gz", "zst"] = "gz" if suffix == ".gz" else "zst" if suffix in (".zst", ".zstd") else ""
    if compression:
        suffix = os.path.splitext(stem)[1]
    found = format or _FORMATS.get(suffix)
    if found is None:
        raise ConfigError(
            f"--input {path}: got the unknown ending {suffix!r}, expected one of {', '.join(_FORMATS)} (and .gz or .zst); "
            "say what it is with --format"
        )
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            print_ = fingerprint(file, status.st_size)
    except OSError as error:
        raise DataError(f"--input {path}: cannot be read: {error.strerror or error}") from error
    return InputFile(os.path.abspath(path), found, compression, status.st_size, status.st_mtime_ns, print_)


def fingerprint(file: IO[bytes], size: int) -> str:
    """sha256 over the size and 64 blocks of 64 KiB spread evenly over the file; files up to 4 MiB are covered whole."""
    digest = hashlib.sha256(str(size).encode())
    if size <= _FINGERPRINT_BLOCKS * _FINGERPRINT_BLOCK:
        while block := file.read(_READ):
            digest.update(block)
        return digest.hexdigest()
    for number in range(_FINGERPRINT_BLOCKS):
        file.seek((size - _FINGERPRINT_BLOCK) * number // (_FINGERPRINT_BLOCKS - 1))
        digest.update(file.read(_FINGERPRINT_BLOCK))
    return digest.hexdigest()


def open_bytes(file: InputFile) -> contextlib.AbstractContextManager[IO[bytes]]:
    """The uncompressed content; `read` gives any number of bytes, and none only at the end."""
    if file.compression == "gz":
        return gzip.open(file.path, "rb")  # type: ignore[return-value]
    if file.compression == "zst":
        return contextlib.closing(_ZstStream(file.path))  # type: ignore[arg-type]
    return open(file.path, "rb", buffering=0)


class _ZstStream:
    """Reads zstandard frames; unlike the library's own stream it notices that the last one is cut short."""

    def __init__(self, path: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ExtensionError(f"{path}: reading .zst needs zstandard: pip install zstandard") from error
        self._decompressor = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._frame: Any = None  # the frame being read
        self._file = open(path, "rb")  # noqa: SIM115
        self._unused = b""

    def read(self, _size: int = -1) -> bytes:
        """The next piece."""
        while True:
            piece = self._unused or self._file.read(_ZST_READ)
            self._unused = b""
            if not piece:
                if self._frame is not None:
                    raise EOFError("the compressed stream ends in the middle")
                return b""
            try:
                self._frame = self._frame or self._decompressor.decompressobj()
                content: bytes = self._frame.decompress(piece)
            except self._error as error:
                raise OSError(f"not a zstandard stream ({error})") from error
            if self._frame.eof:
                self._unused, self._frame = self._frame.unused_data, None
            if content:
                return content

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextlib.contextmanager
def read_errors(file: InputFile) -> Iterator[None]:
    """Turn what libraries raise about a file into a DataError that names it.

    Raises:
        DataError: the body met such an error.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file, error) from error


def unreadable(file: InputFile, error: Exception) -> DataError:
    """The error for a file that a library could not read."""
    return DataError(
        f"{file.path}: cannot be read as {file.compression or file.format}: {str(error) or type(error).__name__}; the file is "
        "damaged or incomplete: copy or download it again"
    )


def check_unchanged(files: Sequence[InputFile]) -> None:
    """Refuse a result whose inputs changed while they were read.

    Raises:
        DataError: a file has another size or time than when the job began.
    """
    for file in files:
        try:
            status = os.stat(file.path)
        except OSError as error:
            raise DataError(
                f"{file.path}: gone while the job was reading it ({error.strerror}); start again with --restart"
            ) from error
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise DataError(
                f"{file.path}: got {status.st_size:,} bytes changed at {status.st_mtime_ns} ns, expected {file.size:,} bytes "
                f"of {file.mtime_ns} ns as when the job began; let the file be finished, then start again with --restart"
            )
