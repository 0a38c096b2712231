"""Save, resume, and read weights.

A save freezes what is to be written, by a copy in host memory, and lets training go on. Threads of all ranks write into a folder
of another name; when all have, the writer's thread adds the manifest, and a rename makes the folder a checkpoint: a process
killed at any moment leaves the checkpoint before it untouched. A load checks every byte first, then every shape, and only then
overwrites anything. What lies in the folder is described in `checkpoint_files`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

import megarpt
from megarpt.config.load import config_hash, dump_resolved
from megarpt.config.schema import PretrainConfig
from megarpt.corpus.atomic import atomic_write_bytes
from megarpt.device.runtime import Runtime
from megarpt.errors import CheckpointError, DataError
from megarpt.model.build import unwrap
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import Progress
from megarpt.train.background import at_once, in_background
from megarpt.train.checkpoint_files import (
    LATEST,
    MODEL,
    TRAINING,
    Manifest,
    check_files,
    list_checkpoints,
    list_damaged,
    read_manifest,
    remove_leftovers,
    set_aside,
    step_name,
)
from megarpt.train.checkpoint_job import SaveJob
from megarpt.train.environment import git_state
from megarpt.train.sharded import (
    OPTIMIZER_METADATA,
    first_error,
    from_rank_0,
    gathered,
    gathered_on_rank_0,
    load_sharded,
)
from megarpt.train.sharded_save import Distribution, Part
from megarpt.train.staging import HostBuffer, available_host_bytes, room_for
from megarpt.train.state import TrainState
from megarpt.train.weights import describe_model, load_model, sharded_weights, weight_differences

logger = logging.getLogger(__name__)

_MARGIN_BYTES = 16 << 20  # metadata, common state and manifest
_MEMORY_MARGIN_BYTES = 256 << 20  # what else a host must be able to do


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

    has_optimizer_state: bool
    is_saved: bool  # known to the writer
    token: int  # of the writer: names the attempt


class _Need(NamedTuple):
    """Room that a rank's share of a checkpoint takes, and room there is; bytes."""

    disk: int
    memory: int  # still to be taken from the host
    host: str
    free_memory: int
    free_disk: int  # known to the writer


