"""Writing sharded state in megatron-core's torch_dist format, cut where threads may change.

Distribution.part   training thread: who writes which shard; collectives only the first time
Part.freeze         training thread: what is written no longer changes
Part.write          any thread, no collectives, no CUDA: this rank's file
complete            any thread of rank 0: the index over the files of all ranks
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megarpt.train.sharded import without_library_warnings


class Distribution:
    """Which rank writes which shard of a state dict whose structure stays the same: every shard once, replicas share the work.

    It follows from the structure alone, so it is worked out and checked with the first `part` and kept.
    """

    def __init__(self, dp: ProcessGroup) -> None:
        self._shared = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1), dp, do_cache_distribution=True
        )
        self._has_replicas, self._is_checked = dp.size() > 1, False

    def part(self, sharded: dict[str, Any]) -> Part:
        """This rank's share of a sharded state dict. Collectives: several over all ranks the first time, then none."""
        with without_library_warnings():
            shards, common = save_preprocess(sharded, validate_access_integrity=not self._is_checked)
            if self._has_replicas:
                self._shared.apply_saving_parallelization(shards)
        self._is_checked = True
        return Part(shards, common)


@dataclass(frozen=True, slots=True)
class Written:
    """What one rank wrote, for the index."""

    plan: SavePlan
    results: Sequence[WriteResult]


class Part:
    """One rank's share of one folder of a checkpoint."""

    def __init__(self, shards: dict[str, Any], common: dict[str, Any]) -> None:
        """Use `Distribution.part`."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(shards, keep_only_main_replica=True)
        self._by_key = by_key
        self._tensors = [entry for entries in by_key.values() for entry in entries if isinstance(entry, ShardedTensor)]
        # Plain values may hold live tensors, such as the optimizer's step count. As bytes they cannot change any more.
        self._common = _serialized(common) if dist.get_rank() == 0 else None

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor that this rank writes."""
        return [entry.data.nbytes for entry in self._tensors]

    def freeze(self, place: Callable[[Tensor], Tensor] | None) -> None:
        """Fix what is written.

        Args:
            place: gives the copy of a tensor that is written in its stead; None writes the tensor itself, which must not change
                before `write` has returned.
        """
        if place is not None:
            for entry in self._tensors:
                entry.data = place(entry.data.detach())

    def write(self, folder: Path, rank: int, is_given_up: Callable[[], bool] = lambda: False) -> Written:
        """Write the file of this rank, and on rank 0 the plain values, and wait until they are on the disk.

        Args:
            folder: of the part.
            rank: this one.
            is_given_up: asked between any two tensors; when it is true, the write ends with an error.

        Raises:
            OSError: the file system refused, or the save was given up.
        """
        planner = _Planner(is_given_up)
        planner.set_up_planner(mcore_to_pyt_state_dict(self._by_key, False), is_coordinator=rank == 0)
        writer = _Writer(folder)
        writer.set_up_storage_writer(is_coordinator=False, rank=rank, use_collectives=False)  # names the file after the rank
        plan = writer.prepare_local_plan(planner.create_local_plan())
        try:
            if self._common is not None:
                (folder / COMMON_STATE_FNAME).write_bytes(self._common)
            results = writer.write_data(plan, planner).wait()
        except RuntimeError as error:
            if "inline_container" not in str(error):
                raise
            raise OSError(f"torch could not write an archive: {error}") from error
        return Written(replace(plan, storage_data=None), results)


def complete(folder: Path, everyone: Sequence[Written]) -> None:
    """Write the index over the files of all ranks, by rank."""
    _, metadata = _Planner().create_global_plan([each.plan for each in everyone])
    _Writer(folder).finish(metadata, [list(each.results) for each in everyone])
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _Planner(MCoreSavePlanner):
    """Can be told to stop: a writer asks it for one tensor after the other."""

    def __init__(self, is_given_up: Callable[[], bool] = lambda: False) -> None:
        super().__init__(flatten_state_dict=False)
        self._is_given_up = is_given_up

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if self._is_given_up():
            raise InterruptedError("the save was given up because the run ended")
        return super().resolve_data(write_item)


class _Writer(FileSystemWriter):
    """Says what the file system said: torch reports a refused write as a corrupt archive, with the reason as its context."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)  # with a copy ahead it would use CUDA streams

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            reason = error.__context__
            if isinstance(reason, OSError):
                raise OSError(reason.errno, reason.strerror, reason.filename) from error
            raise


def _serialized(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
