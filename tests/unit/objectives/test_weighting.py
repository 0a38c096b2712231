"""Weightings: scopes, counts, ties, ignored labels, NaN; the lagged choice and combined sets, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megarpt.errors import ConfigError
from megarpt.objectives.weighting import Combination, LaggedTopFraction, TopFraction, Uniform, token_order
from megarpt.ops import reference
from megarpt.structs import TokenBatch
from megarpt.testing.distributed import spawn

SCOPES = ("sequence", "microbatch", "rank", "global_batch")
NAN, INF = float("nan"), float("inf")


def score_of(batch: TokenBatch, seed: int = 0, levels: int = 0) -> torch.Tensor:
    """Random scores; with `levels`, that many distinct values, so that nearly all tie."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, batch.labels.shape, generator=generator).float()
    return torch.randn(batch.labels.shape, generator=generator)


def row(batch: TokenBatch, i: int) -> TokenBatch:
    return replace(batch, labels=batch.labels[[i]], loss_mask=batch.loss_mask[[i]], sample_index=batch.sample_index[[i]])


def best_of_all(scores: list[torch.Tensor], batches: list[TokenBatch], fraction: float) -> torch.Tensor:
    """By a sort: mask of the best tokens of all micro-batches together."""
    valid = torch.cat([batch.loss_mask for batch in batches])
    return reference.top_fraction_mask(torch.cat(scores).flatten(), valid.flatten(), fraction).view_as(valid)


def kept_by(weighting, scores: list[torch.Tensor], batches: list[TokenBatch], group=None) -> torch.Tensor:
    return torch.cat([chosen.weight for chosen in weighting([scores], batches, group)]) > 0


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

    for scope in ("rank", "global_batch"):
        assert torch.equal(kept_by(TopFraction(fraction, scope), scores, batches), best_of_all(scores, batches, fraction))


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

    shuffled = [2, 0, 3, 1]
    parts = TopFraction(0.6)([[score[[i]] for i in shuffled]], [row(batch, i) for i in shuffled], None)
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
    for scope in SCOPES[1:]:
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
        TopFraction(0.5, "node")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fraction"):
        LaggedTopFraction(0.0)
    with pytest.raises(NotImplementedError, match="TopFraction learns nothing"):
        TopFraction(0.5).settle([[score_of(batch)]], [batch], None)


def step_of(make_tokens, step: int, micro_batches: int = 3) -> tuple[list[torch.Tensor], list[TokenBatch]]:
    """Scores and batches of a step; the scores drift, so that a threshold grows old."""
    seeds = [step * micro_batches + i for i in range(micro_batches)]
    batches = [make_tokens(seed=seed, first_sample=3 * seed)[1] for seed in seeds]
    return [score_of(batch, seed) + 0.2 * step for seed, batch in zip(seeds, batches, strict=True)], batches


@pytest.mark.parametrize("fraction", [0.1, 0.6, 1.0])
def test_lagged_keeps_what_a_loop_with_a_sort_keeps(make_tokens, fraction) -> None:
    lagged, threshold, differing = LaggedTopFraction(fraction), None, 0
    for step in range(5):
        scores, batches = step_of(make_tokens, step)
        valid = torch.cat([batch.loss_mask for batch in batches])
        if threshold is None:
            expected = torch.cat([best_of_all([one], [batch], fraction) for one, batch in zip(scores, batches, strict=True)])
        else:
            expected = valid & (torch.cat(scores) >= threshold)
        assert torch.equal(kept_by(lagged, scores, batches), expected)

        exact = best_of_all(scores, batches, fraction)
        settled = lagged.settle([scores], batches, None)
        assert torch.equal(torch.cat([chosen.weight for chosen in settled]) > 0, exact)
        threshold = float(torch.cat(scores)[exact].min()) if fraction < 1.0 else -INF
        assert lagged.state_dict() == {"threshold": threshold}
        differing += int((expected != exact).sum())
    assert (differing > 0) == (fraction < 1.0)  # else the lagged choice is the exact one and this tests nothing


def test_lagged_is_exact_when_scores_repeat(make_tokens) -> None:
    scores, batches = step_of(make_tokens, 0)
    lagged = LaggedTopFraction(0.6)
    kept_by(lagged, scores, batches)
    for _ in range(3):
        lagged.settle([scores], batches, None)
        assert torch.equal(kept_by(lagged, scores, batches), best_of_all(scores, batches, 0.6))