class CheckpointManager:
    """The checkpoints of one run. Every rank makes one and calls its methods together.

    A context manager: leaving it gives up a save that is still under way.

    Collectives: a few small ones over all ranks in each method, none in `poll` while no save is under way.
    """

    def __init__(
        self, directory: Path, cfg: PretrainConfig, *, tokenizer_sha256: str, runtime: Runtime, groups: ProcessGroups
    ) -> None:
        """Take over `directory` and remove what a killed process was writing there. The run folder must be locked.

        Raises:
            CheckpointError: the folder cannot be made or cleaned.
        """
        self.directory = directory
        self.newest: Path | None = None  # the checkpoint that was saved or restored last
        self._cfg, self._tokenizer_sha256 = cfg, tokenizer_sha256
        self._runtime, self._groups = runtime, groups
        self._config, self._config_sha256 = dump_resolved(cfg), config_hash(cfg)
        self._distributions: dict[tuple[str, bool], Distribution] = {}
        self._buffer = HostBuffer(runtime)
        self._pending: _Pending | None = None
        self._saved: list[SavedCheckpoint] = []
        self._is_writer = runtime.rank == 0
        self._versions = {
            "megarpt": megarpt.__version__,
            "git": git_state(Path(megarpt.__file__).parent) if self._is_writer else None,
            **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
        }
        try:
            self._together(self._take_over)
        except (OSError, DataError) as error:
            raise CheckpointError(
                f"{directory} cannot be prepared for checkpoints: {error}; fix the permissions or choose another run.dir"
            ) from error

    def save(
        self,
        state: TrainState,
        model: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
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
        facts = gathered(_Facts(_has_state(optimizer), self._is_writer and self._is_saved(final), secrets.randbits(32)))
        if facts[0].is_saved:
            self.newest = final
            return
        has_optimizer_state = any(each.has_optimizer_state for each in facts)
        parts = self._parts(state, model, optimizer, scheduler, has_optimizer_state)
        has_memory = self._preflight(final, parts)
        is_staged = self._cfg.checkpoint.async_save and has_memory
        self._freeze(parts, is_staged)
        job = SaveJob(
            final=final,
            # Not the name of a former attempt: a process that was given up for dead may still be writing there.
            temporary=final.with_name(f"{final.name}.tmp-{facts[0].token}"),
            manifest=self._manifest(state, model, has_optimizer_state),
            config=self._config,
            parts=parts,
            rank=self._runtime.rank,
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
            self._pending.job.is_given_up.set()
            wait([self._pending.work])
            self._pending = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def load_latest(
        self, model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
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
        checkpoint, manifest = self._choose()
        if checkpoint is None or manifest is None:
            return None
        differences = weight_differences(manifest, unwrap(model[0]), self._tokenizer_sha256)
        load_model(checkpoint, model, differences)
        if differences:
            lines = "".join(f"\n  {key}: {text}" for key, text in differences.items())
            raise CheckpointError(f"{checkpoint} was made by another model:{lines}\nuse the configuration of the checkpoint")
        state = self._load_training(checkpoint, manifest, model, optimizer, scheduler, differences)
        self.newest = checkpoint
        logger.info(
            "continuing from %s: %.1f MB checked and read in %.2f s",
            checkpoint,
            manifest.num_bytes / 1e6,
            time.perf_counter() - started,
        )
        return replace(state, restarts=state.restarts + 1)

    def _parts(
        self,
        state: TrainState,
        model: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        has_optimizer_state: bool,
    ) -> dict[str, Part]:
        """Folder name -> this rank's share. Weights lie apart, so that who needs only them reads and checks only them."""
        weights = sharded_weights(model)
        training: dict[str, Any] = {
            "state": state.to_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": self._sharded_rng(),
            "content_metadata": dict(OPTIMIZER_METADATA),
        }
        if has_optimizer_state:
            training["optimizer"] = optimizer.sharded_state_dict(weights, metadata=dict(OPTIMIZER_METADATA))
        parts = {}
        for name, sharded in ((MODEL, weights), (TRAINING, training)):
            structure = (name, has_optimizer_state)
            if structure not in self._distributions:
                self._distributions[structure] = Distribution(self._groups.dp)
            parts[name] = self._distributions[structure].part(sharded)
        return parts

    def _sharded_rng(self) -> ShardedObject:
        tracker = tensor_parallel.get_cuda_rng_tracker()
        states = {"torch": self._runtime.rng_state(), "tracker": tracker.get_states()}
        return ShardedObject("rng", states, (self._runtime.world_size,), (self._runtime.rank,), replica_id=0)

    def _load_training(
        self,
        checkpoint: Path,
        manifest: Manifest,
        model: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        differences: Mapping[str, str],
    ) -> TrainState:
        wanted: dict[str, Any] = {}
        same_layout = dict(manifest.layout) == self._layout()
        if same_layout:
            wanted["rng"] = self._sharded_rng()
        if manifest.has_optimizer_state:
            weights = sharded_weights(model)
            metadata = dict(OPTIMIZER_METADATA)
            wanted["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata)
        loaded = load_sharded(
            wanted, checkpoint / TRAINING, what="optimizer.mcore", differences=differences, same_vocabulary=True
        )
        if manifest.has_optimizer_state:
            optimizer.load_state_dict(loaded["optimizer"])
        else:
            optimizer.reload_model_params()  # no step was made: the masters are the weights
        scheduler.num_steps = 0
        scheduler.load_state_dict(loaded["scheduler"])
        if same_layout:
            tensor_parallel.get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])
            self._runtime.set_rng_state(loaded["rng"]["torch"])
        else:
            logger.warning(
                "%s was written under the layout %s, this run has %s: random states start from run.seed",
                checkpoint,
                dict(manifest.layout),
                self._layout(),
            )
        return TrainState.from_dict(loaded["state"])

    def _choose(self) -> tuple[Path | None, Manifest | None]:
        """The newest whole checkpoint; damaged ones that are newer are set aside."""
        damaged: dict[Path, list[str]] = {}
        for checkpoint in from_rank_0(list_checkpoints(self.directory)):
            manifest, problems = self._check(checkpoint)
            if not problems:
                break
            damaged[checkpoint] = problems
        else:
            self._refuse(damaged)
            return None, None
        self._together(lambda: self._set_aside(damaged, checkpoint))
        return checkpoint, manifest

    def _refuse(self, damaged: Mapping[Path, list[str]]) -> None:
        """Never begin again in silence where a run has been."""
        if damaged:
            lines = "".join(f"\n  {problem}" for problems in damaged.values() for problem in problems)
            raise CheckpointError(
                f"{self.directory}: none of the {len(damaged)} checkpoints is whole:{lines}\n"
                "restore one from a copy, or move the folder away to begin again"
            )
        aside = from_rank_0(list_damaged(self.directory))
        if aside:
            raise CheckpointError(
                f"{self.directory} holds only checkpoints that were set aside as damaged ({', '.join(p.name for p in aside)}), "
                "expected a whole one; restore one from a copy, or move the folder away to begin again"
            )

    def _check(self, checkpoint: Path) -> tuple[Manifest | None, list[str]]:
        """The manifest and what is wrong, equal on every rank; ranks share the files."""
        manifest: Manifest | None = None
        try:
            manifest = read_manifest(checkpoint)
            names = sorted(manifest.files)[self._runtime.rank :: self._runtime.world_size]
            problems = check_files(checkpoint, manifest, names)
        except CheckpointError as error:
            problems = [str(error)]
        everyone = gathered(problems)
        return manifest, list(dict.fromkeys(problem for each in everyone for problem in each))

    def _set_aside(self, damaged: Mapping[Path, list[str]], chosen: Path) -> None:
        for checkpoint, problems in damaged.items():
            lines = "".join(f"\n  {problem}" for problem in problems)
            logger.warning("%s is damaged and set aside as %s:%s", checkpoint, set_aside(checkpoint).name, lines)
        if damaged:
            logger.warning("going back to %s", chosen)
        atomic_write_bytes(self.directory / LATEST, f"{chosen.name}\n".encode())

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

    def _manifest(self, state: TrainState, model: Sequence[torch.nn.Module], has_optimizer_state: bool) -> Manifest:
        return Manifest(
            step=state.progress.step,
            progress=asdict(state.progress),
            config_sha256=self._config_sha256,
            tokenizer_sha256=self._tokenizer_sha256,
            model=describe_model(unwrap(model[0])),
            has_optimizer_state=has_optimizer_state,
            layout=self._layout(),
            versions=self._versions,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files={},
        )

    def _layout(self) -> dict[str, int]:
        return {"world": self._runtime.world_size, "tp": self._groups.tp.size(), "dp": self._groups.dp_size}

    def _preflight(self, final: Path, parts: Mapping[str, Part]) -> bool:
        """Whether the hosts have memory for the copies; asked before anything is touched.

        Raises:
            CheckpointError: the disk has not enough space.
        """
        sizes = [size for part in parts.values() for size in part.sizes]
        everyone = gathered(self._need(sum(sizes), room_for(sizes)))
        needed, free = sum(each.disk for each in everyone) + _MARGIN_BYTES, everyone[0].free_disk
        if free < needed:
            raise CheckpointError(
                f"{final}: the checkpoint needs {needed} bytes and {free} bytes are free; "
                f"free space, or lower checkpoint.keep_last, and run the same command again. {self._former()}"
            )
        return _has_memory(everyone)

    def _reserve(self, model: Sequence[torch.nn.Module]) -> None:
        """Touch the memory of the first copy before it is needed, as far as its size follows from the parameters."""
        if not self._cfg.checkpoint.async_save:
            return
        parameters = [p for chunk in model for p in chunk.parameters()]
        # Two moments in fp32, and an fp32 master of every parameter of another precision. Replicas share the work unevenly.
        total = sum(p.nbytes + p.numel() * (8 if p.dtype == torch.float32 else 12) for p in parameters)
        expected = int(1.1 * total) // self._groups.dp_size
        if _has_memory(gathered(self._need(0, expected))):
            self._buffer.reserve(expected)

    def _need(self, disk: int, memory: int) -> _Need:
        return _Need(
            disk=disk,
            memory=max(memory - self._buffer.num_bytes, 0) if self._cfg.checkpoint.async_save else 0,
            host=socket.gethostname(),
            free_memory=available_host_bytes(),
            free_disk=shutil.disk_usage(self.directory).free if self._is_writer else 0,
        )

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
            self._give_up(pending)
        is_complete = outcome is _Outcome.DONE and pending.is_written
        if outcome is _Outcome.DONE and not pending.is_written:
            pending.is_written = True
            everyone = gathered_on_rank_0(pending.work.result())
            if everyone is not None:
                job, options = pending.job, self._cfg.checkpoint
                pending.work = _start(lambda: job.complete(everyone, options), pending.is_staged)
        pending.stall_s += time.perf_counter() - began
        if is_complete:
            self._pending = None
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
        if not work.done():
            own = _Outcome.BUSY
        else:
            own = _Outcome.DONE if work.exception() is None else _Outcome.FAILED
        if self._runtime.world_size == 1:
            return own
        lowest = torch.tensor(own.value, device=self._runtime.device)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        return _Outcome(int(lowest))

    def _give_up(self, pending: _Pending) -> None:
        pending.job.is_given_up.set()
        wait([pending.work])
        error = pending.work.exception()
        everyone = gathered(None if error is None else f"{error}" if isinstance(error, OSError | DataError) else repr(error))
        if self._is_writer:
            shutil.rmtree(pending.job.temporary, ignore_errors=True)
        if error is not None and not isinstance(error, OSError | DataError):
            raise error
        texts = [text if len(everyone) == 1 else f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
        free = shutil.disk_usage(self.directory).free
        raise CheckpointError(
            f"{pending.job.final} cannot be written: {'; '.join(texts)} ({free} bytes are free); free space or fix the "
            f"permissions, then run the same command again. {self._former()}"
        ) from error

    def _former(self) -> str:
        return f"{self.newest} is intact" if self.newest else "There was no checkpoint before it"

    def _together(self, action: Callable[[], None]) -> None:
        """Do something to the folder on the writer; when it fails, fail everywhere."""
        problem: OSError | DataError | None = None
        if self._is_writer:
            try:
                action()
            except (OSError, DataError) as error:
                problem = error
        text = first_error(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        if text is not None:
            raise OSError(text)


def _start(work: Callable[[], Any], in_the_background: bool) -> Future[Any]:
    return in_background("checkpoint", work) if in_the_background else at_once(work)


def _has_state(optimizer: MegatronOptimizer) -> bool:
    """Whether a step was made. A rank without parameters has no state whatever was done: ask all ranks."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return any(part.optimizer is not None and len(part.optimizer.state) > 0 for part in parts)


def _has_memory(everyone: Sequence[_Need]) -> bool:
    """Whether all hosts have room for the copies of their ranks; says so where not."""
    short = []
    for host in dict.fromkeys(each.host for each in everyone):
        ranks = [each for each in everyone if each.host == host]
        needed, free = sum(each.memory for each in ranks), min(each.free_memory for each in ranks)
        if needed and needed + _MEMORY_MARGIN_BYTES > free:
            short.append(f"{host}: {len(ranks)} ranks need {needed} bytes more and {free} bytes are free")
    if short:
        logger.warning(
            "no host memory for copies of the training state (%s): training waits while a checkpoint is written, as with "
            "checkpoint.async_save=false; free memory, or spread the run over more hosts",
            "; ".join(short),
        )
    return not short
