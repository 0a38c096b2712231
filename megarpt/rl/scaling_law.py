"""The law by which a score follows from the compute spent: P(C) = A / C^alpha + P*.

An error falls to its limit P* with A > 0; an accuracy rises to it with A < 0. For a given alpha the other two are a linear
least-squares problem, so that only alpha is searched for (variable projection): over a grid, then by golden section.

Dims: b fits at once (bootstrap), n points.
Source: RPT (arXiv 2506.08007), equation 5; variable projection, Golub and Pereyra (1973).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megarpt.errors import DataError

Numbers = npt.NDArray[np.float64]

ALPHA_RANGE = (0.01, 10.0)
LEAST_POINTS = 5
_NUM_PARAMETERS = 3
_GRID = 121
_GOLDEN_STEPS = 60  # each shortens the bracket to 0.618 of itself: to the last digits of alpha
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_EDGE = 1e-6  # of alpha, relative


class Interval(NamedTuple):
    """Where a parameter lies, with the confidence that was asked for."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingLaw:
    """P(C) = a / C^alpha + limit, as it was fitted. Units: of the compute and the score that were given."""

    a: float
    alpha: float
    limit: float  # P*, the score of unbounded compute
    r_squared: float  # 1 - residual sum of squares / that around the mean
    a_interval: Interval
    alpha_interval: Interval
    limit_interval: Interval
    confidence: float
    num_points: int
    is_alpha_at_edge: bool  # alpha is the smallest or largest that was looked at: the points do not determine the law
    is_limit_at_edge: bool  # the limit would lie outside of its range otherwise

    def score(self, compute: npt.ArrayLike) -> Numbers:
        """The score at some compute, above 0."""
        return self.a * np.asarray(compute, dtype=np.float64) ** -self.alpha + self.limit


class _Fit(NamedTuple):
    """Of b sets of scores; [b] each. The slope is that over (C / center)^-alpha."""

    alpha: Numbers
    slope: Numbers
    limit: Numbers
    residual: Numbers  # sum of squares


