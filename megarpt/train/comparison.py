"""Whether two runs are the same to the last bit, and if not, where they part.

A difference is one sentence that names the place and both values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarpt.train.checkpoint_files import MODEL, TRAINING
from megarpt.train.reports import comparable
from megarpt.train.sharded import read_objects, read_tensor, tensor_names

Line = Mapping[str, str | int | float]

# Counts how often a run was continued: the one thing in which a resumed run must differ.
_MAY_DIFFER = ("state.restarts",)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was compared, how much of it there was, and the first difference."""

    what: str
    count: int
    num_bytes: int | None  # of tensors
    difference: str | None  # None: equal


def compare_tensors(what: str, one: Path, other: Path, on_tensor: Callable[[], None] = lambda: None) -> Comparison:
    """All tensors of two `model` or `training` folders, bit by bit, as numbers of any kind.

    Cost: reads every tensor; memory of the two largest.
    """
    names, others = tensor_names(one), tensor_names(other)
    missing = sorted(set(names) ^ set(others))
    difference = f"{missing[0]}: only in {one if missing[0] in names else other}" if missing else None
    num_bytes = 0
    for name in sorted(set(names) & set(others)):
        a, b = read_tensor(one, name), read_tensor(other, name)
        num_bytes += a.nbytes
        difference = difference or tensor_difference(name, a, b)
        on_tensor()
    return Comparison(what, len(names), num_bytes, difference)


def compare_objects(what: str, one: Path, other: Path) -> Comparison:
    """All that two checkpoints hold besides tensors: random states of every rank, schedule, data position, counters."""
    a, b = (
        {name: value for part in (MODEL, TRAINING) for name, value in _leaves("", read_objects(checkpoint / part))}
        for checkpoint in (one, other)
    )
    for name in _MAY_DIFFER:
        a.pop(name, None)
        b.pop(name, None)
    return Comparison(what, len(a), None, _first_difference(a, b))


def compare_lines(what: str, one: Sequence[Line], other: Sequence[Line]) -> Comparison:
    """Metrics lines in their order, without the fields that depend on the machine."""
    difference = None
    for a, b in zip(one, other, strict=False):
        found = _first_difference(comparable(a), comparable(b))
        if found is not None:
            difference = f"step {a['step']}, {a['kind']} line: {found}"
            break
    else:
        if len(one) != len(other):
            alone = max(one, other, key=len)[min(len(one), len(other))]
            side = "first" if len(one) > len(other) else "second"
            difference = f"step {alone['step']}, {alone['kind']} line: only in the {side}"
    return Comparison(what, len(one), None, difference)


def tensor_difference(name: str, one: Tensor, other: Tensor) -> str | None:
    """Where two tensors part; -0 is not 0 here, and NaN is itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{name}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
    a, b = (each.reshape(-1).view(torch.uint8).view(each.numel(), each.element_size()) for each in (one, other))
    differs = (a != b).any(dim=1)
    if not differs.any():
        return None
    first = int(differs.int().argmax())
    place = [int(index) for index in torch.unravel_index(torch.tensor(first), one.shape)]
    values = (each.reshape(-1)[first].item() for each in (one, other))
    share = f"{int(differs.sum())} of {one.numel()} values differ"
    return f"{name}{place}: {' and '.join(repr(value) for value in values)} ({share})"


def _first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    for name in dict.fromkeys([*one, *other]):
        if name not in one or name not in other:
            return f"{name}: only in the {'first' if name in one else 'second'}"
        a, b = one[name], other[name]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            found = tensor_difference(name, a, b)
            if found is not None:
                return found
        elif type(a) is not type(b) or repr(a) != repr(b):  # repr: NaN is itself, and a float keeps all its digits
            return f"{name}: {a!r} and {b!r}"
    return None


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), each)
    elif isinstance(value, list | tuple) and value:
        for index, each in enumerate(value):
            yield from _leaves(f"{prefix}[{index}]", each)
    else:
        yield prefix, value
