"""The scaling law: known parameters are found again, intervals hold them, and points that determine nothing are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megarpt.errors import DataError
from megarpt.rl.scaling_law import ALPHA_RANGE, fit_scaling_law

STEPS = np.array([100.0, 200.0, 400.0, 800.0, 1000.0, 1200.0])  # the paper's


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e18])
@pytest.mark.parametrize(
    ("a", "alpha", "limit"), [(-3.0, 0.5, 0.45), (2.0, 0.2, 0.1), (-0.8, 0.05, 0.9), (-900.0, 1.5, 0.3), (-2e5, 3.0, 0.5)]
)
def test_exact_points_give_the_parameters_back(a: float, alpha: float, limit: float, unit: float) -> None:
    law = fit_scaling_law(STEPS * unit, a * STEPS**-alpha + limit, bootstrap=1)
    assert law.alpha == pytest.approx(alpha, rel=1e-5) and law.limit == pytest.approx(limit, rel=1e-5)
    assert law.a == pytest.approx(a * unit**alpha, rel=1e-3)
    assert law.r_squared == pytest.approx(1.0, abs=1e-12) and not law.is_alpha_at_edge and law.num_points == 6
    np.testing.assert_allclose(law.score(STEPS * unit), a * STEPS**-alpha + limit, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_noisy_points_give_the_parameters_back_nearly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    compute = np.geomspace(1e15, 1e18, 40)
    score = 0.5 - 0.4 * (compute / 1e15) ** -0.5 + rng.normal(0.0, 0.01, 40)
    law = fit_scaling_law(compute, score, limit_range=(0.0, 1.0), bootstrap=300, seed=seed)
    assert law.r_squared > 0.9
    assert law.limit == pytest.approx(0.5, abs=0.03) and law.alpha == pytest.approx(0.5, abs=0.12)
    for interval, truth in ((law.limit_interval, 0.5), (law.alpha_interval, 0.5)):
        assert interval.low < interval.high and interval.low - 0.02 < truth < interval.high + 0.02
    assert law.a_interval.low <= law.a <= law.a_interval.high < 0.0
    assert (np.diff(law.score(np.geomspace(1e14, 1e21, 100))) > 0.0).all()  # it rises, also beyond the points


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, compute = np.random.default_rng(0), np.geomspace(1.0, 1000.0, 30)
    inside = 0
    for trial in range(40):
        score = 0.5 - 0.4 * compute**-0.5 + rng.normal(0.0, 0.01, 30)
        interval = fit_scaling_law(compute, score, bootstrap=80, confidence=0.8, seed=trial).limit_interval
        inside += interval.low <= 0.5 <= interval.high
    assert 22 <= inside <= 39  # 32 of 40 are expected, with a deviation of 2.5


def test_the_fit_is_the_best_there_is() -> None:
    rng = np.random.default_rng(5)
    score = 0.4 - 2.0 * STEPS**-0.4 + rng.normal(0.0, 0.01, 6)
    law = fit_scaling_law(STEPS, score, bootstrap=1)
    least = ((law.score(STEPS) - score) ** 2).sum()
    for alpha in np.geomspace(*ALPHA_RANGE, 400):  # against a plain solver
        matrix = np.stack([STEPS**-alpha, np.ones(6)], axis=1)
        solution = np.linalg.lstsq(matrix, score, rcond=None)[0]
        assert ((matrix @ solution - score) ** 2).sum() >= least - 1e-12


def test_the_limit_stays_in_its_range() -> None:
    score = 0.9 + 0.05 * np.log(STEPS / 100.0)  # no bend: a free limit lies far beyond
    free, bound = (fit_scaling_law(STEPS, score, limit_range=r, bootstrap=20) for r in ((-math.inf, math.inf), (0.0, 1.1)))
    assert free.limit > 1.5 and free.is_alpha_at_edge and not free.is_limit_at_edge
    assert bound.limit == 1.1 and bound.is_limit_at_edge and bound.limit_interval.high == 1.1
    shrunk = [((law.score(STEPS) - score) ** 2).sum() for law in (free, bound)]
    assert shrunk[0] < shrunk[1] and bound.r_squared > 0.9


def test_a_step_has_the_steepest_law() -> None:
    law = fit_scaling_law(STEPS, [0.0, 0.5, 0.5, 0.5, 0.5, 0.5], bootstrap=1)
    assert law.is_alpha_at_edge and law.alpha == pytest.approx(ALPHA_RANGE[1])


def test_the_same_seed_gives_the_same_intervals() -> None:
    score = 0.4 - 2.0 * STEPS**-0.4 + 0.01 * np.sin(STEPS)
    laws = [fit_scaling_law(STEPS, score, bootstrap=50, seed=seed) for seed in (1, 1, 2)]
    assert laws[0] == laws[1] and laws[0].limit_interval != laws[2].limit_interval and laws[0].alpha == laws[2].alpha


@pytest.mark.parametrize(
    ("compute", "score", "message"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], "got 4 points, expected at least 5"),
        ([1, 1, 2, 2, 3, 3], [1, 2, 3, 4, 5, 6], "3 different computes, expected at least 4"),
        ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5], "got a compute of 0, expected numbers above 0"),
        ([-1, 1, 2, 3, 4], [1, 2, 3, 4, 5], "got a compute of -1"),
        ([1, 2, 3, 4, 5], [1, 2, math.nan, 4, 5], "is not finite"),
        ([1, 2, 3, 4, math.inf], [1, 2, 3, 4, 5], "is not finite"),
        ([1, 2, 3, 4, 5], [0.25] * 5, "all scores are 0.25"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], r"shape \(5,\) and scores of shape \(4,\)"),
    ],
)
def test_points_that_determine_no_law_are_refused(compute: list[float], score: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_scaling_law(compute, score)


@pytest.mark.parametrize(
    "options",
    [
        {"limit_range": (1.0, 0.0)},
        {"alpha_range": (0.0, 1.0)},
        {"alpha_range": (2.0, 1.0)},
        {"bootstrap": 0},
        {"confidence": 1.0},
    ],
)
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(DataError, match=f"scaling law: .*{next(iter(options))} "):
        fit_scaling_law(STEPS, STEPS, **options)
