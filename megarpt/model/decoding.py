"""The network one token per sequence at a time, beside its own forward pass.

Around the operations of a layer megatron-core runs much that only training needs (hooks, offloading, checkpoints, autograd
functions); with one token per sequence and a small model that is a large part of the time. Here the same parameters are walked
through by the operations alone; what keys and values are attended to is the caller's. Every variant of a layer that this walk
does not know is refused; tests compare it with the training forward pass.

megatron-core's own engines were no way out: its static one runs the layer as in training, needs all sequences to be of one
length, and admits none while others run; its dynamic one attends by flash-attn's kernels, which exist for CUDA only.

Dims: t tokens, h hidden, ng key/value heads of this rank, g query heads of each, hn head size, n sequences, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megarpt.errors import ConfigError
from megarpt.model.attention import SdpaCoreAttention
from megarpt.model.token_stats_gpt import TokenStatsGPT
from megarpt.ops.head_tiles import tile_dtype
from megarpt.parallel.context import query_ranges
from megarpt.streaming.chunks import PackedSegments

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""(number of the layer, query [t, ng, g, hn], keys and values [t, ng, 2, hn]) -> [t, ng, g, hn]"""

Linear = Callable[[Tensor], Tensor]


class CacheShape(NamedTuple):
    """What one token leaves behind on this rank."""

    num_layers: int
    num_groups: int  # key/value heads
    head_size: int
    dtype: torch.dtype


class Prefill(NamedTuple):
    """What is left of some prompts."""

    last_logits: Tensor  # [n, v of this rank], at the last token of each
    keys_values: list[Tensor]  # of each layer [t, ng, 2, hn], prompt after prompt


@dataclass(frozen=True, slots=True)
class _Layer:
    """The parameters of a layer, as functions."""

    attention_norm: Linear
    qkv: Linear
    query_norm: Linear | None
    key_norm: Linear | None
    core: SdpaCoreAttention
    attention_out: Linear
    mlp_norm: Linear
    mlp: Linear


