"""A step: what it decides before the model runs, and a selection that follows from the step before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megarpt.device.runtime import Runtime
from megarpt.model import forward, token_stats_gpt
from megarpt.objectives.policy_gradient import ClippedPolicyGradient
from megarpt.ops.linear_logprob import LEAST_GROUP, GradientGuess
from megarpt.structs import TokenStats
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
    """For every call of the head that trains: how many tokens it was told, or guessed, to have a gradient; None where it was
    told nothing."""
    monkeypatch.setitem(LEAST_GROUP, ("cpu", False), 1)
    told: list[float | None] = []
    head = token_stats_gpt.linear_logprob

    def counting(guess: GradientGuess, call: int, tokens: slice, stats: TokenStats) -> torch.Tensor:
        gradient = guess.of(tokens, stats)
        told[call] = (told[call] or 0.0) - gradient.sum().item()
        return gradient

    def spy(*args, known_gradient: torch.Tensor | GradientGuess | None, **kwargs):
        if torch.is_grad_enabled():
            told.append(-known_gradient.sum().item() if isinstance(known_gradient, torch.Tensor) else None)
        if isinstance(known_gradient, GradientGuess):
            known_gradient = replace(known_gradient, of=partial(counting, known_gradient, len(told) - 1))
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
        (random_half("sequence") | {"scorer": "loss"}, [], B * S),
        (random_half("microbatch") | {"scorer": "loss"}, [], B * S),
        (LAGGED, [], 2 * round(0.6 * B * S)),
    ],
)
def test_the_head_is_told_the_weights_where_they_are_known(
    objective: dict,
    passes: list[int],
    tokens: float,
    given: list[float | None],
    scoring_passes: list[int],
    cpu_runtime: Runtime,
    tmp_path: Path,
) -> None:
    """And the model scores beforehand only where it has a say."""
    run = tiny_run(tmp_path, cpu_runtime, seed=1, objective=objective)
    two_micro_batches(run)
    assert scoring_passes == passes
    assert len(given) == 2 and sum(told or 0.0 for told in given) == tokens


def test_a_lagged_threshold_is_the_guess_once_there_is_one(
    given: list[float | None], cpu_runtime: Runtime, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, cpu_runtime, seed=1, objective=LAGGED)
    two_micro_batches(run)
    kept = run.step([random_batch(B, S, VOCAB, seed=seed) for seed in (3, 4)], run.state.progress).num_tokens
    assert 0 < kept == sum(told for told in given[2:] if told is not None)


@pytest.mark.parametrize("keep_mib", [0, 1])
def test_nothing_is_guessed_where_no_logits_are_held(
    keep_mib: int, given: list[float | None], cpu_runtime: Runtime, tmp_path: Path
) -> None:
    objective = random_half("sequence") | {"scorer": "loss"}
    run = tiny_run(tmp_path, cpu_runtime, seed=1, objective=objective, **{"train.head_keep_mib": keep_mib})
    two_micro_batches(run)
    assert given == ([B * S / 2.0] * 2 if keep_mib else [None] * 2)


TWO_SETS = {**random_half("sequence"), "scorer": "loss", "second": {"scorer": "random", "fraction": 0.7}}


@pytest.mark.parametrize(
    "objective",
    [{}, random_half("global_batch"), random_half("sequence") | {"scorer": "loss"}, TWO_SETS, LAGGED],
    ids=["all", "known", "by-sample", "two-sets", "lagged"],
)
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


@pytest.mark.parametrize("tokens", [5, 16, 20])
@pytest.mark.parametrize(
    "objective",
    [
        random_half("global_batch") | {"scorer": "loss"},
        random_half("microbatch") | {"scorer": "loss"},
        random_half("sequence") | {"scorer": "loss"},
        TWO_SETS | {"scope": "global_batch"},
        TWO_SETS | {"scope": "rank", "combine": "union"},
        LAGGED,
    ],
    ids=["global", "microbatch", "sequence", "two-sets", "one-of-two", "lagged"],
)
def test_a_guess_from_the_first_tokens_changes_nothing(
    objective: dict, tokens: int, given: list[float | None], cpu_runtime: Runtime, tmp_path: Path
) -> None:
    """Against a head that waits for the choice: the same metrics, among them the threshold of the step before, and the same
    weights, although guesses were wrong."""
    runs = [tiny_run(tmp_path / name, cpu_runtime, seed=1, objective=objective) for name in ("guesses", "waits")]
    for run, keep_bytes in zip(runs, (tokens * VOCAB * 4, 0), strict=True):
        forward.unwrap(run.model[0]).head_keep_bytes = keep_bytes
    ours, expected = (run.train(3) for run in runs)
    for one, other in zip(ours, expected, strict=True):
        assert one.num_tokens == other.num_tokens and one.metrics == pytest.approx(other.metrics, rel=1e-5, abs=1e-5)
    for name, value in runs[1].weights().items():
        torch.testing.assert_close(runs[0].weights()[name], value, rtol=1e-3, atol=1e-4)
    guessed = [told for told in given if told is not None]
    assert len(guessed) == 3
    is_exact = (objective["scope"] == "sequence" and tokens >= S) or objective is LAGGED
    assert is_exact or guessed != [report.num_tokens for report in expected]


@pytest.mark.parametrize("reduction", ["token", "rollout"])
def test_a_policy_gradient_is_a_step_like_any_other(
    reduction: str, scoring_passes: list[int], cpu_runtime: Runtime, tmp_path: Path
) -> None:
    """On policy and with advantages of 1 its gradient is that of language modeling. Nothing is scored beforehand, no weight is
    asked for, and there is no state."""
    policy, language = (tiny_run(tmp_path / name, cpu_runtime, seed=1) for name in ("policy", "language"))
    policy.step.objective = ClippedPolicyGradient(reduction=reduction, entropy_coef=1e-9)
    ones = torch.ones(B, S)
    ends = torch.zeros(B, S).index_fill(1, torch.tensor([S - 1]), 1.0)
    streams = {"advantage": ones, "rollout_share": ones / S, "rollout_end": ends}
    batches = [random_batch(B, S, VOCAB, seed=seed) for seed in (1, 2)]
    report = policy.step([replace(batch, streams=streams) for batch in batches], policy.state.progress)
    expected = language.step(batches, language.state.progress)
    assert scoring_passes == [] and policy.step.selection_state() == {}
    assert report.num_tokens == (2 * B if reduction == "rollout" else 2 * B * S)
    assert report.metrics["policy/ratio"] == 1.0 and report.metrics["policy/loss"] == pytest.approx(-1.0)
    assert report.metrics["policy/entropy_nats"] > 1.0
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, value in language.weights().items():
        torch.testing.assert_close(policy.weights()[name], value, rtol=1e-4, atol=1e-5)
