"""Log-probability of the label and whether it is the likeliest token; for evaluation, without gradients.

Dims: t tokens, h hidden, v_tp this rank's vocabulary rows, c chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Which rows of the vocabulary this rank holds."""

    start: int  # first row's token id
    size: int  # entries of the whole vocabulary that are real; padded rows beyond carry no probability
    group: ProcessGroup | None  # the tensor-parallel ranks, None when the vocabulary is whole


@torch.no_grad()
def linear_top1(hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """(logprob, correct) of every label.

    Shapes: hidden [t, h], weight [v_tp, h], labels [t] int64 -> logprob [t] fp32 nats, correct [t] bool.
    Cost: one [c, v_tp] chunk of fp32 logits at a time. Labels outside the vocabulary give logprob 0 and False.
    Collectives: per chunk three all-reduces of [c] over the tensor-parallel group.
    Ties: a label whose logit equals the maximum counts as correct.
    """
    rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    valid_rows = min(max(shard.size - shard.start, 0), weight.shape[0])
    logprobs, corrects = [], []
    for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = (h @ weight.t()).float()  # [c, v_tp]
        logits[:, valid_rows:] = -torch.inf
        row_max = _reduce(logits.amax(-1), dist.ReduceOp.MAX, shard)
        sum_exp = _reduce((logits - row_max[:, None]).exp_().sum(-1), dist.ReduceOp.SUM, shard)
        local = y - shard.start
        here = (local >= 0) & (local < valid_rows)
        own = logits.gather(1, local.clamp(0, weight.shape[0] - 1)[:, None]).squeeze(1)
        target = _reduce(torch.where(here, own, -torch.inf), dist.ReduceOp.MAX, shard)
        known = (y >= 0) & (y < shard.size)
        logprobs.append(torch.where(known, target - row_max - sum_exp.log(), 0.0))
        corrects.append(known & (target == row_max))
    if not logprobs:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.bool)
    return torch.cat(logprobs), torch.cat(corrects)


def _reduce(x: Tensor, op: dist.ReduceOp.RedOpType, shard: VocabShard) -> Tensor:
    if shard.group is not None:
        dist.all_reduce(x, op=op, group=shard.group)
    return x
