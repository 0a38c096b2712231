"""Queries that are the last of the keys, against torch's attention with the mask spelled out in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megarpt.ops.causal_attention import causal_attention
from megarpt.testing.memory import peak_bytes
from megarpt.testing.oracle import assert_within_twice

SCALE = 0.17


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    n_q, n_kv = query.shape[2], key.shape[2]
    mask = torch.ones(n_q, n_kv, dtype=torch.bool).tril(n_kv - n_q)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=True)


def operands(n_q: int, n_kv: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n_q + n_kv)
    shapes = (2, n_q, heads, 16), (2, n_kv, kv_heads, 16), (2, n_kv, kv_heads, 16), (2, n_q, heads, 16)
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def with_gradients(function, tensors, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in tensors[:3]]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, tensors[3].to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("n_q", "n_kv"), [(1, 1), (1, 9), (2, 3), (7, 7), (33, 34), (40, 200)])
def test_value_and_gradients(n_q: int, n_kv: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    tensors = operands(n_q, n_kv, heads, kv_heads, dtype)
    truth = with_gradients(masked, tensors, torch.float64)
    plain = with_gradients(masked, tensors, dtype)
    ours = with_gradients(lambda q, k, v: causal_attention(q, k, v, scale=SCALE), tensors, dtype)
    floor = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for name, *three in zip(("out", "dq", "dk", "dv"), ours, plain, truth, strict=True):
        assert_within_twice(*three, name=name, floor=floor)


def test_the_alignment_of_torchs_own_flag_would_be_seen() -> None:
    q, k, v, _ = operands(7, 30, 4, 2, torch.float64)
    wrong = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    assert (wrong - masked(q, k, v)).abs().max() > 0.1


def test_no_mask_is_made() -> None:
    tensors = operands(256, 8192, 1, 1, torch.float32)
    cpu = torch.device("cpu")
    own = peak_bytes(
        lambda: with_gradients(lambda q, k, v: causal_attention(q, k, v, scale=SCALE), tensors, torch.float32), cpu
    )
    with_mask = peak_bytes(lambda: with_gradients(masked, tensors, torch.float32), cpu)
    assert own < 256 * 8192 * 4 < with_mask  # torch makes floats of a mask
