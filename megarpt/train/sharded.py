"""megarpt's side of megatron-core's `dist_checkpointing`: sharded state in, sharded files out, and back under any layout."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megarpt.errors import CheckpointError

# How the optimizer shards its state: the one form that loads under every layout.
OPTIMIZER_METADATA: Mapping[str, Any] = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")


class InProcessSaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist format, written by the training process itself.

    megatron-core's synchronous save is its asynchronous one, waited for: it spawns a manager process and forks writers. The
    files are the same when torch's own writer makes them here. `async_save` stays megatron-core's.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Write this rank's shards and wait until they are on the disk."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        write_tensors(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=_Writer(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False),
        )


class _Writer(FileSystemWriter):
    """Says what the file system said: torch reports a refused write as a corrupt archive, with the reason as its context."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            reason = error.__context__
            if isinstance(reason, OSError):
                raise OSError(reason.errno, reason.strerror, reason.filename) from error
            raise


def save_strategy(dp: ProcessGroup) -> TorchDistSaveShardedStrategy | FullyParallelSaveStrategyWrapper:
    """How to write: replicas share the work."""
    strategy = InProcessSaveStrategy()
    # The distribution follows from the model alone, but two state dicts pass through one strategy: it is not cached.
    return FullyParallelSaveStrategyWrapper(strategy, dp) if dp.size() > 1 else strategy


def save_sharded(sharded: dict[str, Any], directory: Path, strategy: Any) -> None:
    """Write a sharded state dict into an existing, empty folder.

    Collectives: several over all ranks.

    Raises:
        OSError: on every rank, when any of them could not write.
    """
    try:
        with _without_library_warnings():
            dist_checkpointing.save(sharded, str(directory), strategy)
    except CheckpointException as error:
        refusals = {rank: text for rank, (cause, _) in error.failures.items() if (text := _refusal(cause)) is not None}
        if not refusals:
            raise
        raise OSError("; ".join(f"rank {rank}: {text}" for rank, text in sorted(refusals.items()))) from error
    except RuntimeError as error:
        text = _refusal(error)
        if text is None:
            raise
        raise OSError(text) from error


def _refusal(cause: BaseException) -> str | None:
    """What the file system said; None when the failure is of another kind."""
    if isinstance(cause, OSError):
        return str(cause)
    is_archive = isinstance(cause, RuntimeError) and "inline_container" in str(cause)
    return f"torch could not write an archive: {cause}" if is_archive else None


def load_sharded(
    sharded: dict[str, Any], directory: Path, *, what: str, differences: Mapping[str, str], same_vocabulary: bool
) -> dict[str, Any]:
    """Read into a sharded state dict of the present layout; its tensors are overwritten only once everything fits.

    Args:
        sharded: what to fill.
        directory: the `model` or `training` folder of a checkpoint.
        what: the configuration key that decides what `sharded` holds, for messages.
        differences: configuration key -> how its values in the checkpoint and in this run differ, for messages.
        same_vocabulary: whether embeddings may differ in the rows that only pad the vocabulary.

    Raises:
        CheckpointError: a tensor is missing on one side, or has another shape; all of them are listed.
    """
    stored = load_sharded_metadata(str(directory))
    problems = _misfits(_tensors(sharded), stored, same_vocabulary)
    if problems:
        reasons = [f"{key}: {text}" for key, text in differences.items()] or [f"{what}: other values than in the checkpoint"]
        lines = [f"{directory} does not fit this run:", *problems, "because of", *reasons]
        raise CheckpointError(
            "\n  ".join(lines) + "\nuse the configuration of the checkpoint (its config.yaml), or another checkpoint"
        )

    def keep(entry: Any) -> Any:
        # Extra state of layers (scales of FP8 in Transformer Engine) exists on one side only when the layer spec changed.
        is_absent = isinstance(entry, ShardedObject) and entry.unique_key not in stored
        return LocalNonpersistentObject(entry.data) if is_absent else entry

    with _without_library_warnings():
        loaded: dict[str, Any] = dist_checkpointing.load(dict_list_map_inplace(keep, sharded), str(directory))
    return loaded


