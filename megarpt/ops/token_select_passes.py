"""What a selection does to one rank's scores, pass by pass, as torch operators: compiled where `megarpt._C` is, else torch.

Both give the same digits, masks and counts, bit for bit, so ranks with and without the extension may select together;
`megarpt.ops.token_select` puts the passes together and does all communication. The operators allocate what they return.

A `search` is how far the k-th largest key has been found, [3] int64: the leading digits known so far, how many of the keys that
start with them belong to the best k, and how many start with them at all.

Dims: n scores on this rank, c chunks of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megarpt.ops import _ext

DIGIT_BITS = 11  # csrc/token_select/README.md has the measurement
NUM_BINS = 1 << DIGIT_BITS
SCORE_BITS = 32  # of a score's key
ORDER_BITS = 63  # of an order's key
CHUNK = 4096  # scores whose sums and counts belong together
NUM_SUMS = 10
_LOWEST = -(1 << 31)  # of int32


def num_chunks(n: int) -> int:
    """Shapes: c for n."""
    return -(-n // CHUNK)


def ordered_key(score: Tensor) -> Tensor:
    """Integers in [0, 2**32) that sort as the scores do: NaN is the lowest, then -inf; -0.0 equals +0.0.

    Shapes: any fp32 -> the same, int64.
    """
    bits = score.view(torch.int32)  # integers, whatever the processor does to denormals
    bits = torch.where(bits == _LOWEST, 0, bits)  # -0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards as integers
    return torch.where(score.isnan(), _LOWEST, rising).long() - _LOWEST


def score_of_key(key: Tensor) -> Tensor:
    """Inverse of `ordered_key` for one key; NaN for the key of NaN."""
    bits = torch.where(key < (1 << 31), -1 - key, key - (1 << 31))
    return torch.where(key == 0, torch.nan, bits.to(torch.int32).view(torch.float32))


def order_key(order: Tensor) -> Tensor:
    """Non-negative for the non-negative, largest for 0."""
    return torch.iinfo(torch.int64).max - order


@torch.library.custom_op("megarpt::score_excess", mutates_args=())
def score_excess(logprob: Tensor, reference: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """-logprob - reference, and how often each leading digit of its key occurs among the valid.

    Shapes: logprob [n], reference [n] fp32, valid [n] bool -> score [n] fp32, histogram [2048] int64.
    """
    compiled = _compiled(logprob)
    if compiled is None:
        score = -logprob - reference
        shift = SCORE_BITS - DIGIT_BITS
        return score, _histogram(ordered_key(score), valid, torch.zeros_like(valid[:1], dtype=torch.int64), shift, DIGIT_BITS)
    logprob, reference, valid = logprob.contiguous(), reference.contiguous(), valid.contiguous()
    score, histogram = torch.empty_like(logprob), _bins(logprob)
    scores = compiled.Scores(_ext.vector(score), _ext.vector(valid))
    compiled.score_excess(
        _ext.vector(logprob), _ext.vector(reference), scores, _ext.vector(histogram), _ext.place(score.device)
    )
    return score, histogram


@score_excess.register_fake
def _(logprob: Tensor, reference: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logprob), _bins(logprob)


@torch.library.custom_op("megarpt::count_digits", mutates_args=())
def count_digits(score: Tensor, valid: Tensor, search: Tensor, shift: int, width: int) -> Tensor:
    """How often each digit of `width` bits at `shift` occurs, among valid keys that start with the digits of `search`.

    Shapes: score [n] fp32, valid [n] bool -> [2048] int64.
    """
    compiled = _compiled(score)
    if compiled is None:
        return _histogram(ordered_key(score), valid, search, shift, width)
    score, valid, histogram = score.contiguous(), valid.contiguous(), _bins(score)
    scores = compiled.Scores(_ext.vector(score), _ext.vector(valid))
    compiled.count_digits(scores, _ext.vector(search), shift, width, _ext.vector(histogram), _ext.place(score.device))
    return histogram


@count_digits.register_fake
def _(score: Tensor, valid: Tensor, search: Tensor, shift: int, width: int) -> Tensor:
    return _bins(score)


@torch.library.custom_op("megarpt::count_order_digits", mutates_args=())
def count_order_digits(
    score: Tensor, valid: Tensor, search: Tensor, order: Tensor, order_search: Tensor, shift: int, width: int
) -> Tensor:
    """The same for the order of the scores whose key is the one `search` has found.

    Shapes: score [n] fp32, valid [n] bool, order [n] int64 -> [2048] int64.
    """
    compiled = _compiled(score)
    if compiled is None:
        equal = valid & (ordered_key(score) == search[0])
        return _histogram(order_key(order), equal, order_search, shift, width)
    score, valid, order, histogram = score.contiguous(), valid.contiguous(), order.contiguous(), _bins(score)
    scores = compiled.Scores(_ext.vector(score), _ext.vector(valid))
    state = compiled.Search(_ext.vector(search), _ext.vector(order), _ext.vector(order_search))
    compiled.count_order_digits(scores, state, shift, width, _ext.vector(histogram), _ext.place(score.device))
    return histogram


@count_order_digits.register_fake
def _(score: Tensor, valid: Tensor, search: Tensor, order: Tensor, order_search: Tensor, shift: int, width: int) -> Tensor:
    return _bins(score)


@torch.library.custom_op("megarpt::choose_digit", mutates_args=())
def choose_digit(histogram: Tensor, search: Tensor, width: int) -> Tensor:
    """`search` one digit further: the largest digit that still has as many candidates at or above it as are to be kept.

    Shapes: histogram [2048] int64, of all ranks -> [3].
    """
    compiled = _compiled(histogram)
    if compiled is None:
        prefix, count, _ = search.unbind()
        at_least = histogram.flip(0).cumsum(0).flip(0)  # [2048], candidates with this digit or a larger one
        chosen = ((at_least >= count).sum() - 1).clamp(min=0)  # 0 when there is no candidate at all
        here = histogram.gather(0, chosen[None])[0]
        above = at_least.gather(0, chosen[None])[0] - here
        return torch.stack([(prefix << width) | chosen, count - above, here])
    result = torch.empty_like(search)
    compiled.choose_digit(_ext.vector(histogram), _ext.vector(search), width, _ext.vector(result), _ext.place(histogram.device))
    return result


@choose_digit.register_fake
def _(histogram: Tensor, search: Tensor, width: int) -> Tensor:
    return torch.empty_like(search)


@torch.library.custom_op("megarpt::count_equals", mutates_args=())
def count_equals(score: Tensor, valid: Tensor, search: Tensor, order: Tensor | None, order_search: Tensor | None) -> Tensor:
    """How many scores of each chunk the searches leave equal to the last that is kept.

    Shapes: score [n] fp32, valid [n] bool, order [n] int64 -> [c] int64.
    """
    compiled = _compiled(score)
    if compiled is None:
        equal = _above_and_equal(score, valid, search, order, order_search)[1].long()
        return torch.nn.functional.pad(equal, (0, -equal.numel() % CHUNK)).view(-1, CHUNK).sum(dim=1)
    score, valid, order = score.contiguous(), valid.contiguous(), None if order is None else order.contiguous()
    counts = torch.empty(num_chunks(score.numel()), dtype=torch.int64, device=score.device)
    scores = compiled.Scores(_ext.vector(score), _ext.vector(valid))
    state = compiled.Search(_ext.vector(search), _ext.vector(order), _ext.vector(order_search))
    compiled.count_equals(scores, state, _ext.vector(counts), _ext.place(score.device))
    return counts


@count_equals.register_fake
def _(score: Tensor, valid: Tensor, search: Tensor, order: Tensor | None, order_search: Tensor | None) -> Tensor:
    return torch.empty(num_chunks(score.numel()), dtype=torch.int64, device=score.device)


@torch.library.custom_op("megarpt::write_mask", mutates_args=())
def write_mask(
    score: Tensor,
    valid: Tensor,
    search: Tensor,
    order: Tensor | None,
    order_search: Tensor | None,
    starts: Tensor | None,
) -> Tensor:
    """Which scores the searches keep.

    Args:
        starts: how many equals of all ranks come before each chunk's; None when every equal is kept.

    Shapes: score [n] fp32, valid [n] bool, order [n] int64, starts [c] int64 -> [n] bool.
    """
    compiled = _compiled(score)
    if compiled is None:
        return _mask(score, valid, search, order, order_search, starts)
    score, valid, order = score.contiguous(), valid.contiguous(), None if order is None else order.contiguous()
    mask = torch.empty_like(valid)
    scores = compiled.Scores(_ext.vector(score), _ext.vector(valid))
    state = compiled.Search(_ext.vector(search), _ext.vector(order), _ext.vector(order_search))
    place = _ext.place(score.device)
    compiled.write_mask(scores, state, _ext.vector(starts), _ext.vector(mask), compiled.Report(), place)
    return mask


@write_mask.register_fake
def _(score: Tensor, valid: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(valid)


@torch.library.custom_op("megarpt::write_mask_and_sums", mutates_args=())
def write_mask_and_sums(
    score: Tensor,
    valid: Tensor,
    search: Tensor,
    order: Tensor | None,
    order_search: Tensor | None,
    starts: Tensor | None,
    logprob: Tensor,
    reference: Tensor,
    previous: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`write_mask` and `sum_selected` in one pass.

    Shapes: -> mask [n] bool, sums [10] fp64.
    """
    compiled = _compiled(score)
    if compiled is None:
        mask = _mask(score, valid, search, order, order_search, starts)
        return mask, _sums(-logprob, score, reference, valid, mask, previous)
    score, valid, order = score.contiguous(), valid.contiguous(), None if order is None else order.contiguous()
    logprob, reference = logprob.contiguous(), reference.contiguous()
    mask, partial, sums = torch.empty_like(valid), *_room_for_sums(score)
    scores = compiled.Scores(_ext.vector(score), _ext.vector(valid))
    state = compiled.Search(_ext.vector(search), _ext.vector(order), _ext.vector(order_search))
    report = _report(compiled, logprob, True, reference, previous, partial, sums)
    compiled.write_mask(scores, state, _ext.vector(starts), _ext.vector(mask), report, _ext.place(score.device))
    return mask, sums


