"""Exactly the best k scores, over any number of ranks, without gathering them.

Scores become integers that sort alike; the k-th largest is then found digit by digit: a 256-bin histogram of the leading digit,
summed over ranks, says in which bin the k-th score lies; the next digit is looked at within that bin only. Four rounds settle
fp32. Scores equal to the k-th are told apart by `order`, a position that belongs to the token and not to the rank that holds
it, so the same tokens are kept on one rank or many, in one micro-batch or many.

A threshold (`score >= t`) would not do: scores repeat (excess loss is exactly 0 everywhere when the model starts from the
reference), and a threshold then keeps all or none of them.

Dims: n scores on this rank, b rows, s columns.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.errors import ShapeError

_DIGIT_BITS = 8
_NUM_BINS = 1 << _DIGIT_BITS


def ordered_key(score: Tensor) -> Tensor:
    """Integers in [0, 2**32) that sort as the scores do: NaN is the lowest, then -inf; -0.0 equals +0.0.

    Shapes: any fp32 -> the same, int64.
    """
    bits = (score + 0.0).view(torch.int32).long()  # adding +0.0 turns -0.0 into +0.0
    key = torch.where(bits < 0, -1 - bits, bits + (1 << 31))  # negative floats sort backwards as integers
    return torch.where(score.isnan(), 0, key)


def _score_of_key(key: Tensor) -> Tensor:
    """Inverse of `ordered_key` for one key; NaN for the key of NaN."""
    bits = torch.where(key < (1 << 31), -1 - key, key - (1 << 31))
    return torch.where(key == 0, torch.nan, bits.to(torch.int32).view(torch.float32))


def num_kept(fraction: float, num_valid: Tensor) -> Tensor:
    """How many tokens the best `fraction` of `num_valid` is: floor(x + 0.5) in fp64, at least 1, and 0 when there is none.

    Shapes: any int64 -> the same.
    """
    rounded = torch.floor(num_valid.double() * fraction + 0.5).long()
    return torch.minimum(rounded.clamp(min=1), num_valid)


def _sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group)
    return values


def _kth_largest(
    key: Tensor, candidate: Tensor, k: Tensor, bits: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The k-th largest key among the candidates of all ranks, and how many of those equal to it belong to the best k.

    Shapes: key [n] int64 in [0, 2**bits), candidate [n] bool, k [] >= 1 and at most the number of candidates -> [], [].
    Collectives: one SUM of 256 int64 for every 8 bits.
    """
    prefix = torch.zeros_like(k)
    for shift in range((bits - 1) // _DIGIT_BITS * _DIGIT_BITS, -1, -_DIGIT_BITS):
        digit = (key >> shift) & (_NUM_BINS - 1)
        histogram = torch.zeros(_NUM_BINS, dtype=torch.int64, device=key.device).scatter_add_(0, digit, candidate.long())
        _sum(histogram, group)
        at_least = histogram.flip(0).cumsum(0).flip(0)  # [256], candidates with this digit or a larger one
        # the largest digit that still has k candidates at or above it; bin 0 when there is no candidate at all
        chosen = ((at_least >= k).sum() - 1).clamp(min=0)
        k = k - (at_least - histogram).gather(0, chosen[None])[0]
        prefix = (prefix << _DIGIT_BITS) | chosen
        candidate = candidate & (digit == chosen)
    return prefix, k


def select_top_fraction(
    score: Tensor,
    valid: Tensor,
    fraction: float,
    group: dist.ProcessGroup | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask of the best `fraction` of all valid scores of all ranks; exactly floor(fraction * valid + 0.5) of them, at least 1.

    Args:
        score: higher is better. NaN is the lowest of all, below minus infinity.
        valid: which scores compete; the others are neither counted nor kept.
        fraction: in (0, 1]; 1 keeps every valid score, NaN included.
        group: ranks that select together; every one must call, also with n = 0. None: this rank alone.
        order: non-negative and unique among equal scores; of equal scores the smaller order is kept. What is still equal, or
            everything when None, is told apart by rank and index.

    Returns:
        mask [n] bool; the lowest score that is kept, [] fp32 (minus infinity when fraction is 1, infinity when nothing is
        valid); the number kept over all ranks, [] int64.

    Shapes: score [n] fp32, valid [n] bool, order [n] int64.
    Cost: 4 passes over n, 12 when the k-th score is not unique. The host waits once for the device.
    Collectives: over group, SUM of int64: 1, then 4 of 256; when the k-th score is not unique 8 of 256 and one of [ranks] more.
        Only the first when fraction is 1.
    Error: none, the selection is exact (tests/unit/ops/test_topk_select.py, against a sort).
    Raises: ShapeError.
    """
    _check(score, valid, fraction, order)
    num_valid = _sum(valid.sum(), group)
    if fraction >= 1.0:
        threshold = torch.where(num_valid > 0, -torch.inf, torch.inf)
        return valid.clone(), threshold, num_valid
    k = num_kept(fraction, num_valid)
    key = ordered_key(score)
    kth, num_equal_kept = _kth_largest(key, valid, k.clamp(min=1), 32, group)
    above, equal = valid & (key > kth), valid & (key == kth)
    num_equal = _sum(equal.sum(), group)
    if bool(num_equal > num_equal_kept):
        equal = _first_of_equals(equal, num_equal_kept, order, group)
    mask = (above | equal) & (num_valid > 0)
    return mask, torch.where(num_valid > 0, _score_of_key(kth), torch.inf), k


def _first_of_equals(equal: Tensor, count: Tensor, order: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
    """Of the marked scores of all ranks, `count`: by order, then rank, then index."""
    kept = torch.zeros_like(equal)
    if order is not None:
        descending = torch.iinfo(torch.int64).max - order
        kth, count = _kth_largest(descending, equal, count, 63, group)
        kept = equal & (descending > kth)
        equal = equal & (descending == kth)
    before = torch.zeros((), dtype=torch.int64, device=equal.device)
    if group is not None:
        per_rank = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=equal.device)
        per_rank[dist.get_rank(group)] = equal.sum()
        before = _sum(per_rank, group)[: dist.get_rank(group)].sum()
    return kept | (equal & (equal.cumsum(0) + before <= count))


def select_top_fraction_rows(score: Tensor, valid: Tensor, fraction: float) -> Tensor:
    """Mask of the best `fraction` of each row's valid scores; equal scores by ascending column, NaN lowest.

    Shapes: score [b, s] fp32, valid [b, s] bool -> [b, s] bool.
    Cost: one sort of every row.
    Raises: ShapeError.
    """
    _check(score, valid, fraction, None)
    key = torch.where(valid, ordered_key(score), -1)
    best_first = torch.argsort(key, dim=-1, descending=True, stable=True)
    k = num_kept(fraction, valid.sum(dim=-1, keepdim=True))
    rank = torch.arange(score.shape[-1], device=score.device).expand_as(score)
    return torch.zeros_like(valid).scatter_(-1, best_first, rank < k)


def _check(score: Tensor, valid: Tensor, fraction: float, order: Tensor | None) -> None:
    if score.dtype != torch.float32 or valid.dtype != torch.bool or (order is not None and order.dtype != torch.int64):
        order_dtype = "" if order is None else f", order {order.dtype}"
        raise ShapeError(
            f"top fraction: got score {score.dtype}, valid {valid.dtype}{order_dtype}; expected float32, bool, int64. "
            "Scores in half precision repeat so often that the selection is decided by position."
        )
    if score.shape != valid.shape or (order is not None and order.shape != score.shape):
        order_shape = "" if order is None else f", order {tuple(order.shape)}"
        raise ShapeError(
            f"top fraction: got score {tuple(score.shape)}, valid {tuple(valid.shape)}{order_shape}; expected one shape."
        )
    if not 0.0 < fraction <= 1.0:
        raise ShapeError(f"top fraction: got fraction {fraction}; expected a number in (0, 1].")
