"""Exchanges between the ranks of a layout that megatron-core has no name for."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from megarpt.parallel.layout import ProcessGroups

T = TypeVar("T")


def from_last_stage(value: T, groups: ProcessGroups) -> T:
    """`value` of the last pipeline stage, on every stage. Collectives: with a pipeline, one broadcast of objects."""
    if groups.pp.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=groups.last_stage_rank, group=groups.pp)
    return box[0]


def from_first_of_copy(value: T, groups: ProcessGroups) -> T:
    """`value` of the first of the ranks that share a copy of the model, on all of them. What is not the same on all of them
    by itself, such as a verdict with a time limit, has to come from one.

    Collectives: one broadcast of objects over each of tensor, context and pipeline parallelism that there is.
    """
    for group in (groups.tp, groups.cp, groups.pp):
        if group.size() > 1:
            box = [value]
            dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
            value = box[0]
    return value


def from_all_samples(value: T, groups: ProcessGroups) -> list[T]:
    """`value` of every data-parallel rank, in their order, on all of them. Collectives: one gather of objects."""
    if groups.dp_size == 1:
        return [value]
    everyone: list[T] = [value] * groups.dp_size
    dist.all_gather_object(everyone, value, group=groups.dp)
    return everyone


def from_speaker(value: T, groups: ProcessGroups) -> T:
    """`value` of the rank that speaks for the loss, on every rank. Collectives: one gather of objects over the world."""
    if dist.get_world_size() == 1:
        return value
    everyone: list[tuple[bool, T]] = [(False, value)] * dist.get_world_size()
    dist.all_gather_object(everyone, (groups.speaks_for_the_loss, value))
    return next(each for speaks, each in everyone if speaks)
