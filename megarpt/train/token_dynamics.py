"""How the loss of single tokens moves during a training: the four classes of Rho-1.

A line is fitted to the losses of a token over the checkpoints. Falls it by more than a threshold from its first to its last
point, the token was learned (H->L); rises it by more, it was unlearned (L->H). The others stayed where they were: low (L->L) or
high (H->H), measured by the mean loss of all tokens at the last checkpoint.

Source: Rho-1 (arXiv 2404.07965), appendix D.1.

Dims: n checkpoints, t tokens of a block, m tokens of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megarpt.errors import DataError

CLASSES = ("H->L", "L->H", "L->L", "H->H")
MEANINGS = ("learned", "unlearned", "low throughout", "high throughout")
IGNORED = -1  # the class of a token that is never predicted

_BLOCK = 1 << 18  # tokens at a time

Float64Array = npt.NDArray[np.float64]
Losses = Sequence[npt.NDArray[np.float32]]  # [m] each, memory-mapped; NaN where a token is never predicted


@dataclass(frozen=True, slots=True)
class TokenClasses:
    """What became of the tokens."""

    of_token: npt.NDArray[np.int8]  # [m], index into CLASSES, or IGNORED
    counts: npt.NDArray[np.int64]  # [4]
    mean_losses: Float64Array  # [4, n], NaN for a class without tokens
    mean_change: Float64Array  # [4], of the fitted lines, from first to last point
    all_mean_losses: Float64Array  # [n]
    num_not_finite: int  # tokens left out because a checkpoint, but not every one, has no finite loss for them

    @property
    def shares(self) -> Float64Array:
        """Of the classified tokens. Shapes: [4]."""
        return self.counts / self.counts.sum()


def fit_lines(losses: npt.NDArray[np.floating], x: npt.NDArray[np.floating]) -> tuple[Float64Array, Float64Array]:
    """First and last point of the least-squares line through each token's losses.

    Shapes: losses [n, t], x [n] ascending -> [t], [t] fp64.
    Error: fp64; equal to numpy.polyfit within rounding (tests/unit/train/test_token_dynamics.py).
    """
    centred = np.asarray(x, dtype=np.float64) - np.mean(x)
    y = losses.astype(np.float64)
    mean = y.mean(axis=0)
    slope = centred @ y / (centred @ centred)
    return mean + slope * centred[0], mean + slope * centred[-1]


def classify(
    change: npt.NDArray[np.floating], last: npt.NDArray[np.floating], mean_last: float, threshold: float
) -> npt.NDArray[np.int8]:
    """The class of every token.

    Args:
        change: of the fitted line, from first to last point.
        last: loss at the last checkpoint.
        mean_last: its mean over all tokens.
        threshold: nats; a change of exactly this much is none.

    Shapes: change, last [t] -> [t]; IGNORED where either is not finite.
    """
    stayed = np.where(last <= mean_last, CLASSES.index("L->L"), CLASSES.index("H->H"))
    moved = np.where(change < 0, CLASSES.index("H->L"), CLASSES.index("L->H"))
    found = np.where(np.abs(change) > threshold, moved, stayed)
    return np.where(np.isfinite(change) & np.isfinite(last), found, IGNORED).astype(np.int8)


def classify_tokens(losses: Losses, x: Sequence[float], threshold: float = 0.2) -> TokenClasses:
    """Classes and mean losses of all tokens.

    Args:
        losses: of every checkpoint in order, one value per token of the corpus.
        x: where the checkpoints lie, such as the tokens they have seen; ascending.
        threshold: nats.

    Cost: reads the losses twice; memory of one byte a token beyond a block of them.

    Raises:
        DataError: no token has a finite loss at every checkpoint.
    """
    n, m = len(losses), len(losses[0])
    positions = np.asarray(x, dtype=np.float64)
    totals, num_tokens, num_not_finite = np.zeros(n), 0, 0
    for _, block in _blocks(losses):
        finite = np.isfinite(block)
        known = finite.all(axis=0)
        totals += block[:, known].sum(axis=1, dtype=np.float64)
        num_tokens += int(known.sum())
        num_not_finite += int((finite.any(axis=0) & ~known).sum())
    if not num_tokens:
        raise DataError(
            f"got no token with a finite loss at each of the {n} checkpoints, expected some; a checkpoint is broken or the "
            "corpus has no label: look at the losses with numpy.fromfile(FILE.bin, numpy.float32)"
        )
    of_token = np.empty(m, dtype=np.int8)
    counts, sums, changes = np.zeros(4, dtype=np.int64), np.zeros((4, n)), np.zeros(4)
    for begin, block in _blocks(losses):
        # A token that one checkpoint has no finite loss for has no line: its change is not finite either.
        start, end = fit_lines(np.where(np.isfinite(block), block, np.nan), positions)
        found = classify(end - start, block[-1], totals[-1] / num_tokens, threshold)
        of_token[begin : begin + len(found)] = found
        for number in range(len(CLASSES)):
            members = found == number
            counts[number] += members.sum()
            sums[number] += block[:, members].sum(axis=1, dtype=np.float64)
            changes[number] += (end - start)[members].sum()
    with np.errstate(invalid="ignore"):
        return TokenClasses(
            of_token, counts, sums / counts[:, None], changes / counts, totals / num_tokens, num_not_finite=num_not_finite
        )


def _blocks(losses: Losses) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    for begin in range(0, len(losses[0]), _BLOCK):
        yield begin, np.stack([values[begin : begin + _BLOCK] for values in losses])
