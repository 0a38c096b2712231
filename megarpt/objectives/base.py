"""What an objective is: a number for every token, from statistics of that token.

An objective never sees logits. It gets `TokenStats` (log-probability and, on request, entropy of every token), the batch and
the progress of the run, and returns sums. Sums, an integer token count, and one global division make the result independent
of micro-batching and of the parallel layout.

Dims: b micro-batch, s sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from megarpt.objectives.weighting import TokenWeights
from megarpt.structs import Progress, TokenBatch, TokenStats

Metric = tuple[Tensor, Tensor]  # (numerator, denominator), [] fp32 or fp64, both sum-reduced over micro-batches and ranks


class ObjectiveOutput(NamedTuple):
    """Sums over this rank's micro-batch."""

    loss_sum: Tensor  # [] fp32, differentiable; the sum over trained tokens, never a mean
    num_tokens: Tensor  # [] int32, how many units `loss_sum` is to be divided by once summed over all ranks and micro-batches
    metrics: Mapping[str, Metric]  # the same names for every micro-batch of every step on every rank
    token_loss: Tensor  # [b, s] fp32, detached nll of every label, for dumps, histograms and samples
    weight: Tensor  # [b, s] fp32, what each token was worth
    scores: tuple[Tensor, ...]  # [b, s] fp32, detached, one for each scorer: what the weighting ranked by

    @property
    def score(self) -> Tensor | None:
        """Of the first scorer; None without one."""
        return self.scores[0] if self.scores else None


class Objective(Protocol):
    """Per-token statistics to a loss."""

    streams: tuple[str, ...]  # names of `TokenBatch.streams` it needs; checked against the data before step 0
    needs_entropy: bool

    def __call__(
        self, stats: TokenStats, batch: TokenBatch, chosen: TokenWeights | None, progress: Progress
    ) -> ObjectiveOutput:
        """`chosen` is given when it was decided for several micro-batches together beforehand, None otherwise."""
        ...
