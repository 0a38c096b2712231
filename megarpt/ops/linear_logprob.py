"""The language-model head as one operation: hidden states to the log-probability of each label, without the logits matrix.

Logits exist a tile at a time (megarpt/ops/head_tiles.py); what stays of them is a few numbers a token. The upstream gradient
arrives after the forward pass is over, for every token its own value, because selection and reinforcement learning know only
then what a token is worth: backward computes the tiles again and leaves out the tokens whose upstream gradient is zero. At 60%
kept it does 60% of the work.

With p the softmax of z = hidden @ weight.T / T, y the label, H the entropy, g and e the upstream gradients of both:
    d logprob / d z = onehot(y) - p,    d H / d z = -p (log p + H)
    d loss / d z = g onehot(y) + p (constant + slope log p),    constant = -(g + e H),    slope = -e

Dims: t tokens, h hidden, v vocabulary rows on this rank (v_tp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.errors import ShapeError
from megarpt.ops.head_tiles import TilePlan, head_gradients, head_statistics, plan_tiles, spans, tile_dtype
from megarpt.ops.tile_passes import RowState, wide_dtype
from megarpt.structs import TokenStats

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ANOTHER_RANKS, _IGNORED = -1, -2  # labels as head_tiles wants them
# (device, half precision) -> tokens. Each group of tokens reads and writes the weight's gradient once; with fewer tokens that
# costs more than a fourth product. Measured on a CPU (docs/decisions/0011), reasoned for a GPU.
LEAST_GROUP = {("cpu", False): 128, ("cpu", True): 2048, ("cuda", False): 1024, ("cuda", True): 4096}


class VocabShard(NamedTuple):
    """Which part of the vocabulary this rank holds."""

    start: int = 0  # vocabulary entry of the first row of `weight`
    size: int | None = None  # entries of the whole vocabulary that exist; rows beyond are padding. None: all rows exist
    group: dist.ProcessGroup | None = None  # the ranks that share the vocabulary; None: this one has all of it


_WHOLE = VocabShard()


@dataclass(frozen=True, slots=True)
class GradientGuess:
    """What the upstream gradient of `logprob` will be, as well as the results that are there can say.

    Attributes:
        of: (some tokens, their results) -> their gradients, shapes [n] each. Asked of the first tokens first, of every token
            once, so that it can go by all that it was shown before.
        unit: tokens are shown in multiples of this many, where as many are shown at a time.
    """

    of: Callable[[slice, TokenStats], Tensor]
    unit: int = 1


class _Options(NamedTuple):
    temperature: float
    entropy: bool
    plan: TilePlan
    group: dist.ProcessGroup | None
    start: int
    end: int  # vocabulary entries of all ranks that exist
    num_valid: int  # leading rows of this rank's weight that exist
    main_grad: Tensor | None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    keep_bytes: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    accumulate_into: Tensor | None = None,
    known_gradient: Tensor | GradientGuess | None = None,
) -> TokenStats:
    """Log-probability of every label under softmax(hidden @ weight.T / temperature), and optionally the entropy.

    Args:
        hidden: final hidden states.
        weight: this rank's rows of the output embedding.
        labels: vocabulary entries; a negative label is ignored: its results are 0 and it gets no gradient. A label at or
            beyond `vocab_size` raises on the CPU and yields NaN elsewhere (a check would stall the device).
        temperature: divides the logits.
        entropy: also return the entropy of every distribution, differentiable.
        chunk_tokens: at most this many rows of logits exist at a time; None or 0 lets the device's cache decide.
        keep_bytes: as many logits as fit are held from forward to backward instead of being computed again there.
        tp_group: ranks that share the vocabulary, each holding rows [vocab_start, vocab_start + v) of it.
        vocab_start: first vocabulary entry of this rank's `weight`.
        vocab_size: entries of the whole vocabulary that exist. Rows of `weight` beyond are padding: they carry no
            probability and get no gradient. None: all rows exist; required with a `tp_group` of more than one rank.
        accumulate_into: a buffer of the weight's shape to which its gradient is added in place of being returned, such as
            megatron-core's fp32 `main_grad`; `weight.grad_added_to_main_grad` is then set as its
            gradient_accumulation_fusion does.
        known_gradient: the upstream gradient of `logprob` where it does not depend on the results, or a guess of it from them.
            Both gradients are then made in the forward pass, of as many tokens at a time as have their logits in `keep_bytes`
            (of at least `LEAST_GROUP`; where fewer fit it is not made use of). What is known has to arrive in a backward pass,
            or it raises (on an accelerator as a device-side assertion); where NaN arrives, so it is. What was guessed may turn
            out otherwise: the gradients of those tokens are computed then. The entropy is not differentiable.

    Shapes: hidden [t, h], weight [v, h], labels, known_gradient [t], labels int64 -> logprob [t], entropy [t] or None.
    Units: nats. Outputs are fp32 (fp64 for fp64 inputs) whatever the inputs' dtype.
    Cost: products of 2 t h v FLOPs forward and 6 k h v backward, k = tokens with a non-zero upstream gradient (4 k h v of what
        is kept, and where the gradient is known: forward; a wrong guess costs 6 h v a token). Peak bytes beyond inputs and
        gradients: on a CPU a tile of 4 MiB; for half precision [t, h] in fp32 and [t, h] once more; when tokens are left out
        twice [k, h]; and keep_bytes. A guess holds `hidden` until the backward pass, as without it.
        On an accelerator the host waits once forward (are there ignored labels?) and once backward (how many are kept?).
    Collectives: forward, over tp_group: one MAX of [t] and one SUM of [2, t] fp64 ([3, t] with entropy), or as many of each as
        there are groups of tokens where the gradient is known. Backward: none; the
        gradient of `hidden` is this rank's part, and summing it over tp_group is the caller's, as everywhere in
        megatron-core (`copy_to_tensor_model_parallel_region` before the head, or the sequence-parallel gather).
    Error: at most twice plain torch's (tests/parity/test_linear_logprob.py).
    Raises: ShapeError for shapes, dtypes and ranges that do not fit. Differentiating twice raises.
    """
    shard = VocabShard(vocab_start, vocab_size, tp_group)
    # grad mode is off inside forward(), so whether a backward pass can follow has to be seen here
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    options = _check(hidden, weight, labels, shard, temperature, chunk_tokens, keep_bytes if differentiable else 0)
    if accumulate_into is not None and (
        accumulate_into.shape != weight.shape or accumulate_into.dtype not in (weight.dtype, torch.float32)
    ):
        raise ShapeError(
            f"linear_logprob: got accumulate_into {tuple(accumulate_into.shape)} {accumulate_into.dtype}; expected "
            f"{tuple(weight.shape)}, the weight's shape, in {weight.dtype} or torch.float32."
        )
    options = options._replace(entropy=entropy, main_grad=accumulate_into)
    if known_gradient is None:
        return TokenStats(*_LinearLogprob.apply(hidden, weight, labels, options))
    if isinstance(known_gradient, Tensor) and (known_gradient.shape != labels.shape or known_gradient.device != labels.device):
        raise ShapeError(
            f"linear_logprob: got known_gradient {tuple(known_gradient.shape)} on {known_gradient.device}; expected "
            f"{tuple(labels.shape)} on {labels.device}, a number for every label."
        )
    group = group_of_known(weight, keep_bytes) if differentiable else 0
    if not group:
        return TokenStats(*_LinearLogprob.apply(hidden, weight, labels, options))
    return TokenStats(*_KnownLogprob.apply(hidden, weight, labels, known_gradient, options, group, chunk_tokens))


def group_of_known(weight: Tensor, keep_bytes: int) -> int:
    """How many tokens' gradients are made at a time where they are known or guessed; 0 where that does not pay."""
    rows = keep_bytes // (weight.shape[0] * tile_dtype(weight.dtype, weight.device).itemsize)
    kind = "cpu" if weight.device.type == "cpu" else "cuda"
    return rows if rows >= LEAST_GROUP[kind, weight.dtype.itemsize < 4] else 0


