"""The learning rate over tokens, and which parameters decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError
from megarpt.model.build import build_model
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.testing.configs import tiny_config
from megarpt.train.optimizer import build_optimizer

PEAK, LOW, WARMUP, END, STEP = 1e-3, 1e-4, 400, 2000, 100
SMALL = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 48}


def build(cpu_runtime: Runtime, groups: ProcessGroups, optimizer: dict[str, Any]) -> tuple[Any, Any, Any]:
    cfg = tiny_config(**{"model.mcore": SMALL, "optimizer": optimizer, "train.train_tokens": END})
    chunks = build_model(cfg, ParallelLayout(), groups, cpu_runtime, vocab_size=257)
    return chunks[0], *build_optimizer(cfg.optimizer, cfg.train, chunks, groups)


def cosine(tokens: int) -> float:
    return LOW + (PEAK - LOW) * 0.5 * (1 + math.cos(math.pi * (tokens - WARMUP) / (END - WARMUP)))


def linear(tokens: int) -> float:
    return LOW + (PEAK - LOW) * (1 - (tokens - WARMUP) / (END - WARMUP))


def stable_then_linear(tokens: int) -> float:
    return PEAK if tokens <= END - 500 else LOW + (PEAK - LOW) * (END - tokens) / 500


@pytest.mark.parametrize(
    ("style", "shape"),
    [
        ({"lr_decay_style": "cosine"}, cosine),
        ({"lr_decay_style": "linear"}, linear),
        ({"lr_decay_style": "constant"}, lambda tokens: PEAK),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_tokens": 500}, stable_then_linear),
    ],
)
def test_learning_rate_over_tokens(
    cpu_runtime: Runtime, one_rank: ProcessGroups, style: dict[str, Any], shape: Callable[[int], float]
) -> None:
    _, optimizer, scheduler = build(cpu_runtime, one_rank, {"lr": PEAK, "min_lr": LOW, "lr_warmup_tokens": WARMUP} | style)
    for tokens in range(STEP, END + 1, STEP):
        scheduler.step(increment=STEP)
        expected = PEAK * tokens / WARMUP if tokens <= WARMUP else shape(tokens)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected, rel=1e-9), tokens


def test_norms_and_biases_do_not_decay(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    model, optimizer, scheduler = build(cpu_runtime, one_rank, {"weight_decay": 0.3})
    scheduler.step(increment=STEP)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.dim() > 1 else 0.0), name


def test_an_unknown_field_of_the_optimizer_is_refused(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.mcore\.adam_epsilon: not a field.*did you mean 'adam_eps'"):
        build(cpu_runtime, one_rank, {"mcore": {"adam_epsilon": 1e-8}})


def test_a_step_moves_the_parameters_by_about_the_learning_rate(cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    model, optimizer, scheduler = build(cpu_runtime, one_rank, {"lr": PEAK, "lr_decay_style": "constant", "weight_decay": 0.0})
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.main_grad.fill_(2.0)
    scheduler.step(increment=STEP)
    optimizer.prepare_grads()
    optimizer.step_with_ready_grads()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old - new, torch.full_like(old, PEAK), rtol=1e-3, atol=0)
