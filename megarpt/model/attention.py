"""Core attention on torch's scaled_dot_product_attention.

It takes the place of megatron-core's DotProductAttention through the layer spec. Documents packed into one sample are kept
apart by running each attention segment on its own: exact, never a mask of s x s, and less work than the masked square. Under
context parallelism every rank gathers all keys and values and attends from its own queries.

Dims: t packed tokens (t_q of them queries of this rank), np query heads, ng key/value heads, hn head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarpt.ops.causal_attention import causal_attention
from megarpt.parallel.context import QueryRange, gather_shares
from megarpt.streaming.chunks import PackedSegments
from megarpt.streaming.keys import KeyValues


class SdpaCoreAttention(MegatronModule):
    """softmax(q k^T / sqrt(hn)) v, causal, within segments.

    Shapes: query [t_q, b, np, hn], key and value [t_kv, b, ng, hn] -> [t_q, b, np * hn]. Segments need b == 1.
    Collectives: under context parallelism one all-gather of keys and values forward, one reduce-scatter backward.
    Error: as torch's scaled_dot_product_attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert pg_collection is not None, "megatron-core's attention layer hands its process groups to the core attention"
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
    ) -> Tensor:
        if packed_seq_params is None:
            out = self._dense(query, key, value)
        elif packed_seq_params.keys is not None:
            out = self._chunk(query, key, value, packed_seq_params, packed_seq_params.keys)
        else:
            out = self._packed(query, key, value, packed_seq_params)
        return out.reshape(*query.shape[:2], -1)

    def _dense(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One sequence per batch row; with a KV cache the queries are the last of the keys."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, hn]
        return self._causal(q, k, v).permute(2, 0, 1, 3)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments) -> Tensor:
        if self.cp_group.size() > 1:  # one collective for both
            both = gather_shares(torch.cat([key, value], dim=-1), self.cp_group, sums_gradients=True)
            key, value = both.chunk(2, dim=-1)
        q, k, v = (x.squeeze(1) for x in (query, key, value))  # [t, heads, hn]
        queries = q.split([each.num_queries for each in packed.ranges])
        outs = [
            self._range(own, k[each.keys], v[each.keys], each, packed.max_seqlen_q)
            for own, each in zip(queries, packed.ranges, strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _chunk(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, keys: KeyValues) -> Tensor:
        """Queries of a chunk to the keys of all tokens."""

        def attend(q: Tensor, k: Tensor, v: Tensor, queries: QueryRange) -> Tensor:
            q, k, v = (x.squeeze(1) for x in (q, k, v))
            return self._range(q, k, v, queries, packed.max_seqlen_q).unsqueeze(1)

        (chunk,) = packed.chunks
        return keys.attend(attend, query, key, value, chunk.tokens, chunk.queries)

    def _range(self, q: Tensor, k: Tensor, v: Tensor, queries: QueryRange, longest: int) -> Tensor:
        """[t_q, heads, hn] in and out."""
        if queries.query_lengths:
            return self._segments(q, k, v, queries.query_lengths, queries.key_lengths)
        if (self.dropout and self.training) or q.dtype == torch.float32:  # the kernel has neither dropout nor fp32
            lengths = (tuple(edges.diff().tolist()) for edges in (queries.cu_seqlens_q, queries.cu_seqlens_k))
            return self._segments(q, k, v, *lengths)
        return self._varlen(q, k, v, queries, longest)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[b, heads, s, hn] in and out; the queries are the last of the keys."""
        if not (self.dropout and self.training):
            return causal_attention(q, k, v, scale=self.softmax_scale)
        n_q, n_kv = q.shape[2], k.shape[2]
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=torch.ones(n_q, n_kv, dtype=torch.bool, device=q.device).tril(n_kv - n_q) if n_q < n_kv else None,
            is_causal=n_q == n_kv,
            scale=self.softmax_scale,
            dropout_p=self.dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def _segments(
        self, q: Tensor, k: Tensor, v: Tensor, query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]
    ) -> Tensor:
        if len(set(query_lengths + key_lengths)) == 1:
            shape = (len(query_lengths), query_lengths[0])
            q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
            return self._causal(q, k, v).transpose(1, 2).flatten(0, 1)
        pairs = ((q, query_lengths), (k, key_lengths), (v, key_lengths))
        heads_first = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x, lengths in pairs)
        outs = [self._causal(*part) for part in zip(*heads_first, strict=True)]
        return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor, queries: QueryRange, longest: int) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler, which takes seconds

        out = varlen_attn(
            q,
            k,
            v,
            queries.cu_seqlens_q,
            queries.cu_seqlens_k,
            min(longest, q.shape[0]),
            min(longest, k.shape[0]),
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal; the last query of a segment is aligned with its last key
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(out, Tensor)  # a pair only when auxiliary results are asked for
        return out