@torch.no_grad()
def linear_top1(hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard = _WHOLE) -> tuple[Tensor, Tensor]:
    """Log-probability of every label and whether no vocabulary entry is likelier; for evaluation, without gradients.

    Shapes: hidden [t, h], weight [v, h], labels [t] int64 -> logprob [t], correct [t] bool. An ignored label gives 0, False.
    Collectives: as `linear_logprob` without entropy, which see for the arguments.
    """
    options = _check(hidden, weight, labels, shard, 1.0, None, 0)
    state, _, _ = _statistics(hidden, weight, labels, options)
    return state.target - state.largest - _log_sum(state), (labels >= 0) & (state.target == state.largest)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: VocabShard,
    temperature: float,
    chunk_tokens: int | None,
    keep_bytes: int,
) -> _Options:
    """Validate what a caller can get wrong."""
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
    if not hidden.device == weight.device == labels.device:
        raise ShapeError(
            f"linear_logprob: got hidden on {hidden.device}, weight on {weight.device}, labels on {labels.device}; "
            "expected one device."
        )
    if not 0.0 < temperature < float("inf"):
        raise ShapeError(f"linear_logprob: got temperature {temperature}; expected a number above 0.")
    if (chunk_tokens is not None and chunk_tokens < 0) or keep_bytes < 0:
        raise ShapeError(
            f"linear_logprob: got chunk_tokens {chunk_tokens}, keep_bytes {keep_bytes}; expected numbers that are not "
            "negative (chunk_tokens 0 or None to choose)."
        )
    start, size, group = shard
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    if group is not None and size is None:
        raise ShapeError("linear_logprob: with a tp_group, vocab_size (entries of the whole vocabulary) must be given.")
    if start < 0 or (size is not None and size <= 0):
        raise ShapeError(f"linear_logprob: got vocab_start {start}, vocab_size {size}; expected >= 0 and > 0.")
    end = start + weight.shape[0] if size is None else size
    if not torch.compiler.is_compiling() and labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= end:
        raise ShapeError(
            f"linear_logprob: got label {int(labels.max())}; expected labels below vocab_size = {end} (negative = ignored). "
            "The corpus was tokenized with a larger vocabulary than the model's: raise model.vocab_size."
        )
    num_valid = min(max(end - start, 0), weight.shape[0])
    plan = plan_tiles(hidden.shape[0], num_valid, hidden.dtype, hidden.device, chunk_tokens, keep_bytes)
    return _Options(float(temperature), False, plan, group, start, end, num_valid, None)


