"""The run folder: who runs in it, with which configuration, on which machine, and how it ended.

    config.yaml        the resolved configuration of the newest attempt
    environment.json   versions, git commit, host and command of the newest attempt
    exit.json          how the newest attempt ended ("running" while it has not, or when it was killed), and all before it
    run.lock           held by the process that trains here
    verified.json      which data files were read and found whole
    valid_split/       which held-out tokens count as kept-like
    faults/attempt_<n>/   why an attempt failed or hung, written by the ranks concerned
    metrics.jsonl, tensorboard/, checkpoints/, dumps/, profile/   written by others

Only the writer rank touches the folder, but for `faults/`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml
from pydantic import ValidationError

from megarpt.config.load import config_kind, dump_resolved
from megarpt.config.schema import LanguageModelConfig, TrainingConfig
from megarpt.corpus.atomic import atomic_write_bytes, atomic_write_json, cannot_write
from megarpt.errors import (
    EXIT_CONFIG,
    EXIT_ENVIRONMENT,
    EXIT_HANG,
    EXIT_OK,
    EXIT_RESUMABLE,
    EXIT_UNSTABLE,
    ConfigError,
    DataError,
    MegarptError,
)
from megarpt.structs import Progress
from megarpt.train.environment import describe_environment

logger = logging.getLogger(__name__)

Status = Literal["finished", "resumable", "unstable", "hung", "failed", "config_error"]
EXIT_CODES: Mapping[Status, int] = {
    "finished": EXIT_OK,
    "resumable": EXIT_RESUMABLE,
    "unstable": EXIT_UNSTABLE,
    "hung": EXIT_HANG,
    "failed": 1,
    "config_error": EXIT_CONFIG,
}
_MAX_ATTEMPTS_KEPT = 1000

# What may differ between the attempts of one run. Everything else changes what is computed.
_FREE_KEYS = (
    "run.dir",
    "run.device",
    "data.valid",
    "data.verify",
    "train.train_tokens",
    "train.train_steps",
    "train.max_skipped_steps",
    "train.head_chunk_tokens",
    "train.head_keep_mib",
    "rollout.engine",
    "rollout.url",
    "rollout.weights_dir",
    "rollout.max_batch",
    "parallel",
    "stream",
    "model.mcore.recompute_granularity",
    "model.mcore.recompute_method",
    "model.mcore.recompute_num_layers",
    "model.mcore.recompute_modules",
    "evaluation",
    "checkpoint",
    "logging",
    "profile",
    "stability",  # switched on where a run turns out to need it
    "faults",
)


class RunDirBusyError(MegarptError):
    """Another process trains in the run folder."""

    exit_code = EXIT_ENVIRONMENT


@dataclass(frozen=True, slots=True)
class Difference:
    """One configuration key with two values."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: was {_show(self.old)}, now {_show(self.new)}"


