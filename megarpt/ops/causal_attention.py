"""Causal attention of the last queries of a sequence, without a mask.

torch's causal flag aligns top-left: query i sees keys 0 to i, also where the queries are the last of the keys. Spelled out as a
mask the right alignment costs [n_q, n_kv] of memory and the work of the whole rectangle. Here the keys before the queries are
attended to in full, those of the queries causally, and the two results are merged by their log-sums. Given the merged result
and log-sum, either part's backward yields its share of the gradients (as in FlashAttention-2, arXiv 2307.08691, section 3.1).

Dims: b batch, np query heads, ng key/value heads, n_q queries, n_kv keys, hn head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """softmax(q k^T * scale) v, where query i sees the keys up to n_kv - n_q + i.

    Shapes: query [b, np, n_q, hn], key and value [b, ng, n_kv, hn] with n_q <= n_kv and np a multiple of ng -> like query.
    Cost: the products of the keys that are seen; peak bytes beyond inputs, results and gradients: the result once more.
    Error: at most twice that of torch's own with a mask (tests/unit/ops/test_causal_attention.py). Differentiable once.
    """
    n_q, n_kv = query.shape[2], key.shape[2]
    if 1 < n_q < n_kv and query.device.type == "cpu":
        out: Tensor = _Merged.apply(query, key, value, scale)
        return out
    bias, is_causal = None, n_q == n_kv
    if 1 < n_q < n_kv:
        from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, which takes seconds

        bias = causal_lower_right(n_q, n_kv)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        before = key.shape[2] - query.shape[2]
        (k_before, k_own), (v_before, v_own) = (x.tensor_split((before,), dim=2) for x in (key, value))
        out, log_sum = _forward(query, k_own, v_own, 0.0, True, scale=scale)
        other, other_log_sum = _forward(query, k_before, v_before, 0.0, False, scale=scale)
        merged = torch.logaddexp(log_sum, other_log_sum)
        own_share, other_share = ((x - merged).exp().unsqueeze(-1) for x in (log_sum, other_log_sum))
        out = (out * own_share + other * other_share).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, merged)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum = ctx.saved_tensors
        before = key.shape[2] - query.shape[2]
        (k_before, k_own), (v_before, v_own) = (x.tensor_split((before,), dim=2) for x in (key, value))
        dq, dk_own, dv_own = _backward(grad, query, k_own, v_own, out, log_sum, 0.0, True, scale=ctx.scale)
        more, dk_before, dv_before = _backward(grad, query, k_before, v_before, out, log_sum, 0.0, False, scale=ctx.scale)
        return dq.add_(more), torch.cat([dk_before, dk_own], dim=2), torch.cat([dv_before, dv_own], dim=2), None
