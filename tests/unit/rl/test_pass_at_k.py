"""pass@k against all subsets, and intervals against published values and against how often they hold the truth."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from megarpt.errors import ShapeError
from megarpt.rl.pass_at_k import bootstrap_interval, pass_at_k, wilson_interval


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_estimator_is_the_share_of_subsets_that_hold_a_right_completion(n):
    rights = np.arange(n + 1)
    for k in range(1, n + 1):
        subsets = list(combinations(range(n), k))
        expected = [sum(min(each) < c for each in subsets) / len(subsets) for c in rights]  # the first c are right
        np.testing.assert_allclose(pass_at_k(np.full(n + 1, n), rights, k), expected, rtol=1e-14, atol=1e-15)


def test_it_is_exact_where_binomials_overflow():
    n, c, k = 5000, 37, 800
    none = Fraction(1)
    for i in range(k):
        none *= Fraction(n - c - i, n - i)
    assert pass_at_k([n, 10], [c, 0], 10)[1] == 0.0
    assert pass_at_k([n], [c], k)[0] == pytest.approx(float(1 - none), rel=1e-12)
    assert pass_at_k([100_000], [1], 1)[0] == pytest.approx(1e-5, rel=1e-10)


def test_questions_may_have_different_numbers_of_completions():
    np.testing.assert_allclose(pass_at_k([4, 2, 7, 3], [1, 2, 0, 3], 2), [1 / 2, 1.0, 0.0, 1.0], rtol=1e-15)
    assert pass_at_k(np.zeros(0, int), np.zeros(0, int), 3).shape == (0,)


def test_it_has_no_bias():
    rng = np.random.default_rng(0)
    p = np.full(20_000, 0.15)
    estimate = pass_at_k(np.full(p.shape, 8), rng.binomial(8, p), 4)
    truth = 1 - 0.85**4
    assert abs(estimate.mean() - truth) < 4 * estimate.std() / np.sqrt(len(p))
    naive = 1 - (1 - rng.binomial(8, p) / 8) ** 4  # what it is instead of
    assert abs(naive.mean() - truth) > 4 * naive.std() / np.sqrt(len(p))


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [([3], [1], 4), ([3], [1], 0), ([3], [4], 1), ([3], [-1], 1), ([3, 3], [1], 1), ([3.0], [1], 1), ([[3]], [[1]], 1)],
)
def test_numbers_that_cannot_be_are_refused(n, c, k):
    with pytest.raises(ShapeError, match="pass@k: got"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("right", "num", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), 857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_intervals_that_were_published(right, num, low, high):
    assert wilson_interval(right, num) == pytest.approx((low, high), abs=5e-5)


def test_wilson_intervals_at_their_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 10**9).low == 0.0 and wilson_interval(10**9, 10**9).high == 1.0
    assert (
        wilson_interval(3, 10, confidence=0.5).high < wilson_interval(3, 10).high < wilson_interval(3, 10, confidence=0.99).high
    )


def test_wilson_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    for p, num in ((0.1, 50), (0.5, 30), (0.9, 200)):
        drawn = rng.binomial(num, p, size=4000)
        held = {c: wilson_interval(int(c), num) for c in np.unique(drawn)}
        assert 0.93 <= np.mean([held[c].low <= p <= held[c].high for c in drawn]) <= 0.98


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    """Questions of different difficulty, of which others might have been asked."""
    rng = np.random.default_rng(2)
    truth = 1 - (4 * 5 * 6) / (6 * 7 * 8)  # of pass@3: E[(1 - p)^3] for p ~ Beta(2, 4) is 4*5*6 / (6*7*8)
    held = narrow = 0
    for seed in range(400):
        right = rng.binomial(6, rng.beta(2.0, 4.0, size=80))
        low, high = bootstrap_interval(pass_at_k(np.full(80, 6), right, 3), seed=seed, resamples=500)
        held += low <= truth <= high
        narrow += high - low < 0.25
    assert 0.90 * 400 <= held <= 0.98 * 400 and narrow == 400


def test_bootstrap_intervals_are_those_of_the_mean():
    values = np.random.default_rng(3).random(300)
    low, high = bootstrap_interval(values, seed=0)
    assert (low, high) == bootstrap_interval(values, seed=0) != bootstrap_interval(values, seed=1)
    deviation = values.std() / np.sqrt(300)
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * deviation, values.mean() + 1.96 * deviation), abs=0.1 * deviation
    )


def test_bootstrap_in_parts_is_the_bootstrap(monkeypatch):
    values = np.random.default_rng(4).random(50)
    whole = bootstrap_interval(values, seed=0, resamples=997)
    monkeypatch.setattr("megarpt.rl.pass_at_k._VALUES_AT_A_TIME", 50 * 100)
    assert bootstrap_interval(values, seed=0, resamples=997) == whole


@pytest.mark.parametrize(("values", "right"), [([0.0] * 12, 0), ([1.0] * 12, 12), ([], 0)])
def test_where_all_values_are_alike_the_interval_is_not_a_point(values, right):
    assert bootstrap_interval(values, seed=0) == wilson_interval(right, len(values))


@pytest.mark.parametrize("wrong", [[0.5, 1.5], [0.5, float("nan")], [[0.5]]])
def test_values_that_are_no_shares_are_refused(wrong):
    with pytest.raises(ShapeError, match="interval: got values"):
        bootstrap_interval(wrong, seed=0)


def test_a_confidence_or_count_that_is_none_is_refused():
    with pytest.raises(ShapeError, match="confidence of 1"):
        wilson_interval(1, 2, confidence=1.0)
    with pytest.raises(ShapeError, match="3 right of 2"):
        wilson_interval(3, 2)
