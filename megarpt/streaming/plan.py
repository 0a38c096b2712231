"""How much memory a training step needs and what it costs, before anything is built.

Three ways to train are compared: plain (all activations are held), recomputed (megatron-core's full recomputation: each
layer's input is held) and streamed (StreamBP: likewise, and a layer is recomputed a chunk of tokens at a time). Memory is
predicted by activations.py, allocation by allocation; what does not depend on tokens is counted here. From both follow the
longest sequence that fits, and the largest chunk.

Units: a GB is 10^9 bytes. A card of 80 GB has some GB more than that, which is what the driver, communication and
fragmentation take; none of them is predicted.
Error: activations within 10 % of what is measured on a CPU (tests/unit/streaming/test_plan.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megarpt.config.schema import DEFAULT_CHUNK_TOKENS, DEFAULT_HEAD_KEEP_MIB, LanguageModelConfig
from megarpt.config.validate import layout_problems, ranks_by_student
from megarpt.errors import ConfigError
from megarpt.streaming.activations import Peak, Way, Work, kept_share, peak_of
from megarpt.streaming.shape import Shape, Stage, shape_of, smallest_world

logger = logging.getLogger(__name__)

GB = 10**9
SMALLEST_CHUNK = 128  # tokens; below, products are too small to be worth it on any device
_LONGEST = 2**27  # tokens
_FP32 = 4


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the rank that needs most, by what they are for."""

    parameters: float
    gradients: float
    optimizer: float
    layer_inputs: float  # all that is held from forward to backward
    layer_working_set: float
    head: float  # and the embedding
    optimizer_step: float  # there instead of the three before, while parameters are updated
    stage: int  # the pipeline stage of that rank

    @property
    def static(self) -> float:
        return self.parameters + self.gradients + self.optimizer

    @property
    def activations(self) -> float:
        return self.layer_inputs + self.layer_working_set + self.head

    @property
    def worst_moment(self) -> str:
        """Where the total is reached."""
        if self.optimizer_step > self.activations:
            return "optimizer step"
        return "a layer" if self.layer_working_set > self.head else "head or embedding"

    @property
    def total(self) -> float:
        return self.static + max(self.activations, self.optimizer_step)


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations per token, of the whole model."""

    layers: float  # forward and backward, the attention included
    attention: float  # of those
    recomputation: float  # of layers
    key_value_projection: float  # once more, because a chunk sees the keys of all tokens
    head: float
    head_recomputation: float  # of logits that were not kept

    @property
    def total(self) -> float:
        return self.layers + self.recomputation + self.key_value_projection + self.head + self.head_recomputation


@dataclass(frozen=True, slots=True)
class Situation:
    """A model on its ranks and the micro-batch it is given."""

    shape: Shape
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    keep_bytes: int = DEFAULT_HEAD_KEEP_MIB * 2**20
    head_chunk_tokens: int = 0
    trained_share: float = 1.0  # of the tokens
    weight_unit: int = 0  # tokens that are best weighed together; 1: weights are known before; 0: only when all are there

    @classmethod
    def of(cls, cfg: LanguageModelConfig, *, vocab_size: int, on_cpu: bool, world_size: int | None = None) -> Situation:
        """Of a run; `world_size` None is the smallest that holds one copy of the model.

        Raises:
            ConfigError: the world cannot be divided that way.
        """
        shape = shape_of(cfg, world_size or smallest_world(cfg), vocab_size, on_cpu=on_cpu)
        keep_mib = DEFAULT_HEAD_KEEP_MIB if cfg.train.head_keep_mib is None else cfg.train.head_keep_mib
        micro, objective = cfg.batch.micro_batch_size, cfg.objective
        num_microbatches = max(1, cfg.batch.global_batch_size // (micro * shape.dp))
        weight_unit = cfg.data.seq_length if shape.cp == 1 else 0  # guessed
        if not ranks_by_student(objective) or (objective.scope in ("rank", "global_batch") and num_microbatches > 1):
            weight_unit = 1
        return cls(
            shape=shape,
            seq_length=cfg.data.seq_length,
            micro_batch_size=micro,
            num_microbatches=num_microbatches,
            chunk_tokens=cfg.stream.chunk_tokens or DEFAULT_CHUNK_TOKENS,
            keep_bytes=keep_mib * 2**20,
            head_chunk_tokens=cfg.train.head_chunk_tokens,
            trained_share=objective.fraction if objective.weighting == "top_fraction" else 1.0,
            weight_unit=weight_unit,
        )

    @property
    def rank_tokens(self) -> int:
        """Of a micro-batch on one rank."""
        return self.seq_length * self.micro_batch_size // self.shape.cp

    def work(self, way: Way) -> Work:
        # Where chunks are dealt out among ranks, the head does not see tokens in their order.
        is_dealt = way == "streamed" and self.shape.is_sequence_parallel
        return Work(
            way=way,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            chunk_tokens=self.chunk_tokens,
            keep_bytes=self.keep_bytes,
            head_chunk_tokens=self.head_chunk_tokens,
            num_microbatches=self.num_microbatches,
            weight_unit=0 if is_dealt and self.weight_unit > 1 else self.weight_unit,
        )

    def memory(self, way: Way) -> Memory:
        """Of the stage that needs most."""
        return max((self._memory_of(stage, way) for stage in self.shape.stages), key=lambda memory: memory.total)

    def _memory_of(self, stage: Stage, way: Way) -> Memory:
        kinds = peak_of(self.shape, stage, self.work(way)).by_kind()
        parameters, gradients, optimizer, step = static_bytes(self.shape, stage)
        return Memory(
            parameters=parameters,
            gradients=gradients,
            optimizer=optimizer,
            layer_inputs=kinds.get("layer inputs", 0.0),
            layer_working_set=kinds.get("layer working set", 0.0),
            head=kinds.get("head", 0.0),
            optimizer_step=step,
            stage=stage.number,
        )

    def peak(self, way: Way) -> Peak:
        """Every tensor alive at the worst moment, on the stage that needs most."""
        return peak_of(self.shape, self.shape.stages[self.memory(way).stage], self.work(way))

    def whole_logits_bytes(self) -> float:
        """What a head that makes all logits takes beyond this one: the logits, in fp32 once more where they are not, and their
        gradient."""
        fp32_copy = _FP32 if self.shape.item_bytes < _FP32 else 0
        return float(self.rank_tokens * self.shape.vocab * (self.shape.item_bytes + fp32_copy + _FP32))

    def largest_sequence(self, way: Way, limit_bytes: float) -> int:
        """The largest seq_length with which a rank stays within the limit at this micro_batch_size; 0 where none does."""
        shape = self.shape
        unit = 64 * shape.cp * 2 * (shape.tp if shape.is_sequence_parallel else 1)

        def fits(units: int) -> bool:
            return replace(self, seq_length=units * unit).memory(way).total <= limit_bytes

        return unit * _largest(fits, _LONGEST // unit)

    def within(self, budget_bytes: float, *, may_keep: bool) -> Situation | None:
        """With the largest chunk that stays within the budget when streamed, and, where that may be chosen, as many logits
        held as still fit; None where not even the smallest chunk does."""
        least = replace(self, keep_bytes=0) if may_keep else self
        chunk = least.chunk_within(budget_bytes)
        if not chunk:
            return None
        chosen = replace(least, chunk_tokens=chunk)
        return replace(chosen, keep_bytes=chosen.keep_within(budget_bytes) * 2**20) if may_keep else chosen

    def chunk_within(self, budget_bytes: float) -> int:
        """The largest chunk with which a streamed step stays within the budget, holding the logits it holds; 0 for none."""
        unit = min(SMALLEST_CHUNK, self.rank_tokens)

        def fits(units: int) -> bool:
            return replace(self, chunk_tokens=units * unit).memory("streamed").total <= budget_bytes

        return min(unit * _largest(fits, -(-self.rank_tokens // unit)), self.rank_tokens)

    def keep_within(self, budget_bytes: float) -> int:
        """The most MiB of logits that can be held beside everything else; no more than there are."""
        logits = self.rank_tokens * self.shape.vocab * (self.shape.item_bytes if self.shape.on_cpu else _FP32)

        def fits(mib: int) -> bool:
            return replace(self, keep_bytes=mib * 2**20).memory("streamed").total <= budget_bytes

        return _largest(fits, -(-logits // 2**20))

    def cost(self, way: Way) -> Cost:
        """Attention is causal and sees half of the sequence on average, in a kernel that makes the scores again backward."""
        shape = self.shape
        h, attention = shape.hidden, 2.0 * self.seq_length * shape.q
        forward, scores, key_value = 0.0, 0.0, 0.0
        # megatron-core's own projection can leave the queries out. Under context parallelism keys are made before the forward
        # pass too, and differentiated in a walk of their own.
        again = 2 * shape.k if shape.on_cpu and not shape.is_sequence_parallel else shape.qkv
        for stage in shape.stages:
            products = stage.layers * h * (shape.qkv + shape.q)
            products += stage.dense_layers * h * (shape.fc1(shape.ffn) + shape.ffn)
            if shape.experts is not None:
                width = shape.experts.topk * shape.experts.width + shape.experts.shared_width
                products += stage.expert_layers * h * (shape.fc1(width) + width + shape.experts.total)
            forward += 2.0 * products
            scores += stage.layers * attention
            key_value += stage.layers * 2.0 * h * (again if shape.cp == 1 else again + 4 * shape.qkv)
        head, share = 2.0 * h * shape.vocab, self.trained_share
        return Cost(
            layers=shape.tp * (3.0 * forward + 3.5 * scores),
            attention=shape.tp * 3.5 * scores,
            recomputation=0.0 if way == "plain" else shape.tp * (forward + scores),
            key_value_projection=shape.tp * key_value if way == "streamed" else 0.0,
            head=shape.tp * head * (1.0 + 2.0 * share),
            head_recomputation=shape.tp * head * share * (1.0 - kept_share(shape, self.work(way))),
        )


def static_bytes(shape: Shape, stage: Stage) -> tuple[float, float, float, float]:
    """(parameters, gradients, optimizer, what its step takes for itself), for AdamW as train/optimizer.py builds it."""
    dense, experts = shape.parameters(stage)
    count = dense + experts
    # master weights where those of the model are in half precision, and two moments
    each = 2 * _FP32 if shape.item_bytes == _FP32 else 3 * _FP32
    owned = float(count)
    if shape.has_distributed_optimizer:
        owned = dense / (shape.dp * shape.cp) + experts / shape.expert_dp
    # torch's AdamW on an accelerator takes the square roots of all second moments at once
    step = 0.0 if shape.on_cpu else _FP32 * owned
    return count * shape.item_bytes, count * _FP32, each * owned, step


def within_budget(cfg: LanguageModelConfig, *, world_size: int, vocab_size: int, on_cpu: bool) -> LanguageModelConfig:
    """The configuration with `stream.chunk_tokens` (and `train.head_keep_mib`, where it is not given) chosen such that a rank
    stays within `stream.memory_budget_gb`; as it is where there is no budget.

    Raises:
        ConfigError: not even the smallest chunk fits; says how much is needed and what would help.
    """
    if cfg.stream.memory_budget_gb is None:
        return cfg
    budget = cfg.stream.memory_budget_gb * GB
    situation = Situation.of(cfg, vocab_size=vocab_size, on_cpu=on_cpu, world_size=world_size)
    chosen = situation.within(budget, may_keep=cfg.train.head_keep_mib is None)
    if chosen is None:
        raise ConfigError(_does_not_fit(cfg, situation, world_size, vocab_size))
    memory, keep_mib = chosen.memory("streamed"), chosen.keep_bytes // 2**20
    logger.info(
        "stream.memory_budget_gb %g: stream.chunk_tokens %d, train.head_keep_mib %d; %s GB expected, activations %s of them",
        cfg.stream.memory_budget_gb,
        chosen.chunk_tokens,
        keep_mib,
        gb(memory.total),
        gb(memory.activations),
    )
    stream = cfg.stream.model_copy(update={"chunk_tokens": chosen.chunk_tokens, "memory_budget_gb": None})
    return cfg.model_copy(update={"stream": stream, "train": cfg.train.model_copy(update={"head_keep_mib": keep_mib})})


def _does_not_fit(cfg: LanguageModelConfig, situation: Situation, world_size: int, vocab_size: int) -> str:
    if cfg.train.head_keep_mib is None:
        situation = replace(situation, keep_bytes=0)
    unit = min(SMALLEST_CHUNK, situation.rank_tokens)
    memory = replace(situation, chunk_tokens=unit).memory("streamed")
    budget = cfg.stream.memory_budget_gb
    assert budget is not None
    parts = ", ".join(
        f"{name.replace('_', ' ')} {gb(getattr(memory, name))}"
        for name in ("parameters", "gradients", "optimizer", "layer_inputs", "layer_working_set", "head")
    )
    helps = "; ".join(_what_would_help(cfg, situation, unit, world_size, vocab_size))
    return (
        f"stream.memory_budget_gb: got {budget:g}, but a rank needs {gb(memory.total)} GB even with chunks of {unit} tokens; "
        f"needed for {parts}; what would help: {helps}"
    )


def _what_would_help(
    cfg: LanguageModelConfig, situation: Situation, unit: int, world_size: int, vocab_size: int
) -> Iterator[str]:
    """Other settings and what a rank needs with them."""
    assert cfg.stream.memory_budget_gb is not None
    smallest = replace(situation, chunk_tokens=unit)
    longest = smallest.largest_sequence("streamed", cfg.stream.memory_budget_gb * GB)
    if longest:
        yield f"data.seq_length={longest} or less"
    if situation.micro_batch_size > 1:
        one = replace(smallest, micro_batch_size=1).memory("streamed").total
        yield f"batch.micro_batch_size=1 ({gb(one)} GB)"
    parallel = cfg.parallel
    changes: list[tuple[dict[str, Any], int]] = []
    if not parallel.use_distributed_optimizer and situation.shape.dp * situation.shape.cp > 1:
        changes.append(({"use_distributed_optimizer": True}, 1))
    for name in ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"):
        changes.append(({name: 2 * getattr(parallel, name)}, 2))
    for change, factor in changes:
        other = cfg.model_copy(update={"parallel": parallel.model_copy(update=change)})
        if layout_problems(other):
            continue
        try:
            found = Situation.of(other, vocab_size=vocab_size, on_cpu=situation.shape.on_cpu, world_size=factor * world_size)
        except ConfigError:
            continue  # the experts do not divide that way
        needed = replace(found, chunk_tokens=unit, keep_bytes=situation.keep_bytes).memory("streamed").total
        (key, value), ranks = next(iter(change.items())), f" on {factor * world_size} ranks" if factor > 1 else ""
        yield f"parallel.{key}={str(value).lower()}{ranks} ({gb(needed)} GB)"


def gb(size: float) -> str:
    """Bytes in GB, for people."""
    return f"{size / GB:.2f}" if size >= GB or not size else f"{size / GB:.2g}"


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits; 0 where none does. What fits is expected to go on fitting below."""
    if not fits(1):
        return 0
    good, bad = 1, most + 1
    while good * 2 < bad:  # most often the answer is far below the most there could be
        if not fits(good * 2):
            bad = good * 2
            break
        good *= 2
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
