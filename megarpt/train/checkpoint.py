"""Save, resume, and read weights.

A save freezes what is to be written, by a copy in host memory, and lets training go on. A thread of each rank writes into a
folder of another name; when all have, one adds the manifest, and a rename makes the folder a checkpoint: a process killed at
any moment leaves the checkpoint before it untouched. A load checks every byte first, then every shape, and only then
overwrites anything. What lies in the folder is described in `checkpoint_files`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

import megarpt
from megarpt.config.load import config_hash, dump_resolved
from megarpt.config.schema import TrainingConfig
from megarpt.device.runtime import Runtime
from megarpt.errors import CheckpointError, DataError
from megarpt.model.build import unwrap
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import Progress
from megarpt.train.background import at_once, in_background
from megarpt.train.checkpoint_choice import newest_whole
from megarpt.train.checkpoint_files import MODEL, Manifest, read_manifest, remove_leftovers, set_aside, step_name
from megarpt.train.checkpoint_job import SaveJob
from megarpt.train.checkpoint_state import RunShards
from megarpt.train.environment import git_state
from megarpt.train.optimizer_state import steps_of
from megarpt.train.preflight import Room, disk_shortage, memory_shortage
from megarpt.train.sharded import gathered, gathered_on_rank_0, on_rank_0
from megarpt.train.sharded_save import Part
from megarpt.train.staging import HostBuffer, room_for
from megarpt.train.state import TrainState
from megarpt.train.weights import describe_model, load_model, weight_differences

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that became complete."""

    path: Path
    progress: Progress  # of the run when it was frozen
    stall_s: float  # training waited
    seconds: float  # from the call of `save` until it was complete


class _Outcome(Enum):
    """Of a piece of work; that of several is the lowest."""

    FAILED = 0
    BUSY = 1
    DONE = 2


@dataclass(slots=True)
class _Pending:
    """A save under way."""

    job: SaveJob
    progress: Progress
    started: float
    work: Future[Any]  # of this rank: writing, then on the writer completing
    is_staged: bool
    is_written: bool = False  # by all ranks
    stall_s: float = 0.0


class _Facts(NamedTuple):
    """What the ranks tell each other before a save."""

    optimizer_steps: int
    is_saved: bool  # known to the writer
    token: int  # of the writer: names the attempt


