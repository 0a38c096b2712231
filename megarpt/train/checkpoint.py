"""Save, resume, and read weights.

A save writes into a folder of another name, and a rename makes it a checkpoint: a process killed at any moment leaves the
checkpoint before it untouched. A load checks every byte first, then every shape, and only then overwrites anything. What lies
in the folder is described in `checkpoint_files`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

import megarpt
from megarpt.config.load import config_hash, dump_resolved
from megarpt.config.schema import PretrainConfig
from megarpt.corpus.atomic import atomic_write_bytes, fsync_directory
from megarpt.device.runtime import Runtime
from megarpt.errors import CheckpointError, DataError
from megarpt.model.build import unwrap
from megarpt.parallel.layout import ProcessGroups
from megarpt.train.checkpoint_files import (
    CONFIG,
    LATEST,
    MODEL,
    TRAINING,
    Manifest,
    check_files,
    describe_file,
    list_checkpoints,
    list_damaged,
    read_manifest,
    remove_checkpoint,
    remove_leftovers,
    set_aside,
    step_name,
    surplus,
)
from megarpt.train.environment import git_state
from megarpt.train.sharded import (
    OPTIMIZER_METADATA,
    first_error,
    from_rank_0,
    gathered,
    load_sharded,
    local_bytes,
    save_sharded,
    save_strategy,
)
from megarpt.train.state import TrainState
from megarpt.train.weights import describe_model, load_model, sharded_weights, weight_differences

logger = logging.getLogger(__name__)

_MARGIN_BYTES = 16 << 20  # metadata, common state and manifest


class CheckpointManager:
    """The checkpoints of one run. Every rank makes one and calls its methods together.

    Collectives: a few small ones over all ranks in each method.
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
        self._strategy = save_strategy(groups.dp)
        self._attempt = 0
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
        self, state: TrainState, model: torch.nn.Module, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
    ) -> Path:
        """Write the checkpoint of `state.progress.step`, then let older ones go. A step that is saved already stays as it is.

        Raises:
            CheckpointError: no space, or the file system refused; the checkpoints before are untouched.
        """
        started = time.perf_counter()
        final = self.directory / step_name(state.progress.step)
        if from_rank_0(self._is_writer and self._is_saved(final)):
            self.newest = final
            return final
        parts = self._parts(state, model, optimizer, scheduler)
        self._check_space(final, sum(local_bytes(part) for part in parts.values()))
        self._attempt += 1
        temporary = final.with_name(f"{final.name}.tmp-{self._attempt}")
        try:
            self._together(lambda: self._begin(temporary, parts))
            for name, part in parts.items():
                save_sharded(part, temporary / name, self._strategy)
            manifest = self._manifest(state, unwrap(model), optimizer, self._describe_files(temporary))
            self._together(lambda: self._complete(temporary, final, manifest))
        except BaseException as error:
            if self._is_writer:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError | DataError):
                raise self._cannot_save(final, error) from error
            raise
        self.newest = final
        if self._is_writer:
            self._retain()
        seconds = time.perf_counter() - started
        logger.info("saved %s: %.1f MB in %.2f s", final, manifest.num_bytes / 1e6, seconds)
        return final

    def load_latest(
        self, model: torch.nn.Module, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
    ) -> TrainState | None:
        """Continue from the newest whole checkpoint; None when the folder holds none.

        Model, optimizer and schedule must be freshly built. The caller hands `TrainState.data` to its data. A damaged
        checkpoint is named, set aside and passed over for the one before it.

        Raises:
            CheckpointError: all checkpoints are damaged, or the chosen one does not fit this run.
        """
        started = time.perf_counter()
        checkpoint, manifest = self._choose()
        if checkpoint is None or manifest is None:
            return None
        network = unwrap(model)
        differences = weight_differences(manifest, network, self._tokenizer_sha256)
        load_model(checkpoint, network, differences)
        if differences:
            lines = "".join(f"\n  {key}: {text}" for key, text in differences.items())
            raise CheckpointError(f"{checkpoint} was made by another model:{lines}\nuse the configuration of the checkpoint")
        state = self._load_training(checkpoint, manifest, network, optimizer, scheduler, differences)
        self.newest = checkpoint
        logger.info(
            "continuing from %s: %.1f MB checked and read in %.2f s",
            checkpoint,
            manifest.num_bytes / 1e6,
            time.perf_counter() - started,
        )
        return replace(state, restarts=state.restarts + 1)

    def _parts(
        self, state: TrainState, model: torch.nn.Module, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
    ) -> dict[str, dict[str, Any]]:
        """Folder name -> sharded state. Weights lie apart, so that who needs only them reads and checks only them."""
        weights = sharded_weights(unwrap(model))
        training: dict[str, Any] = {
            "state": state.to_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": self._sharded_rng(),
            "content_metadata": dict(OPTIMIZER_METADATA),
        }
        if len(optimizer.state):
            training["optimizer"] = optimizer.sharded_state_dict(weights, metadata=dict(OPTIMIZER_METADATA))
        return {MODEL: {"model": weights}, TRAINING: training}

    def _sharded_rng(self) -> ShardedObject:
        tracker = tensor_parallel.get_cuda_rng_tracker()
        states = {"torch": self._runtime.rng_state(), "tracker": tracker.get_states()}
        return ShardedObject("rng", states, (self._runtime.world_size,), (self._runtime.rank,), replica_id=0)

    def _load_training(
        self,
        checkpoint: Path,
        manifest: Manifest,
        network: torch.nn.Module,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        differences: Mapping[str, str],
    ) -> TrainState:
        wanted: dict[str, Any] = {}
        same_layout = dict(manifest.layout) == self._layout()
        if same_layout:
            wanted["rng"] = self._sharded_rng()
        if manifest.has_optimizer_state:
            weights = sharded_weights(network)
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

    def _begin(self, temporary: Path, parts: Mapping[str, Any]) -> None:
        for name in parts:
            (temporary / name).mkdir(parents=True)
        atomic_write_bytes(temporary / CONFIG, dump_resolved(self._cfg).encode())

    def _describe_files(self, temporary: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of every file; each rank reads what it wrote, the writer the rest."""
        files: dict[str, dict[str, Any]] = {}
        problem = None
        try:
            for path in sorted(temporary.rglob("*")):
                is_shard = path.suffix == ".distcp"
                mine = path.name.startswith(f"__{self._runtime.rank}_") if is_shard else self._is_writer
                if path.is_file() and mine:
                    files[str(path.relative_to(temporary))] = describe_file(path)
        except OSError as error:
            problem = str(error)
        everyone = gathered((files, problem))
        for _, text in everyone:
            if text is not None:
                raise OSError(text)
        return {name: entry for each, _ in everyone for name, entry in sorted(each.items())}

    def _complete(self, temporary: Path, final: Path, manifest: Manifest) -> None:
        for name in (MODEL, TRAINING):
            fsync_directory(temporary / name)
        manifest.write(temporary)
        temporary.rename(final)
        fsync_directory(self.directory)
        atomic_write_bytes(self.directory / LATEST, f"{final.name}\n".encode())

    def _retain(self) -> None:
        options = self._cfg.checkpoint
        for checkpoint in surplus(self.directory, keep_last=options.keep_last, keep_every_steps=options.keep_every_steps):
            try:
                remove_checkpoint(checkpoint)
            except OSError as error:
                logger.warning("%s is not needed any more and cannot be removed: %s", checkpoint, error)

    def _manifest(
        self, state: TrainState, network: torch.nn.Module, optimizer: MegatronOptimizer, files: Mapping[str, Mapping[str, Any]]
    ) -> Manifest:
        return Manifest(
            step=state.progress.step,
            progress=asdict(state.progress),
            config_sha256=config_hash(self._cfg),
            tokenizer_sha256=self._tokenizer_sha256,
            model=describe_model(network),
            has_optimizer_state=len(optimizer.state) > 0,
            layout=self._layout(),
            versions=self._versions,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files=files,
        )

    def _layout(self) -> dict[str, int]:
        return {"world": self._runtime.world_size, "tp": self._groups.tp.size(), "dp": self._groups.dp_size}

    def _check_space(self, final: Path, own_bytes: int) -> None:
        needed = sum(gathered(own_bytes)) + _MARGIN_BYTES
        free = from_rank_0(shutil.disk_usage(self.directory).free if self._is_writer else 0)
        if free < needed:
            raise CheckpointError(
                f"{final}: the checkpoint needs {needed} bytes and {free} bytes are free; "
                f"free space, or lower checkpoint.keep_last, and run the same command again. {self._former()}"
            )

    def _cannot_save(self, final: Path, error: OSError | DataError) -> CheckpointError:
        free = shutil.disk_usage(self.directory).free
        return CheckpointError(
            f"{final} cannot be written: {error} ({free} bytes are free); free space or fix the permissions, then run the same "
            f"command again. {self._former()}"
        )

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