def _statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options
) -> tuple[RowState, tuple[Tensor, Tensor, Tensor], Tensor]:
    """The state of every token over the whole vocabulary; (columns of labels, largest, best) of this rank; kept logits."""
    local = labels - options.start
    columns = torch.where((local >= 0) & (local < options.num_valid), local, _ANOTHER_RANKS)
    columns = torch.where(labels < 0, _IGNORED, columns)
    largest, total, weighted, target, best, kept = head_statistics(
        hidden, weight[: options.num_valid], columns, 1.0 / options.temperature, options.entropy, *options.plan
    )
    state = RowState(largest, total, weighted if options.entropy else None, target, best)
    if options.group is not None:
        state = _combine_over_ranks(state, labels < 0, options.group)
    # a label beyond every rank's vocabulary (refused on a CPU) has no target anywhere
    state = state._replace(target=state.target.masked_fill(labels >= options.end, torch.nan))
    return state, (columns, largest, best), kept


def _combine_over_ranks(state: RowState, ignored: Tensor, group: dist.ProcessGroup) -> RowState:
    """States of the parts of the vocabulary -> state of the whole, on every rank."""
    largest = state.largest.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    # of a rank that holds nothing but padding, largest is -inf and the sum 0
    shift = torch.where(state.sum > 0.0, state.largest.double() - largest.double(), 0.0)
    shift = torch.where(state.largest == largest, 0.0, shift)  # also where both are infinite
    factor = shift.exp()
    sums = [state.sum * factor, state.target.double()]
    if state.weighted is not None:
        sums.append((state.weighted + shift * state.sum) * factor)
    packed = torch.stack(sums)
    dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=group)
    total = torch.where(ignored, 1.0, packed[0])
    return RowState(largest, total, None if state.weighted is None else packed[2], packed[1].to(largest.dtype), state.best)


def _log_sum(state: RowState) -> Tensor:
    return state.sum.log().to(state.largest.dtype)


class _Results(NamedTuple):
    """What the forward pass leaves, for the tokens it was given."""

    hidden: Tensor
    weight: Tensor
    columns: Tensor  # of the labels, on this rank
    kept: Tensor
    largest: Tensor
    log_sum: Tensor
    local_largest: Tensor
    best: Tensor
    logprob: Tensor
    entropy: Tensor | None


def _results(hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options) -> _Results:
    state, (columns, local_largest, best), kept = _statistics(hidden, weight, labels, options)
    log_sum = _log_sum(state)
    logprob = state.target - state.largest - log_sum
    entropy = None
    if state.weighted is not None:
        entropy = (state.sum.log() - state.weighted / state.sum).to(logprob.dtype)
    return _Results(hidden, weight, columns, kept, state.largest, log_sum, local_largest, best, logprob, entropy)


