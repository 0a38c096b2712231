"""The weighted language model: identities, normalisation, what reaches the gradient, metrics, state."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.distributed as dist

from megarpt.config.schema import ObjectiveConfig
from megarpt.config.validate import ranks_by_student
from megarpt.errors import CheckpointError, ConfigError
from megarpt.objectives.build import SCORERS, WEIGHTINGS, build_objective
from megarpt.objectives.language_model import WeightedLanguageModel
from megarpt.objectives.scoring import ExcessLoss, Loss, ReferenceEntropy, ReferenceLoss
from megarpt.objectives.weighting import Combination, LaggedTopFraction, TopFraction, Uniform
from megarpt.structs import Progress, TokenBatch, TokenStats
from megarpt.testing.distributed import spawn

NAN = float("nan")
SCOPES = get_args(ObjectiveConfig.model_fields["scope"].annotation)


def rows(batch: TokenBatch, chosen: slice) -> TokenBatch:
    """A part of a batch."""
    names = ("tokens", "labels", "loss_mask", "position_ids", "sample_id", "source_id", "sample_index")
    parts = {name: getattr(batch, name)[chosen] for name in names}
    return replace(batch, **parts, streams={name: values[chosen] for name, values in batch.streams.items()})


def run(objective: WeightedLanguageModel, stats: TokenStats, batch: TokenBatch, step: int = 0):
    """One step of one micro-batch, as a training step calls it: (output, gradient of the mean loss)."""
    progress = Progress(step=step)
    chosen = objective.select([stats], [batch], progress, None)[0] if objective.spans_micro_batches else None
    out = objective(stats, batch, chosen, progress)
    if objective.learns_from_steps:
        out = out._replace(metrics=out.metrics | objective.settle([(batch, out)], None))
    (gradient,) = torch.autograd.grad(out.loss_sum / out.num_tokens.clamp(min=1), stats.logprob)
    return out, gradient


@pytest.mark.parametrize("scorer", [name for name in SCORERS if name != "none"])
@pytest.mark.parametrize("scope", SCOPES)
def test_fraction_one_is_plain_language_modeling_bit_for_bit(make_tokens, scorer, scope) -> None:
    stats, batch = make_tokens()
    plain_loss = torch.where(batch.loss_mask, -stats.logprob, 0.0).sum()
    (plain_gradient,) = torch.autograd.grad(plain_loss / batch.loss_mask.sum(), stats.logprob)
    uniform = build_objective(ObjectiveConfig(), seed=0)
    everything = build_objective(ObjectiveConfig(scorer=scorer, weighting="top_fraction", fraction=1.0, scope=scope), seed=0)
    for objective in (uniform, everything, everything):  # the second step of a lagged choice is another than the first
        out, gradient = run(objective, stats, batch)
        assert torch.equal(out.loss_sum, plain_loss)
        assert int(out.num_tokens) == int(batch.loss_mask.sum())
        assert torch.equal(gradient, plain_gradient)


def test_loss_is_the_mean_over_kept_tokens_and_only_they_get_a_gradient(make_tokens) -> None:
    stats, batch = make_tokens()
    out, gradient = run(WeightedLanguageModel(ExcessLoss(), TopFraction(0.6)), stats, batch)
    kept = out.weight > 0
    assert int(out.num_tokens) == int(kept.sum()) == math.floor(0.6 * int(batch.loss_mask.sum()) + 0.5)
    assert out.num_tokens.dtype == torch.int32 and out.num_tokens.shape == out.loss_sum.shape == ()
    torch.testing.assert_close(out.loss_sum.detach(), -stats.logprob[kept].sum().detach())
    assert torch.equal(gradient != 0, kept)
    excess = -stats.logprob.detach() - batch.streams["ref_nll"]
    assert excess[kept].min() > excess[batch.loss_mask & ~kept].max()


def test_selection_follows_the_label_not_its_neighbours(make_tokens) -> None:
    """Shift by one. Exactly the labels that the reference finds impossible are dropped."""
    stats, batch = make_tokens(b=1, s=10, valid=1.1)
    noise = torch.tensor([[2, 3, 7]])
    ref_nll = torch.zeros(1, 10).index_fill(1, noise[0], 50.0)
    out, gradient = run(
        WeightedLanguageModel(ExcessLoss(), TopFraction(0.7)), stats, replace(batch, streams={"ref_nll": ref_nll})
    )
    assert (out.weight[0] == 0).nonzero()[:, 0].tolist() == [2, 3, 7]
    assert (gradient[0] == 0).nonzero()[:, 0].tolist() == [2, 3, 7]


@pytest.mark.parametrize("scope", SCOPES)
def test_no_valid_token_gives_a_zero_loss_with_a_graph(make_tokens, scope) -> None:
    stats, batch = make_tokens(valid=0.0)
    selecting = build_objective(ObjectiveConfig(scorer="excess_loss", weighting="top_fraction", fraction=0.5, scope=scope), 0)
    for objective in (WeightedLanguageModel(None, Uniform()), selecting):
        out, gradient = run(objective, stats, batch)
        assert out.loss_sum.requires_grad and float(out.loss_sum.detach()) == 0.0 and int(out.num_tokens) == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))
        assert all(torch.isfinite(part) for pair in out.metrics.values() for part in pair)


def test_nan_of_a_dropped_token_reaches_neither_loss_nor_gradient(make_tokens) -> None:
    stats, batch = make_tokens(b=1, s=8, valid=1.1)
    logprob = stats.logprob.detach().clone()
    logprob[0, 3] = NAN  # a NaN score is the lowest
    out, gradient = run(
        WeightedLanguageModel(ExcessLoss(), TopFraction(0.5)), TokenStats(logprob.requires_grad_(), None), batch
    )
    assert out.weight[0, 3] == 0 and torch.isfinite(out.loss_sum) and torch.isfinite(gradient).all()
    numerator, denominator = out.metrics["select/nan_scores"]
    assert (float(numerator), float(denominator)) == (1.0, 8.0)


def test_nan_of_a_kept_or_masked_token(make_tokens) -> None:
    """A kept NaN must be seen, so that the step is skipped; a masked one must not."""
    stats, batch = make_tokens(b=1, s=8, valid=1.1)
    logprob = stats.logprob.detach().clone()
    logprob[0, 3] = NAN
    poisoned = TokenStats(logprob.requires_grad_(), None)
    out, _ = run(WeightedLanguageModel(None, Uniform()), poisoned, batch)
    assert torch.isnan(out.loss_sum)
    mask = batch.loss_mask.clone()
    mask[0, 3] = False
    out, gradient = run(WeightedLanguageModel(None, Uniform()), poisoned, replace(batch, loss_mask=mask))
    assert torch.isfinite(out.loss_sum) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("split", [(1, 5), (2, 2, 2), (6,)])
def test_gradient_does_not_depend_on_micro_batching(make_tokens, split) -> None:
    """The normaliser is the kept count of the whole step, and so is the set that tokens compete in."""
    stats, batch = make_tokens(b=6)
    whole, expected = run(WeightedLanguageModel(ExcessLoss(), TopFraction(0.6)), stats, batch)

    objective = WeightedLanguageModel(ExcessLoss(), TopFraction(0.6))
    bounds = [sum(split[:i]) for i in range(len(split) + 1)]
    spans = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    parts = [(TokenStats(stats.logprob[span], None), rows(batch, span)) for span in spans]
    weights = objective.select([p[0] for p in parts], [p[1] for p in parts], Progress(), None)
    outs = [objective(one, part, weight, Progress()) for (one, part), weight in zip(parts, weights, strict=True)]
    assert torch.equal(torch.cat([out.weight for out in outs]), whole.weight)
    num_tokens = sum(int(out.num_tokens) for out in outs)
    loss = sum(out.loss_sum for out in outs) / num_tokens
    (gradient,) = torch.autograd.grad(loss, stats.logprob)
    assert num_tokens == int(whole.num_tokens)
    torch.testing.assert_close(gradient, expected)
    for name, (numerator, denominator) in whole.metrics.items():
        if name != "select/threshold":  # a mean over micro-batches of one and the same number
            torch.testing.assert_close(sum(out.metrics[name][0] for out in outs), numerator, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(sum(out.metrics[name][1] for out in outs), denominator)


def test_global_scope_refuses_to_guess_its_weights(make_tokens) -> None:
    stats, batch = make_tokens()
    with pytest.raises(ConfigError, match="select"):
        WeightedLanguageModel(ExcessLoss(), TopFraction(0.6))(stats, batch, None, Progress())


def test_metrics_are_sums_that_say_what_they_are_named(make_tokens) -> None:
    stats, batch = make_tokens(b=4)
    out, _ = run(WeightedLanguageModel(ExcessLoss(), TopFraction(0.6), num_sources=3), stats, batch)
    nll, ref_nll = -stats.logprob.detach(), batch.streams["ref_nll"]
    valid, kept = batch.loss_mask, out.weight > 0
    dropped = valid & ~kept
    expected = {
        "train/loss_nats": nll[kept].mean(),
        "select/kept_fraction": kept.sum() / valid.sum(),
        "select/all_loss_nats": nll[valid].mean(),
        "select/kept_loss_nats": nll[kept].mean(),
        "select/dropped_loss_nats": nll[dropped].mean(),
        "select/excess_nats": (nll - ref_nll)[valid].mean(),
        "select/ref_nll_nats": ref_nll[valid].mean(),
        "select/threshold": out.score[kept].min(),
        "select/nan_scores": torch.tensor(0.0),
        "select/kept_fraction/source_0": kept[0::2].sum() / valid[0::2].sum(),
        "select/kept_fraction/source_1": kept[1::2].sum() / valid[1::2].sum(),
    }
    for name, value in expected.items():
        numerator, denominator = out.metrics[name]
        assert not numerator.requires_grad and numerator.shape == denominator.shape == (), name
        torch.testing.assert_close((numerator / denominator).float(), value, msg=name)
    empty = {"select/kept_fraction/source_2", "select/agreement_with_previous_threshold"}
    assert set(out.metrics) - set(expected) == empty
    assert all([float(part) for part in out.metrics[name]] == [0.0, 0.0] for name in empty)
    assert torch.equal(out.token_loss, nll) and not out.token_loss.requires_grad


def test_plain_language_modeling_reports_no_selection(make_tokens) -> None:
    out, _ = run(WeightedLanguageModel(None, Uniform()), *make_tokens())
    assert set(out.metrics) == {"train/loss_nats"} and out.score is None


def test_missing_reference_values_are_left_out_of_the_means(make_tokens) -> None:
    stats, batch = make_tokens(valid=1.1)
    ref_nll = batch.streams["ref_nll"].clone()
    ref_nll[:, 0] = NAN
    out, _ = run(WeightedLanguageModel(ExcessLoss(), TopFraction(0.6)), stats, replace(batch, streams={"ref_nll": ref_nll}))
    for name in ("select/ref_nll_nats", "select/excess_nats"):
        assert torch.isfinite(out.metrics[name][0]) and float(out.metrics[name][1]) == 45.0
    assert float(out.metrics["select/nan_scores"][0]) == 3.0


def test_agreement_with_the_previous_threshold_survives_a_resume(make_tokens) -> None:
    name = "select/agreement_with_previous_threshold"
    straight = WeightedLanguageModel(ExcessLoss(), TopFraction(0.6))
    first, _ = run(straight, *make_tokens(seed=1))
    assert [float(part) for part in first.metrics[name]] == [0.0, 0.0]
    state = straight.state_dict()
    second, _ = run(straight, *make_tokens(seed=2), step=1)
    valid, kept = make_tokens(seed=2)[1].loss_mask, second.weight > 0
    threshold = float(first.metrics["select/threshold"][0])
    agreeing = ((second.score >= threshold) == kept)[valid].sum()
    assert (float(second.metrics[name][0]), float(second.metrics[name][1])) == (float(agreeing), float(valid.sum()))

    resumed = WeightedLanguageModel(ExcessLoss(), TopFraction(0.6))
    resumed.load_state_dict(state)
    again, _ = run(resumed, *make_tokens(seed=2), step=1)
    assert again.metrics == second.metrics
    with pytest.raises(CheckpointError, match="threshold"):
        resumed.load_state_dict({"level": 1.0})


def test_high_loss_and_low_reference_loss_are_opposite_controls(make_tokens) -> None:
    stats, batch = make_tokens(b=1, s=4, valid=1.1)
    batch = replace(batch, streams={"ref_nll": torch.tensor([[0.1, 9.0, 0.2, 8.0]])})
    stats = TokenStats(torch.tensor([[-0.3, -9.5, -0.4, -8.5]]).requires_grad_(), None)
    hardest, _ = run(WeightedLanguageModel(Loss(), TopFraction(0.5)), stats, batch)
    learnable, _ = run(WeightedLanguageModel(ReferenceLoss(), TopFraction(0.5)), stats, batch)
    assert hardest.weight.tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert learnable.weight.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_every_configured_name_is_built() -> None:
    assert set(SCORERS) == set(ObjectiveConfig.model_fields["scorer"].annotation.__args__)
    assert set(WEIGHTINGS) == set(ObjectiveConfig.model_fields["weighting"].annotation.__args__)
    objective = build_objective(ObjectiveConfig(scorer="reference_entropy", weighting="top_fraction", fraction=0.5), seed=0)
    assert objective.streams == ("ref_entropy",) and objective.spans_micro_batches and not objective.needs_entropy
    with pytest.raises(ConfigError, match="scorer"):
        build_objective(ObjectiveConfig(weighting="top_fraction", fraction=0.5), seed=0)


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "none"])
def test_weights_that_follow_from_the_data_need_no_statistics(make_tokens, name) -> None:
    """They are chosen before the model has run, and are the same."""
    stats, batch = make_tokens()
    cfg = ObjectiveConfig(scorer=name, weighting="top_fraction", fraction=0.5)
    objective = build_objective(cfg, seed=3)
    assert objective.needs_stats == ranks_by_student(cfg) == (name in ("excess_loss", "loss"))
    progress = Progress(step=4)
    if objective.needs_stats:
        with pytest.raises(AssertionError):
            objective.select(None, [batch], progress, None)
        return
    (before,), (after,) = objective.select(None, [batch], progress, None), objective.select([stats], [batch], progress, None)
    assert torch.equal(before.weight, after.weight) and 0 < before.weight.sum() < batch.loss_mask.sum()


def objective_of(scope: str, combine: str | None = None, num_sources: int = 2) -> WeightedLanguageModel:
    second = {} if combine is None else {"second": {"scorer": "reference_entropy", "fraction": 0.7}, "combine": combine}
    sections = {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": 0.6, "scope": scope, **second}
    return build_objective(ObjectiveConfig.model_validate(sections), seed=0, num_sources=num_sources)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("combine", [None, "intersection", "union"])
def test_every_step_reports_the_same_names(make_tokens, scope, combine) -> None:
    """The first step, later ones, one that keeps nothing, and one after a resume without state: sums are packed by name."""
    objective = objective_of(scope, combine)
    names = [set(run(objective, *make_tokens(seed=i, valid=valid), step=i)[0].metrics) for i, valid in enumerate((0.8, 0.8, 0))]
    names.append(set(run(objective_of(scope, combine), *make_tokens(seed=9), step=9)[0].metrics))
    assert all(each == names[0] for each in names)
    assert ("select/overlap_with_exact" in names[0]) == (scope == "lagged_global_batch")
    assert ("select/kept_fraction/set_1" in names[0]) == (combine is not None)


def test_the_lagged_choice_is_compared_with_the_exact_one(make_tokens) -> None:
    objective = WeightedLanguageModel(ExcessLoss(), LaggedTopFraction(0.6))
    assert objective.awaits_a_step
    first, _ = run(objective, *make_tokens(seed=1))  # one micro-batch: its best are those of the step
    assert not objective.awaits_a_step
    for name in ("overlap_with_exact", "jaccard_with_exact"):
        numerator, denominator = first.metrics[f"select/{name}"]
        assert float(numerator) == float(denominator) > 0

    stats, batch = make_tokens(seed=2)
    lagged, _ = run(objective, stats, batch, step=1)
    exact, _ = run(WeightedLanguageModel(ExcessLoss(), TopFraction(0.6)), stats, batch, step=1)
    kept, right = lagged.weight > 0, exact.weight > 0
    assert float(lagged.metrics["select/threshold"][0]) == float(first.score[first.weight > 0].min())
    assert [int(part) for part in lagged.metrics["select/overlap_with_exact"]] == [int((kept & right).sum()), int(right.sum())]
    assert [int(part) for part in lagged.metrics["select/jaccard_with_exact"]] == [
        int((kept & right).sum()),
        int((kept | right).sum()),
    ]
    assert not torch.equal(kept, right)


@pytest.mark.parametrize("combine", [None, "union"])
def test_a_resumed_lagged_run_goes_on_to_the_last_bit(make_tokens, combine) -> None:
    straight, resumed = (objective_of("lagged_global_batch", combine) for _ in range(2))
    run(straight, *make_tokens(seed=1))
    resumed.load_state_dict(straight.state_dict())
    for step in (2, 3):
        expected, got = (run(objective, *make_tokens(seed=step), step=step) for objective in (straight, resumed))
        assert torch.equal(got[0].weight, expected[0].weight) and torch.equal(got[1], expected[1])
        assert got[0].metrics == expected[0].metrics
    with pytest.raises(CheckpointError, match="threshold"):
        resumed.load_state_dict({"thresholds": []})


def test_a_combination_ranks_by_both_scorers(make_tokens) -> None:
    stats, batch = make_tokens(b=1, s=4, valid=1.1)
    batch = replace(
        batch, streams={"ref_nll": torch.tensor([[0.1, 0.2, 8.0, 9.0]]), "ref_entropy": torch.tensor([[5.0, 1, 2, 6]])}
    )
    both, either = (
        WeightedLanguageModel(
            ReferenceLoss(), Combination(TopFraction(0.5), TopFraction(0.5), combine), second_scorer=ReferenceEntropy()
        )
        for combine in ("intersection", "union")
    )
    assert both.streams == ("ref_nll", "ref_entropy")
    out, gradient = run(both, stats, batch)
    assert out.weight.tolist() == [[0.0, 1.0, 0.0, 0.0]] and int(out.num_tokens) == 1
    assert torch.equal(gradient != 0, out.weight > 0)
    assert run(either, stats, batch)[0].weight.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    expected = {"kept_fraction": (1, 4), "kept_fraction/set_0": (2, 4), "kept_fraction/set_1": (2, 4)}
    expected |= {"threshold/set_0": (-0.2, 1), "threshold/set_1": (-2, 1)}
    for name, pair in expected.items():
        assert [float(part) for part in out.metrics[f"select/{name}"]] == pytest.approx(pair), name
    assert "select/threshold" not in out.metrics and torch.equal(out.score, -batch.streams["ref_nll"])


def test_a_weighting_gets_as_many_scorers_as_it_ranks_by() -> None:
    for scorers, weighting in (
        ((ExcessLoss(), None), Combination(TopFraction(0.5), TopFraction(0.5), "union")),
        ((ExcessLoss(), Loss()), TopFraction(0.5)),
        ((Loss(), None), Uniform()),
    ):
        with pytest.raises(ConfigError, match=r"objective\.scorer: got \d scorers"):
            WeightedLanguageModel(scorers[0], weighting, second_scorer=scorers[1])


def test_two_data_parallel_ranks_are_one() -> None:
    """Same kept tokens, same loss and same gradients, from shards of different difficulty."""
    spawn(2, check_rank)


def check_rank() -> None:
    """Compare this rank's samples with the same samples of a run on one rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    b, s = 6, 8
    # the second rank's samples are harder, and losses are multiples of 1/2, so that they tie within and across ranks
    logprob = -0.5 * torch.randint(0, 8, (b, s), generator=generator) - 0.5 * torch.arange(b)[:, None]
    batch = TokenBatch(
        tokens=torch.zeros(b, s, dtype=torch.int64),
        labels=torch.zeros(b, s, dtype=torch.int64),
        loss_mask=torch.rand(b, s, generator=generator) < 0.8,
        position_ids=torch.zeros(b, s, dtype=torch.int64),
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        sample_id=torch.arange(b),
        source_id=torch.zeros(b, dtype=torch.int64),
        sample_index=torch.arange(b),
        streams={"ref_nll": torch.full((b, s), 0.5)},
    )
    whole = TokenStats(logprob.clone().requires_grad_(), None)
    expected, expected_gradient = run(WeightedLanguageModel(ExcessLoss(), TopFraction(0.6)), whole, batch)

    mine = slice(rank * b // world, (rank + 1) * b // world)
    stats, part = TokenStats(logprob[mine].clone().requires_grad_(), None), rows(batch, mine)
    objective = WeightedLanguageModel(ExcessLoss(), TopFraction(0.6))
    (chosen,) = objective.select([stats], [part], Progress(), dist.group.WORLD)
    out = objective(stats, part, chosen, Progress())
    sums = torch.stack([out.loss_sum.detach(), out.num_tokens.float()])
    dist.all_reduce(sums)
    (gradient,) = torch.autograd.grad(out.loss_sum / sums[1], stats.logprob)
    torch.testing.assert_close(chosen.weight, expected.weight[mine], rtol=0, atol=0)
    torch.testing.assert_close(sums, torch.stack([expected.loss_sum.detach(), expected.num_tokens.float()]))
    torch.testing.assert_close(gradient, expected_gradient[mine])
    if torch.equal(chosen.weight, TopFraction(0.6, "microbatch")([[out.score]], [part], None)[0].weight):
        raise AssertionError("the local choice is the global one: this case tests nothing")
