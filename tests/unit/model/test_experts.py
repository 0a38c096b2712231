"""The auxiliary loss of a mixture of experts: what it weighs, and what is reported of it."""

from __future__ import annotations

import pytest
import torch

from megarpt.device.runtime import Runtime
from megarpt.model.build import build_model, transformer_config
from megarpt.model.experts import take_balance_losses
from megarpt.objectives.build import build_objective
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.structs import Progress
from megarpt.testing.batches import random_batch
from megarpt.testing.configs import tiny_config
from megarpt.train.optimizer import build_optimizer
from megarpt.train.step import TrainStep

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "moe_ffn_hidden_size": 16}
SELECTION = {"scorer": "random", "weighting": "top_fraction", "fraction": 0.5}


@pytest.mark.parametrize(
    ("layout", "overrides", "expected"),
    [
        (ParallelLayout(), {}, 0.01),
        (ParallelLayout(tp=2, etp=2), {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}, 0.02),
        (ParallelLayout(cp=4), {"parallel": {"context_parallel_size": 4}}, 0.04),
        (ParallelLayout(), {"objective": SELECTION}, 0.005),
        (ParallelLayout(), {"model.mcore": {**SMALL, "moe_aux_loss_coeff": 0.3}}, 0.3),
        (ParallelLayout(), {"model.preset": "tiny", "model.mcore": {}}, 0.0),
    ],
)
def test_the_coefficient_makes_up_for_the_layout_and_the_selection(
    layout: ParallelLayout, overrides: dict, expected: float
) -> None:
    cfg = tiny_config(**{"model.preset": "tiny-moe", "model.mcore": SMALL} | overrides)
    assert transformer_config(cfg, layout, is_cuda=False).moe_aux_loss_coeff == pytest.approx(expected)


def test_the_balance_of_a_step_is_reported_and_counting_begins_anew(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    cfg = tiny_config(**{"model.preset": "tiny-moe", "model.mcore": SMALL, "data.seq_length": 16})
    torch.manual_seed(1)
    chunks = build_model(cfg, ParallelLayout(), one_rank, cpu_runtime, vocab_size=300)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, chunks, one_rank)
    step = TrainStep(chunks, build_objective(cfg.objective, 1), optimizer, scheduler, one_rank)
    reported = [
        step([random_batch(2, 16, 300, seed=i) for i in range(count)], Progress()).metrics["moe/load_balancing_loss"]
        for count in (1, 3)
    ]
    for value in reported:  # 1 is perfect balance, 4 is one expert of four for all
        assert 1.0 <= value < 1.5
    config = chunks[0].config
    assert take_balance_losses(config, one_rank, 1, torch.device("cpu")) == {}
