"""Softmax over rows of logits in blocks that fit the cache: the passes around the head's matrix products.

Every function works on one chunk of logits, in place where it can, through fp32 copies of a block of rows (fp64 for fp64).
A rank may hold only a part of the vocabulary; `combine_over_ranks` joins the parts by one number or two per row.

Dims: c rows of a chunk, n rows in all, v vocabulary rows on this rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# fp32 rows worked on at a time
_BLOCK_BYTES_ONE_THREAD = 2 * 2**20  # a core's second-level cache
_BLOCK_BYTES_PER_THREAD = 4 * 2**20  # larger, as every pass over a block makes the threads wait for each other
_BLOCK_BYTES_MOST = 64 * 2**20


class Shard(NamedTuple):
    """How logits become probabilities on this rank."""

    num_valid: int  # leading columns that exist; the rest is padding and carries no probability
    temperature: float


class RowStatistics(NamedTuple):
    """Per row, [n] each. Local to this rank's part of the vocabulary until `combine_over_ranks`."""

    largest: Tensor  # logit
    log_sum: Tensor  # log of the sum of exp(logit - largest); kept apart from `largest`, as p near 1 needs every digit of it
    target: Tensor  # logit of the label, 0 where the label lives on another rank
    surprise: Tensor | None  # sum of p * log p, p normalised over this rank's part; the negative entropy once combined

    @classmethod
    def empty(cls, num_rows: int, like: Tensor, entropy: bool) -> RowStatistics:
        """Unfilled, in the wide dtype of `like`."""
        parts = like.new_empty(4 if entropy else 3, num_rows, dtype=wide_dtype(like.dtype)).unbind()
        return cls(parts[0], parts[1], parts[2], parts[3] if entropy else None)

    def rows(self, span: slice) -> RowStatistics:
        """Views of some rows."""
        surprise = None if self.surprise is None else self.surprise[span]
        return RowStatistics(self.largest[span], self.log_sum[span], self.target[span], surprise)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and exponentials are computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _block_rows(logits: Tensor) -> int:
    """Rows whose fp32 copy stays in cache on a CPU, and is not a second chunk elsewhere."""
    threads = torch.get_num_threads()
    if logits.device.type != "cpu":
        budget = _BLOCK_BYTES_MOST
    else:
        budget = _BLOCK_BYTES_ONE_THREAD if threads == 1 else min(_BLOCK_BYTES_PER_THREAD * threads, _BLOCK_BYTES_MOST)
    return min(max(1, budget // (4 * logits.shape[1])), max(1, logits.shape[0]))


def _scaled_logits(logits: Tensor, out: Tensor, shard: Shard) -> Tensor:
    """fp32 copy (fp64 for fp64) of a block of logits, divided by the temperature, padding at minus infinity."""
    scaled = out[: logits.shape[0]].copy_(logits)
    if shard.temperature != 1.0:
        scaled.div_(shard.temperature)
    if shard.num_valid < scaled.shape[1]:
        scaled[:, shard.num_valid :] = float("-inf")
    return scaled


def fill_statistics(logits: Tensor, local: Tensor, here: Tensor, out: RowStatistics, store: bool, shard: Shard) -> None:
    """Fill the statistics of a chunk; with `store`, also overwrite its logits by its softmax over this rank's part.

    Shapes: logits [c, v]; local [c] labels counted from this rank's first row, clamped into range; here [c] bool.
    """
    if shard.num_valid == 0:
        out.largest.fill_(float("-inf"))
        out.log_sum.zero_()
        out.target.zero_()
        if out.surprise is not None:
            out.surprise.zero_()
        if store:
            logits.zero_()
        return
    wide, rows = out.target.dtype, _block_rows(logits)
    torch.div(logits.gather(1, local[:, None])[:, 0].to(wide), shard.temperature, out=out.target)
    out.target.masked_fill_(~here, 0.0)
    in_place = store and logits.dtype == wide
    copies = logits.new_empty(1 if in_place else 2, rows, logits.shape[1], dtype=wide)
    surprises: Iterable[Tensor | None] = repeat(None) if out.surprise is None else out.surprise.split(rows)
    parts = zip(logits.split(rows), out.largest.split(rows), out.log_sum.split(rows), surprises, strict=False)
    for block, largest, log_sum, surprise in parts:
        z = _scaled_logits(block, copies[0], shard)
        torch.amax(z, dim=-1, out=largest)
        softmax = torch.softmax(z, dim=-1, out=block if in_place else copies[1][: block.shape[0]])
        # the largest probability is exp(0) / sum, so its logarithm gives the sum without a pass of exponentials of our own
        torch.amax(softmax, dim=-1, out=log_sum).log_().neg_()
        if store and not in_place:
            block.copy_(softmax)
        if surprise is not None:
            log_p = z[:, : shard.num_valid].sub_(largest[:, None]).sub_(log_sum[:, None])
            torch.sum(log_p.mul_(softmax[:, : shard.num_valid]), dim=-1, out=surprise)


def combine_over_ranks(stats: RowStatistics, group: dist.ProcessGroup) -> tuple[RowStatistics, Tensor]:
    """Statistics of the whole vocabulary, and the share [n] of it that this rank's part holds."""
    largest = stats.largest.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    log_mass = stats.largest - largest + stats.log_sum  # minus infinity where a rank holds nothing but padding
    mass = log_mass.exp()
    sums = [mass, stats.target]
    if stats.surprise is not None:
        # over the whole vocabulary, sum p log p = sum over ranks of share * (surprise + log share), share = mass / total
        sums.append(torch.where(mass > 0.0, mass * (stats.surprise + log_mass), 0.0))
    packed = torch.stack(sums)
    dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=group)
    total = packed[0]
    surprise = None if stats.surprise is None else packed[2] / total - total.log()
    return RowStatistics(largest, total.log(), packed[1], surprise), mass / total


def to_softmax(logits: Tensor, share: Tensor | None, shard: Shard) -> None:
    """logits <- p; `share` [c] is what `combine_over_ranks` returned, None without other ranks."""
    if shard.num_valid == 0:
        logits.zero_()
        return
    rows = _block_rows(logits)
    copies = logits.new_empty(2, rows, logits.shape[1], dtype=wide_dtype(logits.dtype))
    for start, block in zip(range(0, logits.shape[0], rows), logits.split(rows), strict=True):
        softmax = torch.softmax(_scaled_logits(block, copies[0], shard), dim=-1, out=copies[1][: block.shape[0]])
        block.copy_(softmax if share is None else softmax.mul_(share[start : start + rows, None]))


def to_weighted_softmax(logits: Tensor, share: Tensor | None, constant: Tensor, slope: Tensor, shard: Shard) -> None:
    """logits <- p * (constant + slope * log p), all per row; `share` as in `to_softmax`.

    log p comes from these very logits and not from the forward pass: a product of fewer rows may round them otherwise, and of
    a peaked distribution every digit counts.
    """
    valid = shard.num_valid
    logits[:, valid:] = 0.0
    if valid == 0:
        return
    rows = _block_rows(logits)
    copies = logits.new_empty(2, rows, logits.shape[1], dtype=wide_dtype(logits.dtype))
    for start, block in zip(range(0, logits.shape[0], rows), logits.split(rows), strict=True):
        span = slice(start, start + rows)
        z = _scaled_logits(block, copies[0], shard)
        softmax = torch.softmax(z, dim=-1, out=copies[1][: block.shape[0]])[:, :valid]
        log_largest = torch.amax(softmax, dim=-1, keepdim=True).log_()  # see fill_statistics
        log_p = z[:, :valid].sub_(torch.amax(z, dim=-1, keepdim=True)).add_(log_largest)
        if share is not None:
            own = share[span, None]
            softmax.mul_(own)
            log_p.add_(own.clamp_min(torch.finfo(own.dtype).tiny).log_())  # a share that underflowed leaves p = 0
        block[:, :valid] = log_p.mul_(slope[span, None]).add_(constant[span, None]).mul_(softmax)
