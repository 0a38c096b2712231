"""The language-model head as one operation: hidden states to the log-probability of each label, without the logits matrix.

Three products are the floor: hidden x weight forward, and two of the same size backward. Around them, plain torch walks over
fp32 copies of the [t, v] logits a dozen times. Here the softmax runs over blocks of rows that fit the processor's cache, and
one of three things is kept for backward:

- the softmax minus the one-hot label, in the inputs' dtype, in the very memory the product wrote to: backward is then two
  matrix products and no pass over [t, v] at all, because the upstream gradient g of a row scales a row of `hidden`, not of v:
      d hidden = -(g / T) * (D @ weight),   d weight = D^T @ (-(g / T) * hidden),   D = softmax(z) - onehot(label)
- the logits, when the entropy was asked for as well;
- nothing but `hidden`, when the logits would not fit `keep_bytes`: chunks of logits are computed again in backward.

The upstream gradient arrives after the forward pass is over, for every row its own value. Rows where it is zero (tokens that
a selection dropped) are left out of both backward products.

Dims: t tokens, n tokens with a label, h hidden, v vocabulary rows on this rank (v_tp), c chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.errors import ShapeError
from megarpt.ops.softmax_blocks import (
    RowStatistics,
    Shard,
    combine_over_ranks,
    fill_statistics,
    to_softmax,
    to_weighted_softmax,
    wide_dtype,
)

KEEP_BYTES = 512 * 2**20  # logits up to this size are held from forward to backward
CHUNK_BYTES = 128 * 2**20  # size of one chunk of logits otherwise
_GATHER_BYTES = 16 * 2**20  # of held logits that backward collects at a time when rows are left out
_GATHER_ROWS = 256  # but at least this many rows, or the products lose their speed
_PIECE_BYTES = 8 * 2**20  # of the weight's gradient, where products are summed in a wider dtype than their own
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class _Options(NamedTuple):
    shard: Shard
    entropy: bool
    chunk: int  # rows of logits per matrix product
    keep: bool  # hold [n, v] from forward to backward
    tp_group: dist.ProcessGroup | None
    vocab_start: int  # first vocabulary entry of this rank
    vocab_size: int  # entries of the whole vocabulary that exist; rows beyond are padding
    accumulate_main_grad: bool


def plan_chunks(
    num_tokens: int, vocab: int, dtype: torch.dtype, chunk_tokens: int | None = None, keep_bytes: int = KEEP_BYTES
) -> tuple[int, bool]:
    """Rows of logits per product, and whether all logits are held from forward to backward.

    A given `chunk_tokens` is a promise that no more rows than that exist at any time, so logits are held only when all
    tokens fit one chunk.
    """
    row_bytes = max(1, vocab * dtype.itemsize)
    keep = num_tokens * row_bytes <= keep_bytes
    if chunk_tokens:
        return chunk_tokens, keep and num_tokens <= chunk_tokens
    return max(1, CHUNK_BYTES // row_bytes), keep


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    keep_bytes: int = KEEP_BYTES,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    accumulate_main_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every label under softmax(hidden @ weight.T / temperature), and optionally the entropy.

    Args:
        hidden: final hidden states.
        weight: this rank's rows of the output embedding.
        labels: vocabulary entries; a negative label is ignored: its results are 0 and it gets no gradient. A label at or
            beyond `vocab_size` raises on the CPU and yields NaN elsewhere (a check would stall the device).
        temperature: divides the logits.
        entropy: also return the entropy of every distribution, differentiable.
        chunk_tokens: at most this many rows of logits exist at a time; None or 0 chooses by `keep_bytes`.
        keep_bytes: logits are held for backward when they are no larger, else recomputed there, chunk by chunk.
        tp_group: ranks that share the vocabulary, each holding rows [vocab_start, vocab_start + v) of it.
        vocab_start: first vocabulary entry of this rank's `weight`.
        vocab_size: entries of the whole vocabulary that exist. Rows of `weight` beyond are padding: they carry no
            probability and get no gradient. None: all rows exist; required with a `tp_group` of more than one rank.
        accumulate_main_grad: add the weight's gradient to `weight.main_grad` in place, as megatron-core's
            gradient_accumulation_fusion does, and set `weight.grad_added_to_main_grad`.

    Shapes: hidden [t, h], weight [v, h], labels [t] int64 -> logprob [t], entropy [t] or None.
    Units: nats. Outputs are fp32 (fp64 for fp64 inputs) whatever the inputs' dtype.
    Cost: products of 2 t h v FLOPs forward and 4 k h v backward, k = rows with a non-zero upstream gradient; 2 k h v more when
        nothing was kept. Peak extra bytes: t * v * itemsize if that fits keep_bytes, else about one chunk (128 MiB, or
        chunk_tokens rows); and [v, h] in fp32 for the weight's gradient when there is more than one chunk. On an accelerator
        the host waits once forward (are there ignored labels?) and once backward (how many rows are kept?).
    Collectives: forward, over tp_group: one MAX of [t] and one SUM of [2, t] ([3, t] with entropy). Backward: none; the
        gradient of `hidden` is this rank's part, and summing it over tp_group is the caller's, as everywhere in
        megatron-core (`copy_to_tensor_model_parallel_region` before the head, or the sequence-parallel gather).
    Error: at most twice plain torch's (tests/parity/test_linear_logprob.py).
    Raises: ShapeError for shapes, dtypes and ranges that do not fit. Differentiating twice raises.
    """
    valid = _check(hidden, weight, labels, temperature, chunk_tokens, tp_group, vocab_start, vocab_size)
    if accumulate_main_grad and getattr(weight, "main_grad", None) is None:
        raise ShapeError(
            "linear_logprob: accumulate_main_grad=True needs weight.main_grad, which this weight lacks. "
            "Wrap the model in megatron-core's DistributedDataParallel first, or pass accumulate_main_grad=False."
        )
    chunk, keep = plan_chunks(labels.numel(), weight.shape[0], weight.dtype, chunk_tokens, keep_bytes)
    options = _Options(
        shard=Shard(valid, float(temperature)),
        entropy=entropy,
        chunk=chunk,
        keep=keep,
        tp_group=tp_group if tp_group is not None and dist.get_world_size(tp_group) > 1 else None,
        vocab_start=vocab_start,
        vocab_size=valid if vocab_size is None else vocab_size,
        accumulate_main_grad=accumulate_main_grad,
    )
    # grad mode is off inside forward(), so whether a backward pass can follow has to be seen here
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    logprob, entropies = _LinearLogprob.apply(hidden, weight, labels, options._replace(keep=keep and differentiable))
    return logprob, entropies


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    chunk_tokens: int | None,
    tp_group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int | None,
) -> int:
    """Validate what a caller can get wrong; returns how many rows of `weight` exist."""
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dim() != 1:
        raise ShapeError(f"linear_logprob: got {shapes}; expected [t, h], [v, h], [t]. Flatten batch and sequence first.")
    if hidden.shape[1] != weight.shape[1] or hidden.shape[0] != labels.shape[0]:
        raise ShapeError(
            f"linear_logprob: got {shapes}; expected the same h in hidden and weight, the same t in hidden and labels."
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
        raise ShapeError(
            f"linear_logprob: got hidden {hidden.dtype}, weight {weight.dtype}; expected one of {_DTYPES} for both. "
            "Cast before the call (autocast does not reach inside)."
        )
    if labels.dtype != torch.int64:
        raise ShapeError(f"linear_logprob: got labels {labels.dtype}; expected torch.int64. Use labels.long().")
    if not temperature > 0.0:
        raise ShapeError(f"linear_logprob: got temperature {temperature}; expected a number above 0.")
    if chunk_tokens is not None and chunk_tokens < 0:
        raise ShapeError(
            f"linear_logprob: got chunk_tokens {chunk_tokens}; expected a positive number, or 0 or None to choose."
        )
    if tp_group is not None and vocab_size is None and dist.get_world_size(tp_group) > 1:
        raise ShapeError("linear_logprob: with a tp_group, vocab_size (entries of the whole vocabulary) must be given.")
    if vocab_start < 0 or (vocab_size is not None and vocab_size <= 0):
        raise ShapeError(f"linear_logprob: got vocab_start {vocab_start}, vocab_size {vocab_size}; expected >= 0 and > 0.")
    end = vocab_start + weight.shape[0] if vocab_size is None else vocab_size
    if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= end:
        raise ShapeError(
            f"linear_logprob: got label {int(labels.max())}; expected labels below vocab_size = {end} (negative = ignored). "
            "The corpus was tokenized with a larger vocabulary than the model's: raise model.vocab_size."
        )
    return min(max(end - vocab_start, 0), weight.shape[0])


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options) -> tuple[Tensor, Tensor | None]:
        rows = None if labels.numel() == 0 or bool((labels >= 0).all()) else torch.nonzero(labels >= 0)[:, 0]
        x, y = (hidden, labels) if rows is None else (hidden.index_select(0, rows), labels.index_select(0, rows))
        local = y - options.vocab_start
        here = (local >= 0) & (local < options.shard.num_valid)
        local = local.clamp(0, max(0, options.shard.num_valid - 1))

        num_rows, chunk = y.numel(), min(options.chunk, max(1, y.numel()))
        store_softmax = options.keep and not options.entropy
        logits = x.new_empty(num_rows if options.keep else chunk, weight.shape[0])
        stats = RowStatistics.empty(num_rows, x, options.entropy)
        for start in range(0, num_rows, chunk):
            span = slice(start, min(start + chunk, num_rows))
            z = logits[span] if options.keep else logits[: span.stop - start]
            torch.mm(x[span], weight.t(), out=z)
            fill_statistics(z, local[span], here[span], stats.rows(span), store_softmax, options.shard)
        share = None
        if options.tp_group is not None:
            stats, share = combine_over_ranks(stats, options.tp_group)
            if store_softmax:
                logits.mul_(share[:, None])

        logprob = stats.target - stats.largest - stats.log_sum
        logprob.masked_fill_(y >= options.vocab_size, float("nan"))
        if store_softmax:
            # p - 1 from the logarithm: exact where p is close to 1, and never rounded to the dtype before the subtraction
            at = torch.nonzero(here)[:, 0]
            logits[at, local[at]] = torch.expm1(logprob[at]).to(logits.dtype)
        negative_entropy = stats.surprise
        saved = logits if options.keep else None
        ctx.save_for_backward(hidden, weight, saved, rows, local, here, share, logprob, negative_entropy)
        ctx.options = options
        ctx.parameter = weight if options.accumulate_main_grad else None
        ctx.set_materialize_grads(False)
        return _scatter(logprob, rows, labels), None if negative_entropy is None else _scatter(-negative_entropy, rows, labels)

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, saved, rows, local, here, share, logprob, negative_entropy = ctx.saved_tensors
        options: _Options = ctx.options
        if torch.is_grad_enabled():  # only so under create_graph=True; a gradient without a graph would pass for a constant
            raise RuntimeError(
                "linear_logprob: create_graph=True asks for second derivatives, which it does not have; use ops.reference"
            )
        if grad_logprob is None and grad_entropy is None:
            return None, None, None, None
        if rows is not None:
            grad_logprob, grad_entropy = (None if g is None else g.index_select(0, rows) for g in (grad_logprob, grad_entropy))
        upstream = torch.stack([g for g in (grad_logprob, grad_entropy) if g is not None])
        kept = torch.nonzero((upstream != 0).any(dim=0))[:, 0]  # [k]; NaN counts as kept, so that it is seen
        rows_of_hidden = kept if rows is None else rows.index_select(0, kept)

        source = _GradientSource(
            weight, saved, local, here, share, logprob, negative_entropy, grad_logprob, grad_entropy, options
        )
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        grad_weight = _WeightGradient(weight, ctx.parameter) if ctx.needs_input_grad[1] else None
        chunk = source.chunk(kept.numel())
        buffer = None if source.is_whole(chunk) else weight.new_empty(chunk, weight.shape[0])
        for start in range(0, kept.numel(), chunk):
            span = slice(start, min(start + chunk, kept.numel()))
            at = rows_of_hidden[span]
            x = hidden if at.numel() == hidden.shape[0] else hidden.index_select(0, at)
            logits_grad, factor = source.rows(x, kept[span], buffer)
            if grad_hidden is not None:
                grad_hidden.index_copy_(0, at, torch.mm(logits_grad, weight).mul_(factor[:, None]))
            if grad_weight is not None:
                grad_weight.add(logits_grad, (x * factor[:, None]).to(x.dtype), is_only=chunk == kept.numel())
        return grad_hidden, None if grad_weight is None else grad_weight.result(), None, None