class Decoder:
    """Runs a network over tokens whose keys and values the caller keeps.

    It holds the network's own parameters: what is trained in place is what the next call computes with. Nothing of it is
    computed for gradients.

    Collectives: under tensor parallelism two all-reduces of [t, h] per layer and one for the embedding.
    Error: log-probabilities within 1e-5 of the training forward pass in fp32 (tests/unit/rl/test_embedded_engine.py).

    Raises:
        ConfigError: a layer, or a layout, that the walk does not know.
    """

    def __init__(self, network: TokenStatsGPT) -> None:
        self.network, self.config, self.tp = network, network.config, network.pg_collection.tp
        _refuse_unknown(network)
        attention = network.decoder.layers[0].self_attention
        self.groups = attention.num_query_groups_per_partition
        self.queries_per_group = attention.num_attention_heads_per_partition // self.groups
        self.scale: float = attention.core_attention.softmax_scale
        self.shape = CacheShape(
            len(network.decoder.layers), self.groups, attention.hidden_size_per_attention_head, self.config.params_dtype
        )
        self._calls_modules = False  # other than norms
        self._layers = [self._take(layer) for layer in network.decoder.layers]
        self._rotation: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What is called as a module in evaluation mode, and afterwards as it was; the walk itself knows no other mode."""
        was_training = self._calls_modules and self.network.training
        if was_training:
            self.network.eval()
        try:
            yield
        finally:
            if was_training:
                self.network.train()

    def prefill(self, prompts: Sequence[Sequence[int]], device: torch.device) -> Prefill:
        """All prompts in one pass, as segments that do not see each other."""
        lengths = [len(prompt) for prompt in prompts]
        edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        t, longest = sum(lengths), max(lengths)
        packed = PackedSegments(
            qkv_format="sbhd",
            cu_seqlens_q=edges,
            cu_seqlens_kv=edges,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            ranges=query_ranges(edges, t, 0, 1),
        )
        kept: list[Tensor] = []

        def attend(number: int, query: Tensor, keys_values: Tensor) -> Tensor:
            kept.append(keys_values)
            key, value = keys_values.unsqueeze(1).unbind(3)  # [t, 1, ng, hn]
            out = self._layers[number].core(query.flatten(1, 2).unsqueeze(1), key, value, None, packed_seq_params=packed)
            return out.view(query.shape)

        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        hidden = self.run(tokens, positions, longest, attend)
        return Prefill(self.logits(hidden[edges[1:] - 1]), kept)

    def run(self, tokens: Tensor, positions: Tensor, num_positions: int, attend: Attend) -> Tensor:
        """Hidden states behind the last norm. Shapes: tokens, positions [t], all positions below num_positions -> [t, h]."""
        hidden = self._embed(tokens, positions)
        rotation = self._rotation_at(positions, num_positions)
        for number, layer in enumerate(self._layers):
            query, keys_values = self._project(layer, layer.attention_norm(hidden), rotation)
            attended = attend(number, query, keys_values)
            hidden = hidden + layer.attention_out(attended.flatten(1))
            hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
        norm = self.network.decoder.final_layernorm
        return hidden if norm is None else norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Shapes: [n, h] -> [n, v of this rank], with columns that pad the vocabulary."""
        network = self.network
        tied = network.share_embeddings_and_output_weights
        weight = network.shared_embedding_or_output_weight() if tied else network.output_layer.weight
        dtype = tile_dtype(hidden.dtype, hidden.device)  # as the head of training
        return F.linear(hidden, weight) if dtype == hidden.dtype else torch.mm(hidden, weight.t(), out_dtype=dtype)

    def _project(self, layer: _Layer, normalized: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(query, keys and values), their positions in them."""
        g = self.queries_per_group
        mixed = layer.qkv(normalized).view(len(normalized), self.groups, g + 2, self.shape.head_size)
        if layer.query_norm is not None and layer.key_norm is not None:
            parts = mixed.split((g, 1, 1), dim=2)
            mixed = torch.cat([layer.query_norm(parts[0]), layer.key_norm(parts[1]), parts[2]], dim=2)
        if rotation is not None:
            cos, sin = rotation
            mixed = torch.addcmul(mixed * cos, mixed.roll(self.shape.head_size // 2, -1), sin)
        return mixed[:, :, :g], mixed[:, :, g:]

    def _rotation_at(self, positions: Tensor, num_positions: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin [t, 1, g + 2, hn] of the angles, with the sign of the rotated half; values are turned by none."""
        if self.network.position_embedding_type != "rope":
            return None
        if self._rotation is None or len(self._rotation[0]) < num_positions:
            angles = self.network.rotary_pos_emb.get_emb(num_positions)[:, 0].to(positions.device)  # [num_positions, 1, hn]
            first, second = angles.sin().chunk(2, dim=-1)
            table = torch.stack([angles.cos(), torch.cat([-first, second], dim=-1)]).to(self.shape.dtype)
            self._rotation = (table[0], table[1])
        per_token = (len(positions), self.queries_per_group + 1, self.shape.head_size)
        cos, sin = (x[positions].expand(per_token) for x in self._rotation)
        return F.pad(cos, (0, 0, 0, 1), value=1.0).unsqueeze(1), F.pad(sin, (0, 0, 0, 1)).unsqueeze(1)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embedding = self.network.embedding
        words = embedding.word_embeddings
        if self.tp.size() == 1:
            hidden = F.embedding(tokens, words.weight)
        else:
            local = tokens - words.vocab_start_index
            elsewhere = (local < 0) | (local >= len(words.weight))
            hidden = F.embedding(local.masked_fill(elsewhere, 0), words.weight).masked_fill(elsewhere.unsqueeze(1), 0.0)
            dist.all_reduce(hidden, group=self.tp)
        return hidden + embedding.position_embeddings(positions) if embedding.add_position_embedding else hidden

    def _take(self, layer: TransformerLayer) -> _Layer:
        attention = layer.self_attention
        norms = (attention.q_layernorm, attention.k_layernorm)
        query_norm, key_norm = (None if norm is None or isinstance(norm, IdentityOp) else norm for norm in norms)
        return _Layer(
            attention_norm=_norm(layer.input_layernorm),
            qkv=self._linear(attention.linear_qkv),
            query_norm=query_norm,
            key_norm=key_norm,
            core=attention.core_attention,
            attention_out=self._linear(attention.linear_proj),
            mlp_norm=_norm(layer.pre_mlp_layernorm),
            mlp=self._mlp(layer.mlp),
        )

    def _linear(self, module: Any) -> Linear:
        """megatron-core's plain layers without their wrapping; others (Transformer Engine's) as they are, bias added."""
        if type(module) is ColumnParallelLinear or (type(module) is RowParallelLinear and self.tp.size() == 1):
            return lambda x: F.linear(x, module.weight, module.bias)
        if type(module) is not RowParallelLinear:
            return self._call(module)

        def summed(x: Tensor) -> Tensor:
            out = F.linear(x, module.weight)
            dist.all_reduce(out, group=self.tp)
            return out if module.bias is None else out + module.bias

        return summed

    def _mlp(self, module: Any) -> Linear:
        if type(module) is not MLP:
            return self._call(module)
        first, second = self._linear(module.linear_fc1), self._linear(module.linear_fc2)
        activation = self.config.activation_func
        if not self.config.gated_linear_unit:
            return lambda x: second(activation(first(x)))

        def gated(x: Tensor) -> Tensor:
            gate, up = first(x).chunk(2, dim=-1)
            return second(activation(gate) * up)

        return gated

    def _call(self, module: Any) -> Linear:
        """A module of [t, 1, h] that returns its bias beside the result, on [t, h]."""
        self._calls_modules = True

        def call(x: Tensor) -> Tensor:
            out, bias = module(x.unsqueeze(1))
            return (out if bias is None else out + bias).squeeze(1)

        return call


def _norm(module: torch.nn.Module) -> Linear:
    return _as_it_is if isinstance(module, IdentityOp) else module


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _refuse_unknown(network: TokenStatsGPT) -> None:
    config = network.config
    groups, layers = network.pg_collection, network.decoder.layers
    attentions = [layer.self_attention for layer in layers]
    experts = [layer.mlp for layer in layers if type(layer.mlp) is MoELayer]
    plain = all(type(each.linear_qkv) is ColumnParallelLinear for each in attentions)
    unknown = {
        "pipeline_model_parallel_size above 1": groups.pp.size() > 1,
        "context_parallel_size above 1": groups.cp.size() > 1,
        "expert_model_parallel_size above 1": bool(experts) and groups.ep.size() > 1,
        "sequence_parallel with experts or Transformer Engine": config.sequence_parallel and (bool(experts) or not plain),
        "experts with a capacity (what a token gets depends on the others)": (
            bool(experts) and config.moe_expert_capacity_factor is not None
        ),
        "fewer num_query_groups than tensor-parallel ranks": config.num_query_groups < groups.tp.size(),
        f"position_embedding_type {network.position_embedding_type}": (
            network.position_embedding_type not in ("rope", "learned_absolute", "none")
        ),
        "rotary_interleaved": config.rotary_interleaved,
        "rotary_percent below 1": network.position_embedding_type == "rope" and network.rotary_percent != 1.0,
        "no_rope_freq": bool(config.no_rope_freq),
        "attention_output_gate": config.attention_output_gate,
        "attention other than megatron-core's SelfAttention over SdpaCoreAttention": not all(
            type(each) is SelfAttention and isinstance(each.core_attention, SdpaCoreAttention) for each in attentions
        ),
        "fp32_residual_connection": config.fp32_residual_connection,
        "activation_func_clamp_value": config.activation_func_clamp_value is not None,
        "glu_linear_offset": config.glu_linear_offset != 0.0,
        "use_te_activation_func": config.use_te_activation_func,
        "multi-token prediction": network.mtp_process,
    }
    found = [name for name, is_there in unknown.items() if is_there]
    if found:
        raise ConfigError(
            f"the embedded engine cannot decode with {', '.join(found)}; expected a decoder of plain, "
            "Transformer Engine or expert layers under tensor and data parallelism; use rollout.engine=server or another layout"
        )
