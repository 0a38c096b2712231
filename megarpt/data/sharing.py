"""One rank of a tensor-parallel group reads a step; the others receive it in a single broadcast.

Dims: n micro-batches of a step, b micro-batch, s sequence length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megarpt.errors import DataError
from megarpt.structs import TokenBatch

_SEQUENCES = ("tokens", "labels", "position_ids")  # [b, s] int64
_SAMPLES = ("sample_id", "source_id", "sample_index")  # [b] int64


class StepShare:
    """The steps of a group, each read once.

    Args:
        group: the tensor-parallel group; its first rank reads.
        shape: (n, b, s).
        streams: names of the per-token streams, in a fixed order.
        device: where the micro-batches are wanted.

    Collectives: one broadcast a step, of about 30 bytes a token.
    """

    def __init__(self, group: ProcessGroup, shape: tuple[int, int, int], streams: Sequence[str], device: torch.device) -> None:
        self._group, self._device = group, device
        self._source = dist.get_global_rank(group, 0)
        self._streams = tuple(streams)
        n, b, s = shape
        # Wide elements first, so that every part begins where its type may.
        self._parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "header": ((1 + n,), torch.int64),  # 0 or 1 for a failure, then the number of segment edges of each micro-batch
            **dict.fromkeys(_SEQUENCES, ((n, b, s), torch.int64)),
            **dict.fromkeys(_SAMPLES, ((n, b), torch.int64)),
            "cu_seqlens": ((n, b * s + 1), torch.int32),  # as many as there could be
            **dict.fromkeys(self._streams, ((n, b, s), torch.float32)),
            "loss_mask": ((n, b, s), torch.bool),
        }
        self._sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self._parts.values()]

    def __call__(self, read: Callable[[], list[TokenBatch]]) -> list[TokenBatch]:
        """What `read` returns on the first rank, on all ranks; it is called there only.

        Raises:
            DataError: on every rank, when the first one could not read.
        """
        buffer = torch.zeros(sum(self._sizes), dtype=torch.uint8, device=self._device)
        parts = {
            name: piece.view(dtype).view(shape)
            for piece, (name, (shape, dtype)) in zip(buffer.split(self._sizes), self._parts.items(), strict=True)
        }
        problem: DataError | None = None
        if self._group.rank() == 0:
            try:
                self._fill(parts, read())
            except DataError as error:
                problem = error
                parts["header"][0] = 1
        dist.broadcast(buffer, src=self._source, group=self._group)
        failed, *edges = parts.pop("header").tolist()
        if failed:
            self._fail(problem)
        return [self._batch(parts, i, count) for i, count in enumerate(edges)]

    def _fill(self, parts: dict[str, Tensor], batches: Sequence[TokenBatch]) -> None:
        for i, batch in enumerate(batches):
            for name in (*_SEQUENCES, *_SAMPLES, "loss_mask"):
                parts[name][i].copy_(getattr(batch, name))
            for name in self._streams:
                parts[name][i].copy_(batch.streams[name])
            count = len(batch.cu_seqlens)
            parts["cu_seqlens"][i, :count].copy_(batch.cu_seqlens)
            parts["header"][1 + i] = count

    def _batch(self, parts: dict[str, Tensor], i: int, count: int) -> TokenBatch:
        return TokenBatch(
            **{name: parts[name][i] for name in (*_SEQUENCES, *_SAMPLES, "loss_mask")},
            cu_seqlens=parts["cu_seqlens"][i, :count],
            streams={name: parts[name][i] for name in self._streams},
        )

    def _fail(self, problem: DataError | None) -> None:
        box = [str(problem)]
        dist.broadcast_object_list(box, src=self._source, group=self._group)
        raise problem or DataError(f"rank {self._source}, which reads for this one, failed: {box[0]}")