def _scatter(values: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    return values if rows is None else values.new_zeros(like.shape).index_copy_(0, rows, values)


class _GradientSource(NamedTuple):
    """What turns row numbers into rows of the gradient with respect to the logits."""

    weight: Tensor
    saved: Tensor | None  # [n, v]: softmax minus one-hot, or logits when the entropy was asked for
    local: Tensor
    here: Tensor
    share: Tensor | None
    logprob: Tensor
    negative_entropy: Tensor | None
    grad_logprob: Tensor | None  # [n]
    grad_entropy: Tensor | None  # [n]
    options: _Options

    def is_whole(self, num_rows: int) -> bool:
        """All rows are wanted, and were written down in forward up to a factor per row."""
        return self.saved is not None and not self.options.entropy and num_rows == self.saved.shape[0]

    def chunk(self, num_rows: int) -> int:
        """Rows per pair of products; the kept ones are only copied together, so fewer at a time suffice for full speed."""
        if self.is_whole(num_rows):
            return max(1, num_rows)
        rows = self.options.chunk
        if self.saved is not None:
            rows = min(rows, max(_GATHER_ROWS, _GATHER_BYTES // (self.weight.dtype.itemsize * self.weight.shape[0])))
        return max(1, min(rows, num_rows))

    def rows(self, x: Tensor, at: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradient [c, v] of the rows `at`, whose hidden states are `x`; it is to be multiplied by the factors [c]."""
        shard = self.options.shard
        scale = -1.0 / shard.temperature
        if buffer is None:
            assert self.saved is not None and self.grad_logprob is not None
            return self.saved, self.grad_logprob * scale
        logits = buffer[: at.numel()]
        if self.saved is None:
            torch.mm(x, self.weight.t(), out=logits)
        else:
            torch.index_select(self.saved, 0, at, out=logits)
        if self.saved is not None and not self.options.entropy:
            assert self.grad_logprob is not None
            return logits, self.grad_logprob.index_select(0, at) * scale
        pick = [
            None if part is None else part.index_select(0, at) for part in (self.share, self.grad_logprob, self.grad_entropy)
        ]
        share, grad_logprob, grad_entropy = pick
        local, here, logprob = (part.index_select(0, at) for part in (self.local, self.here, self.logprob))
        if grad_entropy is None:
            assert grad_logprob is not None
            to_softmax(logits, share, shard)
            at_label = torch.expm1(logprob)
            factor = grad_logprob * scale
        else:
            assert self.negative_entropy is not None
            negative_entropy = self.negative_entropy.index_select(0, at)
            grad_logprob = torch.zeros_like(grad_entropy) if grad_logprob is None else grad_logprob
            # d logprob / d z = onehot - p,  d entropy / d z = -p * (log p + entropy); negated here, as the factor is negative
            constant = grad_logprob - grad_entropy * negative_entropy
            to_weighted_softmax(logits, share, constant, grad_entropy, shard)
            probability = logprob.exp()
            at_label = grad_logprob * torch.expm1(logprob) + grad_entropy * probability * (logprob - negative_entropy)
            factor = torch.full_like(logprob, scale)
        labelled = torch.nonzero(here)[:, 0]
        logits[labelled, local[labelled]] = at_label[labelled].to(logits.dtype)
        return logits, factor


class _WeightGradient:
    """Sum of [v, h] products over chunks, in fp32, in a buffer of its own or in the parameter's `main_grad`."""

    def __init__(self, weight: Tensor, parameter: Tensor | None) -> None:
        self.weight = weight
        self.parameter = parameter
        self.total: Tensor | None = None if parameter is None else parameter.main_grad  # type: ignore[attr-defined]

    def add(self, logits_grad: Tensor, x: Tensor, is_only: bool) -> None:
        if is_only and self.parameter is None:
            self.total = torch.mm(logits_grad.t(), x)
            return
        if self.total is None:
            self.total = torch.zeros_like(
                self.weight, dtype=wide_dtype(self.weight.dtype), memory_format=torch.contiguous_format
            )
        if self.total.dtype == x.dtype:
            self.total.addmm_(logits_grad.t(), x)
        else:
            # a piece at a time, so that the product in half precision is added while it is still in cache
            rows = max(1, _PIECE_BYTES // (x.dtype.itemsize * x.shape[1]))
            for total, piece in zip(self.total.split(rows), logits_grad.split(rows, dim=1), strict=True):
                total.add_(torch.mm(piece.t(), x))

    def result(self) -> Tensor | None:
        """What autograd gets: the gradient, or megatron-core's placeholder when it went to `main_grad`."""
        if self.parameter is None:
            return torch.zeros_like(self.weight) if self.total is None else self.total.to(self.weight.dtype)
        if not hasattr(self.parameter, "grad_added_to_main_grad"):
            return None
        # DistributedDataParallel's hook only runs when some gradient arrives; it ignores the values, unless the weight is
        # shared with the input embedding (zero_out_wgrad), whose gradient autograd adds to this one
        self.parameter.grad_added_to_main_grad = True
        make = torch.zeros if getattr(self.parameter, "zero_out_wgrad", False) else torch.empty
        return make(self.weight.shape, dtype=self.weight.dtype, device=self.weight.device)
