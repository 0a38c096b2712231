from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megarpt.corpus import inputs, readers
from megarpt.corpus.inputs import check_unchanged, find_inputs
from megarpt.corpus.readers import ReadOptions, cut, read_documents, sample_texts
from megarpt.errors import ConfigError, DataError

Read = tuple[list[str], list[tuple[int, str]]]


def read(path: Path | str, *, segment_bytes: int = 1 << 40, **options: Any) -> Read:
    """Documents and malformed lines of one file."""
    files = find_inputs([str(path)])
    texts: list[str] = []
    malformed: list[tuple[int, str]] = []
    read_options = ReadOptions(**options)
    for segment in cut(files, read_options, segment_bytes=segment_bytes):
        for block in read_documents(files[0], segment, read_options, lambda line, reason: malformed.append((line, reason))):
            texts += block.texts
    return texts, malformed


LINES = [
    json.dumps({"text": text}, ensure_ascii=ascii_)
    for text in ("one", "", "zwei\u2028drei\x85vier\r\nfünf", "😀" * 30, " ", "x" * 3000)
    for ascii_ in (True, False)
]
TEXTS = [json.loads(line)["text"] for line in LINES]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n \t\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_as_people_write_it(tmp_path: Path, end: str, last: bool, bom: bytes, suffix: str) -> None:
    content = bom + end.join(LINES).encode() + (end.encode() if last else b"")
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](content))
    assert read(path) == (TEXTS, [])


@pytest.mark.parametrize("read_bytes", [1, 3, 64, 1 << 20])
@pytest.mark.parametrize("segment_bytes", [1, 2, 17, 100, 5000])
def test_cut_anywhere_reads_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment_bytes: int, read_bytes: int
) -> None:
    monkeypatch.setattr(readers, "_READ", read_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + "\n".join(LINES[:8]).encode())
    assert read(path, segment_bytes=segment_bytes) == (TEXTS[:8], [])


@settings(max_examples=200, deadline=None)
@given(
    content=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\n\n", b"d" * 9, "é".encode()]), max_size=40).map(
        b"".join
    ),
    segment_bytes=st.integers(1, 20),
    read_bytes=st.integers(1, 12),
)
def test_cut_lines_of_text(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, segment_bytes: int, read_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(content)
    expected = [line.removesuffix(b"\r").decode() for line in content.split(b"\n") if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_READ", read_bytes)
        assert read(path, segment_bytes=segment_bytes, text_documents="line") == (expected, [])


MALFORMED = {
    b'{"text": "cut': "invalid JSON",
    b'{"other": 1, "key": 2}': "missing key 'text'; the line has 'other', 'key'",
    b"{}": "missing key 'text'; the line has no keys",
    b'{"text": null}': "the value of 'text' is null, expected a string",
    b'{"text": 5}': "the value of 'text' is a number",
    b'{"text": ["a"]}': "the value of 'text' is a list",
    b'["text"]': "the line is a list, expected an object",
    b'"text"': "the line is a string, expected an object",
    b'{"text": "\xff"}': "invalid UTF-8 (byte 0xff at column 11)",
    b'{"text": "\\ud800"}': "half a surrogate pair (U+D800)",
    '{"text": "a"}'.encode("utf-16"): "this looks like UTF-16",
    b"\x00\x00": "invalid JSON",
    b'{"text": "a"} {"text": "b"}': "invalid JSON",
}


@pytest.mark.parametrize("line", MALFORMED)
@pytest.mark.parametrize("segment_bytes", [1 << 30, 20])
def test_malformed_lines_are_counted_with_their_number(tmp_path: Path, line: bytes, segment_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good * 3 + b"\n" + line.replace(b"\n", b"") + b"\n" + good)
    texts, malformed = read(path, segment_bytes=segment_bytes)
    assert texts == ["good"] * 4
    assert [number for number, _reason in malformed] == [5] and MALFORMED[line] in malformed[0][1]


def test_python_json_with_nan_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN}\n{"text": "b", "n": -Infinity, "i": 1' + "0" * 400 + "}\n")
    assert read(tmp_path / "a.jsonl") == (["a", "b"], [])


@pytest.mark.parametrize("read_bytes", [7, 1 << 20])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("newline", [b"", b"\n"])
def test_too_long_line_is_malformed_and_never_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int, at: int, newline: bytes
) -> None:
    monkeypatch.setattr(readers, "_READ", read_bytes)
    lines = [b'{"text": "good"}'] * 2
    lines.insert(at, b'{"text": "' + b"x" * 500 + b'"}')
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + newline)
    for segment_bytes in (1 << 30, 50):
        texts, malformed = read(path, segment_bytes=segment_bytes, max_document_bytes=100)
        assert texts == ["good"] * 2
        assert [(number, reason[:25]) for number, reason in malformed] == [(at + 1, "longer than 100 bytes; rai")][:1] or (
            malformed[0][0] == at + 1 and malformed[0][1].startswith("longer than 100 bytes")
        )


