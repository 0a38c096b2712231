"""How the ranks of a context-parallel group share the tokens of a micro-batch.

The flattened micro-batch is cut into 2 * cp pieces. Rank r holds piece r and piece 2 * cp - 1 - r, so that under a causal mask
every rank has the same work: an early piece sees little, its late partner much.

Dims: t tokens of the whole micro-batch, c = t / (2 * cp) tokens of a piece.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, reduce_scatter_to_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


class QueryRange(NamedTuple):
    """A run of consecutive tokens that this rank has the queries of, and the keys they can see.

    The segments (documents) in it are given by their edges. A segment that began before the range has more keys than queries;
    its queries are the last of its keys.
    """

    num_queries: int
    keys: slice  # of the whole micro-batch: from the start of the first segment to the end of the range
    query_lengths: tuple[int, ...]  # queries of each segment; empty on CUDA, where the kernel reads the edges
    key_lengths: tuple[int, ...]
    cu_seqlens_q: Tensor  # [n + 1] int32, from 0 to num_queries
    cu_seqlens_k: Tensor  # [n + 1] int32, from 0 to the number of keys


def query_ranges(cu_seqlens: Tensor, num_tokens: int, cp_rank: int, cp_size: int) -> tuple[QueryRange, ...]:
    """What this rank attends to.

    Shapes: cu_seqlens [n + 1] int32, from 0 to t. Cost: waits for the device once when cp_size > 1.
    """
    on_cpu = cu_seqlens.device.type == "cpu"
    if cp_size == 1:
        lengths = tuple(cu_seqlens.diff().tolist()) if on_cpu else ()
        return (QueryRange(num_tokens, slice(0, num_tokens), lengths, lengths, cu_seqlens, cu_seqlens),)
    edges = cu_seqlens.tolist()
    return tuple(query_range(edges, *piece, cu_seqlens.device) for piece in pieces_of(num_tokens, cp_rank, cp_size))


def query_range(edges: Sequence[int], start: int, end: int, device: torch.device) -> QueryRange:
    """What tokens start to end of the micro-batch attend to. `edges` are its cu_seqlens."""
    first_key = edges[bisect_right(edges, start) - 1]
    inside = edges[bisect_right(edges, start) : bisect_left(edges, end)]
    queries = torch.tensor([start, *inside, end], dtype=torch.int32) - start
    keys = torch.tensor([first_key, *inside, end], dtype=torch.int32) - first_key
    on_cpu = device.type == "cpu"
    return QueryRange(
        num_queries=end - start,
        keys=slice(first_key, end),
        query_lengths=tuple(queries.diff().tolist()) if on_cpu else (),
        key_lengths=tuple(keys.diff().tolist()) if on_cpu else (),
        cu_seqlens_q=queries.to(device),
        cu_seqlens_k=keys.to(device),
    )


def pieces_of(num_tokens: int, cp_rank: int, cp_size: int) -> tuple[tuple[int, int], ...]:
    """(start, end) of the tokens of a rank, in the order in which it holds them; everything in one where nobody shares."""
    if cp_size == 1:
        return ((0, num_tokens),)
    assert num_tokens % (2 * cp_size) == 0, f"{num_tokens} tokens do not divide into 2 x {cp_size} pieces"
    size = num_tokens // (2 * cp_size)
    return tuple((piece * size, (piece + 1) * size) for piece in (cp_rank, 2 * cp_size - 1 - cp_rank))


def take_share(values: Tensor, group: ProcessGroup) -> Tensor:
    """The entries of this rank, its two pieces one behind the other. Shapes: [t, ...] -> [t / cp, ...]."""
    if group.size() == 1:
        return values
    return torch.cat([values[start:end] for start, end in pieces_of(values.shape[0], group.rank(), group.size())])


def gather_shares(values: Tensor, group: ProcessGroup, *, sums_gradients: bool) -> Tensor:
    """All entries in order, from the shares of all ranks; the inverse of `take_share`.

    Shapes: [t / cp, ...] -> [t, ...].

    Args:
        values: this rank's share.
        group: the context-parallel group.
        sums_gradients: True where every rank uses the result in its own way, so that a share's gradient is the sum of all
            ranks' gradients (keys and values); False where all compute the same from it (a loss every rank computes in full).

    Collectives: an all-gather forward; a reduce-scatter backward when gradients are summed.
    """
    if group.size() == 1:
        return values
    gathered = gather_from_sequence_parallel_region(
        values.contiguous(), tensor_parallel_output_grad=sums_gradients, group=group
    )
    parts = gathered.chunk(2 * group.size())
    early, late = parts[0::2], parts[1::2]
    return torch.cat([*early, *reversed(late)])


def sum_shares(values: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over all ranks of this rank's entries; what `gather_shares` does backward where it sums gradients.

    Shapes: [t, ...] -> [t / cp, ...]. Collectives: a reduce-scatter.
    """
    if group.size() == 1:
        return values
    by_rank = [values[start:end] for r in range(group.size()) for start, end in pieces_of(len(values), r, group.size())]
    return reduce_scatter_to_sequence_parallel_region(torch.cat(by_rank), group=group)