def _gradients(
    results: _Results, grad_logprob: Tensor | None, grad_entropy: Tensor | None, needs: tuple[bool, bool], options: _Options
) -> tuple[Tensor, Tensor]:
    """Of hidden and weight, from the upstream gradients; [0] for what is not needed or went to `main_grad`."""
    scale = 1.0 / options.temperature
    logprob = results.logprob
    g = torch.zeros_like(logprob) if grad_logprob is None else grad_logprob * scale
    # p - 1 of the label from the logarithm: exact where p is close to 1
    at_label = -g * torch.expm1(logprob)
    constant, slope = -g, None
    if grad_entropy is not None:
        assert results.entropy is not None
        e = grad_entropy * scale
        constant, slope = constant - e * results.entropy, -e
        at_label = at_label - e * logprob.exp() * (logprob + results.entropy)
    best_log_p = results.local_largest - results.largest - results.log_sum
    at_best = best_log_p.exp() * (constant if slope is None else constant + slope * best_log_p)
    # NaN counts as active, so that it is seen
    active = (g != 0) if slope is None else (g != 0) | (slope != 0)
    gradients: tuple[Tensor, Tensor] = head_gradients(
        results.hidden,
        results.weight[: options.num_valid],
        results.columns,
        active & (results.columns != _IGNORED),
        results.kept,
        results.largest,
        results.log_sum,
        constant,
        slope,
        at_label,
        results.best,
        at_best,
        scale,
        *options.plan,
        *needs,
        None if options.main_grad is None else options.main_grad[: options.num_valid],
    )
    return gradients


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # only so under create_graph=True
        raise RuntimeError(
            "linear_logprob: create_graph=True asks for second derivatives, which it does not have; use ops.reference"
        )


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options) -> tuple[Tensor, Tensor | None]:
        results = _results(hidden, weight, labels, options)
        ctx.save_for_backward(*results)
        ctx.options = options
        ctx.parameter = weight if options.main_grad is not None else None
        ctx.set_materialize_grads(False)
        return results.logprob, results.entropy

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        results, options = _Results(*ctx.saved_tensors), ctx.options
        _refuse_second_derivatives()
        if grad_logprob is None and grad_entropy is None:
            return None, None, None, None
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden, grad_weight = _gradients(results, grad_logprob, grad_entropy, needs, options)
        return (
            grad_hidden if needs[0] else None,
            _weight_result(results.weight, ctx.parameter, grad_weight, options) if needs[1] else None,
            None,
            None,
        )


class _KnownLogprob(torch.autograd.Function):
    """Both gradients in the forward pass; the backward pass hands them on, corrected where they were guessed wrong."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        known: Tensor | GradientGuess,
        options: _Options,
        group: int,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = options.main_grad
        if total is None and needs[1]:
            total = weight.new_zeros(weight.shape, dtype=wide_dtype(weight.dtype))
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        found, promised = [], []
        for span in _groups(hidden.shape[0], group, known):
            rows, itemsize = span.stop - span.start, tile_dtype(hidden.dtype, hidden.device).itemsize
            all_logits = rows * options.num_valid * itemsize
            plan = plan_tiles(rows, options.num_valid, hidden.dtype, hidden.device, chunk_tokens, all_logits)
            of_group = options._replace(plan=plan, main_grad=total)
            results = _results(hidden[span], weight, labels[span], of_group)
            upstream = _known_of(known, span, results)
            own = _gradients(results, upstream, None, needs, of_group)[0]
            if grad_hidden is not None:
                grad_hidden[span] = own
            promised.append(upstream)
            found.append(results._replace(kept=results.kept.new_empty(0)))
            del results, own  # before the logits of the next group are made
        results = _joined(found, hidden, weight)
        is_guess = isinstance(known, GradientGuess)
        ctx.options = options._replace(plan=options.plan._replace(kept_columns=0), entropy=False)
        ctx.parameter = weight if options.main_grad is not None else None
        # a guess leaves the weight's gradient as wide as it was summed, to add to it
        grad_weight = None if options.main_grad is not None or total is None else total if is_guess else total.to(weight.dtype)
        of_tokens = results._replace(entropy=None) if is_guess else ()
        ctx.save_for_backward(torch.cat(promised), grad_hidden, grad_weight, *of_tokens)
        if results.entropy is not None:
            ctx.mark_non_differentiable(results.entropy)
        return results.logprob, results.entropy

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        promised, grad_hidden, grad_weight, *of_tokens = ctx.saved_tensors
        _refuse_second_derivatives()
        if of_tokens:
            results = _Results(*of_tokens)
            grad_hidden, grad_weight = _corrected(results, promised, grad_logprob, grad_hidden, grad_weight, ctx.options)
        else:
            broken = grad_logprob.isnan()  # of a loss that is no number, which has to be seen
            torch._assert_async(
                ((grad_logprob == promised) | broken).all(),
                "linear_logprob: the gradient of logprob that backward was given is not the known_gradient that forward was "
                "given, so the weight's gradient is wrong; expected the same numbers. Leave known_gradient out where a loss is "
                "scaled or masked after the call.",
            )
            if grad_hidden is not None:
                grad_hidden = grad_hidden.masked_fill(broken[:, None], torch.nan)
        if ctx.needs_input_grad[1] and ctx.parameter is not None:
            grad_weight = _placeholder(ctx.parameter)
        return grad_hidden, grad_weight, None, None, None, None, None


def _corrected(
    results: _Results,
    promised: Tensor,
    arrived: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    options: _Options,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients made for a guess -> those for what arrived: what is missing for the difference is added.

    Of what is given only `options.main_grad` is changed; grad_weight is wide, and comes back in the weight's dtype.
    """
    missing = arrived - promised  # NaN where NaN arrived, which is seen in the results
    if bool((missing != 0.0).any()):
        total = grad_weight.clone() if options.main_grad is None and grad_weight is not None else options.main_grad
        needs = grad_hidden is not None, total is not None
        own, _ = _gradients(results, missing, None, needs, options._replace(main_grad=total))
        if grad_hidden is not None:
            # nothing is left of a token whose gradient was not to be made, not even the rounding of a difference
            grad_hidden = (grad_hidden + own).masked_fill(((arrived == 0.0) & (missing != 0.0))[:, None], 0.0)
        if grad_weight is not None:
            grad_weight = total
    return grad_hidden, None if grad_weight is None else grad_weight.to(results.weight.dtype)