def test_memory_is_bounded_by_the_limit(tmp_path: Path) -> None:
    """The pieces of an endless line are dropped, not gathered."""
    held = 0

    def endless() -> Any:
        for _ in range(10_000):
            yield b"x" * 1000

    for lines, _size in readers._split(endless(), 5000):
        held = max(held, sum(len(line or b"") for line in lines))
    assert held == 0 and lines == [None]


def test_text_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \n\nthree\n  four\n\n\n")
    assert read(path) == (["one\r\ntwo\n\n \n\nthree\n  four\n\n\n"], [])
    assert read(path, text_documents="line") == (["one", "two", "three", "  four"], [])
    assert read(path, text_documents="paragraph") == (["one\r\ntwo", "three\n  four"], [])


@pytest.mark.parametrize(("mode", "line"), [("file", 3), ("line", 3), ("paragraph", 3)])
def test_invalid_utf8_in_text(tmp_path: Path, mode: str, line: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\nt\xffo\n\nthree\n")
    texts, malformed = read(path, text_documents=mode)
    assert texts == {"file": [], "line": ["one", "three"], "paragraph": ["one", "three"]}[mode]
    assert [number for number, _ in malformed] == [line] and "invalid UTF-8 (byte 0xff" in malformed[0][1]


@pytest.mark.parametrize("mode", ["file", "paragraph", "line"])
def test_too_long_text(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"short\n\n" + b"x" * 999 + b"\n" + b"y" * 10)
    texts, malformed = read(path, text_documents=mode, max_document_bytes=100)
    assert texts == {"file": [], "paragraph": ["short"], "line": ["short", "y" * 10]}[mode]
    assert [number for number, _ in malformed] == [1 if mode == "file" else 3]


@pytest.mark.parametrize("mode", ["file", "paragraph", "line"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_empty_file_has_no_document(tmp_path: Path, mode: str, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    assert read(tmp_path / name, text_documents=mode) == ([], [])


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "flip"])
def test_damaged_compression(tmp_path: Path, kind: str, damage: str) -> None:
    compress: Callable[[bytes], bytes] = gzip.compress
    if kind == "zst":
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
    whole = compress("\n".join(LINES * 50).encode())
    content = {"cut": whole[:-20], "garbage": b"not compressed at all", "flip": whole[:40] + b"\xff\xff" + whole[42:]}[damage]
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a.jsonl.{kind}: cannot be read as {kind}: .*damaged or incomplete"):
        read(path)


def test_several_compressed_frames(tmp_path: Path) -> None:
    halves = [b'{"text": "on', b'e"}\n{"text": "two"}\n']
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, halves)))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert read(tmp_path / name) == (["one", "two"], [])


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=lambda kind: str(kind)[:10],
)
@pytest.mark.parametrize("segment_bytes", [1, 1 << 30])
def test_parquet(tmp_path: Path, kind: Any, segment_bytes: int) -> None:
    texts = [f"text {i} é" for i in range(1000)]
    column = pa.array(texts, pa.string()).cast(kind)
    pq.write_table(pa.table({"n": list(range(1000)), "text": column}), tmp_path / "a.parquet", row_group_size=300)
    assert read(tmp_path / "a.parquet", segment_bytes=segment_bytes) == (texts, [])
    files = find_inputs([str(tmp_path / "a.parquet")])
    assert len(cut(files, ReadOptions(), segment_bytes=segment_bytes)) == (4 if segment_bytes == 1 else 1)


