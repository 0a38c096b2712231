"""Documents out of files: jsonl, plain text and parquet; plain, `.gz` or `.zst`; never more than a block in memory.

A `Segment` is a piece of a file that can be read by itself. A piece of an uncompressed file of lines is a range of bytes and
owns the lines that begin in it, so pieces can be cut anywhere without looking.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol

import orjson

from megarpt.errors import ConfigError, DataError, ExtensionError

Format = Literal["jsonl", "text", "parquet"]
TextDocuments = Literal["file", "line", "paragraph"]
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
_BOM = b"\xef\xbb\xbf"
_READ = 1 << 20  # bytes per read
_ZST_READ = 1 << 13  # small, because zstandard's output for one input piece is unbounded
_FINGERPRINT_BLOCKS, _FINGERPRINT_BLOCK = 64, 1 << 16
_PARQUET_ROWS = 256


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


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes [start, end) of a file of lines, row groups [start, end) of a parquet file, or [0, size) for a whole file."""

    file: int  # index in the list of inputs
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What is a document."""

    text_key: str = "text"
    text_documents: TextDocuments = "file"
    max_document_bytes: int = 64 << 20


class Block(NamedTuple):
    """Some documents in a row, about one read's worth."""

    texts: list[str]
    read_bytes: int  # of the file, for progress


class OnMalformed(Protocol):
    """Told of every line that is no document; raises when that is one too many."""

    def __call__(self, line: int, reason: str) -> None: ...


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
            raise DataError(f"--input {pattern}: no such file; check the path (patterns such as 'data/*.jsonl.gz' may be quoted)")
        for path in paths:
            real = os.path.realpath(path)
            if real in seen:
                raise ConfigError(
                    f"--input {path}: this file is given twice (also as {seen[real]}), its text would be counted twice; give it once"
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


def cut(files: Sequence[InputFile], options: ReadOptions, *, segment_bytes: int) -> list[Segment]:
    """Every file in pieces of at most about `segment_bytes` where it can be cut; the result depends on nothing else.

    Raises:
        DataError: a parquet file cannot be opened.
        ExtensionError: parquet files without pyarrow.
    """
    segments: list[Segment] = []
    for number, file in enumerate(files):
        if file.format == "parquet":
            segments += _row_group_segments(number, file, segment_bytes)
            continue
        lines = file.format == "jsonl" or options.text_documents == "line"
        pieces = max(1, -(-file.size // segment_bytes)) if file.is_cuttable and lines else 1
        edges = [file.size * piece // pieces for piece in range(pieces + 1)]
        segments += [Segment(number, start, end) for start, end in zip(edges, edges[1:], strict=False)]
    return segments


def read_documents(file: InputFile, segment: Segment, options: ReadOptions, on_malformed: OnMalformed) -> Iterator[Block]:
    """The documents of a segment, block by block, in file order.

    Raises:
        DataError: the file cannot be read, its compression is damaged, or `on_malformed` gave up.
        ExtensionError: a library for this format is not installed.
    """
    if file.format == "parquet":
        yield from _read_parquet(file, segment, options, on_malformed)
    elif file.format == "text" and options.text_documents != "line":
        yield from _read_text(file, options, on_malformed)
    else:
        parse = _parse_json_lines if file.format == "jsonl" else _parse_text_lines
        for lines in _LineReader(file, segment, options.max_document_bytes, on_malformed):
            yield Block(parse(lines, options.text_key, on_malformed), lines.read_bytes)


class _LineNumbers:
    """Numbers the lines of a segment from 1; the lines before the segment are counted only when somebody asks."""

    def __init__(self, file: InputFile, start: int) -> None:
        self._file, self._start = file, start
        self._before: int | None = None
        self.done = 0

    def of(self, index: int) -> int:
        """The number of the line `index` places after those that are done."""
        if self._before is None:
            self._before = _lines_before(self._file.path, self._start) if self._start else 0
        return self._before + self.done + index + 1


def _read_lines(file: InputFile, segment: Segment, options: ReadOptions, on_malformed: OnMalformed) -> Iterator[Block]:
    """The lines that begin in the segment, parsed."""
    parse = _parse_json if file.format == "jsonl" else _parse_text
    numbers = _LineNumbers(file, segment.start)
    limit = options.max_document_bytes
    with read_errors(file), open_bytes(file) as stream:
        for lines, read_bytes in _split(_owned_bytes(stream, segment, cuttable=file.is_cuttable), limit):
            if lines and numbers.done == 0 and segment.start == 0 and lines[0] is not None and lines[0].startswith(_BOM):
                lines[0] = lines[0].removeprefix(_BOM)
            texts: list[str] = []
            for index, line in enumerate(lines):
                text = parse(line, options.text_key) if line is not None else _TooLong(limit)
                if type(text) is str:
                    texts.append(text)
                elif text is not None:
                    on_malformed(numbers.of(index), str(text))
            numbers.done += len(lines)
            yield Block(texts, read_bytes)


def _owned_bytes(stream: IO[bytes], segment: Segment, *, cuttable: bool) -> Iterator[bytes]:
    """From the first line that begins in the segment to the end of the last one that does."""
    position, end = segment.start, segment.end if cuttable else None
    if position:
        stream.seek(position - 1)  # when this byte is a newline, a line begins at the segment's start
        position -= 1
        while True:
            chunk = stream.read(_READ)
            newline = chunk.find(b"\n")
            if newline >= 0 or not chunk:
                break
            position += len(chunk)
        position += newline + 1
        if not chunk or position >= segment.end:
            return
        stream.seek(position)
    last = b"\n"
    while end is None or position < end:
        chunk = stream.read(_READ if end is None else min(_READ, end - position))
        if not chunk:
            return
        position += len(chunk)
        last = chunk[-1:]
        yield chunk
    while last != b"\n" and (chunk := stream.read(_READ)):  # complete the last line
        newline = chunk.find(b"\n")
        if newline >= 0:
            chunk = last = chunk[: newline + 1]
            last = b"\n"
        yield chunk


def _split(chunks: Iterator[bytes], limit: int) -> Iterator[tuple[list[bytes | None], int]]:
    """Chunks of bytes to whole lines without their newline; a line longer than `limit` is None and is never held whole."""
    carry: list[bytes] = []
    carry_bytes = 0
    for chunk in chunks:
        newline = chunk.rfind(b"\n")
        lines: list[bytes | None] = []
        if newline >= 0:
            first = chunk.find(b"\n")
            if carry_bytes + first > limit:
                lines.append(None)
                if first < newline:
                    lines += chunk[first + 1 : newline].split(b"\n")
            else:
                lines += b"".join((*carry, chunk[:newline])).split(b"\n")
            if limit < _READ:
                lines = [line if line is not None and len(line) <= limit else None for line in lines]
            carry, carry_bytes = [], 0
        rest = chunk[newline + 1 :]
        if carry_bytes <= limit:
            carry.append(rest)
        carry_bytes += len(rest)
        yield lines, len(chunk)
    if carry_bytes:
        yield [b"".join(carry) if carry_bytes <= limit else None], 0


class _Reason(str):
    """Why a line is no document; not to be confused with a text."""

    __slots__ = ()


def _TooLong(limit: int) -> _Reason:  # noqa: N802
    return _Reason(f"longer than {limit:,} bytes; raise --max-document-mb if this is wanted")
