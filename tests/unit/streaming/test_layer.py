"""Streamed layers against the whole ones, in fp64: every kind of block, chunk and mask."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megarpt.device.runtime import Runtime
from megarpt.model.build import build_model, build_network, transformer_config, unwrap
from megarpt.model.forward import head_output
from megarpt.model.token_stats_gpt import HeadMode, TokenStatsGPT
from megarpt.parallel.layout import ParallelLayout
from megarpt.streaming.chunks import cut, deal
from megarpt.streaming.layer import StreamedTransformerLayer
from megarpt.structs import TokenBatch
from megarpt.testing.batches import random_batch
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.memory import peak_bytes

VOCAB, SAMPLES, SEQUENCE = 300, 3, 37
ONE_DOCUMENT_EACH, PACKED = [0, 37, 74, 111], [0, 11, 37, 50, 51, 74, 100, 111]
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.05,
}
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped queries": ("tiny", {}),
    "llama, one key head": ("tiny", {"num_query_groups": 1}),
    "llama, all heads": ("tiny", {"num_query_groups": 4}),
    "wide heads": ("tiny", {"kv_channels": 32}),
    "biases everywhere": ("tiny", {"add_bias_linear": True, "add_qkv_bias": True}),
    "qwen2": ("qwen2.5-1.5b", {}),
    "qwen3, norms of queries and keys, tied": ("qwen3-0.6b", {"kv_channels": 16}),
    "gpt2, learned positions, LayerNorm, GELU, tied": ("gpt2-124m", {"num_query_groups": 4}),
    "no positions in the second layer": ("tiny", {"no_rope_freq": [0, 1]}),
    "a gate after attention": ("tiny", {"attention_output_gate": True}),
    "experts": ("tiny", EXPERTS),
    "a shared expert": ("tiny", {**EXPERTS, "moe_shared_expert_intermediate_size": 40}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_rank(cpu_runtime: Runtime) -> None:
    ParallelLayout().initialize(seed=0)


def network(
    chunk_tokens: int, preset: str = "tiny", mcore: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64
) -> TokenStatsGPT:
    """With the same weights whatever the chunk; 0 does not stream."""
    cfg = tiny_config(
        **{
            "model": {"preset": preset, "mcore": {**TWO_LAYERS, **(mcore or {})}, "vocab_size": VOCAB},
            "data.seq_length": SEQUENCE,
            "train.head_keep_mib": 0,
            "stream": {"layers": True, "chunk_tokens": chunk_tokens} if chunk_tokens else {},
        }
    )
    layout = ParallelLayout()
    torch.manual_seed(3)
    made = build_network(cfg, transformer_config(cfg, layout, is_cuda=False), None, vocab_size=VOCAB, backend="torch").to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():  # norms begin as 1 and biases as 0, which would hide mistakes
            parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
    return made.train()


def batch(edges: list[int] = PACKED) -> TokenBatch:
    whole = random_batch(SAMPLES, SEQUENCE, VOCAB, seed=0)
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(edges)])
    return replace(whole, cu_seqlens=torch.tensor(edges, dtype=torch.int32), position_ids=positions.view(SAMPLES, SEQUENCE))


def upstream(kept: float = 1.0) -> Tensor:
    """Gradients of the log-probabilities; 0 where a token carries no loss."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(SAMPLES, SEQUENCE, dtype=torch.float64, generator=generator)
    return torch.where(torch.rand(SAMPLES, SEQUENCE, generator=generator) < kept, weights, 0.0)


def gradients(model: TokenStatsGPT, given: TokenBatch, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logprob, _ = head_output(model, given, HeadMode.LOGPROB)
    (logprob * weights.to(logprob.dtype)).sum().backward()
    return logprob.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


@pytest.mark.parametrize("chunk_tokens", [7, 40, 1000])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_has_the_gradients_of_the_whole_layer(block: str, chunk_tokens: int) -> None:
    preset, mcore = BLOCKS[block]
    value, expected = gradients(network(0, preset, mcore), batch(), upstream(0.6))
    streamed = network(chunk_tokens, preset, mcore)
    assert all(type(layer) is StreamedTransformerLayer for layer in streamed.decoder.layers)
    ours, found = gradients(streamed, batch(), upstream(0.6))
    assert (ours - value).abs().max() < 1e-12
    assert largest_difference(found, expected) < 1e-12


@pytest.mark.parametrize("edges", [ONE_DOCUMENT_EACH, PACKED, list(range(112))], ids=["whole", "packed", "single"])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 16, 37, 110, 111, 112])
def test_every_chunk_and_mask(edges: list[int], chunk_tokens: int) -> None:
    _, expected = gradients(network(0), batch(edges), upstream())
    _, found = gradients(network(chunk_tokens), batch(edges), upstream())
    assert largest_difference(found, expected) < 1e-12


