"""Losses, gradient norms and selection are those of one process, however the work is divided over ranks and micro-batches.

Every layout starts from the same weights, written by one process. fp32 agrees within 1e-5, bf16 within 1e-2.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megarpt.config.schema import ParallelConfig, PretrainConfig
from megarpt.config.validate import reference_streams
from megarpt.device import runtime
from megarpt.errors import ConfigError
from megarpt.model.build import build_inference_network, build_model, unwrap
from megarpt.objectives.build import build_objective
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.structs import Progress, TokenBatch
from megarpt.testing.configs import tiny_config
from megarpt.testing.distributed import spawn
from megarpt.testing.shards import write_sharded
from megarpt.train.optimizer import build_optimizer
from megarpt.train.reference import OnlineReference
from megarpt.train.sharded import load_sharded
from megarpt.train.step import TrainStep

VOCAB, SEQUENCE, SAMPLES, MICRO_BATCH, STEPS = 300, 32, 16, 4, 6
SMALL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
}

TP, PP, CP, EP = (
    {f"{name}_size": 2}
    for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel", "expert_model_parallel")
)
SP = {**TP, "sequence_parallel": True}
VPP = {**PP, "virtual_pipeline_model_parallel_size": 2}
ZERO = {"use_distributed_optimizer": True}
OVERLAP = {**ZERO, "overlap_grad_reduce": True, "overlap_param_gather": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2-overlapped": (2, {"overlap_grad_reduce": True}),
    "dp2-zero": (2, ZERO),
    "dp2-zero-overlapped": (2, OVERLAP),
    "tp2": (2, TP),
    "tp2-sp": (2, SP),
    "pp2": (2, PP),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "pp2-interleaved": (2, VPP),
    "cp2": (2, CP),
    "cp4": (4, {"context_parallel_size": 4}),
    "tp2-sp-pp2": (4, {**SP, **PP}),
    "tp2-sp-cp2": (4, {**SP, **CP}),
    "pp2-cp2": (4, {**PP, **CP}),
    "cp2-dp2-zero": (4, {**CP, **ZERO}),
    "pp2-interleaved-dp2-zero-overlapped": (4, {**VPP, **OVERLAP}),
    "tp2-sp-dp2-zero-overlapped": (4, {**SP, **OVERLAP}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "ep2-zero": (2, {**EP, **ZERO}),
    "ep2-pp2": (4, {**EP, **PP}),
    "ep2-cp2": (2, {**EP, **CP}),
    "ep2-tp2-sp": (4, {**EP, **SP, "expert_tensor_parallel_size": 1}),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "lm": {},
    "selection": {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": 0.6},
    "entropy": {"scorer": "reference_entropy", "weighting": "top_fraction", "fraction": 0.6, "scope": "sequence"},
    "rank": {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": 0.6, "scope": "rank"},
    "lagged": {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": 0.6, "scope": "lagged_global_batch"},
    "both": {
        "scorer": "reference_loss",
        "weighting": "top_fraction",
        "fraction": 0.8,
        "second": {"scorer": "reference_entropy", "fraction": 0.7},
    },
}


def make_samples(step: int, rows: torch.Tensor) -> TokenBatch:
    """The given samples of a global batch, two documents in each, the last sample half padding."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (SAMPLES, SEQUENCE + 1), generator=generator)[rows]
    ref_nll = 5.0 + torch.randn(SAMPLES, SEQUENCE, generator=generator)[rows]
    b, cut = len(rows), 11
    loss_mask = torch.ones(b, SEQUENCE, dtype=torch.bool)
    loss_mask[:, cut - 1] = False
    loss_mask[rows == SAMPLES - 1, SEQUENCE // 2 :] = False
    starts = torch.arange(b) * SEQUENCE
    edges = torch.stack([starts, starts + cut], dim=1).flatten()
    return TokenBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=loss_mask,
        position_ids=torch.cat([torch.arange(cut), torch.arange(SEQUENCE - cut)]).expand(b, -1).contiguous(),
        cu_seqlens=torch.cat([edges, torch.tensor([b * SEQUENCE])]).int(),
        sample_id=rows,
        source_id=torch.zeros(b, dtype=torch.int64),
        sample_index=step * SAMPLES + rows,
        streams={"ref_nll": ref_nll, "ref_entropy": ref_nll.flip(1)},
    )


