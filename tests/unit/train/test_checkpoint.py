"""Checkpoints: bit-exact, atomic, verified, kept as long as asked, and clear about what does not fit."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megarpt.device.runtime import Runtime
from megarpt.errors import CheckpointError
from megarpt.model.build import unwrap
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import Progress, StepReport
from megarpt.testing.tiny_run import SMALL, TOKENIZER, VOCAB, B, S, TinyRun, assert_same
from megarpt.train import checkpoint_files as files
from megarpt.train.checkpoint import CheckpointManager
from megarpt.train.checkpoint_choice import newest_whole
from megarpt.train.state import TrainState
from megarpt.train.weights import checkpoint_hash, describe_model, load_weights

MakeRun = Callable[..., TinyRun]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resuming_is_bit_exact(make_run: MakeRun, precision: str, dropout: float) -> None:
    settings = {
        "train.precision": precision,
        "model.mcore": {**SMALL, "hidden_dropout": dropout},
        "optimizer.lr_warmup_tokens": 3 * B * S,
    }
    straight = make_run(**settings)
    first = straight.train(2)
    straight.save()
    rest = straight.train(6)
    resumed = make_run(**settings)
    assert resumed.load() is not None
    assert resumed.state.progress == Progress(2, 2 * B, 2 * B * S, sum(report.num_tokens for report in first))
    assert resumed.train(6) == rest
    assert_same(straight.weights(), resumed.weights())
    if precision == "bf16":
        masters = [
            [p for group in run.optimizer.chained_optimizers[0].fp32_from_float16_groups for p in group]
            for run in (straight, resumed)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*masters, strict=True)) and len(masters[0]) > 0


def test_dropout_goes_on_where_it_was(make_run: MakeRun) -> None:
    """Without the restored random states the test above could not pass with dropout."""
    settings = {"model.mcore": {**SMALL, "hidden_dropout": 0.1}}
    straight = make_run(**settings)
    straight.train(1)
    straight.save()
    rest = straight.train(2)
    resumed = make_run(**settings)
    resumed.load()
    torch.manual_seed(12345)
    assert resumed.train(2) != rest


def test_a_run_without_a_step_can_be_saved(make_run: MakeRun) -> None:
    fresh = make_run(**{"train.precision": "bf16"})
    fresh.save()
    resumed = make_run(**{"train.precision": "bf16"})
    assert resumed.load() == replace(fresh.state, restarts=1)
    assert resumed.train(2) == fresh.train(2)
    assert_same(fresh.weights(), resumed.weights())


def test_the_state_travels_whole(make_run: MakeRun) -> None:
    run = make_run()
    run.state = TrainState(
        progress=Progress(7, 70, 700, 400),
        data={"consumed_samples": 70, "fingerprint": {"seed": 3, "sources": [{"weight": 0.5, "path": None}]}},
        skipped_in_a_row=1,
        skipped_total=4,
        restarts=2,
        selection={"threshold": 1.25},
    )
    run.save()
    assert make_run().load() == replace(run.state, restarts=3)


def test_after_step_counts_what_was_trained(report_at: Callable[..., StepReport]) -> None:
    state = TrainState().after_step(report_at(1), samples=2, tokens_seen=16)
    assert state.progress == Progress(1, 2, 16, 38) and state.skipped_total == 0
    state = state.after_step(report_at(2, skipped=True), samples=2, tokens_seen=16)
    state = state.after_step(report_at(3, skipped=True), samples=2, tokens_seen=16)
    assert state.progress == Progress(3, 6, 48, 38) and (state.skipped_in_a_row, state.skipped_total) == (2, 2)
    state = state.after_step(report_at(4), samples=2, tokens_seen=16)
    assert (state.skipped_in_a_row, state.skipped_total) == (0, 2)


def test_a_state_of_another_version_is_refused() -> None:
    content = TrainState().to_dict()
    assert TrainState.from_dict(content) == TrainState()
    with pytest.raises(CheckpointError, match="another version"):
        TrainState.from_dict({**content, "surprise": 1})


def test_an_empty_folder_has_nothing_to_resume(make_run: MakeRun, tmp_path: Path) -> None:
    assert make_run().load() is None
    assert files.latest_checkpoint(tmp_path / "checkpoints") is None


def test_retention_keeps_the_last_and_every_so_many(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(**{"checkpoint.keep_last": 2, "checkpoint.keep_every_steps": 3})
    for step in range(1, 9):
        run.state = replace(run.state, progress=Progress(step=step))
        run.save()
    folder = tmp_path / "checkpoints"
    assert [path.name for path in files.list_checkpoints(folder)] == [files.step_name(step) for step in (8, 7, 6, 3)]
    assert (folder / files.LATEST).read_text() == "step_00000008\n"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [files.LATEST, *(files.step_name(step) for step in (3, 6, 7, 8))]
    )


def test_nothing_is_deleted_before_the_new_one_is_complete(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(**{"checkpoint.keep_last": 1})
    run.save()
    seen = []

    def watched(directory: Path, **options: int) -> list[Path]:
        seen.append([files.read_manifest(path).step for path in files.list_checkpoints(directory)])
        return files.surplus(directory, **options)

    monkeypatch.setattr("megarpt.train.checkpoint_job.surplus", watched)
    run.train(1)
    run.save()
    assert seen == [[1, 0]]


def test_saving_a_step_twice_keeps_the_first(make_run: MakeRun) -> None:
    run = make_run()
    path = run.save()
    stamp = (path / files.MANIFEST).stat().st_mtime_ns
    assert run.save() == path and (path / files.MANIFEST).stat().st_mtime_ns == stamp


def test_the_manifest_says_what_the_checkpoint_is_of(make_run: MakeRun) -> None:
    run = make_run()
    run.train(1)
    path = run.save()
    manifest = files.read_manifest(path)
    written = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {files.MANIFEST}
    assert set(manifest.files) == written and files.CONFIG in written
    assert manifest.step == 1 and manifest.progress["tokens_seen"] == B * S and manifest.tokenizer_sha256 == TOKENIZER
    assert manifest.num_bytes == sum((path / name).stat().st_size for name in written)
    assert manifest.model["model.mcore.hidden_size"] == 32 and set(manifest.versions) == {
        "megarpt",
        "git",
        "torch",
        "megatron-core",
    }
    assert files.read_config(path) == run.cfg


# A process may die at any moment.


class Death(BaseException):
    """From here on nothing changes below the folder any more, as if the process were gone."""


class Watch:
    """Counts changes of files below a folder, and forbids all from the n-th on. An audit hook: it cannot be taken out."""

    def __init__(self) -> None:
        self.folder, self.left = "", 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or not arguments or not str(arguments[0]).startswith(self.folder):
            return
        writes = (
            event == "open"
            and not (isinstance(arguments[1], str) and arguments[1] in ("r", "rb"))
            and arguments[2] & os.O_WRONLY
        )
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            if self.left <= 0:
                raise Death(event)
            self.left -= 1


WATCH = Watch()


def test_death_anywhere_in_a_save_leaves_a_checkpoint(
    make_run: MakeRun, tmp_path: Path, cpu_runtime: Runtime, one_rank: ProcessGroups
) -> None:
    folder, before = tmp_path / "checkpoints", tmp_path / "before"
    run = make_run(**{"checkpoint.keep_last": 1})
    run.save()
    shutil.copytree(folder, before)
    run.train(1)
    found = []
    for moment in range(1000):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        WATCH.folder, WATCH.left = str(folder), moment
        try:
            run.save()
            break
        except Death:
            pass
        finally:
            WATCH.folder = ""
        newest = files.latest_checkpoint(folder)
        assert newest is not None
        manifest = files.read_manifest(newest)
        assert files.check_files(newest, manifest, manifest.files) == []
        found.append(manifest.step)
        CheckpointManager(folder, run.cfg, tokenizer_sha256=TOKENIZER, runtime=cpu_runtime, groups=one_rank)
        assert {path.name for path in folder.iterdir()} - {"step_00000000", "step_00000001"} <= {files.LATEST}
    assert found == sorted(found) and found.count(0) > 10 and found.count(1) > 2  # died before and after the rename
    assert make_run().load() == replace(run.state, restarts=1)


def test_what_a_killed_process_left_is_removed_by_the_next(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    run.save()
    folder = tmp_path / "checkpoints"
    for name in ("step_00000005.tmp-1", "step_00000003.deleting"):
        (folder / name / "model").mkdir(parents=True)
    for name in ("notes", "step_00000004.damaged"):
        (folder / name).mkdir()
    resumed = make_run()
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "notes",
        "step_00000000",
        "step_00000004.damaged",
    ]
    assert resumed.load() is not None


# A file may rot.


def flip_a_bit(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    at = 4 * len(content) + 2 if at is None else at
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def truncate(path: Path, to: int = -1) -> None:
    path.write_bytes(path.read_bytes()[:to])


DAMAGES = [
    ("model/__0_0.distcp", flip_a_bit, "sha256"),
    ("training/__0_0.distcp", truncate, "bytes, expected"),
    ("training/__0_0.distcp", Path.unlink, "is missing"),
    ("model/.metadata", flip_a_bit, "sha256"),
    ("training/common.pt", flip_a_bit, "sha256"),
    (files.CONFIG, flip_a_bit, "sha256"),
    (files.MANIFEST, flip_a_bit, "is damaged"),
    (files.MANIFEST, Path.unlink, "is missing"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_named_set_aside_and_passed_over(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None], message: str
) -> None:
    run = make_run()
    run.train(1)
    good = run.save()
    run.train(2)
    bad = run.save()
    damage(bad / name)
    resumed = make_run()
    with caplog.at_level(logging.WARNING):
        state = resumed.load()
    assert state is not None and state.progress.step == 1 and resumed.checkpoints.newest == good
    assert str(bad / name) in caplog.text and message in caplog.text and "step_00000002.damaged" in caplog.text
    assert not bad.exists() and bad.with_name("step_00000002.damaged").exists()
    assert (good.parent / files.LATEST).read_text() == "step_00000001\n"
    resumed.train(2)
    assert resumed.save() == bad


def test_damage_to_any_file_is_seen_and_named(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    run.train(1)
    only = run.save()
    shutil.copytree(only, tmp_path / "good")
    names = sorted(str(path.relative_to(only)) for path in only.rglob("*") if path.is_file())
    assert len(names) == 10
    rng = random.Random(3)
    for name in names:
        size = (only / name).stat().st_size
        for damage in (partial(flip_a_bit, at=rng.randrange(8 * size)), partial(truncate, to=rng.randrange(size)), Path.unlink):
            damage(only / name)
            with pytest.raises(CheckpointError, match=f"{re.escape(str(only / name))}(:| is missing| is damaged)"):
                newest_whole(only.parent)
            shutil.copyfile(tmp_path / "good" / name, only / name)
    assert newest_whole(only.parent) is not None


def test_a_run_never_begins_again_in_silence(make_run: MakeRun) -> None:
    run = make_run()
    only = run.save()
    flip_a_bit(only / "model/__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints is whole(.|\n)*__0_0.distcp: got sha256"):
        make_run().load()
    assert only.exists()
    files.set_aside(only)
    with pytest.raises(CheckpointError, match="set aside as damaged"):
        make_run().load()


def test_weights_are_checked_before_they_are_read(make_run: MakeRun) -> None:
    run = make_run()
    run.train(1)
    path = run.save()
    flip_a_bit(path / "training/__0_0.distcp")
    other = make_run()
    load_weights(path, other.model)  # the optimizer's files do not matter here
    before = make_run(seed=77)
    untouched = before.weights()
    flip_a_bit(path / "model/__0_0.distcp")
    for action in (lambda: load_weights(path, before.model), lambda: checkpoint_hash(path)):
        with pytest.raises(CheckpointError, match=r"model/__0_0.distcp: got sha256 .* expected .*; use another checkpoint"):
            action()
    assert_same(untouched, before.weights())


# A checkpoint may belong to something else.


MISFITS = {
    "layers": (
        {"model.mcore": {**SMALL, "num_layers": 3}},
        VOCAB,
        ["layers.mlp.linear_fc2.weight: got shape (2, 32, 48), expected (3, 32, 48)", "num_layers: 2 in the checkpoint, 3"],
    ),
    "hidden": (
        {"model.mcore": {**SMALL, "hidden_size": 64}},
        VOCAB,
        ["output_layer.weight: got shape (384, 32), expected (384, 64)", "model.mcore.hidden_size: 32 in the checkpoint, 64"],
    ),
    "vocabulary": (
        {},
        400,
        ["word_embeddings.weight: got shape (384, 32), expected (512, 32)", "model.vocab_size: 300 in the checkpoint, 400"],
    ),
    "missing": (
        {"model.mcore": {**SMALL, "add_qkv_bias": True}},
        VOCAB,
        [
            "linear_qkv.bias: missing in the checkpoint, expected shape (2, 64)",
            "model.mcore.add_qkv_bias: False in the checkpoint",
        ],
    ),
    "preset": (
        {"model.mcore": {}},
        VOCAB,
        ["model.mcore.num_layers: 2 in the checkpoint, 4", "model.mcore.hidden_size: 32 in the checkpoint, 256"],
    ),
}


@pytest.mark.parametrize(("overrides", "vocab", "messages"), MISFITS.values(), ids=MISFITS.keys())
def test_a_misfit_names_parameter_shapes_and_key(
    make_run: MakeRun, overrides: dict[str, Any], vocab: int, messages: list[str]
) -> None:
    path = make_run().save()
    other = make_run(vocab=vocab, **overrides)
    untouched = other.weights()
    for action in (other.load, lambda: load_weights(path, other.model)):
        with pytest.raises(CheckpointError) as caught:
            action()
        for message in messages:
            assert message in str(caught.value)
    assert_same(untouched, other.weights())


def test_a_parameter_only_the_checkpoint_has_is_a_misfit(make_run: MakeRun) -> None:
    path = make_run(**{"model.mcore": {**SMALL, "add_qkv_bias": True}}).save()
    with pytest.raises(CheckpointError, match=r"linear_qkv.bias: shape \(2, 64\) in the checkpoint, not in this run"):
        load_weights(path, make_run().model)


def test_another_meaning_of_the_same_shapes_is_refused_or_shown(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    path = make_run().save()
    other = make_run(**{"model.mcore": {**SMALL, "activation": "gelu"}})
    with pytest.raises(CheckpointError, match=r"model\.mcore\.activation: 'silu' in the checkpoint, 'gelu' in this run"):
        other.load()
    with caplog.at_level(logging.WARNING):
        load_weights(path, other.model)
    assert "model.mcore.activation" in caplog.text


def test_another_tokenizer_is_refused(make_run: MakeRun) -> None:
    path = make_run().save()
    other = make_run(tokenizer="cd" * 32)
    for action in (other.load, lambda: load_weights(path, other.model, tokenizer_sha256="cd" * 32)):
        with pytest.raises(CheckpointError, match=r"data.tokenizer: 'abab\S+ in the checkpoint, 'cdcd"):
            action()


# A disk may be full.


def test_too_little_space_is_seen_before_anything_is_written(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run()
    former = run.save()
    run.train(1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        CheckpointError, match=r"step_00000001: the checkpoint needs \d+ bytes and 1000 bytes are free"
    ) as caught:
        run.save()
    assert f"{former} is intact" in str(caught.value)
    assert [path.name for path in files.list_checkpoints(tmp_path / "checkpoints")] == ["step_00000000"]


@pytest.fixture
def limit_file_size() -> Iterator[Callable[[int], None]]:
    """A real refusal to write, as by a full disk or a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 1_000, 1_500, 40_000, 120_000])