@pytest.mark.parametrize("block", BLOCKS)
def test_keys_alone_are_the_keys(block: str) -> None:
    """Without the projection of queries, which mcore's module makes along with them."""
    layer = network(16, *BLOCKS[block]).decoder.layers[1]
    hidden = torch.randn(5, 1, layer.config.hidden_size, dtype=torch.float64)
    calls = []
    layer.self_attention.linear_qkv.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        alone, together = (layer.keys_and_values(hidden, None, alone=alone) for alone in (True, False))
    assert len(calls) == 1
    for ours, theirs in zip(alone, together, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_backward_projects_queries_once_for_each_chunk() -> None:
    model = network(37)
    logprob, _ = head_output(model, batch(), HeadMode.LOGPROB)
    calls = []
    model.decoder.layers[0].self_attention.linear_qkv.register_forward_hook(lambda *_: calls.append(1))
    logprob.sum().backward()
    assert len(calls) == SAMPLES


def test_fp32_differs_by_rounding() -> None:
    _, expected = gradients(network(0, dtype=torch.float32), batch(), upstream())
    _, found = gradients(network(16, dtype=torch.float32), batch(), upstream())
    assert largest_difference(found, expected) < 1e-5


def test_a_mistake_at_a_chunks_border_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: keys whose gradient is taken before the later chunks have added theirs."""
    from megarpt.streaming.keys import KeyValues

    add = KeyValues.add_gradients

    def only_own(self: KeyValues, queries: Any, key_grad: Tensor, value_grad: Tensor) -> None:
        before = key_grad.shape[0] - queries.num_queries
        key_grad[:before] = 0.0
        add(self, queries, key_grad, value_grad)

    _, expected = gradients(network(0), batch(), upstream())
    monkeypatch.setattr(KeyValues, "add_gradients", only_own)
    _, found = gradients(network(16), batch(), upstream())
    assert largest_difference(found, expected) > 1e-4


def test_one_rule_for_parameters_and_their_names() -> None:
    assert network(16).state_dict().keys() == network(0).state_dict().keys()
    network(0).load_state_dict(network(16).state_dict())


@pytest.mark.parametrize("dropout", ["hidden_dropout", "attention_dropout"])
def test_dropout_draws_the_same_numbers_again(dropout: str) -> None:
    """Gradients are those of the function that was computed: finite differences under the same seed agree."""
    model = network(16, mcore={dropout: 0.3})
    weights = upstream()

    def value() -> Tensor:
        torch.manual_seed(7)
        return (head_output(model, batch(), HeadMode.LOGPROB)[0] * weights).sum()

    after = value()
    state = torch.get_rng_state()
    after.backward()
    assert torch.equal(torch.get_rng_state(), state)  # the backward pass leaves the generator as it was
    generator = torch.Generator().manual_seed(2)
    for name in ("decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.1.mlp.linear_fc1.weight"):
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        slopes = []
        with torch.no_grad():
            for step in (1e-6, -1e-6):
                parameter.add_(direction, alpha=step)
                slopes.append(value())
                parameter.add_(direction, alpha=-step)
        slope = (slopes[0] - slopes[1]) / 2e-6
        assert float((parameter.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("separate", ["nowhere", "everywhere", "behind", "between"])
def test_the_last_layer_leaves_out_tokens_that_carry_no_loss(separate: str) -> None:
    """Whole chunks of them, and what is left of others."""
    weights = upstream(0.5).flatten()
    weights[{"nowhere": slice(0), "everywhere": slice(None), "behind": slice(60, None), "between": slice(30, 70)}[separate]] = (
        0.0
    )
    weights = weights.view(SAMPLES, SEQUENCE)
    _, expected = gradients(network(0), batch(), weights)
    model = network(16)
    rows: list[list[int]] = [[], []]
    for seen, layer in zip(rows, model.decoder.layers, strict=True):
        layer.mlp.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0].shape[0]))
    _, found = gradients(model, batch(), weights)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm()
    total, kept = SAMPLES * SEQUENCE, int((weights != 0).sum())
    assert [sum(seen) for seen in rows] == [2 * total, total + kept]  # forward and again in backward


def test_a_frozen_layer_passes_gradients_on() -> None:
    models = network(0), network(16)
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("linear_fc2" in name)
    (_, expected), (_, found) = (gradients(model, batch(), upstream()) for model in models)
    assert len(found) == 2 and largest_difference(found, expected) < 1e-12


def test_two_micro_batches_add_up() -> None:
    models = network(0), network(16)
    for model in models:
        gradients(model, batch(), upstream())
    (_, expected), (_, found) = (gradients(model, batch(ONE_DOCUMENT_EACH), upstream(0.3)) for model in models)
    assert largest_difference(found, expected) < 1e-12


def test_evaluation_streams_too_and_keeps_nothing() -> None:
    with torch.no_grad():
        whole, streamed = (head_output(network(c), batch(), HeadMode.LOGPROB)[0] for c in (0, 16))
    assert (whole - streamed).abs().max() < 1e-12


def main_gradients(chunk_tokens: int, started: Runtime) -> tuple[dict[str, Tensor], Counter[str]]:
    """What megatron-core's DDP has of one micro-batch, and how often autograd brought each parameter a gradient."""
    cfg = tiny_config(
        **{
            "model": {"preset": "tiny", "mcore": TWO_LAYERS, "vocab_size": VOCAB},
            "stream": {"layers": True, "chunk_tokens": chunk_tokens} if chunk_tokens else {},
        }
    )
    layout = ParallelLayout()
    groups = layout.initialize(seed=0)
    torch.manual_seed(3)
    (chunk,) = build_model(cfg, layout, groups, started, vocab_size=VOCAB)
    chunk.zero_grad_buffer()
    calls: Counter[str] = Counter()
    nodes = []
    for name, parameter in chunk.named_parameters():
        nodes.append(parameter.expand_as(parameter).grad_fn.next_functions[0][0])
        nodes[-1].register_hook(lambda *_, name=name: calls.update([name]))
    (head_output(chunk, batch(), HeadMode.LOGPROB)[0] * upstream().float()).sum().backward()
    assert all(parameter.grad is None for parameter in chunk.parameters())
    return {name: parameter.main_grad.clone() for name, parameter in unwrap(chunk).named_parameters()}, calls


def test_hooks_of_a_parameter_run_once_for_each_micro_batch(cpu_runtime: Runtime) -> None:
    (expected, _), (found, calls) = (main_gradients(chunk_tokens, cpu_runtime) for chunk_tokens in (0, 16))
    assert len(calls) == len(found) and set(calls.values()) == {1}
    assert largest_difference(found, expected) < 1e-5


def test_the_input_of_each_layer_is_all_that_is_kept() -> None:
    given = random_batch(1, 1024, VOCAB, seed=0)

    def forward(model: TokenStatsGPT) -> object:
        return head_output(model, given, HeadMode.LOGPROB)

    def kept(model: TokenStatsGPT) -> int:
        before, saved = set(), {}
        for parameter in model.parameters():
            before.add(parameter.untyped_storage().data_ptr())

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in before:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = forward(model)
        del out
        return sum(saved.values())

    whole, streamed = kept(network(0, dtype=torch.float32)), kept(network(128, dtype=torch.float32))
    one = 1024 * 64 * 4
    assert streamed < 6.5 * one < whole / 5  # two inputs, what the final norm and the head keep, and numbers of each token
    cpu = torch.device("cpu")
    model = network(128, dtype=torch.float32)
    assert peak_bytes(lambda: forward(model)[0].sum().backward(), cpu) < 25 * one  # type: ignore[index]


def test_chunks_cover_every_token_once() -> None:
    edges = torch.tensor(PACKED, dtype=torch.int32)
    for chunk_tokens in (1, 5, 36, 500):
        chunks = cut(edges, 111, chunk_tokens)
        assert torch.cat([torch.arange(111)[chunk.tokens] for chunk in chunks]).tolist() == list(range(111))
        assert all(chunk.rows == chunk.tokens and chunk.queries.num_queries <= chunk_tokens for chunk in chunks)
        assert all(chunk.queries.keys.stop == chunk.tokens.stop for chunk in chunks)


def test_sequence_parallel_ranks_hold_a_part_of_every_chunk() -> None:
    edges = torch.tensor([0, 50, 96], dtype=torch.int32)
    for ranks in (2, 4):
        chunks = cut(edges, 96, 25, sp_size=ranks)
        order = deal(chunks, ranks, torch.device("cpu"))
        assert sorted(order.tolist()) == list(range(96))
        parts = order.chunk(ranks)
        for chunk in chunks:
            gathered = torch.cat([part[chunk.rows] for part in parts])
            assert gathered.tolist() == list(range(chunk.tokens.start, chunk.tokens.stop))
