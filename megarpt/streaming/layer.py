"""A transformer layer that keeps its input and nothing else.

Forward, chunk by chunk, no activation survives. Backward, the keys and values of all tokens are computed first; then each
chunk, the last one first, is computed again with its graph and differentiated at once. A chunk's keys are seen by itself and by
later chunks, so when its turn comes their gradient is complete and flows through the same graph. Parameters' gradients add up
over the chunks and reach autograd once.

Under context parallelism later chunks lie on other ranks as well: the gradients of keys are summed over ranks when all chunks
are done, and a second, short walk takes them through the projection.

Tokens that carry no loss have no gradient after the last layer. What lies behind its attention is not computed again for them,
and of a chunk without any other token nothing but the keys.

Source: StreamBP (arXiv 2506.03077), section 3.2.

Dims: t tokens of the flattened micro-batch on this rank, h hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.tensor_parallel import ColumnParallelLinear, checkpoint
from megatron.core.tensor_parallel.random import _fork_rng, _get_all_rng_states, _set_all_rng_states
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from megarpt.streaming.chunks import Chunk, PackedSegments
from megarpt.streaming.gradients import ParameterGradients
from megarpt.streaming.keys import KeyValues


class StreamedTransformerLayer(TransformerLayer):
    """megatron-core's layer, streamed where it is given packed segments with chunks, and itself everywhere else.

    The parameters and their names are those of the layer it is. Of a layer of experts the attention half is streamed; the
    expert half, whose routing and balance loss look at all tokens together, is recomputed as a whole.

    Collectives: those of the layer, for each chunk. Under context parallelism also two all-gathers of keys and values in
    either pass, and two reduce-scatters of their gradients.
    Error: gradients within 1e-12 of the whole layer's in fp64 (tests/unit/streaming/test_layer.py).
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if packed_seq_params is None or not packed_seq_params.chunks:
            return super().forward(
                hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **kwargs
            )
        work = _Work(self, packed_seq_params, rotary_pos_emb)
        parameters = [parameter for parameter in self._streamed_parameters() if parameter.requires_grad]
        out: Tensor = _Streamed.apply(work, hidden_states, *parameters)
        if self.is_moe_layer:
            out = checkpoint(self._forward_mlp, False, out) if torch.is_grad_enabled() else self._forward_mlp(out)
        return out, None

    def draws_random_numbers(self) -> bool:
        """Whether the streamed part depends on random numbers, which then have to be the same when it is computed again."""
        return self.training and (self.hidden_dropout > 0.0 or self.config.attention_dropout > 0.0)

    def has_idle_tokens(self) -> bool:
        """Whether tokens may have no gradient and can be told apart: all layers but the last mix tokens into each other; random
        numbers belong to whole chunks; under sequence parallelism the ranks see different tokens of a chunk."""
        is_last = self.layer_number == self.config.num_layers
        return is_last and not self.draws_random_numbers() and not self.config.sequence_parallel

    def keys_and_values(self, hidden: Tensor, angles: Tensor | None, *, alone: bool = False) -> tuple[Tensor, Tensor]:
        """Of a chunk, as its attention would compute them. Shapes: [n, 1, h] -> [n, 1, ng, hn] each.

        `alone` leaves the queries out where that can be, which is without gradients, and where the projection's weights have
        been called for by a forward pass: it bypasses the module and so its hooks.
        """
        attention, config = self.self_attention, self.config
        normalized = self.input_layernorm(hidden)
        if alone and self._can_leave_queries_out():
            key, value = self._project_keys_and_values(normalized)
        else:
            output_gate = config.attention_output_gate
            _, key, value, *_ = attention.get_query_key_value_tensors(normalized, output_gate=output_gate)
        if angles is not None and not (config.no_rope_freq and config.no_rope_freq[self.layer_number - 1]):
            scale = _yarn_get_concentration_factor_from_config(config)
            key = apply_rotary_pos_emb(key, angles, config=config, mscale=scale, cp_group=self.pg_collection.cp)
        return key, value

    def run_attention(self, hidden: Tensor, angles: Tensor | None, packed: PackedSegments) -> Tensor:
        """The first half of the layer."""
        out: Tensor = self._forward_attention(hidden, rotary_pos_emb=angles, packed_seq_params=packed)[0]
        return out

    def run_mlp(self, hidden: Tensor) -> Tensor:
        """The second half, where it is streamed."""
        return hidden if self.is_moe_layer else self._forward_mlp(hidden)

    def _can_leave_queries_out(self) -> bool:
        """megatron-core's plain projection, whole groups of heads on this rank, and its input already there."""
        attention = self.self_attention
        is_plain = type(attention.linear_qkv) is ColumnParallelLinear
        return is_plain and not self.config.sequence_parallel and self.config.num_query_groups >= attention.world_size

    def _project_keys_and_values(self, normalized: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.self_attention
        linear, groups = attention.linear_qkv, attention.num_query_groups_per_partition
        size = attention.hidden_size_per_attention_head

        def last_two(rows: Tensor) -> Tensor:  # heads of each group, whose others are queries
            return rows.unflatten(0, (groups, -1, size))[:, -2:].flatten(0, 2)

        bias = None if linear.bias is None else last_two(linear.bias)
        both = F.linear(normalized.flatten(0, 1), last_two(linear.weight), bias).view(*normalized.shape[:2], groups, 2, size)
        key, value = both.unbind(-2)
        return (key if attention.k_layernorm is None else attention.k_layernorm(key)), value

    def _streamed_parameters(self) -> Sequence[Parameter]:
        experts = set(map(id, (*self.pre_mlp_layernorm.parameters(), *self.mlp.parameters()))) if self.is_moe_layer else set()
        return [parameter for parameter in self.parameters() if id(parameter) not in experts]


class _Work(NamedTuple):
    """One pass of a layer over a micro-batch."""

    layer: StreamedTransformerLayer
    packed: PackedSegments
    angles: Tensor | None  # [t, 1, 1, hn]

    @property
    def num_tokens(self) -> int:
        return self.packed.chunks[-1].tokens.stop

    def angles_of(self, chunk: Chunk) -> Tensor | None:
        return None if self.angles is None else self.angles[chunk.tokens]

    def of_chunk(self, chunk: Chunk, keys: KeyValues) -> PackedSegments:
        """What the layer is told of its input where that is one chunk."""
        return replace(self.packed, chunks=(chunk,), ranges=(chunk.queries,), keys=keys)

    def attention(self, hidden: Tensor, chunk: Chunk, keys: KeyValues) -> Tensor:
        return self.layer.run_attention(hidden, self.angles_of(chunk), self.of_chunk(chunk, keys))

    def keys(self, hidden: Tensor, *, alone: bool = False) -> KeyValues:
        """Of all tokens; `alone` as in `keys_and_values`."""
        store = KeyValues(self.num_tokens)
        for chunk in self.packed.chunks:
            store.put(chunk.tokens, *self.layer.keys_and_values(hidden[chunk.rows], self.angles_of(chunk), alone=alone))
        store.complete(self.layer.pg_collection.cp)
        return store


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, hidden: Tensor, *parameters: Parameter) -> Tensor:
        shared = work.layer.pg_collection.cp.size() > 1
        keys = work.keys(hidden) if shared else KeyValues(work.num_tokens)
        out = torch.empty_like(hidden)
        states = []
        for chunk in work.packed.chunks:
            if work.layer.draws_random_numbers():
                states.append(_get_all_rng_states())
            out[chunk.rows] = work.layer.run_mlp(work.attention(hidden[chunk.rows], chunk, keys))
        ctx.save_for_backward(hidden)
        ctx.work, ctx.parameters, ctx.states = work, parameters, states
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        work: _Work = ctx.work
        keys = work.keys(hidden, alone=True)
        hidden_grad = torch.empty_like(hidden)
        with ParameterGradients(ctx.parameters) as gradients, _fork_rng():
            for number in reversed(range(len(work.packed.chunks))):
                if ctx.states:
                    _set_all_rng_states(*ctx.states[number])
                chunk = work.packed.chunks[number]
                hidden_grad[chunk.rows] = _chunk_gradient(work, hidden, grad, chunk, keys, ctx.parameters)
            if not keys.connected:
                keys.reduce_gradients(work.layer.pg_collection.cp)
                for chunk in work.packed.chunks:
                    hidden_grad[chunk.rows] += _key_gradient(work, hidden, chunk, keys, ctx.parameters)
        return None, hidden_grad, *gradients.results()