@contextlib.contextmanager
def _without_library_warnings() -> Iterator[None]:
    """megatron-core calls what torch has deprecated; nobody who reads a run's log can change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
        yield


def local_bytes(sharded: Any) -> int:
    """Tensor bytes that this rank is responsible for."""
    return sum(t.data.nbytes for t in _tensors(sharded) if is_main_replica(t.replica_id))


def content_hash(directory: Path, vocab_size: int) -> str:
    """sha256 over names, types, shapes and values of all tensors, whatever the layout that wrote them.

    Of the tensors with a row for every entry of the vocabulary only `vocab_size` rows count: the rest is padding, and how much
    of it there is depends on the layout.

    Cost: reads every tensor; memory of the largest.
    """
    digest = hashlib.sha256()
    for key in tensor_names(directory):
        tensor = read_tensor(directory, key)
        if key in _VOCABULARY_TENSORS:
            tensor = tensor[:vocab_size]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_names(directory: Path) -> list[str]:
    """The tensors of a `model` or `training` folder, whatever the layout that wrote them."""
    stored = FileSystemReader(directory).read_metadata().state_dict_metadata
    return sorted(name for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata))


def read_tensor(directory: Path, name: str) -> torch.Tensor:
    """One whole tensor in host memory. No collectives."""
    stored: Any = FileSystemReader(directory).read_metadata().state_dict_metadata[name]
    tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
    _read({name: tensor}, directory)
    return tensor


def read_objects(directory: Path) -> dict[str, Any]:
    """All that a `model` or `training` folder holds besides tensors, of every rank and of all together. No collectives."""
    stored = FileSystemReader(directory).read_metadata().state_dict_metadata
    objects: dict[str, Any] = {name: None for name, entry in stored.items() if not isinstance(entry, TensorStorageMetadata)}
    _read(objects, directory)
    return {**objects, **dist_checkpointing.load_common_state_dict(str(directory))}


def _read(wanted: dict[str, Any], directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as asked for
        read_tensors(wanted, storage_reader=FileSystemReader(directory), no_dist=True)


def first_error(problem: str | None) -> str | None:
    """The first problem of any rank, so that all ranks raise together. Collectives: one gather of objects."""
    if dist.get_world_size() == 1:
        return problem
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    return next((each for each in everyone if each), None)


def from_rank_0(value: Any) -> Any:
    """`value` of rank 0, on every rank. Collectives: one broadcast of objects."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, on every rank. Collectives: one gather of objects."""
    everyone: list[Any] = [value] * dist.get_world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def _tensors(sharded: Any) -> list[ShardedTensor]:
    """The sharded tensors as they are stored: gated layers, for example, are stored in two halves."""
    copy = dict_list_map_outplace(lambda entry: entry, sharded)
    apply_factories(copy)
    return [entry for entry in nested_values(copy) if isinstance(entry, ShardedTensor)]


def _misfits(wanted: list[ShardedTensor], stored: Mapping[str, Any], same_vocabulary: bool) -> list[str]:
    """What does not fit, on this rank. Collectives: one gather of names."""
    here = {t.key: tuple(t.global_shape) for t in wanted}
    there = {key: tuple(t.global_shape) for key, t in stored.items() if isinstance(t, ShardedTensor)}
    may_pad = {t.key for t in wanted if t.allow_shape_mismatch and same_vocabulary}

    def fits(key: str) -> bool:
        return here[key] == there[key] or (key in may_pad and here[key][1:] == there[key][1:])

    missing = [f"{key}: missing in the checkpoint, expected shape {here[key]}" for key in sorted(set(here) - set(there))]
    everywhere = {key for each in gathered(list(here)) for key in each}  # pipeline stages hold different parameters
    extra = [f"{key}: shape {there[key]} in the checkpoint, not in this run" for key in sorted(set(there) - everywhere)]
    other = [f"{key}: got shape {there[key]}, expected {here[key]}" for key in sorted(set(here) & set(there)) if not fits(key)]
    return missing + extra + other