def configuration(case: dict[str, Any], parallel: dict[str, Any]) -> PretrainConfig:
    return tiny_config(
        **{
            "model": {
                "preset": case.get("preset", "tiny"),
                "mcore": {**SMALL, **case.get("mcore", {})},
                "vocab_size": 384,  # no padding under any layout
                "make_vocab_size_divisible_by": 64,
            },
            "data.seq_length": SEQUENCE,
            "batch": {"micro_batch_size": MICRO_BATCH, "global_batch_size": SAMPLES},
            "objective": case.get("objective", {}),
            "parallel": parallel,
            "stream": case.get("stream", {}),
            "train.precision": case.get("precision", "fp32"),
            "optimizer": {"lr": 3e-3, "min_lr": 3e-3, "lr_decay_style": "constant", "clip_grad": 0.5},
        }
    )


def online_reference(
    case: dict[str, Any], cfg: PretrainConfig, layout: ParallelLayout, groups: ProcessGroups, folder: Path
) -> OnlineReference:
    """A reference model of another depth than the student, with the streams that the objective reads."""
    smaller = {**cfg.model.mcore, "num_layers": 2}
    own = cfg.model_copy(update={"model": cfg.model.model_copy(update={"mcore": smaller})})
    network = build_inference_network(own, layout.without_interleaving(), groups, runtime.start("cpu"), vocab_size=VOCAB)
    weights_from_one_process([network], folder / "reference")
    return OnlineReference(network, groups, reference_streams(cfg.objective))


def weights_from_one_process(chunks: list[torch.nn.Module], folder: Path) -> None:
    """The first process to come here writes its weights, the others read them."""
    sharded = {f"model{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(chunks)}
    if not folder.exists():
        write_sharded(sharded, folder)
        return
    loaded = load_sharded(sharded, folder, what="model", differences={}, same_vocabulary=True)
    for i, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{i}"])


def train(case: dict[str, Any], parallel: dict[str, Any], folder: str) -> dict[str, Any]:
    """A few steps on this rank; what they reported, and which tokens of which sample were kept."""
    started = runtime.start("cpu")
    cfg = configuration(case, parallel)
    layout = ParallelLayout.resolve(cfg.parallel, started.world_size)
    groups = layout.initialize(seed=1)
    torch.manual_seed(1)
    chunks = build_model(cfg, layout, groups, started, vocab_size=VOCAB)
    weights_from_one_process(list(chunks), Path(folder) / "model")
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, chunks, groups)
    reference = online_reference(case, cfg, layout, groups, Path(folder)) if case.get("online") else None
    step = TrainStep(chunks, build_objective(cfg.objective, 1), optimizer, scheduler, groups, annotate=reference)
    losses, norms, kept = [], [], {}
    for number in range(STEPS):
        own = torch.arange(SAMPLES).view(-1, groups.dp_size, MICRO_BATCH)[:, groups.dp_rank]
        batches = [make_samples(number, rows) for rows in own]
        if not groups.is_last_stage or reference:  # only where tokens are selected are the streams read
            batches = [replace(batch, streams={}) for batch in batches]
        report = step(batches, Progress(step=number))
        losses.append(report.loss_nats)
        norms.append(report.grad_norm)
        for batch, output in step.outputs:
            kept |= {int(i): row.tolist() for i, row in zip(batch.sample_index, output.weight, strict=True)}
        assert bool(step.outputs) == groups.is_last_stage and step.first_output() is not None
    return {"losses": losses, "norms": norms, "kept": kept, "num_tokens": report.num_tokens, "metrics": dict(report.metrics)}


