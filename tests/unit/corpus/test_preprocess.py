"""The job inside one process; what needs real processes and signals is in tests/integration/test_corpus_tools.py."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarpt.corpus import atomic, joiner, pool, preprocess, worker
from megarpt.corpus.console import Stopped, StopSignal
from megarpt.corpus.encoders import ReferenceEncoder
from megarpt.corpus.indexed import CorpusIndex, bin_path, idx_path, manifest_path
from megarpt.corpus.inputs import find_inputs
from megarpt.corpus.manifest import CorpusManifest, verify_corpus
from megarpt.corpus.merge import merge
from megarpt.corpus.preprocess import PreprocessOptions, plan_shards
from megarpt.corpus.readers import ReadOptions
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.corpus.worker import ShardJob, encode_shard, read_shard_result, shard_paths
from megarpt.errors import ConfigError, DataError, MegarptError

TEXTS = [f"document {i} é " * (i % 17) for i in range(200)]


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


def run(inputs: str | list[str], output: Path, stop: StopSignal | None = None, **more: Any) -> CorpusManifest:
    options = {"tokenizer": "bytes", "append_eod": True, "workers": 2, "shard_bytes": 4000} | more
    inputs = [inputs] if isinstance(inputs, str) else inputs
    return preprocess.preprocess(PreprocessOptions(inputs=inputs, output_prefix=str(output), **options), stop or StopSignal())


def files(prefix: Path) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


def partial(prefix: Path) -> Path:
    return Path(f"{prefix}.partial")


def test_manifest_tells_what_was_done(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    sources = [write_jsonl(TEXTS[:150], "a.jsonl"), write_jsonl(TEXTS[150:], "b.jsonl")]
    manifest = run(sources, tmp_path / "deep" / "c")
    assert manifest == verify_corpus(tmp_path / "deep" / "c", full=True)
    assert (manifest.num_documents, manifest.append_eod, manifest.dtype) == (200, True, "uint16")
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.num_tokens == manifest.text_bytes + sum(bool(text) for text in TEXTS)
    assert [(each.name, each.num_documents) for each in manifest.inputs] == [("a.jsonl", 150), ("b.jsonl", 50)]
    index = CorpusIndex(tmp_path / "deep" / "c")
    tokenizer = load_tokenizer("bytes")
    for number, text in enumerate(TEXTS):
        ids = index.read_document(number).tolist()
        assert ids == tokenizer.encode(text) + ([256] if text else [])
    assert not partial(tmp_path / "deep" / "c").exists()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shard_bytes", [900, 1 << 30])
def test_bytes_depend_on_nothing_but_the_text(
    tmp_path: Path, write_jsonl: Callable[..., str], workers: int, shard_bytes: int, bpe_json: str
) -> None:
    source = write_jsonl(TEXTS)
    for number, (w, s) in enumerate([(2, 4000), (workers, shard_bytes)]):
        run(source, tmp_path / f"c{number}", workers=w, shard_bytes=s, tokenizer=bpe_json)
    assert files(tmp_path / "c0") == files(tmp_path / "c1")


def test_spawned_workers_give_the_same(tmp_path: Path, write_jsonl: Callable[..., str], bpe_json: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=40)
    run(write_jsonl(TEXTS), tmp_path / "forked", tokenizer=bpe_json)
    run(str(tmp_path / "a.parquet"), tmp_path / "spawned", tokenizer=bpe_json)
    assert files(tmp_path / "forked") == files(tmp_path / "spawned")


def test_shards_do_not_depend_on_who_asks(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    sources = [write_jsonl(TEXTS[i : i + 3], f"{i}.jsonl") for i in range(0, 60, 3)] + [write_jsonl(TEXTS * 5, "big.jsonl")]
    found = find_inputs(sources)
    shards = plan_shards(found, ReadOptions(), 4000)
    assert shards == plan_shards(found, ReadOptions(), 4000)
    segments = [segment for shard in shards for segment in shard]
    assert [segment.file for segment in segments] == sorted(segment.file for segment in segments)
    for number, file in enumerate(found):
        mine = [segment for segment in segments if segment.file == number]
        assert mine[0].start == 0 and mine[-1].end == file.size
        assert all(a.end == b.start for a, b in itertools.pairwise(mine))
    sizes = [sum(segment.end - segment.start for segment in shard) for shard in shards]
    assert max(sizes) <= 4000 and len(shards) < len(segments)
    assert len(plan_shards(found, ReadOptions(), 1)) <= 2 * 4096


def test_same_command_again_does_nothing(
    tmp_path: Path, write_jsonl: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = write_jsonl(TEXTS)
    manifest = run(source, tmp_path / "c")
    times = bin_path(tmp_path / "c").stat().st_mtime_ns
    assert run(source, tmp_path / "c", workers=1) == manifest
    assert "nothing to do" in caplog.text and bin_path(tmp_path / "c").stat().st_mtime_ns == times
    assert not partial(tmp_path / "c").exists()


def test_existing_output_is_not_overwritten(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    run(write_jsonl(TEXTS), tmp_path / "c")
    before = files(tmp_path / "c")
    other = write_jsonl(TEXTS[:9], "other.jsonl")
    with pytest.raises(ConfigError, match="made from other inputs or with other options"):
        run(other, tmp_path / "c")
    assert files(tmp_path / "c") == before
    run(other, tmp_path / "c", restart=True)
    assert verify_corpus(tmp_path / "c", full=True).num_documents == 9
    manifest_path(tmp_path / "c").unlink()
    with pytest.raises(ConfigError, match="there without a manifest"):
        run(other, tmp_path / "c")


class StopAfter(StopSignal):
    """A signal that comes at the n-th look."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def check(self, again: str = "") -> None:
        self.looks -= 1
        self.name = "SIGTERM" if self.looks < 0 else ""
        super().check(again)


