"""Documents out of files: jsonl, plain text and parquet, never more than a block in memory.

A `Segment` is a piece of a file that can be read by itself. A piece of an uncompressed file of lines is a range of bytes and
owns the lines that begin in it, so pieces can be cut anywhere without looking.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple, Protocol

import orjson

from megarpt.corpus.inputs import InputFile, open_bytes, read_errors, unreadable
from megarpt.errors import DataError, ExtensionError

TextDocuments = Literal["file", "line", "paragraph"]
_BOM = b"\xef\xbb\xbf"
_READ = 1 << 20  # bytes per read
_PARQUET_ROWS = 256
_PEEK = 1 << 18  # bytes in which a sample is looked for


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
        segments += [Segment(number, start, end) for start, end in itertools.pairwise(edges)]
    return segments


def read_documents(file: InputFile, segment: Segment, options: ReadOptions, on_malformed: OnMalformed) -> Iterator[Block]:
    """The documents of a segment, block by block, in file order.

    Raises:
        DataError: the file cannot be read, its compression is damaged, or `on_malformed` gave up.
        ExtensionError: a library for this format is not installed.
    """
    with read_errors(file):
        if file.format == "parquet":
            yield from _read_parquet(file, segment, options, on_malformed)
        elif file.format == "jsonl":
            yield from _read_lines(file, segment, options, on_malformed, _parse_json)
        elif options.text_documents == "line":
            yield from _read_lines(file, segment, options, on_malformed, _parse_text)
        elif options.text_documents == "paragraph":
            yield from _read_paragraphs(file, options, on_malformed)
        else:
            yield from _read_whole(file, options, on_malformed)


class _Bad(NamedTuple):
    """A line that is no document."""

    reason: str


_Parsed = str | _Bad | None  # None: blank, neither a document nor a mistake


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


def _read_lines(
    file: InputFile,
    segment: Segment,
    options: ReadOptions,
    on_malformed: OnMalformed,
    parse: Callable[[bytes, str], _Parsed],
) -> Iterator[Block]:
    numbers = _LineNumbers(file, segment.start)
    too_long = _too_long(options)
    with open_bytes(file) as stream:
        for lines, read_bytes in _split(_owned_bytes(stream, segment, file), options.max_document_bytes):
            if lines and lines[0] and numbers.done == 0 and segment.start == 0:
                lines[0] = lines[0].removeprefix(_BOM)
            texts: list[str] = []
            for index, line in enumerate(lines):
                parsed = too_long if line is None else parse(line, options.text_key)
                if type(parsed) is str:
                    texts.append(parsed)
                elif type(parsed) is _Bad:
                    on_malformed(numbers.of(index), parsed.reason)
            numbers.done += len(lines)
            yield Block(texts, read_bytes)


def _owned_bytes(stream: IO[bytes], segment: Segment, file: InputFile) -> Iterator[bytes]:
    """From the first line that begins in the segment to the end of the last one that does."""
    position, end = segment.start, segment.end
    if file.compression:
        while chunk := stream.read(_READ):
            yield chunk
        return
    if position:
        position = _next_line(stream, position - 1, end)  # a newline right before the start begins a line at the start
        stream.seek(position)
    last = b"\n"
    while position < end and (chunk := stream.read(min(_READ, end - position))):
        position += len(chunk)
        last = chunk[-1:]
        yield chunk
    while last != b"\n" and (chunk := stream.read(_READ)):  # past the end only to complete the last line
        newline = chunk.find(b"\n")
        if newline >= 0:
            yield chunk[: newline + 1]
            return
        yield chunk


def _next_line(stream: IO[bytes], position: int, end: int) -> int:
    """Where the line after the next newline begins; not sought past `end`, since a line there belongs to another segment."""
    stream.seek(position)
    while position < end and (chunk := stream.read(min(_READ, end - position))):
        newline = chunk.find(b"\n")
        if newline >= 0:
            return position + newline + 1
        position += len(chunk)
    return end


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


def _parse_json(line: bytes, key: str) -> _Parsed:
    try:
        text = orjson.loads(line)[key]
        if type(text) is str:
            return text
    except (orjson.JSONDecodeError, LookupError, TypeError) as error:
        return _parse_json_with_care(line, key, error)
    return _Bad(f"the value of {key!r} is {_json_type(text)}, expected a string")


def _parse_json_with_care(line: bytes, key: str, error: Exception) -> _Parsed:
    """A line that the fast parser refused: blank, JSON with Python's NaN and Infinity, or malformed in a way to be named."""
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as bad:
        utf16 = "; this looks like UTF-16: convert the file to UTF-8" if b"\x00" in line else ""
        return _Bad(f"invalid UTF-8 (byte {line[bad.start]:#04x} at column {bad.start + 1}){utf16}")
    except (ValueError, RecursionError):
        utf16 = "; this looks like UTF-16: convert the file to UTF-8" if b"\x00" in line else ""
        return _Bad(f"invalid JSON ({error}){utf16}")
    if not isinstance(record, dict):
        return _Bad(f"the line is {_json_type(record)}, expected an object with the key {key!r}")
    if key not in record:
        return _Bad(f"missing key {key!r}; the line has {', '.join(map(repr, list(record)[:8])) or 'no keys'} (--text-key)")
    text = record[key]
    if not isinstance(text, str):
        return _Bad(f"the value of {key!r} is {_json_type(text)}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as bad:
        return _Bad(f"the text holds half a surrogate pair (U+{ord(text[bad.start]):04X}), which is no character")
    return text


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}
    return names.get(type(value), type(value).__name__)


