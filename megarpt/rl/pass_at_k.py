"""How well questions are answered, from some completions of each, and how sure that is.

Dims: q questions.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megarpt.errors import ShapeError

FloatArray = npt.NDArray[np.float64]

_VALUES_AT_A_TIME = 1 << 22  # of resampled questions: 64 MiB with their numbers


class Interval(NamedTuple):
    """Where a share lies with some confidence."""

    low: float
    high: float


def pass_at_k(num_completions: npt.ArrayLike, num_right: npt.ArrayLike, k: int) -> FloatArray:
    """The chance that at least one of k completions is right, without bias, from n >= k of which c are right.

    1 - C(n - c, k) / C(n, k): the share of the subsets of k completions that hold a right one. As a product of c factors it
    does not overflow.

    Args:
        num_completions: n of each question.
        num_right: c of each question.
        k: from 1 to the smallest n.

    Shapes: [q] whole numbers, [q] -> [q] fp64 in [0, 1].
    Cost: q times the largest c.
    Source: Codex (arXiv 2107.03374), equation 1.

    Raises:
        ShapeError: the shapes differ, or a number is out of range.
    """
    n, c = np.atleast_1d(np.asarray(num_completions)), np.atleast_1d(np.asarray(num_right))
    if n.ndim != 1 or n.shape != c.shape or not all(np.issubdtype(each.dtype, np.integer) for each in (n, c)):
        raise ShapeError(f"pass@k: got {n.dtype}{n.shape} and {c.dtype}{c.shape}, expected whole numbers of the same shape [q]")
    if k < 1 or (n < k).any() or (c < 0).any() or (c > n).any():
        raise ShapeError(
            f"pass@k: got k = {k}, from {n.min(initial=k)} completions on, and up to {c.max(initial=0)} right ones; expected "
            "1 <= k <= completions and 0 <= right ones <= completions; leave out questions with fewer completions"
        )
    # 1 - prod over i from n - c + 1 to n of (1 - k / i); a factor is 0 or less exactly where n - c < k
    i = (n - c)[:, None] + 1 + np.arange(c.max(initial=0))
    factors = np.where(i <= n[:, None], np.clip(1.0 - k / i, 0.0, None), 1.0)
    return np.where(n - c < k, 1.0, 1.0 - factors.prod(axis=1))


def wilson_interval(num_right: int, num: int, *, confidence: float = 0.95) -> Interval:
    """The score interval of a share of independent trials. Unlike the share plus or minus deviations it never leaves [0, 1],
    and says something where all trials end alike. Without trials it is [0, 1].

    Source: Wilson, Journal of the American Statistical Association 22 (1927), 209.

    Raises:
        ShapeError: a number is out of range.
    """
    if not 0 <= num_right <= num:
        raise ShapeError(f"interval: got {num_right} right of {num}, expected from 0 to all of them")
    if num == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2.0)
    share, spread = num_right / num, z * z / num
    middle = (share + spread / 2.0) / (1.0 + spread)
    half = z * math.sqrt(share * (1.0 - share) / num + spread / (4.0 * num)) / (1.0 + spread)
    low = 0.0 if num_right == 0 else max(0.0, middle - half)  # which rounding would miss
    return Interval(low, 1.0 if num_right == num else min(1.0, middle + half))


def bootstrap_interval(values: npt.ArrayLike, *, seed: int, confidence: float = 0.95, resamples: int = 4000) -> Interval:
    """The percentile interval of the mean over questions, each with its completions: as if other questions had been asked.

    Where all values are 0, or all 1, every resample says the same; then it is Wilson's of as many trials, which is never too
    narrow for values in [0, 1].

    Args:
        values: one of each question, in [0, 1], such as `pass_at_k`.
        seed: of the resampling.
        confidence: how often such an interval holds the true mean.
        resamples: how often questions are drawn.

    Shapes: [q] -> two numbers.
    Cost: resamples * q additions, at most 64 MiB at a time (one resample, where that is more).
    Source: Efron, Annals of Statistics 7 (1979), 1.

    Raises:
        ShapeError: the shape is none, or a number is out of range.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0.0) & (values <= 1.0)).all() or resamples < 1:
        raise ShapeError(
            f"interval: got values {values.shape} and {resamples} resamples, expected [q] in [0, 1], and 1 or more"
        )
    tail = (1.0 - _checked(confidence)) / 2.0
    q = len(values)
    if q == 0 or ((values == values[0]).all() and values[0] in (0.0, 1.0)):
        return wilson_interval(int(values.sum()), q, confidence=confidence)
    generator = np.random.default_rng(seed)
    per_draw = max(1, _VALUES_AT_A_TIME // q)
    means = [
        values[generator.integers(0, q, size=(min(per_draw, resamples - done), q))].mean(axis=1)
        for done in range(0, resamples, per_draw)
    ]
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return Interval(float(low), float(high))


def _checked(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ShapeError(f"interval: got a confidence of {confidence}, expected a number between 0 and 1")
    return confidence
