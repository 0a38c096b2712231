"""Drawing tokens: the distribution after temperature and truncation, and uniform numbers that belong to a place in a text.

Every draw takes one uniform number and inverts the cumulative distribution with it. The number follows from the seed, the
prompt, the completion's number and the token's position, and from nothing else, so what is drawn does not depend on what else
is drawn at the same time, or on which rank.

Dims: n sequences, v vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 128  # columns summed at once
_GOLDEN, _FIRST, _SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def stream_key(seed: int, prompt_id: str, sample: int) -> int:
    """What names the stream of uniform numbers of one completion: 64 bits, the same on every machine."""
    text = f"{seed}/{sample}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniforms(keys: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Number `position` of each stream, in [0, 1). Shapes: [n] -> [n] fp64.

    Source: SplitMix64, which is random access (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014).
    """
    z = np.array(keys, dtype=np.uint64) + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability under the distribution it was drawn from.

    Args:
        logits: of the valid vocabulary.
        uniform: in [0, 1).
        temperature: divides the logits; 0 takes the likeliest token, with log-probability 0.
        top_k: only among the k likeliest, and those as likely as the last of them; 0 for all.
        top_p: only among the likeliest that together have this mass of what top_k left; the one that crosses it stays in, and
            those as likely as it.

    Shapes: logits [n, v], uniform [n] fp64 -> [n] int64, [n] fp64 nats; NaN where a row's logits are no distribution.
    Error: the cumulative distribution within 1e-6 (fp32 terms, summed in fp64 block by block).
    """
    if temperature == 0.0:
        token = _argmax(logits)
        largest = logits.gather(1, token.unsqueeze(1)).squeeze(1)
        return token, (largest - largest).double()
    scores = truncate(logits.float() * (1.0 / temperature), top_k, top_p)
    n, v = scores.shape
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest).exp_()
    padded = (F.pad(weights, (0, -v % _BLOCK)) if v % _BLOCK else weights).view(n, -1, _BLOCK)
    edges = padded.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # [n, blocks]
    block, before = _find(edges, uniform * edges[:, -1])
    inside = padded[torch.arange(n, device=scores.device), block].cumsum(dim=-1, dtype=torch.float64)
    column, _ = _find(inside, uniform * edges[:, -1] - before)
    token = (block * _BLOCK + column).clamp_(max=v - 1)  # beyond it only where there is no distribution
    chosen = (scores.gather(1, token.unsqueeze(1)) - largest).squeeze(1)
    return token, chosen.double() - edges[:, -1].log()


def truncate(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """The scores, minus infinity for what is never drawn. Shapes: [n, v]."""
    if 0 < top_k < scores.shape[-1]:
        smallest = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if top_p < 1.0:
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
        ordered = _sort(weights)
        up_to = ordered.cumsum(dim=-1, dtype=torch.float64)
        total = up_to[:, -1:]
        # Inside is what has less than top_p above it; of the ordered ones all after the first.
        first = (total - up_to >= top_p * total).sum(dim=-1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
        scores = scores.masked_fill(weights < ordered.gather(1, first), -torch.inf)
    return scores


def _argmax(logits: Tensor) -> Tensor:
    """Of each row, the first of equals; a NaN counts as the largest. On a CPU numpy takes a fraction of torch's time."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.argmax(logits.float().numpy(), axis=-1))
    return logits.argmax(dim=-1)


def _sort(values: Tensor) -> Tensor:
    """Each row in ascending order. numpy sorts on a CPU some ten times as fast as torch, which also tells where values were."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def _find(edges: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first column whose cumulative weight exceeds the target, and the cumulative weight before it; where rounding put the
    target at or behind the end, the last column that has a weight. Shapes: [n, c], [n] -> [n], [n]."""
    end = edges[:, -1]
    target = torch.minimum(target, torch.nextafter(end, torch.zeros_like(end))).unsqueeze(1)
    column = (edges <= target).sum(dim=-1)
    before = edges.gather(1, (column - 1).clamp_(min=0).unsqueeze(1)).squeeze(1)
    return column, torch.where(column > 0, before, torch.zeros_like(before))