class RunDir:
    """An opened and locked run folder; a context manager that records how the run ended.

    Leaving the `with` block through an exception writes `exit.json` from it; otherwise `finish` must have been called.
    """

    def __init__(self, path: Path, *, is_writer: bool) -> None:
        """Use `RunDir.open`."""
        self.path = path
        self.is_writer = is_writer
        self.restarts = 0
        self.config_changes: list[Difference] = []
        self.environment: dict[str, Any] = {}
        self._progress = Progress()
        self._checkpoint: Path | None = None
        self._counts: Mapping[str, int] = {}
        self._lock: int | None = None
        self._attempts: list[dict[str, Any]] = []
        self._started = time.time()
        self._is_finished = False

    @classmethod
    def open(
        cls,
        config: TrainingConfig,
        *,
        has_checkpoint: bool,
        command: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
        is_writer: bool = True,
    ) -> RunDir:
        """Create or reopen `config.run.dir`, lock it, and write `config.yaml`, `environment.json` and a running `exit.json`.

        Args:
            config: the resolved configuration.
            has_checkpoint: whether the folder holds a complete checkpoint, so that this attempt would continue a run.
            command: what was typed, for `environment.json`.
            facts: more entries for `environment.json`, such as the device's name and the world size.
            is_writer: False on every rank but one; the others touch nothing and cannot fail here.

        Raises:
            ConfigError: the folder cannot be made, holds a run that this configuration cannot continue, or holds a run while
                `checkpoint.resume` is false.
            RunDirBusyError: another process trains in the folder.
            DataError: `exit.json` or `config.yaml` of the folder is damaged, or the disk is full.
        """
        run = cls(Path(config.run.dir), is_writer=is_writer)
        if is_writer:
            try:
                run.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"run.dir: cannot make the folder {run.path}: {error.strerror}; choose another") from error
            run._acquire_lock()
            try:
                run._begin(config, has_checkpoint, command, facts or {})
            except BaseException:
                run._release_lock()
                raise
        return run

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoint_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def dump_dir(self) -> Path:
        return self.path / "dumps"

    @property
    def verified_path(self) -> Path:
        return self.path / "verified.json"

    @property
    def profile_dir(self) -> Path:
        return self.path / "profile"

    @property
    def split_dir(self) -> Path:
        return self.path / "valid_split"

    def faults_dir(self, attempt: int) -> Path:
        """Of one attempt; the first is 0, as `restarts` counts them."""
        return self.path / "faults" / f"attempt_{attempt}"

    def record(self, progress: Progress, checkpoint: Path | None = None, *, counts: Mapping[str, int] | None = None) -> None:
        """Remember where the run stands, for `exit.json`; costs nothing unless there is a new complete `checkpoint`.

        A checkpoint is written down at once, so that a killed attempt shows how far it came. A resumed attempt records the
        checkpoint it starts from. `counts` are of what has gone wrong, and stay until they are replaced.
        """
        self._progress = progress
        self._counts = self._counts if counts is None else counts
        if checkpoint is not None:
            self._checkpoint = checkpoint
            if self.is_writer and not self._is_finished:
                self._write_exit("running", None, "")

    def finish(self, status: Status, message: str = "", *, exit_code: int | None = None) -> None:
        """Write the verdict of this attempt to `exit.json`. The first verdict counts."""
        if self._is_finished:
            return
        self._is_finished = True
        if self.is_writer:
            self._write_exit(status, EXIT_CODES[status] if exit_code is None else exit_code, message)

    def close(self) -> None:
        """Give the folder free. Without a verdict the attempt counts as failed."""
        self.finish("failed", "the run was closed without a verdict")
        self._release_lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not self._is_finished:
            status, exit_code = verdict_of(error)
            notes = getattr(error, "__notes__", ())  # which rank it was
            self.finish(status, "; ".join([f"{type(error).__name__}: {error}", *notes]), exit_code=exit_code)
        self.close()

    def _begin(self, config: TrainingConfig, has_checkpoint: bool, command: Sequence[str], facts: Mapping[str, Any]) -> None:
        previous = _read_exit(self.path / "exit.json")
        if previous is not None:
            self._attempts = [*previous.pop("attempts", []), previous][-_MAX_ATTEMPTS_KEPT:]
            self.restarts = int(previous["restarts"]) + 1
            if previous["status"] == "running":  # the writer was killed; another rank may know more
                previous["message"] = _failure_of(self.faults_dir(self.restarts - 1))
            if has_checkpoint:  # until it is read, the run stands where the attempt before left it
                self._progress, self._checkpoint = _stand_of(previous)
        try:
            self._check_config(config, has_checkpoint)
        except ConfigError as error:
            # A launcher that loses exit codes reads this file to decide whether to start the job again.
            self.finish("config_error", str(error))
            raise
        self.environment = describe_environment(command, facts)
        atomic_write_bytes(self.path / "config.yaml", dump_resolved(config).encode())
        atomic_write_json(self.path / "environment.json", self.environment)
        self._write_exit("running", None, "")

    def _check_config(self, config: TrainingConfig, has_checkpoint: bool) -> None:
        stored = self.path / "config.yaml"
        if not has_checkpoint or not stored.exists():
            return
        if not config.checkpoint.resume:
            raise ConfigError(
                f"run.dir: {self.path} holds the checkpoints of a run and checkpoint.resume is false; "
                "choose another run.dir, move the old folder away, or set checkpoint.resume=true"
            )
        try:
            old = yaml.safe_load(stored.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"{stored} is unreadable ({error}); restore it from a copy, or choose another run.dir") from error
        if not isinstance(old, Mapping):
            raise DataError(f"{stored} holds {type(old).__name__}, expected a mapping; restore it, or choose another run.dir")
        differences = config_differences(_effective(_filled_in(old)), _effective(config.model_dump(mode="json")))
        blocking = [d for d in differences if not may_differ(d, config)]
        if blocking:
            lines = "\n".join(f"  {d}" for d in blocking)
            raise ConfigError(
                f"the configuration cannot continue the run in {self.path}; it differs in\n{lines}\n"
                "restore these values to resume, or choose another run.dir to start a new run"
            )
        self.config_changes = differences
        for difference in differences:
            logger.info("resuming with a changed setting: %s", difference)

    def _write_exit(self, status: str, exit_code: int | None, message: str) -> None:
        content = {
            "status": status,
            "exit_code": exit_code,
            "message": message,
            "step": self._progress.step,
            "tokens_seen": self._progress.tokens_seen,
            "tokens_trained": self._progress.tokens_trained,
            "checkpoint": None if self._checkpoint is None else str(self._checkpoint),
            **self._counts,
            "restarts": self.restarts,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _timestamp(self._started),
            "ended": None if status == "running" else _timestamp(time.time()),
            "config_changes": [asdict(d) for d in self.config_changes],
            "attempts": self._attempts,
        }
        atomic_write_json(self.path / "exit.json", content)

    def _acquire_lock(self) -> None:
        # A POSIX record lock: it ends with this very process (flock would live on in forked children) and works over NFS.
        path = self.path / "run.lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.pread(lock, 4096, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise RunDirBusyError(
                f"run.dir: {self.path} is in use by another process ({owner}); wait for it, stop it, or choose another run.dir"
            ) from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): nothing stops a second process from training here", path, error.strerror)
        owner = f"host {socket.gethostname()}, pid {os.getpid()}, since {_timestamp(self._started)}\n"
        os.ftruncate(lock, 0)
        os.pwrite(lock, owner.encode(), 0)
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None


