"""Exactly the best k scores, over any number of ranks, without gathering them.

Scores become integers that sort alike; the k-th largest is then found digit by digit: a 2048-bin histogram of the leading
digit, summed over ranks, says in which bin the k-th score lies; the next digit is looked at within that bin only. Three rounds
settle fp32. Scores equal to the k-th are told apart by `order`, a position that belongs to the token and not to the rank that
holds it, so the same tokens are kept on one rank or many, in one micro-batch or many.

A threshold (`score >= t`) would not do: scores repeat (excess loss is exactly 0 everywhere when the model starts from the
reference), and a threshold then keeps all or none of them.

The passes over this rank's scores are `megarpt.ops.token_select_passes`, compiled from csrc/token_select/.

Dims: n scores on this rank, in any shape; b rows, s columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.errors import ShapeError
from megarpt.ops import token_select_passes as passes


class Selection(NamedTuple):
    """The best scores."""

    mask: Tensor  # [n] bool, in the scores' shape
    threshold: Tensor  # [] fp32, the lowest that is kept; -inf when every valid one is, inf when none is valid
    num_kept: Tensor  # [] int64, over all ranks


class SelectionSums(NamedTuple):
    """What tells a selection that works from a run that diverges; sums over this rank's valid tokens, [] fp64 each.

    What was not given counts 0: the score's entry without a score, the reference's without a reference, `num_agreeing` without
    a previous threshold.
    """

    num_valid: Tensor
    num_kept: Tensor
    nll_valid: Tensor
    nll_kept: Tensor
    nll_dropped: Tensor
    num_nan_scores: Tensor
    reference_nll: Tensor  # where it is known
    num_known: Tensor  # tokens whose reference loss is known, that is not NaN
    excess: Tensor  # nll - reference_nll, where that is known
    num_agreeing: Tensor  # tokens that `score >= previous_threshold` decides as the mask does


class ExcessSelection(NamedTuple):
    """The tokens of the largest excess loss."""

    score: Tensor  # [n] fp32
    mask: Tensor  # [n] bool
    threshold: Tensor  # [] fp32
    num_kept: Tensor  # [] int64, over all ranks
    sums: SelectionSums


class _Cut(NamedTuple):
    """Where the best k of all ranks end."""

    search: Tensor  # [3], see token_select_passes
    num_valid: Tensor  # [], over all ranks
    num_kept: Tensor  # []

    def threshold(self) -> Tensor:
        return torch.where(self.num_valid > 0, passes.score_of_key(self.search[0]), torch.inf)


class _Ties(NamedTuple):
    """Which of the scores equal to the last are kept; nothing is given when they all are."""

    order: Tensor | None = None
    order_search: Tensor | None = None
    starts: Tensor | None = None


def num_kept(fraction: float, num_valid: Tensor) -> Tensor:
    """How many tokens the best `fraction` of `num_valid` is: floor(x + 0.5) in fp64, at least 1, and 0 when there is none.

    Shapes: any int64 -> the same.
    """
    rounded = torch.floor(num_valid.double() * fraction + 0.5).long()
    return torch.minimum(rounded.clamp(min=1), num_valid)


@torch.no_grad()
def select_top_fraction(
    score: Tensor,
    valid: Tensor,
    fraction: float,
    group: dist.ProcessGroup | None = None,
    order: Tensor | None = None,
) -> Selection:
    """Mask of the best `fraction` of all valid scores of all ranks; exactly floor(fraction * valid + 0.5) of them, at least 1.

    Args:
        score: higher is better. NaN is the lowest of all, below minus infinity.
        valid: which scores compete; the others are neither counted nor kept.
        fraction: in (0, 1]; 1 keeps every valid score, NaN included.
        group: ranks that select together; every one must call, also with n = 0. None: this rank alone.
        order: non-negative and unique among equal scores; of equal scores the smaller order is kept. What is still equal, or
            everything when None, is told apart by rank and index.

    Shapes: score [n] fp32, valid [n] bool, order [n] int64.
    Cost: 4 passes over n; 11 when the k-th score is not unique, 5 of them without an order. The host waits once for the device.
    Collectives: over group, SUM of int64: 3 of 2048; when the k-th score is not unique one of [ranks] more, and with an order
        6 of 2048. One of a single number when fraction is 1.
    Error: none, the selection is exact (tests/unit/ops/test_token_select.py, against a sort).
    Raises: ShapeError.
    """
    _check(score, valid, fraction, order)
    if fraction >= 1.0:
        return _select_all(valid, _sum(valid.sum(), group))
    flat_score, flat_valid, flat_order = score.flatten(), valid.flatten(), None if order is None else order.flatten()
    cut = _find_cut(None, flat_score, flat_valid, fraction, group)
    ties = _break_ties(cut, flat_score, flat_valid, flat_order, group)
    mask = passes.write_mask(flat_score, flat_valid, cut.search, *ties)
    return Selection(mask.view_as(score), cut.threshold(), cut.num_kept)


@torch.no_grad()
def select_excess(
    logprob: Tensor,
    reference_nll: Tensor,
    valid: Tensor,
    fraction: float,
    group: dist.ProcessGroup | None = None,
    order: Tensor | None = None,
    previous_threshold: Tensor | None = None,
) -> ExcessSelection:
    """`select_top_fraction` by excess loss, -logprob - reference_nll, with what a log wants to know of it.

    The score is computed in the pass that counts its first digit, the sums in the pass that writes the mask.

    Args:
        logprob: of the labels, under the model that trains.
        reference_nll: loss under the reference model; NaN where unknown, which ranks lowest.
        previous_threshold: [] fp32, of another selection, usually the step before.
        The others: see `select_top_fraction`.

    Shapes: logprob [n], reference_nll [n] fp32, valid [n] bool, order [n] int64.
    Units: nats.
    Cost: as `select_top_fraction`.
    Collectives: as `select_top_fraction`; with fraction 1 one of 2048 instead of the one.
    Source: Rho-1 (arXiv 2404.07965), equations 3 to 5.
    Raises: ShapeError.
    """
    _check(logprob, valid, fraction, order)
    _check_floats("excess selection", logprob, reference_nll=reference_nll)
    flat_logprob, reference, flat_valid = logprob.flatten(), reference_nll.flatten(), valid.flatten()
    flat_order = None if order is None else order.flatten()
    score, histogram = passes.score_excess(flat_logprob, reference, flat_valid)
    if fraction >= 1.0:
        selection = _select_all(valid, _sum(histogram, group).sum())
        sums = selection_sums(-logprob, score.view_as(logprob), reference_nll, valid, selection.mask, previous_threshold)
        return ExcessSelection(score.view_as(logprob), *selection, sums)
    cut = _find_cut(histogram, score, flat_valid, fraction, group)
    ties = _break_ties(cut, score, flat_valid, flat_order, group)
    mask, sums = passes.write_mask_and_sums(score, flat_valid, cut.search, *ties, flat_logprob, reference, previous_threshold)
    shaped = score.view_as(logprob), mask.view_as(logprob)
    return ExcessSelection(*shaped, cut.threshold(), cut.num_kept, SelectionSums(*sums.unbind()))


@torch.no_grad()
def selection_sums(
    nll: Tensor,
    score: Tensor | None,
    reference_nll: Tensor | None,
    valid: Tensor,
    mask: Tensor,
    previous_threshold: Tensor | None = None,
) -> SelectionSums:
    """The sums of any selection, whatever chose it. Values outside `valid` are never looked at, be they NaN.

    Shapes: nll [n], score [n], reference_nll [n] fp32, valid [n], mask [n] bool, previous_threshold [] fp32.
    Cost: one pass over n. The order of summation is fixed: same numbers in, same bits out, on any number of threads.
    Error: fp64 sums (tests/unit/ops/test_token_select.py).
    Raises: ShapeError.
    """
    _check(nll, valid, 1.0, None)
    _check_floats("selection sums", nll, score=score, reference_nll=reference_nll)
    if mask.shape != valid.shape or mask.dtype != torch.bool:
        raise ShapeError(f"selection sums: got mask {mask.dtype} {tuple(mask.shape)}, expected bool {tuple(valid.shape)}.")
    flat_score = None if score is None else score.flatten()
    reference = None if reference_nll is None else reference_nll.flatten()
    sums = passes.sum_selected(nll.flatten(), flat_score, reference, valid.flatten(), mask.flatten(), previous_threshold)
    return SelectionSums(*sums.unbind())


@torch.no_grad()
def global_threshold(score: Tensor, valid: Tensor, fraction: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """The lowest score among the best `fraction` of all ranks, `Selection.threshold`, without the mask.

    For selections that use it one step later, where exactness is given up for not having to know all scores first.

    Shapes: score [n] fp32, valid [n] bool -> [] fp32.
    Cost: 3 passes over n. The host does not wait for the device.
    Collectives: over group, 3 SUMs of 2048 int64; one of a single number when fraction is 1.
    Raises: ShapeError.
    """
    _check(score, valid, fraction, None)
    if fraction >= 1.0:
        return _select_all(valid, _sum(valid.sum(), group)).threshold
    return _find_cut(None, score.flatten(), valid.flatten(), fraction, group).threshold()


@torch.no_grad()
def select_top_fraction_rows(score: Tensor, valid: Tensor, fraction: float) -> Tensor:
    """Mask of the best `fraction` of each row's valid scores; equal scores by ascending column, NaN lowest.

    Shapes: score [b, s] fp32, valid [b, s] bool -> [b, s] bool.
    Cost: one sort of every row.
    Raises: ShapeError.
    """
    _check(score, valid, fraction, None)
    key = torch.where(valid, passes.ordered_key(score), -1)
    best_first = torch.argsort(key, dim=-1, descending=True, stable=True)
    k = num_kept(fraction, valid.sum(dim=-1, keepdim=True))
    rank = torch.arange(score.shape[-1], device=score.device).expand_as(score)
    return torch.zeros_like(valid).scatter_(-1, best_first, rank < k)


def _sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group)
    return values


def _select_all(valid: Tensor, num_valid: Tensor) -> Selection:
    return Selection(valid.clone(), torch.where(num_valid > 0, -torch.inf, torch.inf), num_valid)


def _digits(bits: int) -> Iterator[tuple[int, int]]:
    """(shift, width) of every digit of a key, the leading one first."""
    while bits > 0:
        width = min(passes.DIGIT_BITS, bits)
        bits -= width
        yield bits, width


def _find_cut(histogram: Tensor | None, score: Tensor, valid: Tensor, fraction: float, group: dist.ProcessGroup | None) -> _Cut:
    """Three rounds: count a digit here, sum over ranks, choose. The first histogram may be there already, for this rank."""
    (shift, width), *others = _digits(passes.SCORE_BITS)
    if histogram is None:
        nowhere = torch.zeros(3, dtype=torch.int64, device=score.device)
        histogram = passes.count_digits(score, valid, nowhere, shift, width)
    num_valid = _sum(histogram, group).sum()  # NaN has a digit too, so all are counted
    k = num_kept(fraction, num_valid)
    start = torch.stack([torch.zeros_like(k), k.clamp(min=1), num_valid])
    search = passes.choose_digit(histogram, start, width)
    for shift, width in others:
        histogram = _sum(passes.count_digits(score, valid, search, shift, width), group)
        search = passes.choose_digit(histogram, search, width)
    return _Cut(search, num_valid, k)


def _break_ties(cut: _Cut, score: Tensor, valid: Tensor, order: Tensor | None, group: dist.ProcessGroup | None) -> _Ties:
    """Of scores equal to the k-th, keep by order, then rank, then index."""
    _, num_equal_kept, num_equal = cut.search.unbind()
    if not bool(num_equal > num_equal_kept):  # the same on every rank
        return _Ties()
    order_search = None
    if order is not None:
        order_search = torch.stack([torch.zeros_like(num_equal), num_equal_kept, num_equal])
        for shift, width in _digits(passes.ORDER_BITS):
            histogram = passes.count_order_digits(score, valid, cut.search, order, order_search, shift, width)
            order_search = passes.choose_digit(_sum(histogram, group), order_search, width)
    counts = passes.count_equals(score, valid, cut.search, order, order_search)
    starts = counts.cumsum(0) - counts
    if group is not None:
        per_rank = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=score.device)
        per_rank[dist.get_rank(group)] = counts.sum()
        starts += _sum(per_rank, group)[: dist.get_rank(group)].sum()
    return _Ties(order, order_search, starts)


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


def _check_floats(what: str, like: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != like.shape):
            raise ShapeError(f"{what}: got {name} {tensor.dtype} {tuple(tensor.shape)}, expected float32 {tuple(like.shape)}.")
