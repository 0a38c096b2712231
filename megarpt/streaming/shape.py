"""What of a model one rank holds: sizes and parameter counts, from the configuration alone.

Dims: h hidden, q = query heads * head size, k = key/value heads * head size, f feed-forward width, v vocabulary rows; q, k, f
and v are this rank's part under tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megarpt.config.presets import PRESETS
from megarpt.config.schema import TrainingConfig
from megarpt.config.validate import layout_mistakes, model_fields
from megarpt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in one layer."""

    total: int
    local: int  # on this rank
    topk: int
    width: int  # of each, this rank's part of it
    shared_width: int  # of the experts that every token sees; 0 for none


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers of one pipeline stage."""

    number: int
    dense_layers: int
    expert_layers: int
    has_embedding: bool
    has_head: bool

    @property
    def layers(self) -> int:
        return self.dense_layers + self.expert_layers


@dataclass(frozen=True, slots=True)
class Shape:
    """The model and its layout, as one rank sees them."""

    hidden: int
    head_size: int
    heads: int  # of this rank
    groups: int  # key/value heads of this rank
    ffn: int
    is_gated: bool
    is_fused: bool  # activation and bias in one kernel (model.mcore.bias_activation_fusion)
    has_bias: bool
    has_qkv_bias: bool
    has_qk_norm: bool
    is_rms: bool
    has_rope: bool
    rotary_size: int  # of the head size
    learned_positions: int  # rows of the table; 0 for none
    is_tied: bool
    vocab: int  # rows on this rank, padding included
    experts: Experts | None
    stages: tuple[Stage, ...]
    item_bytes: int  # of a parameter and an activation
    tp: int
    is_sequence_parallel: bool
    cp: int
    pp: int
    vpp: int | None
    dp: int
    expert_dp: int
    has_distributed_optimizer: bool
    on_cpu: bool

    @property
    def q(self) -> int:
        return self.heads * self.head_size

    @property
    def k(self) -> int:
        return self.groups * self.head_size

    @property
    def qkv(self) -> int:
        return self.q + 2 * self.k

    def fc1(self, width: int) -> int:
        """Columns of the first matrix of a feed-forward layer of this width."""
        return 2 * width if self.is_gated else width

    def norm_parameters(self, width: int) -> int:
        return width if self.is_rms else 2 * width

    def attention_parameters(self) -> int:
        """Norm, projections and their biases."""
        h = self.hidden
        bias = self.qkv * (self.has_bias or self.has_qkv_bias) + h * self.has_bias
        qk_norm = 2 * self.norm_parameters(self.head_size) * self.has_qk_norm
        return self.norm_parameters(h) + h * self.qkv + self.q * h + bias + qk_norm

    def mlp_parameters(self, width: int) -> int:
        """Without the norm."""
        columns = self.fc1(width)
        return self.hidden * (columns + width) + (columns + self.hidden) * self.has_bias

    def layer_parameters(self, *, is_expert: bool) -> tuple[int, int]:
        """(of what every rank of the group has or shares, of routed experts)."""
        dense = self.attention_parameters() + self.norm_parameters(self.hidden)
        if not is_expert:
            return dense + self.mlp_parameters(self.ffn), 0
        assert self.experts is not None
        dense += self.hidden * self.experts.total  # the router
        if self.experts.shared_width:
            dense += self.mlp_parameters(self.experts.shared_width)
        return dense, self.experts.local * self.mlp_parameters(self.experts.width)

    def parameters(self, stage: Stage) -> tuple[int, int]:
        """(dense, routed experts) on a rank of this stage."""
        dense = stage.has_embedding * (self.vocab + self.learned_positions) * self.hidden
        if stage.has_head:
            own_matrix = not self.is_tied or not stage.has_embedding
            dense += self.norm_parameters(self.hidden) + own_matrix * self.vocab * self.hidden
        experts = 0
        for count, is_expert in ((stage.dense_layers, False), (stage.expert_layers, True)):
            if count:
                of_layer = self.layer_parameters(is_expert=is_expert)
                dense, experts = dense + count * of_layer[0], experts + count * of_layer[1]
        return dense, experts


def shape_of(cfg: TrainingConfig, world_size: int, vocab_size: int, *, on_cpu: bool) -> Shape:
    """The shape of a run on `world_size` ranks with a tokenizer of `vocab_size` entries.

    Raises:
        ConfigError: the world cannot be divided that way, or the model is of a kind that is not known here.
    """
    mistakes = layout_mistakes(cfg.parallel, world_size)
    if mistakes:
        raise ConfigError("\n  ".join(mistakes))
    fields, preset, parallel = model_fields(cfg), PRESETS[cfg.model.preset], cfg.parallel
    _refuse_unknown(fields)
    gpt = preset.gpt_arguments(cfg.model.gpt.model_dump())
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size or tp
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_size = fields.get("kv_channels") or hidden // heads
    ffn = fields.get("ffn_hidden_size") or 4 * hidden
    multiple = cfg.model.make_vocab_size_divisible_by * tp
    rows = -(-(cfg.model.vocab_size or vocab_size) // multiple) * multiple
    experts = None
    if fields.get("num_moe_experts"):
        experts = Experts(
            total=fields["num_moe_experts"],
            local=fields["num_moe_experts"] // ep,
            topk=fields.get("moe_router_topk", 2),
            width=(fields.get("moe_ffn_hidden_size") or ffn) // etp,
            shared_width=(fields.get("moe_shared_expert_intermediate_size") or 0) // tp,
        )
    has_rope = gpt["position_embedding_type"] == "rope"
    return Shape(
        hidden=hidden,
        head_size=head_size,
        heads=heads // tp,
        groups=max(1, (fields.get("num_query_groups") or heads) // tp),
        ffn=ffn // tp,
        is_gated=bool(fields.get("gated_linear_unit", False)),
        is_fused=bool(fields.get("bias_activation_fusion", False)),
        has_bias=bool(fields.get("add_bias_linear", True)),
        has_qkv_bias=bool(fields.get("add_qkv_bias", False)),
        has_qk_norm=bool(fields.get("qk_layernorm", False)),
        is_rms=fields.get("normalization", "LayerNorm") == "RMSNorm",
        has_rope=has_rope,
        rotary_size=int(head_size * gpt.get("rotary_percent", 1.0)) if has_rope else 0,
        learned_positions=0 if has_rope else gpt["max_sequence_length"],
        is_tied=gpt["share_embeddings_and_output_weights"],
        vocab=rows // tp,
        experts=experts,
        stages=_stages(fields, pp),
        item_bytes=2 if cfg.train.precision == "bf16" else 4,
        tp=tp,
        is_sequence_parallel=parallel.sequence_parallel,
        cp=cp,
        pp=pp,
        vpp=parallel.virtual_pipeline_model_parallel_size,
        dp=world_size // (tp * pp * cp),
        expert_dp=world_size // (etp * ep * pp),
        has_distributed_optimizer=parallel.use_distributed_optimizer,
        on_cpu=on_cpu,
    )


def smallest_world(cfg: TrainingConfig) -> int:
    """Ranks that one copy of the model needs."""
    parallel = cfg.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    world = ranks
    while layout_mistakes(parallel, world):  # experts may need a whole number of copies
        world += ranks
    return world


_UNKNOWN = {
    "pipeline_model_parallel_layout": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "fp8": None,
    "cpu_offloading": False,
}


def _refuse_unknown(fields: Any) -> None:
    for name, unset in _UNKNOWN.items():
        if fields.get(name, unset) not in (unset, 0):
            raise ConfigError(f"model.mcore.{name}: got {fields[name]!r}; the memory of such a model cannot be planned")


def _stages(fields: Any, pp: int) -> tuple[Stage, ...]:
    """As megatron-core divides the layers (transformer_block.get_num_layers_to_build)."""
    total = fields["num_layers"]
    counts = [total // pp] * pp
    first, last = (fields.get(f"num_layers_in_{which}_pipeline_stage") for which in ("first", "last"))
    if first is not None or last is not None:
        rest = pp - (first is not None) - (last is not None)
        middle = (total - (first or 0) - (last or 0)) // rest if rest else 0
        counts = [middle] * pp
        counts[0], counts[-1] = middle if first is None else first, middle if last is None else last
    else:
        embedding, loss = (bool(fields.get(f"account_for_{which}_in_pipeline_split")) for which in ("embedding", "loss"))
        counts = [(total + embedding + loss) // pp] * pp
        counts[0] -= embedding
        counts[-1] -= loss
    is_expert = _expert_layers(fields, total)
    stages, start = [], 0
    for number, count in enumerate(counts):
        experts = sum(is_expert[start : start + count])
        stages.append(Stage(number, count - experts, experts, number == 0, number == pp - 1))
        start += count
    return tuple(stages)


def _expert_layers(fields: Any, total: int) -> Sequence[bool]:
    """Which layers have experts: all, every n-th, or as listed."""
    if not fields.get("num_moe_experts"):
        return [False] * total
    frequency = fields.get("moe_layer_freq", 1)
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(total)]
    return [bool(each) for each in frequency]
