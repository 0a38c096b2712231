"""Reading sharded files back under any layout, with megatron-core's `dist_checkpointing`, and talk between ranks about it."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
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
)
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors

from megarpt.errors import CheckpointError, DataError

_VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")


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

    with without_library_warnings():
        loaded: dict[str, Any] = dist_checkpointing.load(dict_list_map_inplace(keep, sharded), str(directory))
    return loaded


@contextlib.contextmanager
def without_library_warnings() -> Iterator[None]:
    """megatron-core calls what torch has deprecated; nobody who reads a run's log can change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
        yield


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


def stored_tensors(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of the tensors of a `model` or `training` folder."""
    stored = FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    return {name: (entry.properties.dtype, tuple(entry.size)) for name, entry in tensors.items()}


def read_tensor(directory: Path, name: str) -> torch.Tensor:
    """One whole tensor in host memory. No collectives."""
    stored: Any = FileSystemReader(directory).read_metadata().state_dict_metadata[name]
    tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
    _read({name: tensor}, directory)
    return tensor


def read_slice(directory: Path, name: str, index: int) -> torch.Tensor:
    """One entry along the first dimension, such as a layer of parameters that are stored together. No collectives.

    Cost: reads the shards that hold a piece of it, one at a time.
    """
    reader = FileSystemReader(directory)
    metadata = reader.read_metadata()
    stored: Any = metadata.state_dict_metadata[name]
    tensor = torch.empty(stored.size[1:], dtype=stored.properties.dtype)
    offsets, sizes = torch.Size([index, *([0] * tensor.dim())]), torch.Size([1, *tensor.shape])
    wanted = [ChunkStorageMetadata(offsets=offsets, sizes=sizes)]
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = LoadPlan(create_read_items_for_chunk_list(name, stored, wanted))
    reader.read_data(plan, _IntoOneTensor(tensor[None])).wait()
    return tensor


class _IntoOneTensor(DefaultLoadPlanner):
    """Takes whatever is read into the one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return narrow_tensor_by_index(self._tensor, read_item.dest_offsets, read_item.lengths)


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


def on_rank_0(action: Callable[[], None]) -> None:
    """Do something to the file system on rank 0; when it fails, fail everywhere. Collectives: one gather of objects.

    Raises:
        OSError, DataError: on rank 0, what went wrong there; on the others an OSError that says the same.
    """
    problem: OSError | DataError | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, DataError) as error:
            problem = error
    text = first_error(None if problem is None else str(problem))
    if problem is not None:
        raise problem
    if text is not None:
        raise OSError(text)


def from_rank_0(value: Any) -> Any:
    """`value` of rank 0, on every rank. Collectives: one broadcast of objects."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered_on_rank_0(value: Any) -> list[Any] | None:
    """The values of all ranks on rank 0, None on the others. Collectives: one gather of objects."""
    is_receiver = dist.get_rank() == 0
    if dist.get_world_size() == 1:
        return [value]
    everyone: list[Any] | None = [None] * dist.get_world_size() if is_receiver else None
    dist.gather_object(value, everyone, dst=0)
    return everyone


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