def test_lagged_keeps_all_that_tie_with_the_threshold(make_tokens) -> None:
    _, batch = make_tokens(b=1, s=10, valid=1.1)
    score = torch.tensor([[3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    lagged = LaggedTopFraction(0.3)
    assert int(lagged.settle([[score]], [batch], None)[0].weight.sum()) == 3
    assert int(kept_by(lagged, [score], [batch]).sum()) == 5


def test_lagged_does_not_depend_on_the_split_once_it_has_a_threshold(make_tokens) -> None:
    _, batch = make_tokens(b=6)
    score = score_of(batch, seed=1)
    whole, split = LaggedTopFraction(0.6), LaggedTopFraction(0.6)
    rows = [row(batch, i) for i in range(6)]
    assert not torch.equal(kept_by(whole, [score], [batch]), kept_by(split, list(score.split(1)), rows))
    whole.settle([[score]], [batch], None)
    split.settle([list(score.split(1))], rows, None)
    assert whole.state_dict() == split.state_dict()
    newer = score + 0.1 * score.flip(0)
    assert torch.equal(kept_by(whole, [newer], [batch]), kept_by(split, list(newer.split(1)), rows))


def test_a_resumed_lagged_choice_goes_on_with_the_same_threshold(make_tokens) -> None:
    straight, resumed = LaggedTopFraction(0.6), LaggedTopFraction(0.6)
    straight.settle([step_of(make_tokens, 0)[0]], step_of(make_tokens, 0)[1], None)
    resumed.load_state_dict(straight.state_dict())
    for step in (1, 2):
        scores, batches = step_of(make_tokens, step)
        assert torch.equal(kept_by(resumed, scores, batches), kept_by(straight, scores, batches))
        for each in (straight, resumed):
            each.settle([scores], batches, None)
    assert resumed.state_dict() == straight.state_dict()


@pytest.mark.parametrize(("poison", "valid"), [(NAN, True), (INF, True), (0.0, False)])
def test_a_threshold_that_selects_nothing_is_not_learnt(make_tokens, poison, valid) -> None:
    lagged = LaggedTopFraction(0.6)
    scores, batches = step_of(make_tokens, 0)
    lagged.settle([scores], batches, None)
    known = lagged.state_dict()
    masks = [batch.loss_mask & valid for batch in batches]
    poisoned = [replace(batch, loss_mask=mask) for batch, mask in zip(batches, masks, strict=True)]
    lagged.settle([[torch.full_like(score, poison) for score in scores]], poisoned, None)
    assert lagged.state_dict() == known


def test_lagged_drops_nan_and_keeps_it_at_fraction_one(make_tokens) -> None:
    _, batch = make_tokens(b=1, s=4, valid=1.1)
    score = torch.tensor([[NAN, 1.0, -INF, 0.0]])
    for fraction, expected in ((0.5, [[0.0, 1.0, 0.0, 1.0]]), (0.75, [[0.0, 1.0, 1.0, 1.0]]), (1.0, [[1.0] * 4])):
        lagged = LaggedTopFraction(fraction)
        lagged.settle([[score]], [batch], None)
        assert lagged([[score]], [batch], None)[0].weight.tolist() == expected


@pytest.mark.parametrize("scope", [*SCOPES, "lagged_global_batch"])
@pytest.mark.parametrize("combine", ["intersection", "union"])
def test_combined_sets_are_chosen_apart_and_then_combined(make_tokens, scope, combine) -> None:
    def one_set(fraction: float):
        return LaggedTopFraction(fraction) if scope == "lagged_global_batch" else TopFraction(fraction, scope)

    combined, first, second = Combination(one_set(0.7), one_set(0.5), combine), one_set(0.7), one_set(0.5)
    for step in range(2):
        scores, batches = step_of(make_tokens, step)
        others = [score_of(batch, seed=50 + i) for i, batch in enumerate(batches)]
        chosen = combined([scores, others], batches, None)
        a, b = kept_by(first, scores, batches), kept_by(second, others, batches)
        expected = a & b if combine == "intersection" else a | b
        assert torch.equal(torch.cat([each.weight for each in chosen]) > 0, expected)
        assert torch.equal(torch.cat([each.sets[0].weight for each in chosen]) > 0, a)
        assert torch.equal(torch.cat([each.sets[1].weight for each in chosen]) > 0, b)
        assert not torch.equal(a, b) and expected.any()
        if combined.learns_from_steps:
            settled = combined.settle([scores, others], batches, None)
            a, b = best_of_all(scores, batches, 0.7), best_of_all(others, batches, 0.5)
            assert torch.equal(torch.cat([each.weight for each in settled]) > 0, a & b if combine == "intersection" else a | b)
            first.settle([scores], batches, None)
            second.settle([others], batches, None)
    state = combined.state_dict()
    assert state == {**first.state_dict(), "second_threshold": second.state_dict()["threshold"]}
    resumed = Combination(one_set(0.7), one_set(0.5), combine)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


def test_rank_and_lagged_on_two_ranks(make_tokens) -> None:
    """A rank's tokens compete with each other only; a lagged threshold is that of all ranks."""
    scores, batches = step_of(make_tokens, 0, micro_batches=4)
    scores = [score + i % 2 for i, score in enumerate(scores)]  # what the second rank gets scores higher
    spawn(2, check_rank, scores, batches)


def check_rank(scores: list[torch.Tensor], batches: list[TokenBatch]) -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    own, mine = scores[rank::2], batches[rank::2]
    kept = kept_by(TopFraction(0.6, "rank"), own, mine, group)
    assert torch.equal(kept, best_of_all(own, mine, 0.6))
    together = kept_by(TopFraction(0.6), own, mine, group)
    assert not torch.equal(kept, together)
    alone, lagged = LaggedTopFraction(0.6), LaggedTopFraction(0.6)
    alone.settle([scores], batches, None)
    settled = lagged.settle([own], mine, group)
    assert alone.state_dict() == lagged.state_dict()
    assert torch.equal(torch.cat([each.weight for each in settled]) > 0, together)
