"""Attention of a few queries to cached keys, with the logarithm of the sum it was divided by.

Dims: n rows, ng key/value heads, q queries of each, s keys, hn head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_with_log_sum(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + mask) v of every head, and the log-sum-exp of each query's scores, in fp32 at least.

    Shapes: query [n, ng, q, hn], key and value [n, ng, s, hn], mask [n, 1, 1, s] or None -> [n, ng, q, hn], [n, ng, q].
    Error: as torch's scaled_dot_product_attention. No gradients.
    """
    if query.device.type == "cpu":
        bias = mask if mask is None else mask.to(query.dtype)
        out, log_sum = _flash_on_cpu(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
        return out, log_sum
    scores = torch.matmul(query, key.transpose(-1, -2)).float().mul_(scale)
    if mask is not None:
        scores += mask
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum.unsqueeze(-1)).exp_()
    return torch.matmul(weights.to(value.dtype), value), log_sum
