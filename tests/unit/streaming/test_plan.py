"""The plan against what is measured: every way to train, every kind of layer, on one rank and on pretended others."""

from __future__ import annotations

import gc
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarpt.config.presets import PRESETS
from megarpt.config.schema import PretrainConfig
from megarpt.device import runtime
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError
from megarpt.model.build import build_model, build_network, transformer_config
from megarpt.model.forward import head_output, run_schedule
from megarpt.model.token_stats_gpt import HeadMode
from megarpt.ops import head_tiles, linear_logprob
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.streaming import activations
from megarpt.streaming.activations import WAYS, Way, chunk_lengths, peak_of, tile_of
from megarpt.streaming.chunks import cut
from megarpt.streaming.plan import GB, Situation, static_bytes, within_budget
from megarpt.structs import TokenBatch
from megarpt.testing.batches import random_batch
from megarpt.testing.configs import tiny_config
from megarpt.testing.distributed import spawn
from megarpt.testing.memory import peak_bytes
from megarpt.train.optimizer import build_optimizer
from megarpt.train.perf import flops_per_token

SHAPE = {"num_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 384}
GPT2 = {"model.preset": "gpt2-124m", "model.gpt": {"max_sequence_length": 2048}}
MHA = {"num_query_groups": 4}
BF16 = {"train.precision": "bf16"}
SELECTS = {"objective": {"scorer": "loss", "weighting": "top_fraction", "scope": "microbatch"}}
BY_SAMPLE = {"objective": {"scorer": "loss", "weighting": "top_fraction", "scope": "sequence"}}
TIED = {"model.gpt": {"share_embeddings_and_output_weights": True}}
LONG = {"data.seq_length": 2048, "stream.chunk_tokens": 256}
# Queries wider than the hidden state, a narrow feed-forward layer: the peak is in attention.
WIDE_ATTENTION = {"num_layers": 1, "num_attention_heads": 16, "num_query_groups": 4, "kv_channels": 64, "ffn_hidden_size": 64}
MOE = {"model.preset": "tiny-moe"}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 192}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> (model.mcore over SHAPE, configuration)
    "gqa": ({}, {}),
    "gqa-bf16": ({}, BF16),
    "gqa-long": ({}, LONG),
    "gqa-long-bf16": ({}, LONG | BF16),
    "mha": (MHA, {}),
    "mqa-bf16": ({"num_query_groups": 1}, BF16),
    "wide-256": ({"hidden_size": 256, "ffn_hidden_size": 768}, {"data.seq_length": 512, "stream.chunk_tokens": 128}),
    "wide-256-bf16": ({"hidden_size": 256, "ffn_hidden_size": 768}, {"data.seq_length": 512, **BF16}),
    "gelu-bias": (MHA | {"ffn_hidden_size": 512}, GPT2),
    "gelu-bias-bf16": (MHA | {"ffn_hidden_size": 512}, GPT2 | BF16),
    "gelu-bias-gqa-long": ({}, GPT2 | LONG),
    "untied-gelu-bias": (MHA, {**GPT2, "model.gpt": {"share_embeddings_and_output_weights": False}}),
    "tied-large-vocabulary": ({}, TIED | {"model.vocab_size": 8192, "data.seq_length": 512}),
    "tied-large-vocabulary-bf16": ({}, TIED | {"model.vocab_size": 8192, "data.seq_length": 512, **BF16}),
    "large-vocabulary-bf16": ({}, {"model.vocab_size": 8192, "data.seq_length": 512, **BF16}),
    "small-vocabulary": ({}, {"model.vocab_size": 1024, **LONG}),
    "six-layers-small-chunks-bf16": ({"num_layers": 6}, {**LONG, "stream.chunk_tokens": 64, **BF16}),
    "one-chunk": ({}, {"stream.chunk_tokens": 4096}),
    "one-chunk-bf16": ({}, {"stream.chunk_tokens": 4096, **BF16}),
    "qk-norm": ({"qk_layernorm": True}, {}),
    "qk-norm-bf16": ({"qk_layernorm": True}, BF16),
    "qkv-bias": ({"add_qkv_bias": True}, {}),
    "two-samples": ({}, {"data.seq_length": 512, "batch.micro_batch_size": 2}),
    "two-samples-bf16": ({}, {"data.seq_length": 512, "batch.micro_batch_size": 2, **BF16}),
    "wide-attention": (WIDE_ATTENTION, LONG),
    "wide-attention-bf16": (WIDE_ATTENTION, LONG | BF16),
    "all-logits-kept": ({}, {"train.head_keep_mib": 64, **SELECTS}),
    "some-logits-kept-bf16": ({}, {"train.head_keep_mib": 3, **SELECTS, **BF16}),
    "all-gradients-at-once": ({}, {"train.head_keep_mib": 64}),
    "gradients-in-groups": ({}, {"train.head_keep_mib": 8, "model.vocab_size": 8192}),
    "gradients-in-groups-bf16": ({}, {"train.head_keep_mib": 4, "data.seq_length": 4096, "model.vocab_size": 1024, **BF16}),
    "gradients-by-sample": ({}, {"data.seq_length": 512, "batch.micro_batch_size": 4, "train.head_keep_mib": 9, **BY_SAMPLE}),
    "no-sample-fits": ({}, {"train.head_keep_mib": 6, **BY_SAMPLE}),
    "rows-of-logits-bounded": ({}, {"train.head_chunk_tokens": 200}),
    "experts": (EXPERTS, MOE),
    "experts-bf16": (EXPERTS, MOE | BF16),
}

