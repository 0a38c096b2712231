from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megarpt.corpus import indexed
from megarpt.corpus import preprocess as preprocess_module
from megarpt.corpus.console import Stopped, StopSignal
from megarpt.corpus.indexed import bin_path, idx_path
from megarpt.corpus.manifest import verify_corpus
from megarpt.corpus.merge import merge
from megarpt.corpus.preprocess import PreprocessOptions, locked_folder, preprocess
from megarpt.errors import ConfigError, DataError

TEXTS = ["", "one", "two two", "", "three " * 40, "four", ""]


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture
def make(tmp_path: Path, write_jsonl: Callable[..., str]) -> Callable[..., str]:
    def run(name: str, texts: list[str], *, tokenizer: str = "bytes", append_eod: bool = True) -> str:
        options = PreprocessOptions(
            inputs=[write_jsonl(texts, f"{name}.jsonl")],
            output_prefix=str(tmp_path / name),
            tokenizer=tokenizer,
            append_eod=append_eod,
        )
        preprocess(options, StopSignal())
        return options.output_prefix

    return run


@pytest.mark.parametrize("block", [1, 1 << 18])
def test_merging_equals_preprocessing_together(make: Callable[..., str], tmp_path: Path, block: int) -> None:
    parts = [make("a", TEXTS[:3]), make("b", TEXTS[3:5]), make("c", TEXTS[5:])]
    whole = make("whole", TEXTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "_BLOCK", block)
        merged = merge(parts, str(tmp_path / "merged"), StopSignal())
    for path in (bin_path, idx_path):
        assert path(tmp_path / "merged").read_bytes() == path(whole).read_bytes()
    together = verify_corpus(whole)
    assert verify_corpus(tmp_path / "merged", full=True) == merged
    assert (merged.num_documents, merged.num_tokens, merged.text_bytes) == (7, together.num_tokens, together.text_bytes)
    assert [record.name for record in merged.inputs] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert not Path(f"{tmp_path}/merged.partial").exists()


def test_what_does_not_go_together(make: Callable[..., str], tmp_path: Path, bpe_json: str) -> None:
    a, other, without = make("a", TEXTS), make("o", TEXTS, tokenizer=bpe_json), make("w", TEXTS, append_eod=False)
    output = str(tmp_path / "m")
    for prefixes, message in (
        ([a], "expected two or more"),
        ([a, a], "given twice"),
        ([a, other], r"tokenizer: .*a has bytes .*, .*o has tokenizer\.json"),
        ([a, without], "append_eod"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge(prefixes, output, StopSignal())
    with pytest.raises(ConfigError, match="one of the inputs"):
        merge([a, other], a, StopSignal())
    with pytest.raises(ConfigError, match="is there already"):
        merge([a, make("b", TEXTS)], without, StopSignal())
    assert not list(tmp_path.glob("m*"))
    assert merge([a, make("b2", TEXTS)], without, StopSignal(), overwrite=True).num_documents == 14


def test_damaged_input_stops_the_merge(make: Callable[..., str], tmp_path: Path) -> None:
    a, b, c = (make(name, TEXTS) for name in "abc")
    content = bin_path(b).read_bytes()
    bin_path(b).write_bytes(b"\x01" + content[1:])
    with pytest.raises(DataError, match=r"b\.bin: got sha256"):
        merge([a, b], str(tmp_path / "m"), StopSignal())
    shutil.copy(idx_path(make("d", TEXTS[::-1])), idx_path(c))
    with pytest.raises(DataError, match=r"c\.idx: got sha256"):
        merge([a, c], str(tmp_path / "m"), StopSignal())
    assert not list(tmp_path.glob("m*"))


def test_stopping_leaves_nothing(make: Callable[..., str], tmp_path: Path) -> None:
    stop = StopSignal()
    stop.name = "SIGTERM"
    with pytest.raises(Stopped, match="nothing is left behind"):
        merge([make("a", TEXTS), make("b", TEXTS)], str(tmp_path / "m"), stop)
    assert not list(tmp_path.glob("m*"))


def test_a_killed_merge_is_made_anew(make: Callable[..., str], tmp_path: Path) -> None:
    parts, folder = [make("a", TEXTS[:3]), make("b", TEXTS[3:])], tmp_path / "m.partial"
    folder.mkdir()
    (folder / "m.bin.tmp").write_bytes(b"half of it")
    (folder / "lock").touch()
    with locked_folder(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess_module, "_LOCK_WAIT_S", 0.2)
        with pytest.raises(ConfigError, match="another process is making this corpus"):
            merge(parts, str(tmp_path / "m"), StopSignal())
    assert (folder / "m.bin.tmp").exists()
    merge(parts, str(tmp_path / "m"), StopSignal())
    assert bin_path(tmp_path / "m").read_bytes() == bin_path(make("whole", TEXTS)).read_bytes()
    assert not folder.exists()


def test_an_unfinished_corpus_is_not_merged_over(make: Callable[..., str], tmp_path: Path) -> None:
    parts, folder = [make("a", TEXTS[:3]), make("b", TEXTS[3:])], tmp_path / "m.partial"
    folder.mkdir()
    (folder / "job.json").write_text("{}")
    with pytest.raises(ConfigError, match="an unfinished job is in the way"):
        merge(parts, str(tmp_path / "m"), StopSignal())
    assert (folder / "job.json").exists()
