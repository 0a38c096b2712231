"""Checkpoints written while training goes on: an exact snapshot, whole or absent, and honest about what went wrong."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from megarpt.errors import CheckpointError
from megarpt.testing.tiny_run import TinyRun, assert_same
from megarpt.train import checkpoint_files as files
from megarpt.train import preflight
from megarpt.train.checkpoint import SavedCheckpoint
from megarpt.train.checkpoint_job import SaveJob
from megarpt.train.preflight import Room, disk_shortage, memory_shortage
from megarpt.train.sharded import content_hash
from megarpt.train.staging import HostBuffer, room_for
from megarpt.train.weights import checkpoint_hash

MakeRun = Callable[..., TinyRun]
LIMIT_S = 60.0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before it is set."""
    opened, write = threading.Event(), FileSystemWriter.write_data

    def held(self: FileSystemWriter, *arguments: Any) -> Any:
        assert opened.wait(LIMIT_S)
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", held)
    yield opened
    opened.set()


def polled(run: TinyRun) -> list[SavedCheckpoint]:
    """What `poll` returns as soon as it returns something."""
    deadline = time.monotonic() + LIMIT_S
    while not (saved := run.checkpoints.poll()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return saved


def overwrite_everything(run: TinyRun) -> None:
    with torch.no_grad():
        for tensor in [*run.model[0].parameters(), *run.moments().values()]:
            tensor.fill_(7)
    run.scheduler.step(1000)
    torch.manual_seed(9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_written_is_what_was_there_when_save_was_called(
    make_run: MakeRun, gate: threading.Event, precision: str
) -> None:
    run = make_run(**{"train.precision": precision})
    run.train(2)
    before, moments, state = run.weights(), {name: t.clone() for name, t in run.moments().items()}, run.scheduler.state_dict()
    generator = torch.get_rng_state()
    run.begin_save()
    overwrite_everything(run)
    gate.set()
    run.checkpoints.finish()
    resumed = make_run(**{"train.precision": precision})
    resumed.load()
    assert_same(before, resumed.weights())
    assert_same(moments, resumed.moments())
    assert {name.split(".")[1] for name in moments} == {"exp_avg", "exp_avg_sq", "master"}
    assert resumed.scheduler.state_dict() == state and torch.equal(torch.get_rng_state(), generator)


def test_without_a_copy_the_snapshot_would_be_wrong(
    make_run: MakeRun, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above sees what it is there to see."""
    monkeypatch.setattr(HostBuffer, "copy", lambda _self, tensor: tensor)
    run = make_run()
    run.train(1)
    before = run.weights()
    run.begin_save()
    overwrite_everything(run)
    gate.set()
    run.checkpoints.finish()
    resumed = make_run()
    resumed.load()
    assert not any(torch.equal(before[name], p) for name, p in resumed.weights().items())


def test_training_goes_on_while_a_checkpoint_is_written(make_run: MakeRun, gate: threading.Event) -> None:
    settings = {"train.precision": "bf16", "model.mcore": {"num_layers": 2, "hidden_size": 32, "hidden_dropout": 0.1}}
    run = make_run(**settings)
    run.train(2)
    run.begin_save()
    rest = run.train(5)
    assert run.checkpoints.poll() == [] and run.checkpoints.newest is None
    assert files.list_checkpoints(run.checkpoints.directory) == []
    gate.set()
    (saved,) = polled(run)
    assert saved.path.name == "step_00000002" and saved.progress.step == 2 and 0 < saved.stall_s < saved.seconds
    assert run.checkpoints.newest == saved.path and run.checkpoints.poll() == []
    resumed = make_run(**settings)
    resumed.load()
    assert resumed.train(5) == rest


def test_copied_or_not_the_files_say_the_same(make_run: MakeRun, tmp_path: Path) -> None:
    hashes = []
    for in_background in (True, False):
        run = make_run(seed=3, **{"checkpoint.async_save": in_background})
        run.train(2)
        run.begin_save()
        if not in_background:
            assert run.checkpoints.newest is not None  # complete when `save` returns
        run.checkpoints.finish()
        path = run.checkpoints.newest
        assert path is not None
        hashes.append((checkpoint_hash(path), content_hash(path / "training", 1 << 30)))
        files.remove_checkpoint(path)
    assert hashes[0] == hashes[1]


def test_a_second_save_waits_for_the_first(make_run: MakeRun, gate: threading.Event) -> None:
    run = make_run()
    run.train(1)
    run.begin_save()
    run.train(2)
    threading.Timer(0.2, gate.set).start()
    run.begin_save()
    assert files.list_checkpoints(run.checkpoints.directory)[-1].name == "step_00000001"
    assert [saved.path.name for saved in run.checkpoints.finish()] == ["step_00000001", "step_00000002"]


def test_memory_is_taken_once(make_run: MakeRun) -> None:
    run = make_run()
    run.load()
    buffer = run.checkpoints._buffer
    reserved = buffer.num_bytes
    assert reserved > 0
    for step in (1, 2):
        run.train(step)
        run.save()
        assert buffer.num_bytes == reserved  # what was expected at the start is enough


def test_a_buffer_grows_and_keeps_tensors_apart(cpu_runtime: Any) -> None:
    buffer = HostBuffer(cpu_runtime)
    tensors = [torch.randn(3), torch.randn(5, 7).to(torch.bfloat16), torch.tensor(3), torch.empty(0, 4), torch.randn(4, 3).t()]
    for factor in (1, 4):
        wanted = [t.repeat(factor, *([1] * (t.dim() - 1))) if t.dim() else t for t in tensors]
        buffer.reserve(room_for(t.nbytes for t in wanted))
        buffer.clear()
        copies = [buffer.copy(t) for t in wanted]
        for tensor, copy in zip(wanted, copies, strict=True):
            assert torch.equal(tensor, copy) and copy.untyped_storage().size() == copy.nbytes
            assert copy.nbytes == 0 or copy.data_ptr() % 64 == copies[0].data_ptr() % 64


# What goes wrong behind training is said in front of it.


def test_a_failed_write_is_told_at_the_next_poll(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    former = run.save()
    run.train(1)
    with monkeypatch.context() as patch:

        def refuse(*_: Any) -> None:
            raise OSError(28, "No space left on device", "shard")

        patch.setattr(FileSystemWriter, "write_data", refuse)
        run.begin_save()
        with pytest.raises(
            CheckpointError, match=r"step_00000001 cannot be written: .*No space left(.|\n)*step_00000000 is intact"
        ):
            polled(run)
    assert run.checkpoints.poll() == []
    assert sorted(path.name for path in former.parent.iterdir()) == [files.LATEST, former.name]
    run.train(2)
    assert run.save().name == "step_00000002"


def test_a_failure_to_complete_is_told_too(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    former = run.save()
    run.train(1)

    def refuse(*_: Any) -> None:
        raise OSError("the manifest was refused")

    monkeypatch.setattr(files.Manifest, "write", refuse)
    run.begin_save()
    with pytest.raises(CheckpointError, match="the manifest was refused"):
        polled(run)
    assert files.list_checkpoints(former.parent) == [former]


def test_a_mistake_of_the_program_keeps_its_traceback(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(SaveJob, "write", broken)
    run = make_run()
    run.begin_save()
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        run.checkpoints.finish()


def test_a_run_that_ends_with_an_error_does_not_wait_for_its_checkpoint(make_run: MakeRun, gate: threading.Event) -> None:
    run = make_run()
    former = run.checkpoints.directory
    with pytest.raises(RuntimeError, match="something else"), run.checkpoints:
        run.begin_save()
        threading.Timer(0.1, gate.set).start()
        raise RuntimeError("something else")
    (left,) = former.iterdir()
    assert ".tmp-" in left.name
    make_run()
    assert list(former.iterdir()) == []


def test_without_memory_for_a_copy_training_waits_and_says_so(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: 1 << 20)
    run = make_run()
    with caplog.at_level(logging.WARNING):
        run.load()
        run.train(1)
        run.begin_save()
    assert run.checkpoints.newest is not None and run.checkpoints._buffer.num_bytes == 0
    told = [record.message for record in caplog.records if "no room for a copy" in record.message]
    assert len(told) == 2 and "1048576 bytes are free" in told[0] and "checkpoint.async_save=false" in told[0]


def test_shortages_are_counted_by_host_and_by_folder() -> None:
    def room(host: str, memory: int, free: int) -> Room:
        return Room(disk=1 << 30, memory=memory, host=host, free_disk=3 << 30, free_memory=free)

    enough = [room("a", 1 << 30, 3 << 30), room("a", 1 << 30, 3 << 30), room("b", 0, 0)]
    assert memory_shortage(enough) is None
    text = memory_shortage([*enough, room("a", 1 << 30, 3 << 30)])
    assert text is not None and text.startswith(f"a: 3 ranks need {3 << 30} bytes of memory") and "b:" not in text
    assert disk_shortage(enough[:2]) is None
    assert disk_shortage(enough) == f"the checkpoint needs {(3 << 30) + (16 << 20)} bytes and {3 << 30} bytes are free"


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_limits_memory(tmp_path: Path, version: int) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    group = root / ("memory/job/task" if version == 1 else "job/task")
    group.mkdir(parents=True)
    limit, usage = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    membership.write_text("3:cpu:/job/task\n4:memory:/job/task\n" if version == 1 else "0::/job/task\n")
    (group / limit).write_text("9223372036854771712\n" if version == 1 else "max\n")
    (group / usage).write_text("500\n")
    assert preflight._cgroup_room(membership, root) == []
    (group.parent / limit).write_text("1000\n")
    (group.parent / usage).write_text("700\n")
    assert preflight._cgroup_room(membership, root) == [300]
    (group.parent / "memory.stat").write_text("cache 900\ntotal_inactive_file 200\ninactive_file 10\n")
    assert preflight._cgroup_room(membership, root) == [500]


def test_memory_of_this_machine_is_known() -> None:
    assert 0 < preflight.available_memory() < 1 << 50


def test_retention_counts_whole_checkpoints_only(make_run: MakeRun) -> None:
    run = make_run(**{"checkpoint.keep_last": 2})
    paths = []
    for step in range(1, 4):
        run.train(step)
        paths.append(run.save())
        if step == 2:
            (paths[-1] / files.MANIFEST).write_text("{")
    assert files.list_checkpoints(run.checkpoints.directory) == [paths[2], paths[1], paths[0]]  # the damaged one is not counted