def _parse_text(line: bytes, _key: str) -> _Parsed:
    if not line.strip():
        return None
    return _decode(line.removesuffix(b"\r"))


def _decode(content: bytes) -> str | _Bad:
    try:
        return content.decode()
    except UnicodeDecodeError as bad:
        return _Bad(f"invalid UTF-8 (byte {content[bad.start]:#04x} at byte {bad.start + 1} of the document)")


def _read_paragraphs(file: InputFile, options: ReadOptions, on_malformed: OnMalformed) -> Iterator[Block]:
    """Documents between blank lines."""
    number, first = 0, 1
    paragraph: list[bytes] = []
    paragraph_bytes = 0

    def end_paragraph() -> list[str]:
        nonlocal paragraph, paragraph_bytes
        parsed = _too_long(options) if paragraph_bytes > options.max_document_bytes else _decode(b"\n".join(paragraph))
        paragraph, paragraph_bytes = [], 0
        if isinstance(parsed, _Bad):
            on_malformed(first, parsed.reason)
            return []
        return [parsed]

    with open_bytes(file) as stream:
        whole = Segment(0, 0, file.size)
        for lines, read_bytes in _split(_owned_bytes(stream, whole, file), options.max_document_bytes):
            texts: list[str] = []
            for line in lines:
                number += 1
                if number == 1 and line:
                    line = line.removeprefix(_BOM)
                if line is not None and not line.strip():
                    texts += end_paragraph() if paragraph_bytes else []
                    continue
                first = first if paragraph_bytes else number
                paragraph_bytes += options.max_document_bytes + 1 if line is None else len(line) + 1
                if line is not None and paragraph_bytes <= options.max_document_bytes:
                    paragraph.append(line)
            yield Block(texts, read_bytes)
        if paragraph_bytes:
            yield Block(end_paragraph(), 0)


def _read_whole(file: InputFile, options: ReadOptions, on_malformed: OnMalformed) -> Iterator[Block]:
    """The file as one document; an empty file is none."""
    pieces, size = [], 0
    with open_bytes(file) as stream:
        while size <= options.max_document_bytes and (chunk := stream.read(_READ)):
            pieces.append(chunk)
            size += len(chunk)
    content = b"".join(pieces).removeprefix(_BOM)
    texts: list[str] = []
    if size > options.max_document_bytes:
        on_malformed(1, _too_long(options).reason)
    else:
        try:
            texts = [content.decode()] if content else []
        except UnicodeDecodeError as bad:
            on_malformed(content.count(b"\n", 0, bad.start) + 1, f"invalid UTF-8 (byte {content[bad.start]:#04x})")
    yield Block(texts, file.size)


def _too_long(options: ReadOptions) -> _Bad:
    return _Bad(f"longer than {options.max_document_bytes:,} bytes; raise --max-document-mb if such a document is wanted")


def _lines_before(path: str, position: int) -> int:
    """Lines that begin before `position`."""
    count, last = 0, b"\n"
    with open(path, "rb", buffering=0) as file:
        while position > 0 and (chunk := file.read(min(_READ, position))):
            count += chunk.count(b"\n")
            last = chunk[-1:]
            position -= len(chunk)
    return count + (last != b"\n")


def _row_group_segments(number: int, file: InputFile, segment_bytes: int) -> list[Segment]:
    segments, start, size = [], 0, 0
    with _open_parquet(file) as parquet:
        groups = parquet.metadata.num_row_groups
        for group in range(groups):
            size += parquet.metadata.row_group(group).total_byte_size
            if size >= segment_bytes or group == groups - 1:
                segments.append(Segment(number, start, group + 1))
                start, size = group + 1, 0
    return segments


