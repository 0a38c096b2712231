"""The head's matrix products, a tile of logits at a time: [rows, columns] tokens by vocabulary entries.

A tile is small enough to stay in the processor's cache between the product that makes it, the one pass that reads it and
the two products that use it, so the [t, v] logits never travel to memory. Forward the tiles of a block of tokens follow each
other, each merged into a few numbers a token (online softmax). Backward the tiles of a block of the vocabulary follow each
other: their logits are computed again, turned into their gradient in place, and multiplied into both results; the weight's
rows of that block are then complete and never held twice.

The logits of the first `kept_columns` vocabulary entries may be held from forward to backward instead of being computed again.

The two functions are registered as operators, opaque to torch.compile and free of graph breaks.

Dims: t tokens, n tokens with a label, k tokens with an upstream gradient, h hidden, v vocabulary entries of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarpt.ops.tile_passes import RowGradient, RowState, TilePasses, passes_for, wide_dtype

TILE_COLUMNS = {"cpu": 1024, "cuda": 4096}
TILE_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}


class TilePlan(NamedTuple):
    """How large tiles are."""

    rows: int  # tokens
    columns: int  # vocabulary entries
    kept_columns: int  # of these first vocabulary entries the logits are held from forward to backward


def plan_tiles(
    num_tokens: int,
    num_columns: int,
    dtype: torch.dtype,
    device: torch.device,
    chunk_tokens: int | None = None,
    keep_bytes: int = 0,
) -> TilePlan:
    """Tiles for this device; `chunk_tokens` bounds their rows, `keep_bytes` what is held from forward to backward."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    itemsize = tile_dtype(dtype, device).itemsize
    columns = max(1, min(TILE_COLUMNS[kind], num_columns))
    rows = max(1, min(TILE_BYTES[kind] // (columns * itemsize), chunk_tokens or num_tokens, num_tokens))
    kept = min(num_columns, keep_bytes // max(1, num_tokens * itemsize))
    if kept < num_columns:
        kept -= kept % columns
    return TilePlan(rows, columns, kept)


def tile_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What logits are held in: where the product can give fp32 from half precision, fp32."""
    return torch.float32 if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) else dtype


def spans(size: int, most: int) -> Iterator[slice]:
    """[0, size) in pieces of nearly equal length, each at most `most`."""
    pieces = max(1, -(-size // most))
    for i in range(pieces):
        yield slice(size * i // pieces, size * (i + 1) // pieces)


def _blocks(num_columns: int, plan: TilePlan) -> Iterator[tuple[slice, bool]]:
    """Blocks of the vocabulary, and whether their logits are kept; no block is half kept."""
    for start in range(0, num_columns, plan.columns):
        end = min(start + plan.columns, num_columns)
        yield slice(start, end), end <= plan.kept_columns


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out <- left @ right, in out's dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; a total wider than the factors sees every product rounded at most once."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(left, right))


@torch.library.custom_op("megarpt::head_statistics", mutates_args=())
def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    inverse_temperature: float,
    entropy: bool,
    tile_rows: int,
    tile_columns: int,
    kept_columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every token's softmax in a few numbers: the fields of `RowState` and the kept logits.

    Tokens whose label is below -1 are left out: their numbers are those of a certain event (log-probability and entropy 0).

    Shapes: hidden [t, h], weight [v, h], labels [t] int64 (column of `weight`; -1 another rank's) -> largest, sum, weighted
        ([0] without entropy), target, best [t]; kept [t * kept_columns], block after block.
    """
    plan = TilePlan(tile_rows, tile_columns, kept_columns)
    t, v = hidden.shape[0], weight.shape[0]
    rows = _rows_with_label(labels)
    n = t if rows is None else rows.numel()
    passes, state = passes_for(hidden.device), RowState.start(n, hidden, entropy)
    dtype = tile_dtype(hidden.dtype, hidden.device)
    kept = hidden.new_empty(t * kept_columns, dtype=dtype)
    buffer = hidden.new_empty(min(tile_rows, n) * tile_columns, dtype=dtype)
    for span in spans(n, tile_rows) if n and v else ():
        x = hidden[span] if rows is None else hidden.index_select(0, rows[span])
        y = labels[span] if rows is None else labels.index_select(0, rows[span])
        for block, is_kept in _blocks(v, plan):
            z = _kept_block(kept, block, t)[span] if is_kept else _tile(buffer, x.shape[0], block)
            _product_into(z, x, weight[block].t())
            passes.add_tile(z, y, block.start, inverse_temperature, state.rows(span))
    weighted = state.sum.new_empty(0) if state.weighted is None else state.weighted
    if rows is None:
        return state.largest, state.sum, weighted, state.target, state.best, kept

    def spread(values: Tensor, elsewhere: float) -> Tensor:
        return values.new_full((t,), elsewhere).index_copy_(0, rows, values)

    weighted = spread(weighted, 0.0) if entropy else weighted
    return (
        spread(state.largest, 0.0),
        spread(state.sum, 1.0),
        weighted,
        spread(state.target, 0.0),
        spread(state.best, -1),
        kept,
    )


@head_statistics.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, entropy, _, _, kept_columns = others
    t = hidden.shape[0]
    state = RowState.start(t, hidden, entropy)
    weighted = state.sum.new_empty(0) if state.weighted is None else state.weighted
    kept = hidden.new_empty(t * kept_columns, dtype=tile_dtype(hidden.dtype, hidden.device))
    return state.largest, state.sum, weighted, state.target, state.best, kept


@torch.library.custom_op("megarpt::head_gradients", mutates_args=("main_grad",))
def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    active: Tensor,
    kept: Tensor,
    largest: Tensor,
    log_sum: Tensor,
    constant: Tensor,
    slope: Tensor | None,
    at_label: Tensor,
    best: Tensor,
    at_best: Tensor,
    inverse_temperature: float,
    tile_rows: int,
    tile_columns: int,
    kept_columns: int,
    needs_hidden: bool,
    needs_weight: bool,
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight, from the tokens that are active.

    Shapes: as `head_statistics`, whose `labels` and `kept` these are; active [t] bool, the rest [t], the fields of
        `RowGradient` -> grad_hidden [t, h], grad_weight [v, h]; [0] for one that is not needed or went to main_grad [v, h].
    """
    plan = TilePlan(tile_rows, tile_columns, kept_columns)
    t, h, v = hidden.shape[0], hidden.shape[1], weight.shape[0]
    at = None if bool(active.all()) else torch.nonzero(active)[:, 0]
    k = t if at is None else at.numel()
    gradient = RowGradient(largest, log_sum, constant, slope, labels, at_label, best, at_best)
    gradient = gradient if at is None else gradient.rows(at)
    x = hidden if at is None else hidden.index_select(0, at)
    in_kept = _rows_of_kept(labels, at) if kept_columns else None
    passes = passes_for(hidden.device)
    total_x = hidden.new_zeros(k, h, dtype=wide_dtype(hidden.dtype)) if needs_hidden else None
    total_w = _WeightGradient(weight, x, main_grad, passes) if needs_weight else None
    dtype = tile_dtype(hidden.dtype, hidden.device)
    num_rows = min(tile_rows, k)
    buffer = hidden.new_empty(num_rows * tile_columns, dtype=dtype)
    narrow = buffer if dtype == hidden.dtype else hidden.new_empty(num_rows * tile_columns)
    for block, is_kept in _blocks(v, plan) if k else ():
        if total_w is not None:
            total_w.begin(block)
        for span in spans(k, tile_rows):
            z = out = _tile(narrow, span.stop - span.start, block)
            if is_kept:
                z = _kept_block(kept, block, t)
                z, chosen = (z[span], None) if in_kept is None else (z, in_kept[span])
            else:
                z, chosen = _tile(buffer, span.stop - span.start, block), None
                _product_into(z, x[span], weight[block].t())
            passes.write_gradient(z, chosen, block.start, inverse_temperature, gradient.rows(span), out)
            if total_x is not None:
                _add_product(total_x[span], out, weight[block])
            if total_w is not None:
                total_w.add(out, span)
        if total_w is not None:
            total_w.end()
    grad_hidden, grad_weight = hidden.new_empty(0), hidden.new_empty(0)
    if total_x is not None:
        total_x = total_x.to(hidden.dtype)
        grad_hidden = total_x if at is None else hidden.new_zeros(t, h).index_copy_(0, at, total_x)
    if total_w is not None and main_grad is None:
        grad_weight = total_w.result() if k else torch.zeros_like(total_w.result())
    return grad_hidden, grad_weight


@head_gradients.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    needs_hidden, needs_weight, main_grad = others[-3:]
    grad_hidden = hidden.new_empty(hidden.shape) if needs_hidden else hidden.new_empty(0)
    return grad_hidden, weight.new_empty(weight.shape) if needs_weight and main_grad is None else weight.new_empty(0)


def _rows_with_label(labels: Tensor) -> Tensor | None:
    """Numbers of the tokens that are not ignored; None when none is."""
    taken = labels >= -1
    return None if bool(taken.all()) else torch.nonzero(taken)[:, 0]


def _rows_of_kept(labels: Tensor, at: Tensor | None) -> Tensor | None:
    """Where the tokens `at` are among those that have a label, which is how `kept` is numbered; None: in order."""
    taken = labels >= -1
    if bool(taken.all()):
        return at
    position = taken.cumsum(0) - 1
    return position if at is None else position.index_select(0, at)


def _kept_block(kept: Tensor, block: slice, num_tokens: int) -> Tensor:
    width = block.stop - block.start
    return kept[num_tokens * block.start : num_tokens * block.stop].view(num_tokens, width)


def _tile(buffer: Tensor, num_rows: int, block: slice) -> Tensor:
    width = block.stop - block.start
    return buffer[: num_rows * width].view(num_rows, width)


class _WeightGradient:
    """[v, h], complete one block of rows after another, each summed over the tokens in fp32 (fp64 for fp64)."""

    def __init__(self, weight: Tensor, x: Tensor, main_grad: Tensor | None, passes: TilePasses) -> None:
        self.x, self.main_grad, self.passes = x, main_grad, passes
        self.target = torch.empty_like(weight, memory_format=torch.contiguous_format) if main_grad is None else main_grad
        # On a CPU a half-precision product with a transposed left factor runs at half speed: it is made the other way round.
        half = x.dtype in (torch.bfloat16, torch.float16)
        self.x_turned = x.t().contiguous() if half and x.device.type == "cpu" else None
        self.is_direct = self.target.dtype == x.dtype and not half
        self.block = slice(0, 0)
        self.sum: Tensor | None = None

    def begin(self, block: slice) -> None:
        """The tiles that follow belong to these rows."""
        self.block = block
        self.sum = self.target[block] if self.is_direct and self.main_grad is not None else None

    def add(self, logits_grad: Tensor, span: slice) -> None:
        """Tile [rows, columns] of some tokens."""
        left, right = (logits_grad.t(), self.x[span]) if self.x_turned is None else (self.x_turned[:, span], logits_grad)
        if self.sum is not None:
            _add_product(self.sum, left, right)
        elif self.is_direct:
            self.sum = self.target[self.block]
            _product_into(self.sum, left, right)
        else:
            self.sum = left.new_zeros(left.shape[0], right.shape[1], dtype=wide_dtype(left.dtype))
            _add_product(self.sum, left, right)

    def end(self) -> None:
        """All tiles of the block have been added."""
        target, overwrite = self.target[self.block], self.main_grad is None
        if self.is_direct:
            return
        assert self.sum is not None
        if self.x_turned is not None:
            self.passes.add_transposed(self.sum, target, overwrite)
        elif overwrite:
            target.copy_(self.sum)
        else:
            target.add_(self.sum)

    def result(self) -> Tensor:
        """The whole gradient."""
        return self.target
