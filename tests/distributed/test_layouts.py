"""Losses, gradient norms and selection do not depend on how the work is split over ranks and micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megarpt.config.schema import ParallelConfig
from megarpt.device import runtime
from megarpt.model.build import build_model
from megarpt.objectives.build import build_objective
from megarpt.parallel.layout import ParallelLayout
from megarpt.structs import Progress, TokenBatch
from megarpt.testing.configs import tiny_config
from megarpt.testing.distributed import spawn
from megarpt.train.optimizer import build_optimizer
from megarpt.train.step import TrainStep

VOCAB, SEQUENCE, SAMPLES, STEPS = 300, 32, 8, 4
SMALL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96}
SELECTION = {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": 0.6}


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
        streams={"ref_nll": ref_nll},
    )


def train(objective: dict[str, Any], parallel: dict[str, Any], micro_batch: int, precision: str) -> dict[str, Any]:
    """A few steps on this rank; what they reported, and how many tokens of which sample were kept."""
    started = runtime.start("cpu")
    cfg = tiny_config(
        **{
            "model": {
                "preset": "tiny",
                "mcore": SMALL,
                "vocab_size": 384,
                "make_vocab_size_divisible_by": 64,
            },  # no padding under any layout
            "data.seq_length": SEQUENCE,
            "objective": objective,
            "parallel": parallel,
            "train.precision": precision,
            "optimizer": {"lr": 1e-2, "min_lr": 1e-2, "lr_decay_style": "constant", "clip_grad": 0.5},
        }
    )
    layout = ParallelLayout.resolve(ParallelConfig(**parallel), started.world_size)
    groups = layout.initialize(seed=1)
    torch.manual_seed(1)
    model = build_model(cfg, layout, groups, started, vocab_size=VOCAB)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, model, groups)
    step = TrainStep(model, build_objective(cfg.objective, 1), optimizer, scheduler, groups, seq_length=SEQUENCE)
    losses, norms, kept = [], [], {}
    for number in range(STEPS):
        own = torch.arange(SAMPLES).view(-1, groups.dp_size, micro_batch)[:, groups.dp_rank]
        report = step([make_samples(number, rows) for rows in own], Progress(step=number))
        losses.append(report.loss_nats)
        norms.append(report.grad_norm)
        for batch, output in step.outputs:
            kept |= {int(i): row.tolist() for i, row in zip(batch.sample_index, output.weight, strict=True)}
    return {"losses": losses, "norms": norms, "kept": kept, "num_tokens": report.num_tokens}


LAYOUTS = {
    "microbatches": (1, {}, 2),
    "dp2": (2, {}, 4),
    "dp2-microbatches": (2, {}, 1),
    "tp2": (2, {"tensor_model_parallel_size": 2}, 8),
    "tp2-sp-microbatches": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One rank, one micro-batch: what every layout has to agree with."""
    cases = {("lm", "fp32"): {}, ("selection", "fp32"): SELECTION, ("selection", "bf16"): SELECTION}
    return {case: spawn(1, train, objective, {}, SAMPLES, case[1])[0] for case, objective in cases.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", ["lm", "selection"])
def test_fp32_layouts_agree_with_one_rank(layout: str, objective: str, alone: dict[str, Any]) -> None:
    world, parallel, micro_batch = LAYOUTS[layout]
    settings = SELECTION if objective == "selection" else {}
    ranks = spawn(world, train, settings, parallel, micro_batch, "fp32")
    expected = alone[objective, "fp32"]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert rank["num_tokens"] == expected["num_tokens"]
    together = {sample: row for rank in ranks for sample, row in rank["kept"].items()}
    assert together.keys() == expected["kept"].keys()
    differing = sum(a != b for s in together for a, b in zip(together[s], expected["kept"][s], strict=True))
    assert differing <= 2  # rounding may swap the two tokens at the threshold


def test_bf16_data_parallel_agrees_with_one_rank(alone: dict[str, Any]) -> None:
    for rank in spawn(2, train, SELECTION, {}, 2, "bf16"):
        assert rank["losses"] == pytest.approx(alone["selection", "bf16"]["losses"], abs=1e-2)


def test_a_wrong_normaliser_would_be_seen(alone: dict[str, Any]) -> None:
    """The negative control: averaging the ranks' own means is another number on these uneven samples."""
    ranks = spawn(2, train, SELECTION, {}, 4, "fp32")
    counts = [sum(sum(row) for s, row in rank["kept"].items() if s >= (STEPS - 1) * SAMPLES) for rank in ranks]
    assert counts[0] != counts[1]
    assert sum(counts) == alone["selection", "fp32"]["num_tokens"]


def fail_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("as planned")
    torch.distributed.barrier()


def test_spawn_names_the_rank_that_failed() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*as planned"):
        spawn(2, fail_on_rank_1, timeout_s=30)


def test_an_impossible_layout_is_explained() -> None:
    with pytest.raises(RuntimeError, match="tensor parallel 2 x data parallel"):
        spawn(1, train, {}, {"tensor_model_parallel_size": 2}, 8, "fp32")
