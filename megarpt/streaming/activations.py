"""What is alive in a training step, allocation by allocation, by arithmetic alone.

A step is walked through in the order in which it runs, and a ledger is told what is taken and what is given back; the most it
ever held is the peak. Each entry is named after the tensor it stands for. Only the last layer of a stage is walked through: by
the time the others have their turn, what it held is free.

Dims: t tokens of a micro-batch on this rank (divided by context parallelism), n tokens worked on at once (t, or a chunk of
them); h hidden, q and k query and key/value width, f feed-forward width, v vocabulary rows, the last four divided by tensor
parallelism. Bytes throughout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from megarpt.streaming.shape import Shape, Stage

Way = Literal["plain", "recomputed", "streamed"]
WAYS: tuple[Way, ...] = ("plain", "recomputed", "streamed")
Kind = Literal["layer inputs", "layer working set", "head"]

_WIDE = 4  # bytes of fp32

# Of the head: megarpt/ops/head_tiles.py and linear_logprob.py, which need torch; a test compares them.
TILE_COLUMNS = {"cpu": 1024, "cuda": 4096}
TILE_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
LEAST_GROUP = {("cpu", False): 128, ("cpu", True): 2048, ("cuda", False): 1024, ("cuda", True): 4096}


@dataclass(slots=True)
class Ledger:
    """Named bytes that come and go."""

    alive: dict[tuple[Kind, str], float] = field(default_factory=dict)
    total: float = 0.0
    peak: float = 0.0
    at_peak: dict[tuple[Kind, str], float] = field(default_factory=dict)

    def take(self, kind: Kind, **entries: float) -> None:
        """All at once; names with underscores for blanks."""
        for name, size in entries.items():
            key = (kind, name.replace("_", " "))
            assert key not in self.alive, f"{name} is there already"
            self.alive[key] = size
            self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.alive)

    def free(self, *names: str) -> None:
        """Those that exist: which do depends on the model."""
        wanted = {name.replace("_", " ") for name in names}
        for key in [key for key in self.alive if key[1] in wanted]:
            self.total -= self.alive.pop(key)

    def touch(self, kind: Kind, **entries: float) -> None:
        """There for a moment."""
        self.take(kind, **entries)
        self.free(*entries)

    def rename(self, kind: Kind, old: str, new: str) -> None:
        """The same bytes under another name."""
        key = next(key for key in self.alive if key[1] == old.replace("_", " "))
        self.alive[kind, new.replace("_", " ")] = self.alive.pop(key)


@dataclass(frozen=True, slots=True)
class Work:
    """A micro-batch, and how it is worked on."""

    way: Way
    seq_length: int
    micro_batch_size: int
    chunk_tokens: int  # streamed only
    keep_bytes: int  # of logits
    head_chunk_tokens: int
    num_microbatches: int
    weight_unit: int  # tokens that are best weighed together; 1: weights are known before; 0: only when all are there

    @property
    def num_tokens(self) -> int:
        return self.seq_length * self.micro_batch_size


@dataclass(frozen=True, slots=True)
class Peak:
    """The worst moment of a step, without parameters, gradients and optimizer."""

    total: float
    entries: Mapping[tuple[Kind, str], float]

    def by_kind(self) -> dict[Kind, float]:
        sums: dict[Kind, float] = defaultdict(float)
        for (kind, _), size in self.entries.items():
            sums[kind] += size
        return dict(sums)


def peak_of(shape: Shape, stage: Stage, work: Work) -> Peak:
    """Of one pipeline stage."""
    ledger = Ledger()
    kinds = [is_expert for count, is_expert in ((stage.dense_layers, False), (stage.expert_layers, True)) if count]
    # The last layer to run; of a mixture whose layers differ, the one that needs more.
    for is_expert in kinds:
        walk = _Walk(shape, stage, work, Ledger(), is_expert)
        walk.run()
        if walk.ledger.peak > ledger.peak:
            ledger = walk.ledger
    return Peak(ledger.peak, ledger.at_peak)


def chunk_lengths(shape: Shape, work: Work) -> tuple[int, int, int]:
    """(longest chunk, how many, most keys one of them sees) of this rank's tokens, as streaming/chunks.py cuts them where every
    sample is one document."""
    pieces = 1 if shape.cp == 1 else 2
    piece = work.num_tokens // (shape.cp * pieces)
    unit = shape.tp if shape.is_sequence_parallel else 1
    units, most = max(1, piece // unit), max(work.chunk_tokens // unit, 1)
    count = -(-units // most)
    bounds = [unit * (units * i // count) for i in range(count + 1)]
    first = work.num_tokens - piece  # the last piece sees most
    spans = [(first + start, first + end) for start, end in pairwise(bounds)]
    seen = max(end - start // work.seq_length * work.seq_length for start, end in spans)
    return max(end - start for start, end in spans), count * pieces, seen


class _Walk:
    """One forward and backward pass of a stage."""

    def __init__(self, shape: Shape, stage: Stage, work: Work, ledger: Ledger, is_expert: bool) -> None:
        self.d, self.stage, self.work, self.ledger, self.is_expert = shape, stage, work, ledger, is_expert
        self.tokens = work.num_tokens / shape.cp
        self.item = shape.item_bytes
        self.half_on_cpu = shape.on_cpu and self.item < _WIDE
        # a norm that copies its input to fp32 has no use for it afterwards
        self.norms_copy = self.half_on_cpu and shape.is_rms

    def shared(self, tokens: float) -> float:
        """Tokens of the parts that sequence parallelism divides."""
        return tokens / self.d.tp if self.d.is_sequence_parallel else tokens

    def run(self) -> None:
        take, free = self.ledger.take, self.ledger.free
        self._forward_of_layers()
        if self.stage.has_head:
            self._final_norm_forward()
            self._head()
            free("logits kept", "hidden gathered", "head statistics")
            self._norm_backward("final", self.d.hidden, self.tokens, gradient_in="final norm gradient")
            self.ledger.rename("layer working set", "final input gradient", "gradient")
        else:
            take("layer working set", gradient=self.shared(self.tokens) * self.d.hidden * self.item)
        if self.work.way == "streamed":
            self._streamed_backward()
        else:
            self._whole_backward()
        if self.stage.has_embedding:
            self._embedding_backward()

    # Forward

    def _forward_of_layers(self) -> None:
        d, take, way = self.d, self.ledger.take, self.work.way
        residual = self.shared(self.tokens) * d.hidden * self.item
        others = self.stage.layers - 1
        if d.has_rope:
            take("layer inputs", rotary_table=self.work.seq_length * d.rotary_size * _WIDE)
            take("layer inputs", rotary_angles=self.tokens * d.rotary_size * _WIDE)
        # what the norms read: kept by the layers themselves unless everything is
        kept = 0.0 if self.norms_copy and way == "plain" else residual
        take("layer inputs", first_input=kept)
        if way == "plain":
            each = self._saved_by_a_layer(False) * self.stage.dense_layers
            each += self._saved_by_a_layer(True) * self.stage.expert_layers
            each -= self._saved_by_a_layer(self.is_expert)
            take("layer inputs", kept_by_the_other_layers=each)
            per_micro_batch = kept + each + self._saved_by_a_layer(self.is_expert)
        else:
            # a layer of experts is streamed in two halves, and the second keeps its input too
            halves = self.stage.expert_layers if way == "streamed" else 0
            own = int(self.is_expert and way == "streamed")
            take("layer inputs", inputs_of_the_other_layers=others * residual + (halves - own) * residual)
            per_micro_batch = (self.stage.layers + halves) * residual
        self._pipeline(per_micro_batch, residual)
        if d.is_sequence_parallel:  # where the inputs of matrix products are gathered
            gathered = self.tokens if way != "streamed" else chunk_lengths(d, self.work)[0]
            take("layer working set", gather_buffer=gathered * d.hidden * self.item)
        if way == "plain":
            self._attention_forward("layer inputs", self.tokens)
            self._mlp_forward("layer inputs", self.tokens)
        elif own:
            take("layer inputs", middle=residual)
        take("layer inputs", output=residual)

    def _pipeline(self, per_micro_batch: float, residual: float) -> None:
        """What waits for its backward pass: the earlier the stage, the more. Outputs that have been sent are given back on an
        accelerator only."""
        d, rank, count = self.d, self.stage.number, self.work.num_microbatches
        if d.pp == 1:
            return
        pieces = d.vpp or 1
        if d.vpp is None:  # 1F1B
            waiting = min(d.pp - rank, count)
        else:
            waiting = min((d.pp - rank - 1) * 2 + (d.vpp - 1) * d.pp + 1, count * d.vpp)
        outputs = waiting - pieces if d.on_cpu and (d.vpp or not self.stage.has_head) else 0
        others = max(0.0, waiting / pieces - 1.0) * per_micro_batch + max(0, outputs) * residual
        self.ledger.take("layer inputs", other_micro_batches=others)
        if count > 1:  # the last that was sent and, interleaved, what is received meanwhile
            self.ledger.take("layer inputs", sent_and_received=(1 if d.vpp is None else 2 + 2 * pieces) * residual)

    def _free_output(self) -> None:
        """The last layer's; on a CPU a pipeline's schedule holds it until its backward pass is over."""
        if self.stage.has_head or not self.d.on_cpu:
            self.ledger.free("output")

    def _saved_by_a_layer(self, is_expert: bool) -> float:
        """From its forward to its backward pass, the output (the next layer's input) included and the input not."""
        count = self.stage.expert_layers if is_expert else self.stage.dense_layers
        if not count:
            return 0.0
        walk = _Walk(self.d, self.stage, self.work, Ledger(), is_expert)
        walk._attention_forward("layer inputs", self.tokens)
        walk._mlp_forward("layer inputs", self.tokens)
        return walk.ledger.total + (0.0 if self.norms_copy else self.shared(self.tokens) * self.d.hidden * self.item)

    def _norm_forward(self, kind: Kind, name: str, width: float, tokens: float) -> None:
        """What a norm keeps besides its input and its output: on a CPU torch's RMSNorm is not one kernel."""
        if self.d.is_rms and self.d.on_cpu:
            wide = tokens * width * _WIDE
            self.ledger.take(kind, **{f"{name}_normalized": wide})
            if self.norms_copy:
                self.ledger.take(kind, **{f"{name}_in_fp32": wide})

    def _attention_forward(self, kind: Kind, n: float, *, is_chunk: bool = False, has_prefix: bool = False) -> None:
        """A layer up to the sum after its attention, with its graph."""
        d, take, item = self.d, self.ledger.take, self.item
        rows = self.shared(n)
        self._norm_forward(kind, "norm1", d.hidden, rows)
        take(kind, norm1_output=rows * d.hidden * item)
        # Queries, keys and values are views of one tensor, which lives on as long as one of them is needed; a chunk's keys and
        # values are not: attention reads those of all tokens.
        if not is_chunk or not d.has_rope or d.has_qk_norm:
            take(kind, qkv=n * d.qkv * item)
        if d.groups > 1 and d.heads > d.groups and (d.has_qk_norm or not d.has_rope):
            take(kind, queries_in_order=n * d.q * item)  # heads of several groups do not merge without a copy
        if d.has_qk_norm:
            self._norm_forward(kind, "query norm", d.q, n)
            self._norm_forward(kind, "key norm", d.k, n)
            if self.norms_copy:
                self.ledger.free("queries in order")
                if is_chunk:
                    self.ledger.free("qkv")
        if d.has_rope:
            take(kind, cosines_and_sines=4 * n * d.rotary_size * item)
            take(kind, queries_rotated=n * d.q * item)
            if not is_chunk:
                take(kind, keys_rotated=n * d.k * item)
        elif d.has_qk_norm:
            take(kind, queries_normed=n * d.q * item)
            if not is_chunk:
                take(kind, keys_normed=n * d.k * item)
        take(kind, attention_output=n * d.q * item, log_sums=n * d.heads * _WIDE)
        if has_prefix and d.on_cpu:  # heads first, joined over segments, then tokens first
            take(kind, attention_output_joined=n * d.q * item, attention_output_reordered=n * d.q * item)
        if not self.norms_copy:
            take(kind, middle=rows * d.hidden * item)

    def _mlp_forward(self, kind: Kind, n: float) -> None:
        """From there up to the sum at the end of the layer, without that sum."""
        rows = self.shared(n)
        self._norm_forward(kind, "norm2", self.d.hidden, rows)
        self.ledger.take(kind, norm2_output=rows * self.d.hidden * self.item)
        if self.is_expert:
            self._experts_forward(kind, rows)
        else:
            self._feed_forward(kind, n, self.d.ffn)

    def _feed_forward(self, kind: Kind, n: float, width: float) -> None:
        d, take, item = self.d, self.ledger.take, self.item
        take(kind, fc1_output=n * d.fc1(int(width)) * item)  # with its bias
        if d.is_gated and not d.is_fused:
            take(kind, activation=n * width * item, linear_half=n * width * item)
        take(kind, activation_output=n * width * item)

    def _experts_forward(self, kind: Kind, rows: float) -> None:
        """Balanced routing: each rank gets as many tokens as it sends."""
        d, item = self.d, self.item
        assert d.experts is not None
        routed = rows * d.experts.topk * (d.tp if d.is_sequence_parallel else 1)
        take = self.ledger.take
        take(kind, routing=rows * d.experts.total * 3 * _WIDE)
        take(kind, tokens_routed=routed * d.hidden * item)
        self._feed_forward(kind, routed, d.experts.width)
        take(kind, activation_weighted=routed * d.experts.width * item)
        if d.experts.shared_width:
            width, n = d.experts.shared_width, rows * (d.tp if d.is_sequence_parallel else 1)
            take(kind, shared_experts=n * (d.fc1(width) + (3 if d.is_gated else 1) * width) * item)

    def _final_norm_forward(self) -> None:
        rows = self.shared(self.tokens)
        self._norm_forward("head", "final", self.d.hidden, rows)
        self.ledger.take("head", final_output=rows * self.d.hidden * self.item)
        if self.norms_copy:
            self.ledger.free("output")

    # The head

    def _head(self) -> None:
        """megarpt/ops/linear_logprob.py, all tokens trained."""
        d, take, free, item, t = self.d, self.ledger.take, self.ledger.free, self.item, self.tokens
        if d.is_sequence_parallel:
            take("head", hidden_gathered=t * d.hidden * item)
        if group := group_of(d, self.work):
            take("head", final_norm_gradient=t * d.hidden * item)
            self._head_forward(group, kept=d.vocab)
            self._head_gradients(group, result="gradient_of_a_group")
            free("gradient of a group", "final output", "logits kept", "head statistics", "hidden gathered")
        else:
            self._head_forward(t, kept=tile_of(d, self.work)[2])
            self._head_gradients(t, result="final_norm_gradient")
        if d.is_sequence_parallel:
            self.ledger.rename("head", "final norm gradient", "gathered gradient")
            take("head", final_norm_gradient=self.shared(t) * d.hidden * item)
            free("gathered gradient")

    def _head_forward(self, t: float, *, kept: int) -> None:
        rows, columns, _, logit = tile_of(self.d, self.work)
        self.ledger.take("head", logits_kept=kept * t * logit)
        # label's column, largest, log of the sum, label's logit, best column and their likes; forward also fp64 sums
        self.ledger.take("head", head_statistics=t * 44.0)
        self.ledger.touch("head", tile=min(rows, t) * columns * logit, running_sums=t * 32.0)

    def _head_gradients(self, t: float, *, result: str) -> None:
        d, take, free, item = self.d, self.ledger.take, self.ledger.free, self.item
        rows, columns, _, logit = tile_of(d, self.work)
        rows = min(rows, int(t))
        take("head", hidden_gradient_sum=t * d.hidden * _WIDE, tile=rows * columns * logit, per_token_factors=t * 24.0)
        if item < _WIDE:
            # a product of half precision, on a CPU before and after it is made fp32, is added to sums in fp32
            each = item + _WIDE if d.on_cpu else _WIDE
            if d.on_cpu:
                take("head", hidden_turned=t * d.hidden * item)
            else:
                take("head", tile_in_half=rows * columns * item)
            sum_of_block = columns * d.hidden * _WIDE
            if rows < t:  # from earlier tokens
                take("head", weight_gradient_of_a_block=sum_of_block)
            self.ledger.touch("head", product=rows * d.hidden * each)
            free("weight gradient of a block")
            self.ledger.touch("head", weight_gradient_of_a_block=sum_of_block, product=columns * d.hidden * each)
            take("head", **{result: t * d.hidden * item})
            free("hidden gradient sum", "hidden turned", "tile in half")
        else:
            self.ledger.rename("head", "hidden gradient sum", result)
        free("tile", "per token factors")

    # Backward

    def _weight_gradient(self, kind: Kind, size: float, *unneeded: str) -> None:
        """A matrix' gradient in the parameter's precision, until it has been added to main_grad; what its product saved is
        free by then."""
        self.ledger.take(kind, weight_gradient=size * self.item)
        self.ledger.free(*unneeded)
        if self.half_on_cpu:  # the sum of two precisions makes a copy there
            self.ledger.touch(kind, weight_gradient_in_fp32=size * _WIDE)
        self.ledger.free("weight gradient")

    def _norm_backward(self, name: str, width: float, n: float, *, gradient_in: str) -> None:
        """Leaves the gradient of the norm's input."""
        ledger, rows = self.ledger, self.shared(n)
        kind: Kind = "layer working set"
        if self.d.is_rms and self.d.on_cpu:
            wide = rows * width * _WIDE
            if self.half_on_cpu:
                ledger.take(kind, norm_gradient_in_fp32=wide)
            ledger.free(f"{name} output")
            ledger.take(kind, normalized_gradient=wide)
            ledger.touch(kind, norm_weight_products=wide)
            ledger.free(f"{name} normalized", gradient_in, "norm gradient in fp32")
            ledger.take(kind, norm_parts=2 * wide)
            ledger.free("normalized gradient", f"{name} in fp32")
            ledger.take(kind, **{f"{name}_input_gradient": rows * width * self.item})
            ledger.free("norm parts")
        else:
            ledger.take(kind, **{f"{name}_input_gradient": rows * width * self.item})
            ledger.free(gradient_in, f"{name} output")

    def _mlp_backward(self, kind: Kind, n: float) -> None:
        """From `gradient` (which the caller may go on holding) to `middle gradient`."""
        d, ledger, rows = self.d, self.ledger, self.shared(n)
        if self.is_expert:
            self._experts_backward(kind, rows)
        else:
            self._feed_forward_backward(kind, n, d.ffn, d.ffn)
        self._norm_backward("norm2", d.hidden, n, gradient_in="norm2 gradient")
        ledger.take(kind, middle_gradient=rows * d.hidden * self.item)
        ledger.free("norm2 input gradient")

    def _feed_forward_backward(self, kind: Kind, n: float, width: float, matrix_width: float) -> None:
        d, ledger, item = self.d, self.ledger, self.item
        columns = d.fc1(1)
        if d.is_sequence_parallel and not self.is_expert:
            ledger.take(kind, gradient_gathered=n * d.hidden * item)
        ledger.take(kind, activation_gradient=n * width * item)
        self._weight_gradient(kind, d.hidden * matrix_width, "activation output", "activation weighted")
        ledger.free("gradient gathered")
        if d.is_gated and not d.is_fused:
            ledger.take(kind, gate_gradient=n * width * item, linear_half_gradient=n * width * item)
            ledger.free("activation", "linear half", "activation gradient")
            ledger.take(kind, gate_input_gradient=n * width * item)
            ledger.free("gate gradient", "fc1 output")
            ledger.take(kind, fc1_gradient=n * columns * width * item)
            ledger.free("gate input gradient", "linear half gradient")
        else:
            ledger.take(kind, fc1_gradient=n * columns * width * item)
            ledger.free("activation gradient", "fc1 output")
        if d.is_sequence_parallel and not self.is_expert:
            ledger.take(kind, norm2_gradient_of_all=n * d.hidden * item)
        ledger.take(kind, norm2_gradient=(self.shared(n) if not self.is_expert else n) * d.hidden * item)
        self._weight_gradient(kind, d.hidden * columns * matrix_width, "norm2 output")
        ledger.free("fc1 gradient", "norm2 gradient of all")

    def _experts_backward(self, kind: Kind, rows: float) -> None:
        d, ledger, item = self.d, self.ledger, self.item
        assert d.experts is not None
        routed = rows * d.experts.topk * (d.tp if d.is_sequence_parallel else 1)
        ledger.take(kind, routed_gradient=routed * d.hidden * item)
        # experts one after another: the working set is one expert's share, and it is the last of them that comes first
        share = routed / d.experts.local
        ledger.take(kind, activation_gradient=share * d.experts.width * item)
        self._weight_gradient(kind, d.hidden * d.experts.width)
        ledger.take(kind, weighting_gradient=share * 2 * d.experts.width * item)
        ledger.free("activation weighted")
        ledger.take(kind, fc1_gradient=share * d.fc1(d.experts.width) * item)
        ledger.free("activation output", "activation", "linear half", "weighting gradient", "activation gradient")
        self._weight_gradient(kind, d.hidden * d.fc1(d.experts.width))
        ledger.free("fc1 output", "fc1 gradient", "shared experts")
        ledger.take(kind, routed_input_gradient=routed * d.hidden * item)
        ledger.free("routed gradient", "tokens routed")
        ledger.take(kind, norm2_gradient=rows * d.hidden * item)
        ledger.free("routed input gradient", "routing")

    def _attention_backward(self, kind: Kind, n: float, *, keys: float, is_chunk: bool = False) -> None:
        """From `middle gradient` to `norm1 input gradient`; `keys` are those that are seen."""
        d, ledger, item = self.d, self.ledger, self.item
        if d.is_sequence_parallel:
            ledger.take(kind, gradient_gathered=n * d.hidden * item)
        ledger.take(kind, attention_gradient=n * d.q * item)
        self._weight_gradient(kind, d.hidden * d.q, "attention output reordered")
        ledger.free("gradient gathered")
        ledger.take(kind, query_gradient=n * d.q * item, key_value_gradients=2 * keys * d.k * item)
        if not d.on_cpu:  # FlashAttention-2: sums of query gradients in fp32, key gradients of every query head by itself
            ledger.take(kind, kernel_workspace=n * d.q * _WIDE + (2 * keys * d.q * item if d.heads > d.groups else 0.0))
        elif is_chunk and keys > n:  # two products, for the keys before and the chunk's own, joined
            ledger.touch(kind, kernel_workspace=n * d.q * item + 2 * keys * d.k * item)
        ledger.free("kernel workspace", "attention gradient", "attention output", "attention output joined", "log sums")
        ledger.free("queries rotated", "keys rotated", "queries normed", "keys normed")
        if is_chunk:
            if self.half_on_cpu:
                ledger.touch(kind, key_gradients_in_fp32=keys * d.k * _WIDE)
            ledger.free("key value gradients")
            ledger.take(kind, key_value_gradients=2 * n * d.k * item)
        if d.has_rope:
            ledger.touch(kind, rotation=3 * n * d.q * item)
        ledger.free("cosines and sines")
        if d.has_qk_norm:
            self._norm_backward("query norm", d.q * (n / self.shared(n)), n, gradient_in="query gradient")
            ledger.rename(kind, "query norm input gradient", "query gradient")
            ledger.free("key norm normalized", "key norm in fp32", "queries in order")
        ledger.take(kind, qkv_gradient=n * d.qkv * item)
        ledger.free("query gradient", "key value gradients", "qkv", "queries in order")
        if d.is_sequence_parallel:
            ledger.take(kind, norm1_gradient_of_all=n * d.hidden * item)
        ledger.take(kind, norm1_gradient=self.shared(n) * d.hidden * item)
        self._weight_gradient(kind, d.hidden * d.qkv, "norm1 output")
        ledger.free("qkv gradient", "norm1 gradient of all")
        self._norm_backward("norm1", d.hidden, n, gradient_in="norm1 gradient")

    def _whole_backward(self) -> None:
        ledger = self.ledger
        residual = self.shared(self.tokens) * self.d.hidden * self.item
        self._free_output()
        if self.work.way == "recomputed":
            self._attention_forward("layer working set", self.tokens)
            self._mlp_forward("layer working set", self.tokens)
            ledger.take("layer working set", output_again=residual)
        self._mlp_backward("layer working set", self.tokens)
        if self.work.way == "plain":
            ledger.free("gradient")
        self._attention_backward("layer working set", self.tokens, keys=self.tokens * self.d.cp)
        ledger.take("layer working set", input_gradient=residual)
        ledger.free("middle", "middle gradient", "norm1 input gradient", "output again")
        self._end_of_layers()

    def _streamed_backward(self) -> None:
        d, ledger, item = self.d, self.ledger, self.item
        residual = self.shared(self.tokens) * d.hidden * item
        all_keys = self.tokens * d.cp
        self._free_output()
        if self.is_expert:  # recomputed as a whole before the attention half is streamed
            self._mlp_forward("layer working set", self.tokens)
            ledger.take("layer working set", output_again=residual)
            self._mlp_backward("layer working set", self.tokens)
            ledger.free("gradient", "output again", "middle")
            ledger.rename("layer working set", "middle gradient", "gradient")
        n, count, seen = chunk_lengths(d, self.work)
        ledger.take("layer working set", keys_and_values=2 * all_keys * d.k * item, input_gradient=residual)
        ledger.take("layer working set", sums_of_key_and_value_gradients=2 * all_keys * d.k * _WIDE)
        self._attention_forward("layer working set", n, is_chunk=True, has_prefix=count > 1)
        if not self.is_expert:
            self._mlp_forward("layer working set", n)
            ledger.take("layer working set", output_again=self.shared(n) * d.hidden * item)
            self._mlp_backward("layer working set", n)
            ledger.free("output again")
        else:
            ledger.take("layer working set", middle_gradient=self.shared(n) * d.hidden * item)
        self._attention_backward("layer working set", n, keys=seen, is_chunk=True)
        ledger.free("middle", "middle gradient", "norm1 input gradient", "keys and values", "gradient")
        ledger.free("sums of key and value gradients")
        self._end_of_layers()

    def _end_of_layers(self) -> None:
        self.ledger.free("inputs of the other layers", "kept by the other layers", "first input")

    def _embedding_backward(self) -> None:
        """megarpt/model/embedding.py: rows are added to main_grad, in fp32."""
        if self.item < _WIDE:
            self.ledger.touch("head", embedding_gradient_in_fp32=self.tokens * self.d.hidden * _WIDE)
        self.ledger.free("input gradient")


def tile_of(shape: Shape, work: Work) -> tuple[int, int, int, int]:
    """(rows, columns, kept columns, bytes of a logit), as ops/head_tiles.py decides."""
    tokens, device = work.num_tokens // shape.cp, "cpu" if shape.on_cpu else "cuda"
    logit = shape.item_bytes if shape.on_cpu else _WIDE
    columns = min(TILE_COLUMNS[device], shape.vocab)
    rows = max(1, min(TILE_BYTES[device] // (columns * logit), work.head_chunk_tokens or tokens, tokens))
    kept = min(shape.vocab, work.keep_bytes // max(1, tokens * logit))
    return rows, columns, kept if kept == shape.vocab else kept - kept % columns, logit


def group_of(shape: Shape, work: Work) -> int:
    """Tokens whose logits exist at a time where the head makes its gradients at once, as ops/linear_logprob.py decides; 0 where
    it does not."""
    unit, device = work.weight_unit, "cpu" if shape.on_cpu else "cuda"
    if not unit:
        return 0
    most = work.keep_bytes // (shape.vocab * tile_of(shape, work)[3])
    if most < LEAST_GROUP[device, shape.item_bytes < _WIDE]:
        return 0
    unit = unit if unit <= most else 1
    units = work.num_tokens // shape.cp // unit
    return unit * -(-units // -(-units // (most // unit)))


def kept_share(shape: Shape, work: Work) -> float:
    """Of the logits, those that are not made again in the backward pass."""
    return 1.0 if group_of(shape, work) else tile_of(shape, work)[2] / shape.vocab
