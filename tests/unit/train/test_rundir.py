"""The run folder: one process at a time, one configuration, and a verdict that is never half written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarpt.config.load import load_config
from megarpt.config.schema import PretrainConfig
from megarpt.corpus import atomic
from megarpt.corpus.atomic import atomic_write_bytes, atomic_write_json
from megarpt.errors import CheckpointError, ConfigError, DataError, NumericsError, PeerFailedError, StopRequested
from megarpt.structs import Progress
from megarpt.train.environment import describe_environment, git_state
from megarpt.train.rundir import RunDir, RunDirBusyError, verdict_of

MakeConfig = Callable[..., PretrainConfig]


def exit_record(config: PretrainConfig) -> dict[str, Any]:
    return json.loads((Path(config.run.dir) / "exit.json").read_text())


def run_once(config: PretrainConfig, *, has_checkpoint: bool = False) -> RunDir:
    with RunDir.open(config, has_checkpoint=has_checkpoint) as run:
        run.finish("finished")
    return run


def test_opening_writes_configuration_environment_and_a_running_verdict(make_config: MakeConfig) -> None:
    config = make_config()
    with RunDir.open(config, has_checkpoint=False, command=["megarpt", "pretrain"], facts={"world_size": 2}) as run:
        assert exit_record(config)["status"] == "running" and exit_record(config)["exit_code"] is None
        assert load_config(run.path / "config.yaml") == config
        environment = json.loads((run.path / "environment.json").read_text())
        assert environment["command"] == ["megarpt", "pretrain"] and environment["world_size"] == 2
        assert environment["packages"]["torch"] and environment["host"]
        run.record(Progress(step=3, tokens_seen=30, tokens_trained=18), Path("checkpoints/3"))
        run.finish("finished", "done")
        run.finish("failed", "too late")
    record = exit_record(config)
    assert (record["status"], record["exit_code"], record["step"], record["tokens_seen"]) == ("finished", 0, 3, 30)
    assert record["checkpoint"] == "checkpoints/3" and record["message"] == "done" and record["restarts"] == 0


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ConfigError("a"), "config_error", 78),
        (NumericsError("a"), "unstable", 76),
        (StopRequested("a"), "resumable", 75),
        (PeerFailedError("a", 79), "failed", 79),
        (DataError("a"), "failed", 79),
        (CheckpointError("a"), "failed", 79),
        (RuntimeError("a"), "failed", 1),
        (KeyboardInterrupt(), "failed", 130),
        (SystemExit(75), "resumable", 75),
        (SystemExit("message"), "failed", 1),
    ],
)
def test_an_exception_becomes_the_verdict_and_goes_on(
    make_config: MakeConfig, error: BaseException, status: str, code: int
) -> None:
    config = make_config()
    with pytest.raises(type(error)), RunDir.open(config, has_checkpoint=False):
        raise error
    assert verdict_of(error) == (status, code)
    record = exit_record(config)
    assert (record["status"], record["exit_code"]) == (status, code)
    assert type(error).__name__ in record["message"]


def test_leaving_without_a_verdict_counts_as_failed(make_config: MakeConfig) -> None:
    config = make_config()
    with RunDir.open(config, has_checkpoint=False):
        pass
    assert exit_record(config)["status"] == "failed" and "without a verdict" in exit_record(config)["message"]


def test_a_checkpoint_is_in_the_record_before_the_end(make_config: MakeConfig) -> None:
    with RunDir.open(make_config(), has_checkpoint=False) as run:
        run.record(Progress(step=4), Path("checkpoints/4"))
        run.record(Progress(step=5))
        record = exit_record(make_config())
        assert (record["status"], record["step"], record["checkpoint"]) == ("running", 4, "checkpoints/4")
        run.finish("resumable")
        run.record(Progress(step=6), Path("checkpoints/6"))
    assert (exit_record(make_config())["status"], exit_record(make_config())["step"]) == ("resumable", 5)


def test_attempts_are_counted_and_remembered(make_config: MakeConfig) -> None:
    config = make_config()
    for attempt, status in enumerate(("resumable", "failed", "finished")):
        with RunDir.open(config, has_checkpoint=attempt > 0) as run:
            assert run.restarts == attempt
            run.finish(status)  # type: ignore[arg-type]
    record = exit_record(config)
    assert record["restarts"] == 2
    assert [a["status"] for a in record["attempts"]] == ["resumable", "failed"]


def test_until_the_checkpoint_is_read_a_resumed_run_stands_where_it_stood(make_config: MakeConfig) -> None:
    config = make_config()
    with RunDir.open(config, has_checkpoint=False) as run:
        run.record(Progress(step=4, tokens_seen=40), Path("checkpoints/4"))
        run.record(Progress(step=5, tokens_seen=50), counts={"spikes": 2})
        run.finish("resumable")
    assert exit_record(config)["spikes"] == 2
    with pytest.raises(StopRequested), RunDir.open(config, has_checkpoint=True):
        assert exit_record(config)["checkpoint"] == "checkpoints/4"
        raise StopRequested("in the warm-up")
    record = exit_record(config)
    assert (record["status"], record["step"], record["tokens_seen"], record["checkpoint"]) == (
        "resumable",
        5,
        50,
        "checkpoints/4",
    )
    run_once(config)  # without a checkpoint the run begins anew
    assert (exit_record(config)["step"], exit_record(config)["checkpoint"]) == (0, None)


@pytest.mark.parametrize(("content", "message"), [('{"summary": "rank 0 is gone"}', "rank 0 is gone"), ("{", ""), ("[]", "")])
def test_what_others_wrote_about_a_killed_writer_is_remembered(make_config: MakeConfig, content: str, message: str) -> None:
    config = make_config()
    run = RunDir.open(config, has_checkpoint=False)
    run._release_lock()  # as if killed
    run.faults_dir(0).mkdir(parents=True)
    (run.faults_dir(0) / "failure.json").write_text(content)
    run_once(config)
    assert (exit_record(config)["attempts"][0]["status"], exit_record(config)["attempts"][0]["message"]) == ("running", message)


def _train_until_killed(config: PretrainConfig, ready: Any) -> None:
    with RunDir.open(config, has_checkpoint=False):
        ready.set()
        signal.pause()


def test_a_second_process_is_refused_and_a_killed_one_leaves_the_folder_free(make_config: MakeConfig) -> None:
    config = make_config()
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_train_until_killed, args=(config, ready))
    holder.start()
    try:
        assert ready.wait(20)
        before = exit_record(config)
        with pytest.raises(RunDirBusyError, match=rf"in use by another process \(host .*, pid {holder.pid}, since"):
            RunDir.open(config, has_checkpoint=False)
        assert exit_record(config) == before
    finally:
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    assert exit_record(config)["status"] == "running"
    assert run_once(config).restarts == 1
    assert exit_record(config)["attempts"][0]["status"] == "running"


def test_a_lock_ends_with_its_process_although_a_forked_child_lives_on(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    script = (
        "import os, signal, sys, time\n"
        "from megarpt.config.load import load_config\n"
        "from megarpt.train.rundir import RunDir\n"
        "RunDir.open(load_config(sys.argv[1]), has_checkpoint=False)\n"
        "child = os.fork()\n"
        "if child == 0:\n    time.sleep(30); os._exit(0)\n"
        "print(child, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    source = tmp_path / "config.yaml"
    source.write_text(json.dumps(config.model_dump(mode="json")))
    process = subprocess.Popen([sys.executable, "-c", script, str(source)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert process.wait(30) == -signal.SIGKILL
        assert run_once(config).restarts == 1
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_folder_is_free_after_a_refused_opening(make_config: MakeConfig) -> None:
    run_once(make_config())
    with pytest.raises(ConfigError):
        RunDir.open(make_config(run={"seed": 5}), has_checkpoint=True)
    context = multiprocessing.get_context("fork")
    other = context.Process(target=run_once, args=(make_config(),))
    other.start()
    other.join()
    assert other.exitcode == 0


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"run": {"seed": 5}}, "run.seed: was 1234, now 5"),
        ({"model": {"preset": "gpt2-124m"}}, "model.preset: was tiny, now gpt2-124m"),
        ({"model": {"mcore": {"num_layers": 3}}}, "model.mcore"),
        ({"data": {"seq_length": 16}}, "data.seq_length: was 8, now 16"),
        ({"data": {"tokenizer": "other.model"}}, "data.tokenizer: was bytes, now other.model"),
        ({"data": {"train": [{"path": "mix", "weight": 2.0}]}}, r"data.train\[0\].weight: was 1.0, now 2.0"),
        ({"data": {"train": [{"path": "mix"}, {"path": "more"}]}}, r"data.train\[1\].path: was \(absent\), now more"),
        ({"batch": {"global_batch_size": 16}}, "batch.global_batch_size: was 8, now 16"),
        ({"optimizer": {"lr": 1e-2}}, "optimizer.lr: was 0.0003, now 0.01"),
        ({"train": {"precision": "bf16"}}, "train.precision: was fp32, now bf16"),
        ({"train": {"train_tokens": 12800}}, "optimizer.lr_decay_tokens: was 6400, now 12800"),
    ],
)
def test_a_configuration_that_computes_something_else_is_refused(
    make_config: MakeConfig, sections: dict[str, Any], key: str
) -> None:
    run_once(make_config())
    stored = (Path(make_config().run.dir) / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=key):
        RunDir.open(make_config(**sections), has_checkpoint=True)
    record = exit_record(make_config())
    assert record["status"] == "config_error" and record["exit_code"] == 78
    assert record["attempts"][0]["status"] == "finished"
    assert (Path(make_config().run.dir) / "config.yaml").read_bytes() == stored
    run_once(make_config(), has_checkpoint=True)


def test_every_blocking_key_is_named_at_once(make_config: MakeConfig) -> None:
    run_once(make_config())
    with pytest.raises(ConfigError) as caught:
        RunDir.open(make_config(run={"seed": 5}, optimizer={"lr": 1e-2}, logging={"interval_steps": 7}), has_checkpoint=True)
    assert "run.seed" in str(caught.value) and "optimizer.lr" in str(caught.value)
    assert "logging.interval_steps" not in str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"logging": {"interval_steps": 7}},
        {"checkpoint": {"interval_steps": 7}},
        {"evaluation": {"interval_steps": 7}},
        {"data": {"valid": {"clean": "clean", "more": "more"}}},
        {"batch": {"micro_batch_size": 4}},
        {"train": {"max_skipped_steps": 3}},
        {"stability": {"spike_threshold": 6.0}},
        {"faults": {"hang_timeout_minutes": 5.0}},
        {"train": {"train_tokens": 12800}, "optimizer": {"lr_decay_tokens": 6400}},
    ],
)
def test_a_configuration_that_computes_the_same_continues(make_config: MakeConfig, sections: dict[str, Any]) -> None:
    run_once(make_config())
    run = run_once(make_config(**sections), has_checkpoint=True)
    assert run.config_changes and exit_record(make_config())["config_changes"]
    assert load_config(run.path / "config.yaml") == make_config(**sections)


def test_a_longer_run_continues_with_a_constant_learning_rate(make_config: MakeConfig) -> None:
    constant = {"lr_decay_style": "constant"}
    run_once(make_config(optimizer=constant))
    run_once(make_config(optimizer=constant, train={"train_tokens": 12800}), has_checkpoint=True)


@pytest.mark.parametrize("scope", ["microbatch", "rank"])
def test_the_micro_batch_is_bound_where_tokens_compete_in_it(make_config: MakeConfig, scope: str) -> None:
    objective = {"scorer": "loss", "weighting": "top_fraction", "fraction": 0.6, "scope": scope}
    run_once(make_config(objective=objective))
    with pytest.raises(ConfigError, match=r"batch\.micro_batch_size: was 8, now 4"):
        RunDir.open(make_config(objective=objective, batch={"micro_batch_size": 4}), has_checkpoint=True)


def _store_without(run: RunDir, section: str, key: str, **more: Any) -> None:
    path = run.path / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored[section][key]
    stored[section] |= more
    path.write_text(yaml.safe_dump(stored))


def test_a_run_of_an_older_version_continues_where_new_settings_have_their_defaults(make_config: MakeConfig) -> None:
    _store_without(run_once(make_config()), "objective", "second")
    run = run_once(make_config(), has_checkpoint=True)
    assert not run.config_changes
    _store_without(run, "train", "precision")
    with pytest.raises(ConfigError, match=r"train\.precision: was fp32, now bf16"):
        RunDir.open(make_config(train={"precision": "bf16"}), has_checkpoint=True)


def test_a_setting_that_no_longer_exists_is_named(make_config: MakeConfig) -> None:
    _store_without(run_once(make_config()), "objective", "second", former=3)
    with pytest.raises(ConfigError, match=r"objective\.former: was 3, now \(absent\)"):
        RunDir.open(make_config(), has_checkpoint=True)


def test_without_a_checkpoint_any_configuration_starts_anew(make_config: MakeConfig) -> None:
    run_once(make_config())
    run_once(make_config(run={"seed": 5}), has_checkpoint=False)


def test_not_resuming_over_checkpoints_is_refused(make_config: MakeConfig) -> None:
    run_once(make_config())
    with pytest.raises(ConfigError, match=r"checkpoint\.resume is false"):
        RunDir.open(make_config(checkpoint={"resume": False}), has_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "content"), [("exit.json", "{"), ("exit.json", "[]"), ("config.yaml", "a: ["), ("config.yaml", "3")]
)
def test_a_damaged_file_is_named(make_config: MakeConfig, name: str, content: str) -> None:
    run = run_once(make_config())
    (run.path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        RunDir.open(make_config(), has_checkpoint=True)


def test_other_ranks_touch_nothing(make_config: MakeConfig) -> None:
    with RunDir.open(make_config(), has_checkpoint=True, is_writer=False) as run:
        run.finish("finished")
    assert not run.path.exists()


def test_a_folder_that_cannot_be_made_is_a_configuration_error(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.dir: cannot make the folder"):
        RunDir.open(make_config(run={"dir": str(tmp_path / "file" / "run")}), has_checkpoint=False)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "exit.json"
    atomic_write_json(path, {"a": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device.*free space"):
        atomic_write_bytes(path, b"new")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["exit.json"]


def test_the_commit_is_that_of_our_files(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "__init__.py").touch()
    assert git_state(tmp_path) is None
    subprocess.run([*git, "add", "__init__.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    state = git_state(tmp_path)
    assert state is not None and len(state["sha"]) == 40 and not state["is_dirty"]
    (tmp_path / "__init__.py").write_text("x = 1\n")
    assert git_state(tmp_path) == {"sha": state["sha"], "is_dirty": True}


def test_the_environment_is_json() -> None:
    assert json.loads(json.dumps(describe_environment([], {"device": "cpu"})))["device"] == "cpu"
