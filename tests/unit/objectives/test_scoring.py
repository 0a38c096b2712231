"""Scorers: what they rank by, the alignment with labels, and the counter-based random score."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megarpt.errors import DataError
from megarpt.objectives.scoring import ExcessLoss, Loss, Random, ReferenceEntropy, ReferenceLoss
from megarpt.structs import Progress


def test_scores_are_the_stated_differences_and_carry_no_gradient(make_tokens) -> None:
    stats, batch = make_tokens()
    nll, ref_nll, ref_entropy = -stats.logprob.detach(), batch.streams["ref_nll"], batch.streams["ref_entropy"]
    expected = {ExcessLoss: nll - ref_nll, Loss: nll, ReferenceLoss: -ref_nll, ReferenceEntropy: -ref_entropy}
    for scorer, score in expected.items():
        got = scorer()(stats, batch, Progress())
        assert torch.equal(got, score), scorer
        assert not got.requires_grad and got.dtype == torch.float32
        assert not scorer.needs_entropy


@pytest.mark.parametrize(
    ("scorer", "name"), [(ExcessLoss, "ref_nll"), (ReferenceLoss, "ref_nll"), (ReferenceEntropy, "ref_entropy")]
)
def test_a_missing_stream_is_named(make_tokens, scorer, name) -> None:
    stats, batch = make_tokens()
    assert scorer.streams == (name,)
    with pytest.raises(DataError, match=name):
        scorer()(stats, replace(batch, streams={}), Progress())


def test_score_of_a_column_depends_on_that_column_alone(make_tokens) -> None:
    """Shift by one: the stream's column j is the reference's loss of labels[:, j], as is the student's."""
    stats, batch = make_tokens()
    before = ExcessLoss()(stats, batch, Progress())
    ref_nll = batch.streams["ref_nll"].clone()
    ref_nll[1, 5] += 100.0
    changed = ExcessLoss()(stats, replace(batch, streams={"ref_nll": ref_nll}), Progress()) != before
    assert changed.nonzero().tolist() == [[1, 5]]


def test_random_does_not_depend_on_who_holds_the_sample(make_tokens) -> None:
    stats, batch = make_tokens(b=4)
    progress = Progress(step=3)
    whole = Random(seed=5)(stats, batch, progress)
    for row in (2, 0):
        part = replace(
            batch,
            labels=batch.labels[row : row + 1],
            sample_id=batch.sample_id[row : row + 1],
            source_id=batch.source_id[row : row + 1],
        )
        assert torch.equal(Random(seed=5)(stats, part, progress), whole[row : row + 1])


def test_random_changes_with_seed_step_source_sample_and_column(make_tokens) -> None:
    stats, batch = make_tokens(b=2, s=64)
    base = Random(5)(stats, batch, Progress(step=3))
    assert not torch.equal(base, Random(6)(stats, batch, Progress(step=3)))
    assert not torch.equal(base, Random(5)(stats, batch, Progress(step=4)))
    assert not torch.equal(base, Random(5)(stats, replace(batch, source_id=batch.source_id + 1), Progress(step=3)))
    assert not torch.equal(base, Random(5)(stats, replace(batch, sample_id=batch.sample_id + 1), Progress(step=3)))
    assert base.unique().numel() == base.numel()


def test_random_is_uniform(make_tokens) -> None:
    stats, batch = make_tokens(b=64, s=512)
    score = Random(0)(stats, batch, Progress())
    assert score.min() >= 0.0 and score.max() < 1.0
    histogram = torch.histc(score, bins=16, min=0.0, max=1.0)
    expected = score.numel() / 16
    assert ((histogram - expected) ** 2 / expected).sum() < 45.0  # chi-square, 15 degrees of freedom: p < 1e-4
    neighbours = torch.corrcoef(torch.stack([score[:, :-1].flatten(), score[:, 1:].flatten()]))[0, 1]
    assert neighbours.abs() < 0.03