@write_mask_and_sums.register_fake
def _(score: Tensor, valid: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(valid), _room_for_sums(score)[1]


@torch.library.custom_op("megarpt::sum_selected", mutates_args=())
def sum_selected(
    nll: Tensor,
    score: Tensor | None,
    reference: Tensor | None,
    valid: Tensor,
    mask: Tensor,
    previous: Tensor | None,
) -> Tensor:
    """The sums of `megarpt.ops.token_select.SelectionSums`, in its order.

    Shapes: nll [n], score [n], reference [n] fp32, valid [n], mask [n] bool, previous [] fp32 -> [10] fp64.
    """
    compiled = _compiled(nll)
    if compiled is None:
        return _sums(nll, score, reference, valid, mask, previous)
    nll, valid, mask = nll.contiguous(), valid.contiguous(), mask.contiguous()
    score = None if score is None else score.contiguous()
    reference = None if reference is None else reference.contiguous()
    partial, sums = _room_for_sums(nll)
    report = _report(compiled, nll, False, reference, previous, partial, sums)
    scores = compiled.Scores(_ext.vector(score), _ext.vector(valid))
    compiled.add_up(scores, _ext.vector(mask), report, _ext.place(nll.device))
    return sums


@sum_selected.register_fake
def _(nll: Tensor, *others: Any) -> Tensor:
    return _room_for_sums(nll)[1]


def _compiled(values: Tensor) -> Any:
    """The extension's passes; None where torch has to do, which is also the one that knows tensors without memory."""
    extension = _ext.extension(values.device) if values.numel() else None
    return None if extension is None else extension.token_select


def _bins(like: Tensor) -> Tensor:
    return torch.zeros(NUM_BINS, dtype=torch.int64, device=like.device)


def _room_for_sums(like: Tensor) -> tuple[Tensor, Tensor]:
    partial = torch.empty(num_chunks(like.numel()), NUM_SUMS, dtype=torch.float64, device=like.device)
    return partial, torch.empty(NUM_SUMS, dtype=torch.float64, device=like.device)


def _report(
    compiled: Any,
    loss: Tensor,
    negate: bool,
    reference: Tensor | None,
    previous: Tensor | None,
    partial: Tensor,
    sums: Tensor,
) -> Any:
    threshold = None if previous is None else previous.view(1)
    return compiled.Report(
        _ext.vector(loss), negate, _ext.vector(reference), _ext.vector(threshold), _ext.matrix(partial), _ext.vector(sums)
    )


def _histogram(key: Tensor, candidate: Tensor, search: Tensor, shift: int, width: int) -> Tensor:
    head = key >> shift
    digit = head & ((1 << width) - 1)
    counted = candidate & ((head >> width) == search[:1])
    # an index for all and a count of 0 for some: picking out the counted would make the host wait for the device
    return _bins(key).scatter_add_(0, digit, counted.long())


def _above_and_equal(
    score: Tensor, valid: Tensor, search: Tensor, order: Tensor | None, order_search: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What is kept for certain, and what is equal to the last that is kept."""
    key, kth = ordered_key(score), search[0]
    above, equal = valid & (key > kth), valid & (key == kth)
    if order is None or order_search is None:
        return above, equal
    descending, kth_order = order_key(order), order_search[0]
    return above | (equal & (descending > kth_order)), equal & (descending == kth_order)


def _mask(
    score: Tensor,
    valid: Tensor,
    search: Tensor,
    order: Tensor | None,
    order_search: Tensor | None,
    starts: Tensor | None,
) -> Tensor:
    if starts is None:
        return valid & (ordered_key(score) >= search[0])
    above, equal = _above_and_equal(score, valid, search, order, order_search)
    num_equal_kept = (search if order_search is None else order_search)[1]
    position = equal.cumsum(0) + starts[:1]  # 1 for the first
    return above | (equal & (position <= num_equal_kept))


def _sums(
    nll: Tensor, score: Tensor | None, reference: Tensor | None, valid: Tensor, mask: Tensor, previous: Tensor | None
) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=nll.device)
    kept, dropped = valid & mask, valid & ~mask
    num_nan = num_agreeing = reference_sum = num_known = excess = zero
    if score is not None:
        num_nan = (valid & score.isnan()).sum().double()
        if previous is not None:
            num_agreeing = (valid & ((score >= previous) == mask)).sum().double()
    if reference is not None:
        known = valid & ~reference.isnan()
        reference_sum, num_known = _masked_sum(reference, known), known.sum().double()
        excess = _masked_sum(nll.double() - reference.double(), known)
    nll_kept, nll_dropped = _masked_sum(nll, kept), _masked_sum(nll, dropped)
    sums = [valid.sum().double(), kept.sum().double(), nll_kept + nll_dropped, nll_kept, nll_dropped]
    return torch.stack([*sums, num_nan, reference_sum, num_known, excess, num_agreeing])


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(dtype=torch.float64)