class StopOnce(StopSignal):
    """A signal that comes at the first look after something has happened, however many looks that takes."""

    def __init__(self, has_happened: Callable[[], object]) -> None:
        super().__init__()
        self.has_happened = has_happened

    def check(self, again: str = "") -> None:
        self.name = "SIGTERM" if self.has_happened() else ""
        super().check(again)


@pytest.mark.parametrize("checkpoint_s", [0.0, 1e9])
def test_stopped_at_any_point_and_resumed(
    tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch, checkpoint_s: float
) -> None:
    monkeypatch.setattr(joiner, "_SAVE_EVERY_S", checkpoint_s)
    source = write_jsonl(TEXTS)
    run(source, tmp_path / "whole", shard_bytes=900)
    stops = 0
    for looks in range(60):
        try:
            run(source, tmp_path / "c", StopAfter(looks), shard_bytes=900)
            break
        except Stopped as stopped:
            stops += 1
            assert stopped.exit_code == 75
            assert not any(path(tmp_path / "c").exists() for path in (bin_path, idx_path, manifest_path))
    assert stops > 1
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def unfinished(source: str, output: Path, **more: Any) -> None:
    """A job that was stopped with some shards finished."""
    with pytest.raises(Stopped):
        run(source, output, StopOnce(lambda: list(partial(output).glob("shard-*.json"))), **more)