def verdict_of(error: BaseException) -> tuple[Status, int]:
    """The status and exit code an exception stands for."""
    if isinstance(error, MegarptError):
        for status, code in EXIT_CODES.items():
            if code == error.exit_code and status != "finished":
                return status, code
        return "failed", error.exit_code
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return next((s for s, c in EXIT_CODES.items() if c == code), "failed"), code
    return "failed", 130 if isinstance(error, KeyboardInterrupt) else 1


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Leaves in which two resolved configurations differ, in the order of `new`; a missing leaf reads "(absent)"."""
    a, b = _leaves("", old), _leaves("", new)
    keys = list(dict.fromkeys([*b, *a]))
    absent = "(absent)"
    return [Difference(k, a.get(k, absent), b.get(k, absent)) for k in keys if a.get(k, absent) != b.get(k, absent)]


def may_differ(difference: Difference, config: TrainingConfig) -> bool:
    """Whether a run may be continued although this key changed.

    Where and how often things are written, evaluation, the parallel layout, the device and the compilation may change. The
    micro-batch may, unless tokens compete within it, or within a rank, whose samples follow from it. The length may; the decay
    that is measured by it, unless the learning rate is constant, may not.
    """
    key = difference.key
    if any(key == free or key.startswith((free + ".", free + "[")) for free in _FREE_KEYS):
        return True
    if key == "batch.micro_batch_size":
        if not isinstance(config, LanguageModelConfig):
            return True
        return config.objective.weighting != "top_fraction" or config.objective.scope not in ("microbatch", "rank")
    if key == "optimizer.lr_decay_tokens":
        return config.optimizer.lr_decay_style == "constant"
    return False


def _filled_in(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the defaults of settings that the version which stored it did not have; as it is where a value is unknown today."""
    try:
        return config_kind(stored).model_validate(stored).model_dump(mode="json")
    except (ConfigError, ValidationError):
        return stored


def _effective(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with the decay's length written out, so that a longer run shows as a changed schedule."""
    optimizer, train = config.get("optimizer"), config.get("train")
    if not isinstance(optimizer, Mapping) or not isinstance(train, Mapping) or optimizer.get("lr_decay_tokens") is not None:
        return config
    return {**config, "optimizer": {**optimizer, "lr_decay_tokens": train.get("train_tokens")}}


def _leaves(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        parts = [_leaves(f"{prefix}.{k}" if prefix else str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and value:
        parts = [_leaves(f"{prefix}[{i}]", v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    return {k: v for part in parts for k, v in part.items()}


def _read_exit(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
        int(content["restarts"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error!r}); expected the record this program writes; remove the file to go on"
        ) from error
    return dict(content)


def _failure_of(folder: Path) -> str:
    """What the ranks of a killed attempt wrote down; empty when nobody could."""
    try:
        return str(json.loads((folder / "failure.json").read_bytes())["summary"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _stand_of(record: Mapping[str, Any]) -> tuple[Progress, Path | None]:
    step, seen, trained = (int(record.get(name, 0)) for name in ("step", "tokens_seen", "tokens_trained"))
    checkpoint = record.get("checkpoint")
    return Progress(step=step, tokens_seen=seen, tokens_trained=trained), None if checkpoint is None else Path(checkpoint)


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
