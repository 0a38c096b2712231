"""How a micro-batch is cut into the chunks that streamed layers work on one at a time.

A chunk is a run of consecutive tokens of the micro-batch, so its queries need the keys before it and no others. Under sequence
parallelism the tensor-parallel ranks hold different tokens of it: the micro-batch is dealt out such that each holds an equal
part of every chunk, and gathering a chunk gathers nothing else.

Dims: t tokens of the flattened micro-batch, divided by context parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megarpt.parallel.context import QueryRange, pieces_of, query_range
from megarpt.streaming.keys import KeyValues


class Chunk(NamedTuple):
    """Some tokens of this rank, consecutive in the micro-batch."""

    rows: slice  # of this rank's hidden states
    tokens: slice  # of this rank's tokens; of the tensor-parallel group's, where the ranks share the sequence
    queries: QueryRange


@dataclass
class PackedSegments(PackedSeqParams):
    """Attention segments of a flattened batch, and how streamed layers cut it.

    `qkv_format` stays "sbhd", so megatron-core rotates positions as for one long sequence; the model hands it rotary angles
    already gathered by `position_ids`.
    """

    ranges: tuple[QueryRange, ...] = ()  # this rank's queries, in order; adding up to t
    chunks: tuple[Chunk, ...] = ()  # this rank's, in order; empty where layers are not streamed
    dealt: Tensor | None = None  # [t] place of each token where sequence parallelism deals them out by chunk; None: in order
    keys: KeyValues | None = None  # of the whole micro-batch, where only a chunk of it is worked on


def cut(
    cu_seqlens: Tensor, num_tokens: int, chunk_tokens: int, *, cp_rank: int = 0, cp_size: int = 1, sp_size: int = 1
) -> tuple[Chunk, ...]:
    """Chunks of this rank of the context-parallel group, of equal length as far as that goes.

    Args:
        cu_seqlens: edges of the segments of the whole micro-batch.
        num_tokens: of the whole micro-batch.
        chunk_tokens: no chunk has more, where one token for each of `sp_size` ranks allows it.
        sp_size: ranks that share the sequence by sequence parallelism.

    Shapes: cu_seqlens [n + 1] int32, from 0 to the number of tokens. Cost: waits for the device once.
    """
    edges = cu_seqlens.tolist()
    chunks: list[Chunk] = []
    before = 0
    for start, end in pieces_of(num_tokens, cp_rank, cp_size):
        for first, last in pairwise(_bounds(start, end, chunk_tokens, sp_size)):
            tokens = slice(before, before + last - first)
            rows = slice(tokens.start // sp_size, tokens.stop // sp_size)
            chunks.append(Chunk(rows, tokens, query_range(edges, first, last, cu_seqlens.device)))
            before = tokens.stop
    return tuple(chunks)


def deal(chunks: Sequence[Chunk], sp_size: int, device: torch.device) -> Tensor:
    """Tokens in the order in which sequence parallelism has to be given them, so that each rank gets a part of every chunk.

    Shapes: -> [t] int64, a permutation: `tokens[deal(...)]` is what the ranks share, one contiguous part each.
    """
    parts = [torch.arange(chunk.tokens.start, chunk.tokens.stop, device=device).chunk(sp_size) for chunk in chunks]
    return torch.cat([part[rank] for rank in range(sp_size) for part in parts])


def _bounds(start: int, end: int, chunk_tokens: int, multiple: int) -> list[int]:
    assert (end - start) % multiple == 0, f"{end - start} tokens do not divide among {multiple} ranks"
    units, most = (end - start) // multiple, max(chunk_tokens // multiple, 1)
    count = -(-units // most)
    return [start + multiple * (units * i // count) for i in range(count + 1)]