class CheckpointManager:
    """The checkpoints of one run. Every rank makes one and calls its methods together.

    A context manager: leaving it gives up a save that is still under way.

    Collectives: a few small ones over all ranks in each method, none in `poll` while no save is under way.
    """

    def __init__(
        self,
        directory: Path,
        cfg: TrainingConfig,
        *,
        tokenizer_sha256: str,
        runtime: Runtime,
        groups: ProcessGroups,
        reference: Sequence[torch.nn.Module] = (),
    ) -> None:
        """Take over `directory` and remove what a killed process was writing there. The run folder must be locked.

        Args:
            reference: chunks of a frozen network that is a part of the run, saved and restored beside the model.

        Raises:
            CheckpointError: the folder cannot be made or cleaned.
        """
        self.directory = directory
        self.newest: Path | None = None  # the checkpoint that was saved or restored last
        self._cfg, self._tokenizer_sha256 = cfg, tokenizer_sha256
        self._runtime, self._groups = runtime, groups
        self._config, self._config_sha256 = dump_resolved(cfg), config_hash(cfg)
        self._shards = RunShards(runtime, groups, reference)
        self._buffer = HostBuffer(runtime)
        self._given_up = Event()
        self._pending: _Pending | None = None
        self._saved: list[SavedCheckpoint] = []
        self._is_writer = runtime.rank == 0
        self._versions = {
            "megarpt": megarpt.__version__,
            "git": git_state(Path(megarpt.__file__).parent) if self._is_writer else None,
            **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
        }
        try:
            on_rank_0(self._take_over)
        except (OSError, DataError) as error:
            raise CheckpointError(
                f"{directory} cannot be prepared for checkpoints: {error}; fix the permissions or choose another run.dir"
            ) from error

    def save(
        self,
        state: TrainState,
        model: Sequence[torch.nn.Module],
        optimizer: ChainedOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> None:
        """Begin the checkpoint of `state.progress.step`; a step that is saved already stays as it is.

        When this returns, parameters and optimizer may change. `poll` tells when the checkpoint is complete. A save that is
        still under way is waited for; without `checkpoint.async_save` so is this one.

        Raises:
            CheckpointError: no space, or a write was refused; the checkpoints before are untouched.
        """
        started = time.perf_counter()
        self._finish()
        final = self.directory / step_name(state.progress.step)
        facts = gathered(_Facts(steps_of(optimizer), self._is_writer and self._is_saved(final), secrets.randbits(32)))
        if facts[0].is_saved:
            self.newest = final
            return
        optimizer_steps = max(each.optimizer_steps for each in facts)
        parts = self._shards.parts(state, model, optimizer, scheduler, optimizer_steps=optimizer_steps)
        has_memory = self._preflight(final, parts)
        is_staged = self._cfg.checkpoint.async_save and has_memory
        self._freeze(parts, is_staged)
        job = SaveJob(
            final=final,
            # Not the name of a former attempt: a process that was given up for dead may still be writing there.
            temporary=final.with_name(f"{final.name}.tmp-{facts[0].token}"),
            manifest=self._manifest(state, model, has_optimizer_state=optimizer_steps > 0),
            config=self._config,
            parts=parts,
            rank=self._runtime.rank,
            given_up=self._given_up,
        )
        self._pending = _Pending(job, state.progress, started, _start(job.write, is_staged), is_staged)
        if not is_staged:
            self._finish()
        else:
            self._pending.stall_s = time.perf_counter() - started

    def poll(self) -> list[SavedCheckpoint]:
        """The checkpoints that became complete since the last call. To be called by all ranks at the same points of a run.

        Collectives: none while no save is under way; else one all-reduce of a number, and a gather of objects when all ranks
        have written.

        Raises:
            CheckpointError: on all ranks, when any of them could not write; the checkpoints before are untouched.
        """
        if self._pending is not None:
            self._advance(self._pending, time.perf_counter())
        saved, self._saved = self._saved, []
        return saved

    def finish(self) -> list[SavedCheckpoint]:
        """`poll`, after waiting for the save that is under way."""
        self._finish()
        return self.poll()

    def close(self) -> None:
        """Give up what is under way on this rank, without asking the others: the run has ended with an error."""
        if self._pending is not None:
            self._given_up.set()
            wait([self._pending.work])
            self._pending = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def load_latest(
        self, model: Sequence[torch.nn.Module], optimizer: ChainedOptimizer, scheduler: OptimizerParamScheduler
    ) -> TrainState | None:
        """Continue from the newest whole checkpoint; None when the folder holds none.

        Model, optimizer and schedule must be freshly built. The caller hands `TrainState.data` to its data. A damaged
        checkpoint is named, set aside and passed over for the one before it.

        Raises:
            CheckpointError: all checkpoints are damaged, or the chosen one does not fit this run.
        """
        started = time.perf_counter()
        self._finish()
        self._reserve(model)
        chosen = newest_whole(self.directory)
        if chosen is None:
            return None
        checkpoint, manifest = chosen
        if not manifest.has_training_state:
            raise CheckpointError(
                f"{checkpoint} holds weights only, expected optimizer and data position too; to begin a run from these "
                "weights, move them out of the run folder and name them in model.init_from"
            )
        differences = weight_differences(manifest, unwrap(model[0]), self._tokenizer_sha256)
        load_model(checkpoint / MODEL, model, differences)
        if differences:
            lines = "".join(f"\n  {key}: {text}" for key, text in differences.items())
            raise CheckpointError(f"{checkpoint} was made by another model:{lines}\nuse the configuration of the checkpoint")
        state = self._shards.load(checkpoint, manifest, model, optimizer, scheduler, differences)
        self.newest = checkpoint
        logger.info(
            "continuing from %s: %.1f MB checked and read in %.2f s",
            checkpoint,
            manifest.num_bytes / 1e6,
            time.perf_counter() - started,
        )
        return replace(state, restarts=state.restarts + 1)

    def _take_over(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in remove_leftovers(self.directory):
            logger.info("removed %s, which a killed process left unfinished", self.directory / name)

    def _is_saved(self, final: Path) -> bool:
        if not final.exists():
            return False
        try:
            read_manifest(final)
        except CheckpointError as error:
            logger.warning("%s is damaged and set aside as %s:\n  %s", final, set_aside(final).name, error)
            return False
        return True

    def _manifest(self, state: TrainState, model: Sequence[torch.nn.Module], *, has_optimizer_state: bool) -> Manifest:
        return Manifest(
            step=state.progress.step,
            progress=asdict(state.progress),
            config_sha256=self._config_sha256,
            tokenizer_sha256=self._tokenizer_sha256,
            model=describe_model(unwrap(model[0])),
            has_optimizer_state=has_optimizer_state,
            layout=self._shards.layout(),
            versions=self._versions,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files={},
        )

    def _preflight(self, final: Path, parts: Mapping[str, Part]) -> bool:
        """Whether the hosts have memory for the copies; asked before anything is touched.

        Raises:
            CheckpointError: the disk has not enough space.
        """
        sizes = [size for part in parts.values() for size in part.sizes]
        everyone = self._look_around(disk=sum(sizes), memory=room_for(sizes))
        shortage = disk_shortage(everyone)
        if shortage:
            raise CheckpointError(
                f"{final}: {shortage}; free space, or lower checkpoint.keep_last, and run the same command again. "
                f"{self._former()}"
            )
        return self._has_memory(everyone)

    def _reserve(self, model: Sequence[torch.nn.Module]) -> None:
        """Touch the memory of the first copy before it is needed, as far as its size follows from the parameters."""
        if not self._cfg.checkpoint.async_save:
            return
        parameters = [p for chunk in model for p in chunk.parameters()]
        # Two moments in fp32, and an fp32 master of every parameter of another precision. Replicas share the work unevenly.
        total = sum(p.nbytes + p.numel() * (8 if p.dtype == torch.float32 else 12) for p in parameters)
        expected = int(1.1 * total) // self._groups.dp_cp.size()
        if self._has_memory(self._look_around(disk=0, memory=expected)):
            self._buffer.reserve(expected)

    def _look_around(self, *, disk: int, memory: int) -> list[Room]:
        """What all ranks need and see."""
        missing = max(memory - self._buffer.num_bytes, 0) if self._cfg.checkpoint.async_save else 0
        return gathered(Room.of(self.directory, disk=disk, memory=missing))

    def _has_memory(self, everyone: Sequence[Room]) -> bool:
        shortage = memory_shortage(everyone)
        if shortage:
            logger.warning(
                "no room for a copy of the training state (%s): training waits while a checkpoint is written, as with "
                "checkpoint.async_save=false; free memory, or spread the run over more hosts",
                shortage,
            )
        return shortage is None

    def _freeze(self, parts: Mapping[str, Part], is_staged: bool) -> None:
        """From here on nothing that is written changes; unstaged parts are written before training goes on."""
        if is_staged:
            self._buffer.reserve(room_for(size for part in parts.values() for size in part.sizes))
            self._buffer.clear()
        for part in parts.values():
            part.freeze(self._buffer.copy if is_staged else None)
        self._runtime.synchronize()

    def _finish(self) -> None:
        while self._pending is not None:
            began = time.perf_counter()
            wait([self._pending.work])
            self._advance(self._pending, began)

    def _advance(self, pending: _Pending, began: float) -> None:
        """One stage further, when all ranks have come to the end of the present one; `began` is when training began to wait."""
        outcome = self._agree(pending.work)
        if outcome is _Outcome.FAILED:
            self._pending = None
            raise self._failure(pending)
        if outcome is _Outcome.DONE and not pending.is_written:
            pending.is_written = True
            everyone = gathered_on_rank_0(pending.work.result())
            if everyone is not None:
                job, options = pending.job, self._cfg.checkpoint
                pending.work = _start(lambda: job.complete(everyone, options), pending.is_staged)
        elif outcome is _Outcome.DONE:
            self._pending = None
        pending.stall_s += time.perf_counter() - began
        if self._pending is None:
            self._complete(pending)

    def _complete(self, pending: _Pending) -> None:
        self.newest = pending.job.final
        seconds = time.perf_counter() - pending.started
        stall_s = pending.stall_s if pending.is_staged else seconds
        self._saved.append(SavedCheckpoint(self.newest, pending.progress, stall_s, seconds))
        if self._is_writer:
            num_bytes = pending.work.result().num_bytes
            logger.info("saved %s: %.1f MB in %.2f s; training waited %.3f s", self.newest, num_bytes / 1e6, seconds, stall_s)

    def _agree(self, work: Future[Any]) -> _Outcome:
        """The outcome of the slowest rank; of any that failed. Collectives: one all-reduce of a number over the world."""
        own = _Outcome.BUSY
        if work.done():
            own = _Outcome.DONE if work.exception() is None else _Outcome.FAILED
        if self._runtime.world_size == 1:
            return own
        lowest = torch.tensor(own.value, device=self._runtime.device)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        return _Outcome(int(lowest))

    def _failure(self, pending: _Pending) -> BaseException:
        """What ended a save, the same on all ranks unless it was a mistake of the program; nothing of the save is left."""
        wait([pending.work])  # this rank may still be writing
        error = pending.work.exception()
        is_expected = isinstance(error, OSError | DataError)
        everyone = gathered(None if error is None else str(error) if is_expected else repr(error))
        if self._is_writer:
            shutil.rmtree(pending.job.temporary, ignore_errors=True)
        if error is not None and not is_expected:
            return error
        texts = [text if len(everyone) == 1 else f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
        failure = CheckpointError(
            f"{pending.job.final} cannot be written: {'; '.join(texts)} ({shutil.disk_usage(self.directory).free} bytes are "
            f"free); free space or fix the permissions, then run the same command again. {self._former()}"
        )
        failure.__cause__ = error
        return failure

    def _former(self) -> str:
        return f"{self.newest} is intact" if self.newest else "There was no checkpoint before it"


def _start(work: Callable[[], Any], in_the_background: bool) -> Future[Any]:
    return in_background("checkpoint", work) if in_the_background else at_once(work)
