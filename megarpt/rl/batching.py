"""Rollouts to micro-batches: packed into rows, prompts masked, numbers of tokens and of rollouts laid beside their labels.

A rollout of p prompt tokens and n completion tokens takes p + n - 1 places of a row, since the last token is the input of
nothing. The label at place p - 1 is the first token that was sampled, and the n labels from there on train.

Dims: r rollouts, R rows, b rows of a micro-batch, s row length, n tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.data.packing import best_fit_decreasing
from megarpt.data.windows import PADDING_ID
from megarpt.errors import ShapeError
from megarpt.structs import TokenBatch

FloatArray = npt.NDArray[np.float32]


class Place(NamedTuple):
    """Where the sampled tokens of a rollout are among the labels."""

    row: int
    first: int
    last: int  # the one after the last

    @property
    def num_tokens(self) -> int:
        return self.last - self.first


class PackedRollouts:
    """Rollouts of one rank, as micro-batches whose streams can still be laid beside them.

    Every data-parallel rank has the same number of micro-batches: rows of padding fill up.
    """

    def __init__(
        self,
        rollouts: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        seq_length: int,
        micro_batch_size: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            rollouts: (prompt, completion) tokens of each.
            seq_length: of a row.
            micro_batch_size: rows of a micro-batch.
            device: where the batches are to be.
            group: data parallelism; all its ranks pack together. None for one rank.

        Raises:
            ShapeError: a rollout does not fit into a row, or has no prompt or no completion.

        Collectives: one all-reduce of a number.
        """
        self._s, self._b, self._device = seq_length, micro_batch_size, device
        lengths = []
        for prompt, completion in rollouts:
            if not prompt or not completion or len(prompt) + len(completion) - 1 > seq_length:
                raise ShapeError(
                    f"rollout of {len(prompt)} prompt and {len(completion)} completion tokens: expected at least one of each "
                    f"and together at most {seq_length + 1}, data.seq_length and the last token, which is only a label"
                )
            lengths.append(len(prompt) + len(completion) - 1)
        rows = best_fit_decreasing(lengths, seq_length)
        self._num_rows = _largest(-(-max(len(rows), 1) // micro_batch_size), group, device) * micro_batch_size
        self.places = self._fill(rollouts, rows)
        self._streams: dict[str, FloatArray] = {}

    @property
    def batches(self) -> list[TokenBatch]:
        """The micro-batches, with all streams that were laid beside them."""
        streams = {name: torch.from_numpy(values).to(self._device) for name, values in self._streams.items()}
        return [self._batch(first, streams) for first in range(0, self._num_rows, self._b)]

    @property
    def num_tokens(self) -> int:
        """What goes through the model, padding included."""
        return self._num_rows * self._s

    def per_rollout(self, name: str, values: Sequence[float]) -> None:
        """Lay a stream beside the labels that is the same at all tokens of a rollout, and 0 elsewhere."""
        stream = self._new(name)
        for place, value in zip(self.places, values, strict=True):
            stream[place.row, place.first : place.last] = value

    def per_token(self, name: str, values: Sequence[Sequence[float]]) -> None:
        """Lay a stream beside the labels that is given for every sampled token, and 0 elsewhere."""
        stream = self._new(name)
        for place, tokens in zip(self.places, values, strict=True):
            stream[place.row, place.first : place.last] = tokens

    def per_label(self, name: str, values: Sequence[Tensor]) -> None:
        """Lay a stream beside the labels that a model computed of the batches, [b, s] each."""
        self._new(name)[:] = torch.cat(list(values)).float().cpu().numpy()

    def tokens_of(self, name: str) -> list[FloatArray]:
        """What a stream has for the sampled tokens, rollout by rollout, [n] each."""
        stream = self._streams[name]
        return [stream[place.row, place.first : place.last] for place in self.places]

    def train_only(self, trains: Sequence[bool]) -> None:
        """Leave rollouts out of the loss, and mark for the reduction "rollout" what those that stay count."""
        share, end = self._new("rollout_share"), self._new("rollout_end")
        for place, does in zip(self.places, trains, strict=True):
            self._loss_mask[place.row, place.first : place.last] = does
            if does:
                share[place.row, place.first : place.last] = 1.0 / place.num_tokens
                end[place.row, place.last - 1] = 1.0

    def _fill(self, rollouts: Sequence[tuple[Sequence[int], Sequence[int]]], rows: Sequence[Sequence[int]]) -> list[Place]:
        shape = (self._num_rows, self._s)
        self._tokens, self._labels = (np.full(shape, PADDING_ID, np.int64) for _ in range(2))
        self._loss_mask, self._positions = np.zeros(shape, np.bool_), np.zeros(shape, np.int64)
        self._edges: list[list[int]] = []  # where segments begin in every row
        places: dict[int, Place] = {}
        for row in range(self._num_rows):
            at, edges = 0, []
            for number in rows[row] if row < len(rows) else ():
                prompt, completion = rollouts[number]
                whole = np.array([*prompt, *completion], np.int64)
                end = at + len(whole) - 1
                self._tokens[row, at:end], self._labels[row, at:end] = whole[:-1], whole[1:]
                self._positions[row, at:end] = np.arange(end - at)
                places[number] = Place(row, at + len(prompt) - 1, end)
                self._loss_mask[row, end - len(completion) : end] = True
                edges.append(at)
                at = end
            if at < self._s:
                edges.append(at)
                self._positions[row, at:] = np.arange(self._s - at)
            self._edges.append(edges)
        return [places[number] for number in range(len(rollouts))]

    def _new(self, name: str) -> FloatArray:
        self._streams[name] = np.zeros((self._num_rows, self._s), np.float32)
        return self._streams[name]

    def _batch(self, first: int, streams: dict[str, Tensor]) -> TokenBatch:
        rows = slice(first, first + self._b)
        starts = [number * self._s + edge for number, edges in enumerate(self._edges[rows]) for edge in edges]

        def tensor(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values[rows].copy()).to(self._device)

        numbers = torch.arange(first, first + self._b, device=self._device)
        return TokenBatch(
            tokens=tensor(self._tokens),
            labels=tensor(self._labels),
            loss_mask=tensor(self._loss_mask),
            position_ids=tensor(self._positions),
            cu_seqlens=torch.tensor([*starts, self._b * self._s], dtype=torch.int32, device=self._device),
            sample_id=numbers,
            source_id=torch.zeros_like(numbers),
            sample_index=numbers,
            streams={name: values[rows] for name, values in streams.items()},
        )


def _largest(value: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    if group is None or group.size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest.item())