def fit_scaling_law(
    compute: Sequence[float],
    score: Sequence[float],
    *,
    limit_range: tuple[float, float] = (-math.inf, math.inf),
    alpha_range: tuple[float, float] = ALPHA_RANGE,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ScalingLaw:
    """Fit the law by least squares of the score.

    The intervals are of a residual bootstrap: the law's own scores, with its residuals drawn anew, are fitted again. They say
    how well the points determine the law if the law is right, and points are independent; those of one training run are not.

    Args:
        compute: of each point, above 0, in any unit.
        score: of each point.
        limit_range: where P* may lie, (0, 1) for a share.
        alpha_range: where alpha may lie.
        bootstrap: how many fits the intervals are made of.
        confidence: of the intervals.
        seed: of the bootstrap.

    Raises:
        DataError: there are fewer than 5 points or 4 different computes, a number is not finite, a compute is not above 0, all
            scores are equal, or an option is out of range.

    Cost: about 180 * (bootstrap + 1) * n multiply-adds of a few operations each.
    """
    x, y = _points(compute, score)
    _check_options(limit_range, alpha_range, bootstrap, confidence)
    log_x = np.log(x)
    center = float(log_x.mean())  # powers of C itself would leave the range of numbers
    log_x = log_x - center
    best = _fit(log_x, y[None], limit_range, alpha_range)
    fitted = best.slope[0] * np.exp(-best.alpha[0] * log_x) + best.limit[0]
    residuals = y - fitted
    # A fit of three parameters takes a part of the scatter away; the mean of bounded fits need not be 0.
    residuals = (residuals - residuals.mean()) * math.sqrt(len(y) / (len(y) - _NUM_PARAMETERS))
    drawn = np.random.default_rng(seed).choice(residuals, size=(bootstrap, len(y)))
    again = _fit(log_x, fitted + drawn, limit_range, alpha_range)
    alpha = float(best.alpha[0])
    return ScalingLaw(
        a=float(_scaled(best, center)[0]),
        alpha=alpha,
        limit=float(best.limit[0]),
        r_squared=1.0 - float(best.residual[0]) / float(((y - y.mean()) ** 2).sum()),
        a_interval=_interval(_scaled(again, center), confidence),
        alpha_interval=_interval(again.alpha, confidence),
        limit_interval=_interval(again.limit, confidence),
        confidence=confidence,
        num_points=len(y),
        is_limit_at_edge=float(best.limit[0]) in limit_range,
        is_alpha_at_edge=any(abs(math.log(alpha / edge)) < _EDGE for edge in alpha_range),
    )


def _points(compute: Sequence[float], score: Sequence[float]) -> tuple[Numbers, Numbers]:
    x, y = np.asarray(compute, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise DataError(
            f"scaling law: got computes of shape {x.shape} and scores of shape {y.shape}, expected one of each per point"
        )
    if len(x) < LEAST_POINTS:
        raise DataError(
            f"scaling law: got {len(x)} points, expected at least {LEAST_POINTS} for its three parameters; evaluate more often"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("scaling law: a compute or score is not finite; leave that point out")
    if not (x > 0.0).all():
        raise DataError(
            f"scaling law: got a compute of {x.min():g}, expected numbers above 0; leave out what was before training"
        )
    if len(np.unique(x)) <= _NUM_PARAMETERS:
        raise DataError(
            f"scaling law: the points have {len(np.unique(x))} different computes, expected at least {_NUM_PARAMETERS + 1}: "
            "some law of three parameters goes through any fewer"
        )
    if np.ptp(y) == 0.0:
        raise DataError(f"scaling law: all scores are {y[0]:g}; there is nothing that depends on compute")
    return x, y


def _check_options(
    limit_range: tuple[float, float], alpha_range: tuple[float, float], bootstrap: int, confidence: float
) -> None:
    if not limit_range[0] < limit_range[1]:
        raise DataError(f"scaling law: limit_range is {limit_range}, expected a smaller and a larger number")
    if not 0.0 < alpha_range[0] < alpha_range[1] < math.inf:
        raise DataError(f"scaling law: alpha_range is {alpha_range}, expected a smaller and a larger number above 0")
    if bootstrap < 1 or not 0.0 < confidence < 1.0:
        raise DataError(
            f"scaling law: bootstrap is {bootstrap} and confidence {confidence}, expected at least 1 and a share below 1"
        )


def _fit(log_x: Numbers, y: Numbers, limit_range: tuple[float, float], alpha_range: tuple[float, float]) -> _Fit:
    """The best law of each row of `y`, [b, n], over log C - log center, [n]."""
    grid = np.linspace(math.log(alpha_range[0]), math.log(alpha_range[1]), _GRID)
    residuals = np.stack([_linear(log_x, y, np.full(len(y), point), limit_range).residual for point in grid])  # [grid, b]
    nearest = residuals.argmin(axis=0)
    low, high = grid[np.maximum(nearest - 1, 0)], grid[np.minimum(nearest + 1, _GRID - 1)]
    best = _golden_section(log_x, y, low, high, limit_range)
    # Where alpha lies at an end of its range, golden section comes close to it and not there.
    ends = [_linear(log_x, y, np.full(len(y), end), limit_range) for end in (grid[0], grid[-1])]
    for end in ends:
        is_better = end.residual <= best.residual
        best = _Fit(*(np.where(is_better, new, old) for new, old in zip(end, best, strict=True)))
    return best


def _golden_section(log_x: Numbers, y: Numbers, low: Numbers, high: Numbers, limit_range: tuple[float, float]) -> _Fit:
    """The least residual between two logarithms of alpha, [b] each, in which it has one minimum."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = (_linear(log_x, y, point, limit_range).residual for point in (left, right))
    for _ in range(_GOLDEN_STEPS):
        goes_left = at_left < at_right
        low, high = np.where(goes_left, low, left), np.where(goes_left, right, high)
        new = np.where(goes_left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = _linear(log_x, y, new, limit_range).residual
        left, right = np.where(goes_left, new, right), np.where(goes_left, left, new)
        at_left, at_right = np.where(goes_left, at_new, at_right), np.where(goes_left, at_left, at_new)
    return _linear(log_x, y, (low + high) / 2.0, limit_range)


def _linear(log_x: Numbers, y: Numbers, log_alpha: Numbers, limit_range: tuple[float, float]) -> _Fit:
    """Slope and limit for given alphas, [b]: least squares, the limit within its range.

    The residual is a convex quadratic function of both. So where the free limit lies outside of its range the best one within
    is the end that is nearer, and the slope is the best for that.
    """
    alpha = np.exp(log_alpha)
    power = np.exp(-alpha[:, None] * log_x)  # [b, n]
    power_mean, y_mean = power.mean(axis=1), y.mean(axis=1)
    centered = power - power_mean[:, None]
    slope = (centered * (y - y_mean[:, None])).sum(axis=1) / (centered**2).sum(axis=1)
    limit = np.clip(y_mean - slope * power_mean, *limit_range)
    is_bound = (limit == limit_range[0]) | (limit == limit_range[1])
    slope = np.where(is_bound, (power * (y - limit[:, None])).sum(axis=1) / (power**2).sum(axis=1), slope)
    residual = ((y - slope[:, None] * power - limit[:, None]) ** 2).sum(axis=1)
    return _Fit(alpha, slope, limit, residual)


def _scaled(fit: _Fit, center: float) -> Numbers:
    """A, of C itself."""
    with np.errstate(over="ignore"):  # a steep law of a large compute: inf is what it is then
        return fit.slope * np.exp(fit.alpha * center)


def _interval(values: Numbers, confidence: float) -> Interval:
    low, high = np.quantile(values, ((1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0))
    return Interval(float(low), float(high))