def _read_parquet(file: InputFile, segment: Segment, options: ReadOptions, on_malformed: OnMalformed) -> Iterator[Block]:
    import pyarrow as pa

    with _open_parquet(file) as parquet:
        key = _text_column(file, parquet, options.text_key)
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(segment.start))
        groups = list(range(segment.start, segment.end))
        batches = parquet.iter_batches(batch_size=_PARQUET_ROWS, row_groups=groups, columns=[key], use_threads=False)
        while (batch := _next_batch(file, batches)) is not None:
            column = batch.column(0)
            column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
            texts: list[str] = []
            for content in column.cast(pa.large_binary()).to_pylist():
                row += 1
                parsed = _parse_cell(content, options)
                if isinstance(parsed, _Bad):
                    on_malformed(row, parsed.reason)
                else:
                    texts.append(parsed)
            yield Block(texts, file.size * batch.num_rows // parquet.metadata.num_rows)


def _parse_cell(content: bytes | None, options: ReadOptions) -> str | _Bad:
    if content is None:
        return _Bad("null, expected a string")
    return _too_long(options) if len(content) > options.max_document_bytes else _decode(content)


def _next_batch(file: InputFile, batches: Iterator[Any]) -> Any:
    try:
        return next(batches, None)
    except ValueError as error:  # what pyarrow raises for damaged pages
        raise unreadable(file, error) from error


def _text_column(file: InputFile, parquet: Any, key: str) -> str:
    import pyarrow.types as kinds

    schema = parquet.schema_arrow
    if key not in schema.names:
        raise DataError(
            f"{file.path}: no column {key!r}; it has {', '.join(map(repr, schema.names))}: choose one with --text-key"
        )
    kind = schema.field(key).type
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_binary(kind) or kinds.is_large_binary(kind)):
        raise DataError(f"{file.path}: column {key!r} is of type {kind}, expected strings: choose another with --text-key")
    return key


def _open_parquet(file: InputFile) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ExtensionError(f"{file.path}: reading parquet needs pyarrow: pip install 'megarpt[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except (ValueError, OSError) as error:
        raise unreadable(file, error) from error


def sample_texts(files: Sequence[InputFile], options: ReadOptions, *, count: int = 64, characters: int = 4096) -> list[str]:
    """Pieces of documents from all over the inputs, the same every time; what is malformed is passed over.

    Files that cannot be cut are sampled at their beginning.
    """
    total = sum(file.size for file in files)
    edges = list(itertools.accumulate((file.size for file in files), initial=0))
    seen: set[int] = set()  # files sampled at their beginning
    samples: list[str] = []
    for number in range(count if total else 0):
        position = total * number // count
        index = bisect_right(edges, position) - 1
        file = files[index]
        texts: list[str] = []
        wanted = max(1, count * file.size // total)
        if file.is_cuttable and (file.format == "jsonl" or options.text_documents == "line"):
            texts, wanted = _texts_at(file, position - edges[index], options), 1
        if not texts and index not in seen:
            seen.add(index)
            texts = _first_texts(file, options, wanted=wanted)
        for text in texts:
            start = max(0, (len(text) - characters) * number // count)  # anywhere in the document, not only its beginning
            samples.append(text[start : start + characters])
    return samples


def _texts_at(file: InputFile, position: int, options: ReadOptions) -> list[str]:
    """The first document that begins soon after a position, if one does and is not too long."""
    with read_errors(file), open(file.path, "rb", buffering=0) as stream:
        stream.seek(position)
        lines = stream.read(_PEEK).split(b"\n")
    parse = _parse_json if file.format == "jsonl" else _parse_text
    texts = (parse(line, options.text_key) for line in lines[1:-1])  # the first and the last may be cut
    return next(([text] for text in texts if type(text) is str and text), [])


def _first_texts(file: InputFile, options: ReadOptions, *, wanted: int) -> list[str]:
    texts: list[str] = []
    segment = Segment(0, 0, min(1, file.size) if file.format == "parquet" else file.size)  # the first row group, or all bytes
    try:
        for block in read_documents(file, segment, options, lambda line, reason: None):
            texts += [text for text in block.texts if text][: wanted - len(texts)]
            if len(texts) >= wanted:
                break
    except DataError:
        return texts  # the job itself meets the damage and names it
    return texts
