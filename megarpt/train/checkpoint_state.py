"""What of a run goes into a checkpoint, as sharded state of all ranks, and how it comes back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarpt.device.runtime import Runtime
from megarpt.parallel.layout import ProcessGroups
from megarpt.train.checkpoint_files import MODEL, REFERENCE, TRAINING, Manifest
from megarpt.train.optimizer_state import load_optimizer, sharded_optimizer
from megarpt.train.sharded import load_sharded
from megarpt.train.sharded_save import Distribution, Part
from megarpt.train.state import TrainState
from megarpt.train.weights import load_model, sharded_weights

logger = logging.getLogger(__name__)


class RunShards:
    """This rank's part of the state of a run. Model, optimizer and schedule keep their structure, their values change.

    `reference`: chunks of a second, frozen network of the run, whose weights change only now and then.
    """

    def __init__(self, runtime: Runtime, groups: ProcessGroups, reference: Sequence[torch.nn.Module] = ()) -> None:
        self._runtime, self._groups, self._reference = runtime, groups, reference
        self._distributions: dict[tuple[str, bool], Distribution] = {}

    def layout(self) -> dict[str, int]:
        """The sizes that decide which rank holds what."""
        groups = {"tp": self._groups.tp, "pp": self._groups.pp, "cp": self._groups.cp, "ep": self._groups.collection.ep}
        sizes = {name: group.size() for name, group in groups.items()}
        return {"world": self._runtime.world_size, **sizes, "dp": self._groups.dp_size}

    def parts(
        self,
        state: TrainState,
        model: Sequence[torch.nn.Module],
        optimizer: ChainedOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        optimizer_steps: int,
    ) -> dict[str, Part]:
        """Folder name -> this rank's share. Weights lie apart, so that who needs only them reads and checks only them.

        Collectives: several the first time; with the distributed optimizer a gather of its state within data parallelism
        every time.
        """
        weights = sharded_weights(model)
        training: dict[str, Any] = {
            "state": state.to_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": self._rng(),
            "optimizer_steps": optimizer_steps,
        }
        if optimizer_steps:
            training["optimizer"] = sharded_optimizer(optimizer, weights)
        parts, folders = {}, {MODEL: weights, TRAINING: training}
        if self._reference:
            folders[REFERENCE] = sharded_weights(self._reference)
        for name, sharded in folders.items():
            structure = (name, optimizer_steps > 0)
            if structure not in self._distributions:
                self._distributions[structure] = Distribution(self._groups.dp_cp)
            parts[name] = self._distributions[structure].part(sharded)
        return parts

    def load(
        self,
        checkpoint: Path,
        manifest: Manifest,
        model: Sequence[torch.nn.Module],
        optimizer: ChainedOptimizer,
        scheduler: OptimizerParamScheduler,
        differences: Mapping[str, str],
    ) -> TrainState:
        """Restore all but the weights from a checkpoint whose files were checked.

        Raises:
            CheckpointError: it does not fit.
        """
        wanted: dict[str, Any] = {}
        same_layout = dict(manifest.layout) == self.layout()
        if same_layout:
            wanted["rng"] = self._rng()
        if manifest.has_optimizer_state:
            wanted["optimizer"] = sharded_optimizer(optimizer, sharded_weights(model), is_loading=True)
        loaded = load_sharded(
            wanted, checkpoint / TRAINING, what="optimizer.mcore", differences=differences, same_vocabulary=True
        )
        if manifest.has_optimizer_state:
            load_optimizer(optimizer, loaded["optimizer"], loaded["optimizer_steps"])
        else:
            optimizer.reload_model_params()  # no step was made: the masters are the weights
        if self._reference:
            load_model(checkpoint / REFERENCE, self._reference, differences)
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
                self.layout(),
            )
        return TrainState.from_dict(loaded["state"])

    def _rng(self) -> ShardedObject:
        tracker = tensor_parallel.get_cuda_rng_tracker()
        states = {"torch": self._runtime.rng_state(), "tracker": tracker.get_states()}
        return ShardedObject("rng", states, (self._runtime.world_size,), (self._runtime.rank,), replica_id=0)
