"""Core attention on torch's scaled_dot_product_attention, for layers without Transformer Engine.

It takes the place of megatron-core's DotProductAttention through the layer spec. Documents packed into one sample are kept
apart by running each attention segment on its own: exact, never a mask of s x s, and less work than the masked square.

Dims: t packed tokens, np query heads, ng key/value heads, hn head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


@dataclass
class PackedSegments(PackedSeqParams):
    """Attention segments of a flattened batch.

    `qkv_format` stays "sbhd", so megatron-core rotates positions as for one long sequence; the model hands it rotary angles
    already gathered by `position_ids`.
    """

    lengths: tuple[int, ...] = ()  # tokens per segment, on the host; empty on CUDA, where the kernel reads cu_seqlens


class SdpaCoreAttention(MegatronModule):
    """softmax(q k^T / sqrt(hn)) v, causal, within segments.

    Shapes: query [t, b, np, hn], key and value [t_kv, b, ng, hn] -> [t, b, np * hn]. Segments need b == 1.
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
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

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
        elif packed_seq_params.lengths:
            out = self._segments(query, key, value, packed_seq_params.lengths)
        else:
            out = self._varlen(query, key, value, packed_seq_params)
        return out.reshape(*query.shape[:2], -1)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """[b, heads, s, hn] in and out."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=self.softmax_scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _dense(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One sequence per batch row; with a KV cache the queries are the last of the keys."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, hn]
        n_q, n_kv = q.shape[2], k.shape[2]
        if n_q == n_kv:
            out = self._sdpa(q, k, v, causal=True)
        elif n_q == 1:
            out = self._sdpa(q, k, v)
        else:  # torch's causal flag aligns top-left, so the bottom-right triangle is spelled out
            mask = torch.ones(n_q, n_kv, dtype=torch.bool, device=q.device).tril(n_kv - n_q)
            out = self._sdpa(q, k, v, mask=mask)
        return out.permute(2, 0, 1, 3)

    def _segments(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        q, k, v = (x.squeeze(1) for x in (query, key, value))  # [t, heads, hn]
        if len(set(lengths)) == 1:
            shape = (len(lengths), lengths[0])
            q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
            return self._sdpa(q, k, v, causal=True).transpose(1, 2).flatten(0, 1)
        heads_first = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v))
        outs = [self._sdpa(*part, causal=True) for part in zip(*heads_first, strict=True)]  # type: ignore[misc]
        return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments) -> Tensor:
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        if (self.dropout and self.training) or q.dtype == torch.float32:
            lengths = tuple(packed.cu_seqlens_q.diff().tolist())  # the kernel has neither dropout nor fp32
            return self._segments(query, key, value, lengths)
        longest = packed.max_seqlen_q
        out = varlen_attn(
            q,
            k,
            v,
            packed.cu_seqlens_q,
            packed.cu_seqlens_q,
            longest,
            longest,
            scale=self.softmax_scale,
            window_size=(-1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(out, Tensor)  # a pair only when auxiliary results are asked for
        return out