def test_malformed_parquet_rows(tmp_path: Path) -> None:
    column = pa.array([b"good", None, b"b\xffd", b"x" * 99, b"good"], pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=2)
    for segment_bytes in (1, 1 << 30):
        texts, malformed = read(tmp_path / "a.parquet", segment_bytes=segment_bytes, max_document_bytes=50)
        assert texts == ["good"] * 2
        assert [(row, reason[:6]) for row, reason in malformed] == [(2, "null, "), (3, "invali"), (4, "longer")]


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2], "other": ["a", "b"]}), path)
    with pytest.raises(DataError, match="column 'text' is of type int64, expected strings"):
        read(path)
    with pytest.raises(DataError, match="no column 'nope'; it has 'text', 'other'"):
        read(path, text_key="nope")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as parquet"):
        read(path)


def test_damaged_parquet_page(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" * 50 for i in range(5000)]}), path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 64] = b"\xff" * 64
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a.parquet: "):
        read(path)


def test_finding_inputs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt.gz", "d.dat"):
        (tmp_path / name).write_bytes(b"")
    found = find_inputs([str(tmp_path / "*.jsonl"), str(tmp_path / "c.txt.gz")])
    assert [(file.name, file.format, file.compression) for file in found] == [
        ("a.jsonl", "jsonl", ""),
        ("b.jsonl", "jsonl", ""),
        ("c.txt.gz", "text", "gz"),
    ]
    assert find_inputs([str(tmp_path / "d.dat")], format="jsonl")[0].format == "jsonl"
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    for patterns, kind, message in (
        (["a.jsonl", "*.jsonl"], ConfigError, "given twice"),
        (["a.jsonl", "link.jsonl"], ConfigError, "given twice"),
        (["d.dat"], ConfigError, "unknown ending '.dat'"),
        (["nope.jsonl"], DataError, "no such file"),
        ([""], ConfigError, "got a folder"),
    ):
        with pytest.raises(kind, match=message):
            find_inputs([str(tmp_path / pattern) for pattern in patterns])


def test_fingerprint_sees_size_ends_and_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_FINGERPRINT_BLOCK", 16)
    content = bytes(range(256)) * 32
    seen = set()
    variants = [content, content + b"x", b"x" + content[1:], content[:-1] + b"x", content[:4097] + b"x" + content[4098:]]
    for variant in variants:
        seen.add(inputs.fingerprint(io.BytesIO(variant), len(variant)))
    assert len(seen) == len(variants) - 1  # the last one falls between the blocks of a large file: its time gives it away
    small = [b"abc", b"abd"]
    assert len({inputs.fingerprint(io.BytesIO(each), 3) for each in small}) == 2


def test_changed_inputs_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x")
    files = find_inputs([str(path)])
    check_unchanged(files)
    path.write_bytes(b"xy")
    with pytest.raises(DataError, match=r"got 2 bytes .*expected 1 bytes"):
        check_unchanged(files)
    path.unlink()
    with pytest.raises(DataError, match="gone while"):
        check_unchanged(files)


def test_samples_come_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}, " * 30}) + "\n" for i in range(1000, 4000)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\nbroken\n' * 900))
    (tmp_path / "c.txt").write_text("whole text")
    files = find_inputs([str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.txt")])
    samples = sample_texts(files, ReadOptions(), count=32, characters=40)
    numbers = [int(re.findall(r"\d{4}", sample)[0]) for sample in samples if "document" in sample]
    assert len(numbers) > 20 and numbers == sorted(numbers) and numbers[0] < 1200 and numbers[-1] > 3700
    assert all(len(sample) <= 40 for sample in samples) and samples == sample_texts(
        files, ReadOptions(), count=32, characters=40
    )
    assert "packed" in sample_texts(files[1:2], ReadOptions()) and sample_texts(files[2:], ReadOptions()) == ["whole text"]
    assert sample_texts([], ReadOptions()) == []