def test_a_refused_write_leaves_the_checkpoint_before_it(
    make_run: MakeRun, tmp_path: Path, limit_file_size: Callable[[int], None], size: int
) -> None:
    run = make_run()
    former = run.save()
    run.train(1)
    limit_file_size(size)
    with pytest.raises(CheckpointError, match=r"step_00000001 cannot be written: .*is intact") as caught:
        run.save()
    assert size < 2_000 or "File too large" in str(caught.value)
    limit_file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [files.LATEST, former.name]
    assert run.save().name == "step_00000001"
    resumed = make_run()
    resumed.load()
    assert resumed.train(3) == run.train(3)


def test_a_folder_that_cannot_be_made_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="checkpoints cannot be prepared"):
        make_run()


# Weights are wanted by others too.


def test_a_checkpoint_is_found_from_its_run(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    run.save()
    run.train(1)
    path = run.save()
    assert {files.resolve_checkpoint(each) for each in (tmp_path, tmp_path / "checkpoints", path)} == {path}
    (tmp_path / "empty").mkdir()
    for wrong, message in (("empty", "holds no complete checkpoint"), ("nowhere", "does not exist")):
        with pytest.raises(CheckpointError, match=message):
            files.resolve_checkpoint(tmp_path / wrong)


def test_weights_load_across_precisions(make_run: MakeRun) -> None:
    source = make_run()
    source.train(1)
    path = source.save()
    target = make_run(**{"train.precision": "bf16"})
    load_weights(path, target.model)
    target.optimizer.reload_model_params()
    assert_same({name: p.bfloat16() for name, p in source.weights().items()}, target.weights())


def test_the_hash_depends_on_the_weights_alone(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    run.train(1)
    path = run.save()
    before = checkpoint_hash(path)
    moved = tmp_path / "elsewhere"
    shutil.copytree(path, moved)
    assert checkpoint_hash(moved) == before
    run.state = replace(run.state, progress=Progress(step=9), skipped_total=3)
    run.scheduler.step(1000)
    assert checkpoint_hash(run.save()) == before
    run.train(10)
    assert checkpoint_hash(run.save()) != before


def test_the_description_of_a_model_is_plain(make_run: MakeRun) -> None:
    described = describe_model(unwrap(make_run().model[0]))
    assert json.loads(json.dumps(described)) == described
