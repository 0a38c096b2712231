"""A step: what it decides before the model runs, and a selection that follows from the step before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarpt.device.runtime import Runtime
from megarpt.model import forward, token_stats_gpt
from megarpt.ops.linear_logprob import LEAST_GROUP
from megarpt.testing.batches import random_batch
from megarpt.testing.tiny_run import VOCAB, B, S, TinyRun, tiny_run
from megarpt.train import step

LAGGED = {"scorer": "loss", "weighting": "top_fraction", "fraction": 0.6, "scope": "lagged_global_batch"}


def test_a_threshold_that_nothing_reaches_costs_one_step(cpu_runtime: Runtime, tmp_path: Path) -> None:
    """The step that keeps nothing has no gradient, and the next one has the threshold of its scores."""
    run = tiny_run(tmp_path, cpu_runtime, seed=1, objective=LAGGED)
    run.step.objective.load_state_dict({"threshold": 1e9})
    nothing, something = run.train(2)
    assert (nothing.num_tokens, nothing.loss_nats, nothing.grad_norm, nothing.skipped) == (0, 0.0, 0.0, False)
    assert nothing.metrics["select/kept_fraction"] == nothing.metrics["select/overlap_with_exact"] == 0.0
    assert something.num_tokens > 0 and something.grad_norm > 0.0 and something.metrics["select/overlap_with_exact"] > 0.5


def random_half(scope: str) -> dict[str, object]:
    return {"scorer": "random", "weighting": "top_fraction", "fraction": 0.5, "scope": scope}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """For every call of the head that trains: how many tokens it was told to have a gradient; None where it was not told."""
    monkeypatch.setitem(LEAST_GROUP, ("cpu", False), 1)
    told: list[float | None] = []
    head = token_stats_gpt.linear_logprob

    def spy(*args, known_gradient: torch.Tensor | None, **kwargs):
        if torch.is_grad_enabled():
            told.append(None if known_gradient is None else -known_gradient.sum().item())
        return head(*args, known_gradient=known_gradient, **kwargs)

    monkeypatch.setattr(token_stats_gpt, "linear_logprob", spy)
    return told


@pytest.fixture
def scoring_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Micro-batches of every forward pass that only scores."""
    passes: list[int] = []

    def spy(chunks, batches, *args, **kwargs):
        passes.append(len(batches))
        return forward.token_stats(chunks, batches, *args, **kwargs)

    monkeypatch.setattr(step, "token_stats", spy)
    return passes


def two_micro_batches(run: TinyRun) -> float:
    return run.step([random_batch(B, S, VOCAB, seed=seed) for seed in (1, 2)], run.state.progress).loss_nats


@pytest.mark.parametrize(
    ("objective", "passes", "tokens"),
    [
        ({}, [], 2 * B * S),
        (random_half("sequence"), [], B * S),
        (random_half("global_batch"), [], B * S),
        (random_half("global_batch") | {"scorer": "loss"}, [2], B * S),
        (random_half("sequence") | {"scorer": "loss"}, [], None),
    ],
)
def test_the_head_is_told_the_weights_where_they_are_known(
    objective: dict,
    passes: list[int],
    tokens: float | None,
    given: list[float | None],
    scoring_passes: list[int],
    cpu_runtime: Runtime,
    tmp_path: Path,
) -> None:
    """And the model scores beforehand only where it has a say."""
    run = tiny_run(tmp_path, cpu_runtime, seed=1, objective=objective)
    two_micro_batches(run)
    assert scoring_passes == passes
    assert len(given) == 2 and (given == [None, None] if tokens is None else sum(given) == tokens)


@pytest.mark.parametrize("objective", [{}, random_half("global_batch")])
def test_gradients_at_once_change_nothing(
    objective: dict, cpu_runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a head that makes them in the backward pass, after two steps."""
    monkeypatch.setitem(LEAST_GROUP, ("cpu", False), 1)
    runs = [
        tiny_run(tmp_path / str(keep), cpu_runtime, seed=1, objective=objective, **{"train.head_keep_mib": keep})
        for keep in (0, 1)
    ]
    losses = [[two_micro_batches(run) for _ in range(2)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, value in runs[0].weights().items():
        torch.testing.assert_close(runs[1].weights()[name], value, rtol=1e-4, atol=1e-5)