def _chunk_gradient(
    work: _Work, hidden: Tensor, grad: Tensor, chunk: Chunk, keys: KeyValues, parameters: Sequence[Parameter]
) -> Tensor:
    """Of the chunk's hidden states; the parameters' are collected elsewhere."""
    upstream, busy = grad[chunk.rows], None
    if work.layer.has_idle_tokens():
        busy = upstream.flatten(1).any(dim=1).nonzero().flatten()  # NaN is busy
        if len(busy) == 0:
            return _key_gradient(work, hidden, chunk, keys, parameters) if keys.connected else torch.zeros_like(upstream)
        if len(busy) == len(upstream):
            busy = None
    with torch.enable_grad():
        leaf = hidden[chunk.rows].detach().requires_grad_()
        middle = work.attention(leaf, chunk, keys)
        out = work.layer.run_mlp(middle if busy is None else middle[busy])
    upstream = upstream if busy is None else upstream[busy]
    return torch.autograd.grad(out, [leaf, *parameters], upstream, allow_unused=True)[0]


def _key_gradient(work: _Work, hidden: Tensor, chunk: Chunk, keys: KeyValues, parameters: Sequence[Parameter]) -> Tensor:
    """What the chunk's hidden states get through their keys and values."""
    with torch.enable_grad():
        leaf = hidden[chunk.rows].detach().requires_grad_()
        outputs = work.layer.keys_and_values(leaf, work.angles_of(chunk))
    return torch.autograd.grad(outputs, [leaf, *parameters], keys.gradient(chunk.tokens), allow_unused=True)[0]
