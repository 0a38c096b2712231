"""Weightings: scopes, counts, ties, ignored labels and NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megarpt.errors import ConfigError
from megarpt.objectives.weighting import TopFraction, Uniform, token_order
from megarpt.ops import reference
from megarpt.structs import TokenBatch

SCOPES = ("sequence", "microbatch", "global_batch")


def score_of(batch: TokenBatch, seed: int = 0, levels: int = 0) -> torch.Tensor:
    """Random scores; with `levels`, that many distinct values, so that nearly all tie."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, batch.labels.shape, generator=generator).float()
    return torch.randn(batch.labels.shape, generator=generator)


def test_uniform_is_the_loss_mask(make_tokens) -> None:
    _, batch = make_tokens()
    (chosen,) = Uniform()([], [batch], None)
    assert torch.equal(chosen.weight, batch.loss_mask.float()) and chosen.threshold is None


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.6, 0.99, 1.0])
def test_every_scope_keeps_what_a_sort_keeps(make_tokens, fraction, levels) -> None:
    batches = [make_tokens(seed=seed, first_sample=3 * seed)[1] for seed in range(3)]
    scores = [score_of(batch, seed, levels) for seed, batch in enumerate(batches)]

    for batch, score, chosen in zip(batches, scores, TopFraction(fraction, "sequence")([scores], batches, None), strict=True):
        for row in range(3):
            expected = reference.top_fraction_mask(score[row], batch.loss_mask[row], fraction)
            assert torch.equal(chosen.weight[row] > 0, expected)

    for batch, score, chosen in zip(batches, scores, TopFraction(fraction, "microbatch")([scores], batches, None), strict=True):
        expected = reference.top_fraction_mask(score.flatten(), batch.loss_mask.flatten(), fraction)
        assert torch.equal(chosen.weight.flatten() > 0, expected)

    chosen_globally = TopFraction(fraction, "global_batch")([scores], batches, None)
    expected = reference.top_fraction_mask(
        torch.cat(scores).flatten(), torch.cat([b.loss_mask for b in batches]).flatten(), fraction
    )
    assert torch.equal(torch.cat([chosen.weight for chosen in chosen_globally]).flatten() > 0, expected)


@pytest.mark.parametrize("levels", [0, 2])
def test_scopes_coincide_where_their_sets_do(make_tokens, levels) -> None:
    _, batch = make_tokens()
    score = score_of(batch, levels=levels)
    (one_microbatch,) = TopFraction(0.6, "microbatch")([[score]], [batch], None)
    (whole_batch,) = TopFraction(0.6, "global_batch")([[score]], [batch], None)
    assert torch.equal(one_microbatch.weight, whole_batch.weight)

    _, batch = make_tokens(b=1)
    score = score_of(batch, levels=levels)
    weights = [TopFraction(0.6, scope)([[score]], [batch], None)[0].weight for scope in SCOPES]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_global_choice_does_not_depend_on_the_split_into_microbatches(make_tokens) -> None:
    _, batch = make_tokens(b=4)
    score = score_of(batch, levels=3)  # ties everywhere: only the position in the run's data can decide
    (whole,) = TopFraction(0.6)([[score]], [batch], None)

    def row(i: int) -> TokenBatch:
        return replace(batch, labels=batch.labels[[i]], loss_mask=batch.loss_mask[[i]], sample_index=batch.sample_index[[i]])

    shuffled = [2, 0, 3, 1]
    parts = TopFraction(0.6)([[score[[i]] for i in shuffled]], [row(i) for i in shuffled], None)
    for i, part in zip(shuffled, parts, strict=True):
        assert torch.equal(part.weight, whole.weight[[i]])


@pytest.mark.parametrize("scope", SCOPES)
def test_ignored_labels_are_removed_before_ranking(make_tokens, scope) -> None:
    """Masked tokens get the best scores of all, and change nothing: neither who is kept nor how many."""
    _, batch = make_tokens()
    score = score_of(batch)
    tempting = torch.where(batch.loss_mask, score, 1e9)
    (expected,), (got,) = (TopFraction(0.5, scope)([[one]], [batch], None) for one in (score, tempting))
    assert torch.equal(got.weight, expected.weight)
    assert not (got.weight > 0)[~batch.loss_mask].any()


@pytest.mark.parametrize("scope", SCOPES)
def test_all_scores_equal_keeps_exactly_k_in_position_order(make_tokens, scope) -> None:
    _, batch = make_tokens(b=1, s=10, valid=1.1)
    (chosen,) = TopFraction(0.6, scope)([[torch.zeros(1, 10)]], [batch], None)
    assert chosen.weight.tolist() == [[1.0] * 6 + [0.0] * 4]


@pytest.mark.parametrize("scope", SCOPES)
def test_nan_scores_are_kept_last(make_tokens, scope) -> None:
    _, batch = make_tokens(b=1, s=4, valid=1.1)
    score = torch.tensor([[float("nan"), 1.0, -float("inf"), 0.0]])
    assert TopFraction(0.5, scope)([[score]], [batch], None)[0].weight.tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert TopFraction(0.75, scope)([[score]], [batch], None)[0].weight.tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert TopFraction(1.0, scope)([[score]], [batch], None)[0].weight.tolist() == [[1.0] * 4]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_no_valid_token_keeps_nothing(make_tokens, scope, fraction) -> None:
    _, batch = make_tokens(valid=0.0)
    (chosen,) = TopFraction(fraction, scope)([[score_of(batch)]], [batch], None)
    assert not chosen.weight.any()


def test_thresholds(make_tokens) -> None:
    _, batch = make_tokens()
    score = score_of(batch)
    for scope in ("microbatch", "global_batch"):
        (chosen,) = TopFraction(0.5, scope)([[score]], [batch], None)
        assert chosen.threshold == score[chosen.weight > 0].min()
    assert TopFraction(0.5, "sequence")([[score]], [batch], None)[0].threshold is None


def test_order_is_the_position_in_the_run(make_tokens) -> None:
    _, batch = make_tokens(b=2, s=4, first_sample=5)
    assert token_order(batch).tolist() == [[20, 21, 22, 23], [24, 25, 26, 27]]


def test_mistakes_are_refused(make_tokens) -> None:
    _, batch = make_tokens()
    for fraction in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="fraction"):
            TopFraction(fraction)
    with pytest.raises(ConfigError, match="scope"):
        TopFraction(0.5, "rank")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="scorer"):
        TopFraction(0.5)([None], [batch], None)