TP, PP, CP, EP = (
    {f"{name}_size": 2}
    for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel", "expert_model_parallel")
)
SP = {**TP, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {  # parallel section, this rank of two
    "tp2": (TP, 0),
    "tp2-sp": (SP, 1),
    "cp2": (CP, 0),
    "pp2-first": (PP, 0),
    "pp2-last": (PP, 1),
    "zero": ({"use_distributed_optimizer": True}, 0),
}


def configure(way: Way, mcore: dict[str, Any], overrides: dict[str, Any]) -> PretrainConfig:
    recomputed = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    defaults = {
        "data.seq_length": 1024,
        "batch.micro_batch_size": 1,
        "batch.global_batch_size": 4,
        "model.vocab_size": 2048,
        "train.head_keep_mib": 0,
        "stream.layers": way == "streamed",
        "stream.chunk_tokens": 256,
    }
    model = SHAPE | mcore | (recomputed if way == "recomputed" else {})
    return tiny_config(**defaults | overrides | {"model.mcore": model})


def measured(cfg: PretrainConfig, layout: ParallelLayout, groups: ProcessGroups, started: Runtime, count: int) -> int:
    """Most bytes alive at once, beyond parameters and gradients, in the micro-batches of a step."""
    assert cfg.model.vocab_size is not None
    chunks = build_model(cfg, layout, groups, started, vocab_size=cfg.model.vocab_size)
    s, b = cfg.data.seq_length, cfg.batch.micro_batch_size
    work: list[tuple[TokenBatch, None]] = [(random_batch(b, s, cfg.model.vocab_size, seed), None) for seed in range(count)]
    unit = planned(cfg, dist.get_world_size()).weight_unit
    weight = {0: None, 1: torch.ones(b, s)}.get(unit, lambda which, stats: torch.ones_like(stats.logprob))

    def step(items: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        out = head_output(model, next(items)[0], HeadMode.LOGPROB, weight)
        first = out if isinstance(out, torch.Tensor) else out[0]
        return first, lambda output: (-output.sum(), torch.ones((), dtype=torch.int), {})

    gc.collect()  # what an earlier test left would be freed while this one is measured
    return peak_bytes(lambda: run_schedule(chunks, work, step, groups, forward_only=False), torch.device("cpu"))


def planned(cfg: PretrainConfig, world_size: int = 1) -> Situation:
    return Situation.of(cfg, vocab_size=cfg.model.vocab_size or 0, on_cpu=True, world_size=world_size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_activations_are_those_measured(name: str, way: Way, cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    cfg = configure(way, *CASES[name])
    found = measured(cfg, ParallelLayout(), one_rank, cpu_runtime, count=1)
    assert planned(cfg).memory(way).activations == pytest.approx(found, rel=0.1)


def test_the_three_ways_differ_as_they_are_meant_to(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    """Were the measurement blind to what is kept, the test above would be worth nothing."""
    found = {way: measured(configure(way, {}, LONG), ParallelLayout(), one_rank, cpu_runtime, count=1) for way in WAYS}
    assert found["plain"] > 1.8 * found["recomputed"] > 1.8 * 1.8 * found["streamed"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_activations_of_a_rank_among_others(name: str, precision: str) -> None:
    parallel, rank = LAYOUTS[name]
    for way, found, expected in spawn(1, measure_among_others, parallel, rank, precision)[0]:
        assert expected == pytest.approx(found, rel=0.1), way


def measure_among_others(parallel: dict[str, Any], rank: int, precision: str) -> list[tuple[Way, int, float]]:
    """In a world in which collectives do nothing: gloo frees tensors on threads of its own, which are not counted."""
    started = pretend(rank, 2)
    results: list[tuple[Way, int, float]] = []
    for way in WAYS:
        cfg = configure(way, {"num_layers": 4}, {"parallel": parallel, "train.precision": precision})
        layout = ParallelLayout.resolve(cfg.parallel, 2)
        groups = layout.initialize(1)
        found = measured(cfg, layout, groups, started, count=4 // layout.dp)
        situation = planned(cfg, 2)
        stage = situation.shape.stages[groups.pp.rank()]
        results.append((way, found, peak_of(situation.shape, stage, situation.work(way)).total))
    return results


def pretend(rank: int, world_size: int) -> Runtime:
    """This process as one rank of a world that has no others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    return runtime.start("cpu")


FAMILIES = ("gpt2-124m", "llama-3-8b", "qwen2.5-1.5b", "qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b", "mixtral-8x7b")
RANKS: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {  # parallel section, world, ranks to look at
    "one": ({}, 1, (0,)),
    "tp2": (TP, 2, (0, 1)),
    "pp2": (PP, 2, (0, 1)),
    "pp4-interleaved": ({"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}, 4, (0, 1, 3)),
    "tp2-sp-pp2": ({**SP, **PP}, 4, (0, 3)),
    "ep2": (EP, 2, (0, 1)),
    "ep2-tp2-sp": ({**EP, **SP, "expert_tensor_parallel_size": 1}, 2, (1,)),
}


@pytest.mark.parametrize("name", RANKS)
def test_parameters_of_a_rank_are_counted(name: str) -> None:
    parallel, world_size, ranks = RANKS[name]
    for rank in ranks:
        found = spawn(1, count_parameters, parallel, rank, world_size)[0]
        assert len(found) >= (2 if "expert_model_parallel_size" in parallel else 5)
        for family, real, expected in found:
            assert expected == real, f"{family}, rank {rank}"


def count_parameters(parallel: dict[str, Any], rank: int, world_size: int) -> list[tuple[str, int, int]]:
    pretend(rank, world_size)
    results = []
    for family in FAMILIES:
        has_experts = "num_moe_experts" in PRESETS[family].transformer
        if has_experts is not ("expert_model_parallel_size" in parallel) and (has_experts is False or "tp2" in str(parallel)):
            continue  # no experts to divide
        if has_experts and parallel.get("tensor_model_parallel_size", 1) > 1 and not parallel.get("sequence_parallel"):
            continue  # a router must see each token once
        layers = {"num_layers": 16} if parallel.get("pipeline_model_parallel_size", 1) > 2 else {}
        cfg = tiny_config(**{"model.preset": family, "parallel": parallel, "model.mcore": layers, "data.seq_length": 64})
        layout = ParallelLayout.resolve(cfg.parallel, world_size)
        groups = layout.initialize(1)
        config = transformer_config(cfg, layout, is_cuda=False)
        config.perform_initialization = False
        vocab = PRESETS[family].vocab_size
        with torch.device("meta"):
            pieces = [
                build_network(cfg, config, groups, vocab_size=vocab, backend="torch", vp_stage=vp_stage)
                for vp_stage in ([None] if layout.vpp is None else range(layout.vpp))
            ]
        real = sum(parameter.numel() for piece in pieces for parameter in piece.parameters())
        shape = Situation.of(cfg, vocab_size=vocab, on_cpu=True, world_size=world_size).shape
        results.append((family, real, sum(shape.parameters(shape.stages[groups.pp.rank()]))))
    return results


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameters_of_a_whole_model_are_the_published_ones(name: str) -> None:
    cfg = tiny_config(**{"model.preset": name, "model.make_vocab_size_divisible_by": 1, "data.seq_length": 8})
    shape = Situation.of(cfg, vocab_size=PRESETS[name].vocab_size, on_cpu=True).shape
    assert sum(shape.parameters(shape.stages[0])) == PRESETS[name].parameters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_static_memory_is_what_is_allocated(precision: str, cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    cfg = configure("plain", {}, {"train.precision": precision})
    chunks = build_model(cfg, ParallelLayout(), one_rank, cpu_runtime, vocab_size=2048)
    optimizer, _ = build_optimizer(cfg.optimizer, cfg.train, chunks, one_rank)
    for parameter in chunks[0].parameters():
        parameter.main_grad.fill_(1e-3)
    optimizer.step()  # makes the moments
    parameters, gradients, owned, _ = static_bytes(planned(cfg).shape, planned(cfg).shape.stages[0])
    assert parameters == sum(parameter.nbytes for parameter in chunks[0].parameters())
    assert gradients == sum(parameter.main_grad.nbytes for parameter in chunks[0].parameters())
    (inner,) = {id(each.optimizer): each.optimizer for each in optimizer.chained_optimizers}.values()
    state = [value for each in inner.state.values() for value in each.values() if torch.is_tensor(value) and value.dim()]
    masters = [each for group in inner.param_groups for each in group["params"]] if precision == "bf16" else []
    assert owned == sum(tensor.nbytes for tensor in (*state, *masters))


def test_zero_divides_the_optimizer_and_nothing_else() -> None:
    whole, divided = (
        planned(tiny_config(**BF16, **{"model.vocab_size": 2048, "parallel": {**CP, "use_distributed_optimizer": zero}}), 8)
        for zero in (False, True)
    )
    (p, g, o, _), (p8, g8, o8, _) = (static_bytes(each.shape, each.shape.stages[0]) for each in (whole, divided))
    assert (p8, g8, 8 * o8) == (p, g, o)


def test_tiles_of_the_head_are_those_of_the_head() -> None:
    assert (activations.TILE_COLUMNS, activations.TILE_BYTES) == (head_tiles.TILE_COLUMNS, head_tiles.TILE_BYTES)
    assert activations.LEAST_GROUP == linear_logprob.LEAST_GROUP
    for seq, vocab, keep, rows in itertools.product((64, 1000, 4096), (512, 5000, 32_000), (0, 3, 100, 4000), (0, 100)):
        cfg = configure(
            "plain",
            {},
            {
                "data.seq_length": seq,
                "model.vocab_size": vocab,
                "model.make_vocab_size_divisible_by": 1,
                "train.head_keep_mib": keep,
                "train.head_chunk_tokens": rows,
            },
        )
        situation = planned(cfg)
        plan = head_tiles.plan_tiles(seq, vocab, torch.float32, torch.device("cpu"), rows or None, keep * 2**20)
        assert tile_of(situation.shape, situation.work("plain"))[:3] == plan


@pytest.mark.parametrize(("cp", "sp"), [(1, 1), (1, 4), (2, 1), (2, 2)])
@pytest.mark.parametrize(("samples", "seq", "chunk"), [(1, 64, 24), (3, 32, 8), (2, 32, 64), (4, 16, 40), (1, 96, 1)])
def test_chunks_are_those_that_layers_are_cut_into(samples: int, seq: int, chunk: int, cp: int, sp: int) -> None:
    edges = torch.arange(0, samples * seq + 1, seq, dtype=torch.int32)
    parallel = {"context_parallel_size": cp} | ({"tensor_model_parallel_size": sp, "sequence_parallel": True} if sp > 1 else {})
    overrides = {"data.seq_length": seq, "batch.micro_batch_size": samples, "batch.global_batch_size": samples}
    cfg = configure("streamed", {"num_query_groups": 4}, {**overrides, "stream.chunk_tokens": chunk, "parallel": parallel})
    situation = planned(cfg, cp * sp)
    longest, count, seen = chunk_lengths(situation.shape, situation.work("streamed"))
    real = [cut(edges, samples * seq, chunk, cp_rank=rank, cp_size=cp, sp_size=sp) for rank in range(cp)]
    assert {len(chunks) for chunks in real} == {count}
    assert max(each.tokens.stop - each.tokens.start for chunks in real for each in chunks) == longest
    assert max(each.queries.keys.stop - each.queries.keys.start for chunks in real for each in chunks) == seen


def test_a_longer_sequence_and_a_larger_chunk_need_no_less() -> None:
    base = planned(configure("streamed", {}, LONG))
    for way in WAYS:
        totals = [replace(base, seq_length=length).memory(way).total for length in range(256, 8192, 256)]
        assert totals == sorted(totals)
    totals = [replace(base, chunk_tokens=chunk).memory("streamed").total for chunk in range(128, 2048, 128)]
    assert totals == sorted(totals)


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_sequence_fits_and_the_next_does_not(way: Way) -> None:
    base = Situation.of(tiny_config(**BF16, **{"model.vocab_size": 8192}), vocab_size=8192, on_cpu=False)
    longest, unit = base.largest_sequence(way, 2 * GB), 128
    assert replace(base, seq_length=longest).memory(way).total <= 2 * GB
    assert replace(base, seq_length=longest + unit).memory(way).total > 2 * GB
    assert base.largest_sequence(way, 0.01 * GB) == 0


def budgeted(gb: float, **overrides: Any) -> PretrainConfig:
    return configure("streamed", {}, {**LONG, "stream.chunk_tokens": None, "stream.memory_budget_gb": gb, **overrides})


@pytest.mark.parametrize("gb", [0.038, 0.045])
def test_a_budget_chooses_the_largest_chunk_that_is_within_it(gb: float, cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    chosen = within_budget(budgeted(gb), world_size=1, vocab_size=2048, on_cpu=True)
    assert chosen.stream.memory_budget_gb is None
    assert chosen.stream.chunk_tokens is not None
    memory = planned(chosen).memory("streamed")
    assert memory.total <= gb * GB
    larger = replace(planned(chosen), chunk_tokens=chosen.stream.chunk_tokens + 128).memory("streamed")
    assert larger.total > gb * GB
    found = measured(chosen, ParallelLayout(), one_rank, cpu_runtime, count=1)
    assert memory.static + found <= 1.05 * gb * GB


def test_what_a_budget_leaves_holds_logits_unless_their_number_is_given() -> None:
    def chosen(gb: float, keep: int | None) -> tuple[int | None, int | None]:
        cfg = within_budget(budgeted(gb, **{"train.head_keep_mib": keep}), world_size=1, vocab_size=2048, on_cpu=True)
        return cfg.stream.chunk_tokens, cfg.train.head_keep_mib

    assert chosen(1.0, None) == (2048, 16)  # all of [2048, 2048] in fp32
    chunk, keep = chosen(0.04, None)
    assert keep is not None
    assert 0 < keep < 16
    assert chosen(0.04, 2) == (chunk, 2)


def test_without_a_budget_nothing_changes() -> None:
    cfg = configure("streamed", {}, {})
    assert within_budget(cfg, world_size=1, vocab_size=2048, on_cpu=True) is cfg


def test_a_budget_that_is_too_small_says_what_is_needed_and_what_would_help() -> None:
    cfg = budgeted(0.02, **{"batch.micro_batch_size": 2})
    with pytest.raises(
        ConfigError, match=r"memory_budget_gb: got 0\.02, but a rank needs 0\.03\d GB even with chunks"
    ) as error:
        within_budget(cfg, world_size=2, vocab_size=2048, on_cpu=True)
    message = str(error.value)
    for key in ("use_distributed_optimizer=true", "tensor_model_parallel_size=2", "context_parallel_size=2"):
        assert f"parallel.{key}" in message
    assert "batch.micro_batch_size=1" in message
    assert "pipeline_model_parallel_size" not in message  # 3 layers do not divide by 2
    # Whoever follows the advice has a run that fits.
    enough = 0.024
    with pytest.raises(ConfigError, match=r"data\.seq_length=\d+") as error:
        within_budget(budgeted(enough), world_size=1, vocab_size=2048, on_cpu=True)
    length = int(str(error.value).partition("data.seq_length=")[2].split()[0])
    shorter = budgeted(enough, **{"data.seq_length": length})
    assert within_budget(shorter, world_size=1, vocab_size=2048, on_cpu=True).stream.chunk_tokens


@pytest.mark.parametrize("preset", ["tiny", "gpt2-124m", "qwen3-0.6b", "qwen3-30b-a3b"])
def test_operations_are_those_that_training_reports(preset: str) -> None:
    model = PRESETS[preset]
    cfg = tiny_config(
        **{"model.preset": preset, "data.seq_length": 1024, "train.head_keep_mib": 100_000, "batch.micro_batch_size": 1}
    )
    situation = Situation.of(cfg, vocab_size=model.vocab_size, on_cpu=False)
    cost, fields = situation.cost("plain"), model.transformer
    width = fields["num_attention_heads"] * situation.shape.head_size
    lookup = 0 if model.gpt["share_embeddings_and_output_weights"] else situation.shape.vocab * fields["hidden_size"]
    multiplying = model.parameters - lookup - situation.shape.learned_positions * fields["hidden_size"]
    if situation.shape.experts is not None:
        experts = situation.shape.experts
        idle = fields["num_layers"] * situation.shape.mlp_parameters(experts.width) * (experts.total - experts.topk)
        multiplying -= idle
    reported = flops_per_token(multiplying, fields["num_layers"], width, 1024)
    # the kernel makes the scores again backward, which training's figure leaves out
    assert cost.head_recomputation == cost.recomputation == 0.0
    assert cost.total - cost.attention / 7.0 == pytest.approx(reported, rel=0.01)


def test_what_recomputation_costs() -> None:
    cfg = tiny_config(**{"model.vocab_size": 8192, "train.head_keep_mib": 0, "data.seq_length": 4096})
    situation = Situation.of(cfg, vocab_size=8192, on_cpu=False)
    plain, recomputed, streamed = (situation.cost(way) for way in WAYS)
    forward = (plain.layers - plain.attention) / 3.0 + plain.attention / 3.5
    assert recomputed.recomputation == pytest.approx(forward)
    shape = situation.shape
    assert streamed.key_value_projection == 4 * 2.0 * shape.hidden * shape.qkv  # four layers
    assert streamed.total == recomputed.total + streamed.key_value_projection
    assert plain.head_recomputation == pytest.approx(plain.head / 3.0)
    kept = replace(situation, keep_bytes=2**60).cost("plain")
    assert kept.total == pytest.approx(plain.total - plain.head_recomputation)


@pytest.mark.parametrize(
    ("mcore", "words"),
    [({"mtp_num_layers": 1}, "mtp_num_layers"), ({"multi_latent_attention": True}, "cannot be planned")],
)
def test_a_model_of_another_kind_is_refused(mcore: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(configure("plain", mcore, {}))
