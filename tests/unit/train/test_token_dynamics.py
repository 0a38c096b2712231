"""The four classes of tokens: the fit against numpy's, the boundaries, and tokens without a loss."""

from __future__ import annotations

import numpy as np
import pytest

from megarpt.errors import DataError
from megarpt.train import token_dynamics
from megarpt.train.token_dynamics import CLASSES, IGNORED, classify, classify_tokens, fit_lines

H_L, L_H, L_L, H_H = range(4)


@pytest.mark.parametrize("x", [[0, 1, 2], [1e9, 2e9, 3e9, 4e9, 5e9], [100, 250, 260, 1000], [-3.0, -1.0, 0.5, 0.75]])
def test_the_fit_is_numpys(x: list[float]) -> None:
    rng = np.random.default_rng(0)
    losses = rng.gamma(2.0, 2.0, size=(len(x), 200)).astype(np.float32)
    start, end = fit_lines(losses, np.array(x))
    slope, offset = np.polyfit(np.array(x, dtype=np.float64), losses.astype(np.float64), 1)
    np.testing.assert_allclose(start, offset + slope * x[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(end, offset + slope * x[-1], rtol=1e-9, atol=1e-9)


def test_units_of_the_axis_do_not_matter() -> None:
    losses = np.random.default_rng(1).random((4, 50)).astype(np.float32)
    for a, b in zip(fit_lines(losses, np.arange(4.0)), fit_lines(losses, 7e8 + 1e6 * np.arange(4.0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "last", "expected"),
    [
        (-0.2, 1.0, L_L),  # exactly the threshold is no change
        (np.nextafter(-0.2, -1.0), 1.0, H_L),
        (0.2, 1.0, L_L),
        (np.nextafter(0.2, 1.0), 1.0, L_H),
        (0.0, 2.0, L_L),  # exactly the mean is low
        (0.0, np.nextafter(2.0, 3.0), H_H),
        (-5.0, 9.0, H_L),  # a token that moved is not asked where it is
        (5.0, 0.0, L_H),
        (np.nan, 1.0, IGNORED),
        (0.0, np.nan, IGNORED),
        (-np.inf, 1.0, IGNORED),
    ],
)
def test_boundaries(change: float, last: float, expected: int) -> None:
    assert classify(np.array([change]), np.array([last]), 2.0, 0.2).tolist() == [expected]


@pytest.mark.parametrize("block", [1, 3, 1 << 18])
def test_classes_shares_and_curves(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Straight lines with numbers that fp32 holds, in blocks of any size."""
    monkeypatch.setattr(token_dynamics, "_BLOCK", block)
    nan, inf = np.nan, np.inf
    tokens = [
        ([nan, nan, nan], IGNORED),  # begins a document
        ([4.0, 3.0, 2.0], H_L),
        ([1.0, 1.5, 2.0], L_H),
        ([0.5, 0.5, 0.5], L_L),
        ([5.0, 5.0, 5.0], H_H),
        ([1.0, nan, 1.0], IGNORED),
        ([3.0, 3.0, inf], IGNORED),
        ([2.0, 1.875, 1.75], L_L),  # a fall of exactly the threshold
        ([2.0, 1.75, 1.5], H_L),
        ([1.0, 7.0, 1.0], L_L),  # unrest is no trend
    ]
    values = np.array([curve for curve, _ in tokens], dtype=np.float32).T
    found = classify_tokens(list(values), [10.0, 20.0, 30.0], threshold=0.25)
    assert found.of_token.tolist() == [expected for _, expected in tokens]
    assert dict(zip(CLASSES, found.counts.tolist(), strict=True)) == {"H->L": 2, "L->H": 1, "L->L": 3, "H->H": 1}
    assert found.shares.tolist() == [2 / 7, 1 / 7, 3 / 7, 1 / 7]
    assert found.num_not_finite == 2
    classified = values[:, found.of_token != IGNORED]
    np.testing.assert_allclose(found.all_mean_losses, classified.mean(axis=1))
    for number in range(4):
        np.testing.assert_allclose(found.mean_losses[number], values[:, found.of_token == number].mean(axis=1))
    np.testing.assert_allclose(found.mean_change, [(-2.0 - 0.5) / 2, 1.0, -0.25 / 3, 0.0])
    np.testing.assert_allclose(found.counts @ found.mean_losses / 7, found.all_mean_losses)  # the parts make the whole


def test_an_empty_class_has_no_mean() -> None:
    found = classify_tokens([np.array([3.0, 1.0], dtype=np.float32)] * 3, [0.0, 1.0, 2.0])
    assert found.counts.tolist() == [0, 0, 1, 1]
    assert np.isnan(found.mean_losses[H_L]).all() and np.isnan(found.mean_change[L_H])


def test_a_checkpoint_without_finite_losses_is_an_error() -> None:
    good, broken = np.ones(5, dtype=np.float32), np.full(5, np.nan, dtype=np.float32)
    with pytest.raises(DataError, match="no token with a finite loss at each of the 3 checkpoints"):
        classify_tokens([good, broken, good], [0.0, 1.0, 2.0])
