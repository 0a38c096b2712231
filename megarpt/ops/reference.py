"""What every op means, in the plainest torch there is. Slow, memory-hungry, any device, any floating dtype; the tests' truth.

Dims: t tokens, h hidden, v vocabulary, n scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linear_logprob(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each next-token distribution, through the whole logits matrix.

    The product runs in the inputs' dtype, everything after it in fp32 (fp64 for fp64 inputs). Labels below 0 are ignored:
    their log-probability is 0 and carries no gradient.

    Shapes: hidden [t, h], weight [v, h], labels [t] int64 -> logprob [t], entropy [t].
    Units: nats.
    Cost: about five [t, v] matrices.
    """
    logits = hidden @ weight.t()  # [t, v]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    all_logprobs = torch.log_softmax(logits, dim=-1)
    ignored = labels < 0
    logprob = all_logprobs.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)
    return logprob.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def num_kept(fraction: float, num_valid: int) -> int:
    """How many of `num_valid` tokens the best `fraction` is: floor(x + 0.5), at least 1, and 0 when there is none."""
    return 0 if num_valid == 0 else min(num_valid, max(1, math.floor(fraction * num_valid + 0.5)))


def top_fraction_mask(score: Tensor, valid: Tensor, fraction: float, order: Tensor | None = None) -> Tensor:
    """Mask of the best `fraction` of the valid scores, by sorting Python tuples.

    Highest score first, NaN after minus infinity, equal scores by ascending `order` and then by index.

    Shapes: score [n], valid [n] bool, order [n] int64 -> [n] bool.
    """
    scores, orders = score.tolist(), (order.tolist() if order is not None else [0] * score.numel())
    candidates = [i for i, is_valid in enumerate(valid.tolist()) if is_valid]
    candidates.sort(key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i], orders[i], i))
    mask = torch.zeros_like(valid)
    mask[torch.tensor(candidates[: num_kept(fraction, len(candidates))], dtype=torch.int64, device=valid.device)] = True
    return mask
