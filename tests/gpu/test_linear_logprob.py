"""The whole head operation on a GPU: at most twice plain torch's error against float64, both on that GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarpt.ops import reference
from megarpt.ops.linear_logprob import LEAST_GROUP, linear_logprob
from megarpt.testing.oracle import assert_within_twice


def evaluate(function, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, entropy: bool) -> dict[str, Tensor]:
    """Results and gradients of one implementation, on leaf copies."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    logprob, entropies = function(hidden, weight, labels)
    loss = (logprob * upstream[0].to(logprob.dtype)).sum()
    results = {"logprob": logprob}
    if entropy:
        loss = loss + (entropies * upstream[1].to(logprob.dtype)).sum()
        results["entropy"] = entropies
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    return results | {"grad_hidden": grad_hidden, "grad_weight": grad_weight}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("mode", "entropy"), [("kept", False), ("kept", True), ("recomputed", False), ("recomputed", True), ("known", False)]
)
@pytest.mark.parametrize("shape", [(1, 64, 7), (130, 256, 1009), (300, 512, 20001)])
def test_error_is_at_most_twice_plain_torchs(cuda, extension, shape, mode, entropy, dtype, monkeypatch):
    t, h, v = shape
    monkeypatch.setitem(LEAST_GROUP, ("cuda", dtype.itemsize < 4), 1)
    generator = torch.Generator(cuda).manual_seed(v)
    hidden = torch.randn(t, h, generator=generator, device=cuda).to(dtype)
    labels = torch.randint(0, v, (t,), generator=generator, device=cuda)
    upstream = torch.randn(2, t, generator=generator, device=cuda, dtype=torch.float64)
    upstream *= torch.rand(t, generator=generator, device=cuda) < 0.6
    options = {
        "kept": {"keep_bytes": 2**30},
        "recomputed": {"chunk_tokens": 64},
        "known": {"keep_bytes": 128 * v * 4, "known_gradient": upstream[0].float()},  # groups of at most 128 tokens
    }[mode]
    for scale, temperature in ((1.0, 1.0), (20.0, 0.7)):  # ordinary and very peaked distributions
        weight = (scale * torch.randn(v, h, generator=generator, device=cuda) / h**0.5).to(dtype)

        def plain(x: Tensor, w: Tensor, y: Tensor, temperature: float = temperature):
            return reference.linear_logprob(x, w, y, temperature)

        def ours(x: Tensor, w: Tensor, y: Tensor, temperature: float = temperature):
            return linear_logprob(x, w, y, temperature=temperature, entropy=entropy, **options)

        oracle = evaluate(plain, hidden.double(), weight.double(), labels, upstream, entropy)
        plains = evaluate(plain, hidden, weight, labels, upstream, entropy)
        for name, value in evaluate(ours, hidden, weight, labels, upstream, entropy).items():
            assert value.dtype == (dtype if name.startswith("grad") else torch.float32)
            floor = 4.0 * torch.finfo(value.dtype).eps * float(oracle[name].detach().abs().max())
            assert_within_twice(value, plains[name], oracle[name], floor=floor, name=f"{name} at scale {scale}")