def test_other_arguments_are_refused(tmp_path: Path, write_jsonl: Callable[..., str], bpe_json: str) -> None:
    source = write_jsonl(TEXTS)
    unfinished(source, tmp_path / "c", skip_malformed=3)
    for more, message in (
        ({"tokenizer": bpe_json}, "tokenizer: begun with"),
        ({"append_eod": False}, "append-eod: begun with 256, now None"),
        ({"shard_bytes": 2001}, "shard-bytes: begun with 4000, now 2001"),
        ({"read": ReadOptions(text_key="other")}, "text-key: begun with text, now other"),
        ({"inputs": [source, write_jsonl(["x"], "more.jsonl")]}, "inputs: begun with 1 files, now 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(**{"inputs": source, "output": tmp_path / "c"} | more)  # type: ignore[arg-type]
    os.utime(source, ns=(1, 1))
    with pytest.raises(ConfigError, match=r"in\.jsonl: mtime_ns was \d+, is 1"):
        run(source, tmp_path / "c")
    Path(source).write_text(json.dumps({"text": "changed"}))
    with pytest.raises(ConfigError, match=r"size was \d+, is 19"):
        run(source, tmp_path / "c")
    run(source, tmp_path / "c", restart=True)
    assert verify_corpus(tmp_path / "c").num_documents == 1


def test_damaged_finished_shard_is_made_again(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    source = write_jsonl(TEXTS)
    run(source, tmp_path / "whole")
    for damage in ("cut", "flip", "lengths", "json"):
        output = tmp_path / damage
        unfinished(source, output)
        commit = next(partial(output).glob("shard-*.json"))
        victim = commit.with_suffix({"lengths": ".lengths", "json": ".json"}.get(damage, ".bin"))
        content = victim.read_bytes()
        victim.write_bytes(content[:-3] if damage != "flip" else bytes([content[0] ^ 1]) + content[1:])
        run(source, output)
        assert files(output) == files(tmp_path / "whole")


def test_damaged_joined_part_is_noticed(
    tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joiner, "_SAVE_EVERY_S", 0.0)
    source = write_jsonl(TEXTS)
    with pytest.raises(Stopped):
        run(source, tmp_path / "c", StopOnce((partial(tmp_path / "c") / "joined.json").exists))
    joined = partial(tmp_path / "c") / "c.bin.tmp"
    content = joined.read_bytes()
    joined.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match="the joined part was changed"):
        run(source, tmp_path / "c")
    joined.write_bytes(content[:1])
    with pytest.raises(DataError, match="got 1 bytes, expected at least"):
        run(source, tmp_path / "c")
    (partial(tmp_path / "c") / "joined.json").write_text("{")
    with pytest.raises(DataError, match=r"joined\.json: cannot be read"):
        run(source, tmp_path / "c")
    run(source, tmp_path / "c", restart=True)


def test_malformed_lines(tmp_path: Path, write_jsonl: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    source = Path(write_jsonl(TEXTS))
    lines = source.read_text().splitlines(keepends=True)
    for at in (3, 70, 71, 190):
        lines[at] = "broken\n"
    source.write_text("".join(lines))
    with pytest.raises(DataError, match=r"in\.jsonl:(4|71|191): malformed: invalid JSON"):
        run(str(source), tmp_path / "c")
    with pytest.raises(DataError, match=r"more than the 3 that --skip-malformed allows"):
        run(str(source), tmp_path / "c", skip_malformed=3)
    manifest = run(str(source), tmp_path / "c", skip_malformed=4)
    assert manifest.num_malformed == 4 and manifest.num_documents == 196
    assert [record.line for record in manifest.malformed] == [4, 71, 72, 191]
    assert {record.file for record in manifest.malformed} == {"in.jsonl"}
    assert f"{source}:191: malformed" in caplog.text


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_nothing_to_tokenize(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"no token from .*a\.jsonl"):
        run(str(tmp_path / "a.jsonl"), tmp_path / "c")
    assert not bin_path(tmp_path / "c").exists()


def test_an_empty_file_among_others_is_named(
    tmp_path: Path, write_jsonl: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    run([write_jsonl(TEXTS), str(tmp_path / "empty.jsonl")], tmp_path / "c")
    assert f"no documents in {tmp_path}/empty.jsonl" in caplog.text


def test_missing_eod(tmp_path: Path, write_jsonl: Callable[..., str], make_sentencepiece: Callable[..., str]) -> None:
    model = make_sentencepiece(eos_id=-1)
    with pytest.raises(ConfigError, match="name one with --eod-token"):
        run(write_jsonl(TEXTS), tmp_path / "c", tokenizer=model)
    assert run(write_jsonl(TEXTS), tmp_path / "c", tokenizer=model, append_eod=False).tokenizer.eod is None


def test_too_little_space_is_known_before_the_work(
    tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "free_bytes", lambda _path: 1000)
    with pytest.raises(DataError, match=r"not enough space for .*c: got 1,000 bytes free, expected at least [\d,]+"):
        run(write_jsonl(TEXTS), tmp_path / "c")
    monkeypatch.undo()
    run(write_jsonl(TEXTS), tmp_path / "c")


def test_inputs_that_change_meanwhile(tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(TEXTS)
    original = preprocess._Job._prepare_encoder

    def append_then_prepare(job: Any) -> Any:
        with open(source, "a") as file:
            file.write('{"text": "late"}\n')
        return original(job)

    monkeypatch.setattr(preprocess._Job, "_prepare_encoder", append_then_prepare)
    with pytest.raises(DataError, match="let the file be finished"):
        run(source, tmp_path / "c")
    assert not manifest_path(tmp_path / "c").exists()


def test_two_at_once(tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "_LOCK_WAIT_S", 0.2)
    partial(tmp_path / "c").mkdir()
    with (
        preprocess.locked_folder(partial(tmp_path / "c")),
        pytest.raises(ConfigError, match="another process is making this corpus"),
    ):
        run(write_jsonl(TEXTS), tmp_path / "c")
    run(write_jsonl(TEXTS), tmp_path / "c")


def test_a_dead_worker_is_named(tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_args: Any) -> None:
        os._exit(3)

    monkeypatch.setattr(worker, "_encode_segments", die)  # forked workers take it along, and only they:
    monkeypatch.setattr(pool.threading, "active_count", lambda: 1)  # another test may have left a thread behind
    with pytest.raises(MegarptError, match=r"worker [01] \(process \d+\) ended with code 3 while it worked on shard [01]"):
        run(write_jsonl(TEXTS), tmp_path / "c")
    monkeypatch.undo()
    run(write_jsonl(TEXTS), tmp_path / "c")


def job(tmp_path: Path, source: str, **changes: Any) -> ShardJob:
    found = find_inputs([source])
    fields = {
        "job_sha256": "j",
        "folder": tmp_path / "shards",
        "files": found,
        "shards": plan_shards(found, ReadOptions(), 2000),
        "options": ReadOptions(),
        "dtype": "uint16",
        "eod": None,
        "max_malformed": 0,
        "parent": os.getppid(),
    }
    (tmp_path / "shards").mkdir(exist_ok=True)
    return ShardJob(**fields | changes)


def test_a_shard_is_whole_or_not_there(
    tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    this = job(tmp_path, write_jsonl(TEXTS))
    encoder = ReferenceEncoder(load_tokenizer("bytes"))
    result = encode_shard(this, 1, encoder, lambda *_: None)
    assert read_shard_result(this.folder, 1, "j") == result and result.num_documents > 0
    assert read_shard_result(this.folder, 1, "other job") is None and read_shard_result(this.folder, 2, "j") is None
    values, lengths, _commit = shard_paths(this.folder, 1)
    assert np.fromfile(lengths, dtype=np.int32).sum() * 2 == values.stat().st_size

    replace = os.replace
    for failing in range(3):
        calls = 0

        def sometimes(source: Any, target: Any, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls > failing:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", sometimes)
        with pytest.raises(DataError, match="No space left"):
            encode_shard(this, 2, encoder, lambda *_: None)
        assert read_shard_result(this.folder, 2, "j") is None and not list(this.folder.glob("*.tmp-*"))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shares_of_the_inputs_join_to_the_whole(tmp_path: Path, write_jsonl: Callable[..., str], count: int) -> None:
    sources = [write_jsonl(TEXTS[i : i + 5], f"{i:02}.jsonl") for i in range(0, 35, 5)]
    pattern = str(Path(sources[0]).parent / "*.jsonl")
    run(pattern, tmp_path / "whole")
    for number in range(count):
        run(pattern, tmp_path / f"part{number}", part=(number, count))
    merge([str(tmp_path / f"part{number}") for number in range(count)], str(tmp_path / "joined"), StopSignal())
    assert files(tmp_path / "joined") == files(tmp_path / "whole")


def test_more_shares_than_files(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="--part 0/2: got 1 input files"):
        run(write_jsonl(TEXTS), tmp_path / "c", part=(0, 2))
