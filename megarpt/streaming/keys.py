"""Keys and values of a whole micro-batch, for queries that come chunk by chunk.

Dims: t tokens of the micro-batch, n queries of a chunk, np query heads, ng key/value heads, hn head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megarpt.parallel.context import QueryRange, gather_shares, sum_shares

Attend = Callable[[Tensor, Tensor, Tensor, QueryRange], Tensor]  # (query, the keys it sees, their values, what it is) -> output


class KeyValues:
    """Keys and values of one layer, and in its backward pass their gradients, which add up over the chunks in fp32.

    Attributes:
        is_whole: whether all keys are there; until then each chunk brings its own.
        connected: whether a chunk's gradients of its own keys are complete once it has been attended from, because all later
            chunks have been worked on before. Otherwise `gradient` is asked for when all are done.

    Args:
        num_tokens: of this rank.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.is_whole, self.connected = False, True
        self._key = self._value = torch.empty(0)
        self._key_grad = self._value_grad = torch.empty(0)

    def put(self, tokens: slice, key: Tensor, value: Tensor) -> None:
        """Remember the keys and values of a chunk. Shapes: [n, b, ng, hn]."""
        if self._key.numel() == 0:
            self._key, self._value = (x.new_empty(self.num_tokens, *x.shape[1:]) for x in (key, value))
        self._key[tokens], self._value[tokens] = key.detach(), value.detach()

    def complete(self, group: ProcessGroup) -> None:
        """All chunks of this rank are there: fetch those of the others. Collectives: under context parallelism two
        all-gathers."""
        self._key, self._value = (gather_shares(x, group, sums_gradients=True) for x in (self._key, self._value))
        self.is_whole, self.connected = True, group.size() == 1

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, tokens: slice, queries: QueryRange) -> Tensor:
        """Attention of a chunk; `attend` sees the keys that the chunk sees and nothing else.

        Shapes: query [n, b, np, hn], key and value of the chunk [n, b, ng, hn] -> what `attend` makes.
        """
        if not self.is_whole:
            self.put(tokens, key, value)
        if not torch.is_grad_enabled():
            return attend(query, self._key[queries.keys], self._value[queries.keys], queries)
        if not self.connected:
            key, value = key.detach(), value.detach()
        out: Tensor = _Attend.apply(self, attend, queries, tokens, query, key, value)
        return out

    def gradient(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Of the chunk's keys and values, so far. Shapes: [n, b, ng, hn]."""
        self._allocate()
        return tuple(grad[tokens].to(x.dtype) for grad, x in self._pairs())  # type: ignore[return-value]

    def reduce_gradients(self, group: ProcessGroup) -> None:
        """From the gradients of all keys to the sum over ranks of those of this rank's. Collectives: two reduce-scatters."""
        self._allocate()
        self._key_grad, self._value_grad = sum_shares(self._key_grad, group), sum_shares(self._value_grad, group)

    def seen_by(self, queries: QueryRange) -> tuple[Tensor, Tensor]:
        return self._key[queries.keys], self._value[queries.keys]

    def add_gradients(self, queries: QueryRange, key_grad: Tensor, value_grad: Tensor) -> None:
        self._allocate()
        self._key_grad[queries.keys] += key_grad
        self._value_grad[queries.keys] += value_grad

    def _pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        return (self._key_grad, self._key), (self._value_grad, self._value)

    def _allocate(self) -> None:
        if self._key_grad.numel() == 0:
            dtype = torch.promote_types(self._key.dtype, torch.float32)
            self._key_grad, self._value_grad = (torch.zeros_like(x, dtype=dtype) for x in (self._key, self._value))


class _Attend(torch.autograd.Function):
    """Attention to keys that belong to other graphs: their gradients go to the store, and come out of it for the chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        store: KeyValues,
        attend: Attend,
        queries: QueryRange,
        tokens: slice,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        seen_keys, seen_values = store.seen_by(queries)
        leaves = q, k, v = tuple(x.detach().requires_grad_() for x in (query, seen_keys, seen_values))
        with torch.enable_grad():
            out = attend(q, k, v, queries)
        ctx.inner, ctx.store, ctx.queries, ctx.tokens = (out, leaves), store, queries, tokens
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (out, leaves), ctx.inner = ctx.inner, None
        query_grad, key_grad, value_grad = torch.autograd.grad(out, leaves, grad)
        ctx.store.add_gradients(ctx.queries, key_grad, value_grad)
        own = ctx.store.gradient(ctx.tokens) if ctx.store.connected else (None, None)
        return None, None, None, None, query_grad, *own
