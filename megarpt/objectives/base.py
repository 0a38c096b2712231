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

from megarpt.structs import Progress, TokenBatch, TokenStats


class ObjectiveOutput(NamedTuple):
    """Sums over this rank's micro-batch."""

    loss_sum: Tensor  # [] fp32, differentiable; the sum over trained tokens, never a mean
    num_tokens: Tensor  # [] int32, how many units `loss_sum` is to be divided by once summed over all ranks and micro-batches
    metrics: Mapping[str, tuple[Tensor, Tensor]]  # name -> (numerator, denominator), each [] fp32, both sum-reduced
    token_loss: Tensor  # [b, s] fp32, detached nll of every label, for dumps, histograms and samples
    weight: Tensor  # [b, s] fp32, what each token was worth
    score: Tensor | None  # [b, s] fp32, detached; what the weighting ranked by, None without a scorer


class Objective(Protocol):
    """Per-token statistics to a loss."""

    streams: tuple[str, ...]  # names of `TokenBatch.streams` it needs; checked against the data before step 0
    needs_entropy: bool

    def __call__(self, stats: TokenStats, batch: TokenBatch, weight: Tensor | None, progress: Progress) -> ObjectiveOutput:
        """`weight` is given when it was decided for the whole global batch beforehand, None otherwise."""
        ...