CASES: dict[str, dict[str, Any]] = {
    "lm": {},
    "selection": {"objective": OBJECTIVES["selection"]},
    "sequence-selection": {"objective": OBJECTIVES["entropy"]},
    "rank-selection": {"objective": OBJECTIVES["rank"]},
    "lagged-selection": {"objective": OBJECTIVES["lagged"]},
    "online-intersection": {"objective": OBJECTIVES["both"], "online": True},
    "online": {"objective": OBJECTIVES["selection"], "online": True},
    "bf16": {"objective": OBJECTIVES["selection"], "precision": "bf16"},
    "recompute-full": {"mcore": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}},
    "recompute-attention": {"mcore": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}},
    "recompute-mlp": {"mcore": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}},
    # learned positions, biases, LayerNorm, one matrix for both ends of the pipeline
    "gpt2": {"preset": "gpt2-124m", "mcore": {"num_query_groups": 4}, "objective": OBJECTIVES["selection"]},
    # norms of queries and keys, one matrix for both ends
    "qwen3": {"preset": "qwen3-0.6b", "mcore": {"kv_channels": 16}, "objective": OBJECTIVES["selection"]},
    "experts": {"mcore": EXPERTS},
    "experts-selection": {"mcore": EXPERTS, "objective": OBJECTIVES["selection"]},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process computes, and where its first weights lie, for each case; computed when first asked for."""
    known: dict[str, tuple[dict[str, Any], str]] = {}

    def ask(name: str) -> tuple[dict[str, Any], str]:
        if name not in known:
            folder = str(tmp_path_factory.mktemp(name))
            known[name] = (spawn(1, train, CASES[name], {}, folder)[0], folder)
        return known[name]

    return ask


def check(
    name: str, world: int, parallel: dict[str, Any], alone: Any, tolerance: float = 1e-5, stream: dict[str, Any] | None = None
) -> None:
    expected, folder = alone(name)
    ranks = spawn(world, train, {**CASES[name], "stream": stream or {}}, parallel, folder)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected["losses"], abs=tolerance)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=20 * tolerance)
        assert rank["num_tokens"] == expected["num_tokens"]
        assert rank["metrics"] == pytest.approx(expected["metrics"], abs=10 * tolerance, rel=10 * tolerance)
    together = {sample: row for rank in ranks for sample, row in rank["kept"].items()}
    assert together.keys() == expected["kept"].keys()
    differing = sum(a != b for s in together for a, b in zip(together[s], expected["kept"][s], strict=True))
    assert differing <= (2 if tolerance < 1e-4 else 60)  # rounding may swap the two tokens at the threshold


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
@pytest.mark.parametrize("case", ["lm", "selection"])
def test_fp32_layouts_agree_with_one_process(case: str, layout: str, alone: Any) -> None:
    check(case, *LAYOUTS[layout], alone)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
@pytest.mark.parametrize("case", ["experts", "experts-selection"])
def test_expert_layouts_agree_with_one_process(case: str, layout: str, alone: Any) -> None:
    check(case, *EXPERT_LAYOUTS[layout], alone)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "pp2-cp2", "tp2-sp-pp2"])
@pytest.mark.parametrize("case", ["gpt2", "qwen3"])
def test_other_kinds_of_model_agree_with_one_process(case: str, layout: str, alone: Any) -> None:
    check(case, *LAYOUTS[layout], alone)


@pytest.mark.parametrize("layout", ["dp2-zero", "tp2-sp-cp2", "pp2-interleaved", "pp2-cp2"])
def test_an_online_reference_selects_the_same_tokens(layout: str, alone: Any) -> None:
    check("online", *LAYOUTS[layout], alone)


@pytest.mark.parametrize("layout", ["dp2", "cp2", "pp2"])
def test_selection_within_sequences_agrees(layout: str, alone: Any) -> None:
    check("sequence-selection", *LAYOUTS[layout], alone)


@pytest.mark.parametrize("layout", ["cp2", "pp2"])
def test_selection_within_a_rank_agrees_where_the_data_parallel_size_does(layout: str, alone: Any) -> None:
    check("rank-selection", *LAYOUTS[layout], alone)


@pytest.mark.parametrize("layout", ["dp2", "cp2", "pp2", "tp2-sp"])
def test_selection_by_the_threshold_of_the_step_before_agrees(layout: str, alone: Any) -> None:
    check("lagged-selection", *LAYOUTS[layout], alone)
    expected, _ = alone("lagged-selection")
    assert expected["metrics"]["select/overlap_with_exact"] > 0.8 and expected["metrics"]["select/jaccard_with_exact"] > 0.8


@pytest.mark.parametrize("layout", ["dp2", "cp2", "pp2"])
def test_an_intersection_by_loss_and_entropy_of_an_online_reference_agrees(layout: str, alone: Any) -> None:
    check("online-intersection", *LAYOUTS[layout], alone)


@pytest.mark.parametrize("layout", ["dp2-zero-overlapped", "tp2-sp", "pp2-interleaved", "pp2-cp2"])
def test_bf16_layouts_agree_with_one_process(layout: str, alone: Any) -> None:
    check("bf16", *LAYOUTS[layout], alone, tolerance=1e-2)


@pytest.mark.parametrize("case", ["recompute-full", "recompute-attention", "recompute-mlp"])
@pytest.mark.parametrize("layout", ["one", "tp2-sp-cp2", "pp2-interleaved"])
def test_recomputation_changes_nothing(case: str, layout: str, alone: Any) -> None:
    expected, folder = alone("lm")
    world, parallel = LAYOUTS[layout]
    for rank in spawn(world, train, CASES[case], parallel, folder):
        assert rank["losses"] == pytest.approx(expected["losses"], abs=1e-5)


STREAMED = {"layers": True, "chunk_tokens": 24}  # of 128 in a micro-batch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_layers_agree_with_one_process_that_keeps_everything(layout: str, alone: Any) -> None:
    check("selection", *LAYOUTS[layout], alone, stream=STREAMED)


@pytest.mark.parametrize("layout", ["ep2-zero", "ep2-pp2", "ep2-cp2", "ep2-tp2-sp"])
def test_streamed_layers_of_experts_agree(layout: str, alone: Any) -> None:
    check("experts-selection", *EXPERT_LAYOUTS[layout], alone, stream=STREAMED)


@pytest.mark.parametrize(
    ("case", "layout"), [("gpt2", "tp2-sp-pp2"), ("gpt2", "pp2-cp2"), ("qwen3", "tp2-sp-cp2"), ("online", "pp2-cp2")]
)
def test_streamed_layers_of_other_models_agree(case: str, layout: str, alone: Any) -> None:
    check(case, *LAYOUTS[layout], alone, stream=STREAMED)


@pytest.mark.parametrize("layout", ["one", "tp2-sp-dp2-zero-overlapped", "pp2-interleaved", "cp2"])
def test_streamed_layers_agree_in_bf16(layout: str, alone: Any) -> None:
    check("bf16", *LAYOUTS[layout], alone, tolerance=1e-2, stream=STREAMED)


def test_a_wrong_normaliser_would_be_seen(alone: Any) -> None:
    """The negative control: averaging the ranks' own means is another number on these uneven samples."""
    expected, folder = alone("selection")
    ranks = spawn(2, train, CASES["selection"], {}, folder)
    counts = [sum(sum(row) for s, row in rank["kept"].items() if s >= (STEPS - 1) * SAMPLES) for rank in ranks]
    assert counts[0] != counts[1]
    assert sum(counts) == expected["num_tokens"]


def fail_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("as planned")
    torch.distributed.barrier()


def test_spawn_names_the_rank_that_failed() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*as planned"):
        spawn(2, fail_on_rank_1, timeout_s=30)


def test_an_impossible_layout_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"tensor 2 x pipeline 1 x context 1 = 2 ranks.*a world of 3"):
        ParallelLayout.resolve(ParallelConfig(tensor_model_parallel_size=2), 3)