def _joined(parts: Sequence[_Results], hidden: Tensor, weight: Tensor) -> _Results:
    """The results of neighbouring groups as one, without logits."""
    of_tokens = {name: [getattr(part, name) for part in parts] for name in _Results._fields if name not in ("hidden", "weight")}
    joined = {name: None if values[0] is None else torch.cat(values) for name, values in of_tokens.items()}
    return _Results(hidden, weight, **joined)  # type: ignore[arg-type]


def _known_of(known: Tensor | GradientGuess, tokens: slice, results: _Results) -> Tensor:
    """The upstream gradient of a group's log-probabilities."""
    if isinstance(known, Tensor):
        return known[tokens].detach().to(results.logprob.dtype)
    found = known.of(tokens, TokenStats(results.logprob, results.entropy))
    if found.shape != results.logprob.shape:
        raise ShapeError(
            f"linear_logprob: the guess known_gradient gave {tuple(found.shape)} for {tuple(results.logprob.shape)} tokens; "
            "expected a number for every one."
        )
    return found.detach().to(results.logprob.dtype)


def _groups(num_tokens: int, group: int, known: Tensor | GradientGuess) -> list[slice]:
    """Of about equal size, and of whole units where one fits."""
    unit = known.unit if isinstance(known, GradientGuess) and known.unit <= group else 1
    whole = spans(-(-num_tokens // unit), group // unit)
    return [slice(each.start * unit, min(each.stop * unit, num_tokens)) for each in whole]


def _weight_result(weight: Tensor, parameter: Tensor | None, grad: Tensor, options: _Options) -> Tensor | None:
    """What autograd gets for the weight: the gradient, or megatron-core's placeholder when it went to its `main_grad`."""
    if parameter is None:
        if options.num_valid == weight.shape[0]:
            return grad
        padded = weight.new_zeros(weight.shape)
        padded[: options.num_valid] = grad
        return padded
    return _placeholder(parameter)


def _placeholder(parameter: Tensor) -> Tensor | None:
    """For a gradient that went to `main_grad`."""
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    return no_gradient(parameter)


def no_gradient(parameter: Tensor) -> Tensor:
    """Zeros of the parameter's shape that occupy nothing: a placeholder for a gradient that is in `main_grad`.

    DistributedDataParallel's hook only runs when some gradient arrives. Autograd hands a sparse one on as it is, where it would
    copy an expanded one; with the dense gradient of an input embedding that is the same parameter it adds up.
    """
    indices = torch.empty(parameter.dim(), 0, dtype=torch.int64, device=parameter.device)
    values = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)
