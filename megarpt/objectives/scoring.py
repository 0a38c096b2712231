"""What makes a token worth training on: a score for every label, higher is kept.

A score never carries a gradient: the choice of tokens is a constant of the step. Entry [i, j] of a score, of a stream and of
the statistics all speak of `labels[i, j]`; a score that is one column off selects the neighbours and still trains.

Dims: b micro-batch, s sequence length.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megarpt.errors import DataError
from megarpt.structs import Progress, TokenBatch, TokenStats


class TokenScorer(Protocol):
    """Ranks tokens."""

    streams: ClassVar[tuple[str, ...]]  # names of `TokenBatch.streams` it reads
    needs_stats: ClassVar[bool]  # whether it reads `TokenStats`: what the model that trains makes of the tokens
    needs_entropy: ClassVar[bool]  # whether it reads `TokenStats.entropy`

    def __call__(self, stats: TokenStats, batch: TokenBatch, progress: Progress) -> Tensor:
        """Shapes: -> [b, s] fp32, detached. Values where `loss_mask` is False are never looked at."""
        ...


class ExcessLoss:
    """Student loss minus reference loss: what the student has yet to learn and the reference shows can be learned.

    Source: Rho-1 (arXiv 2404.07965), equation 3.
    """

    streams: ClassVar[tuple[str, ...]] = ("ref_nll",)
    needs_stats: ClassVar[bool] = True
    needs_entropy: ClassVar[bool] = False

    def __call__(self, stats: TokenStats, batch: TokenBatch, progress: Progress) -> Tensor:
        return -stats.logprob.detach() - stream(batch, "ref_nll")


class Loss:
    """Student loss alone: the hardest tokens, noise included. A control, not a method."""

    streams: ClassVar[tuple[str, ...]] = ()
    needs_stats: ClassVar[bool] = True
    needs_entropy: ClassVar[bool] = False

    def __call__(self, stats: TokenStats, batch: TokenBatch, progress: Progress) -> Tensor:
        return -stats.logprob.detach()


class ReferenceLoss:
    """Low reference loss is kept, whatever the student knows.

    Source: Rho-1, section 3.4 (self-reference by loss).
    """

    streams: ClassVar[tuple[str, ...]] = ("ref_nll",)
    needs_stats: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False

    def __call__(self, stats: TokenStats, batch: TokenBatch, progress: Progress) -> Tensor:
        return -stream(batch, "ref_nll")


class ReferenceEntropy:
    """Low entropy of the reference's next-token distribution is kept.

    Source: Rho-1, equation 8 (self-reference by entropy).
    """

    streams: ClassVar[tuple[str, ...]] = ("ref_entropy",)
    needs_stats: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False

    def __call__(self, stats: TokenStats, batch: TokenBatch, progress: Progress) -> Tensor:
        return -stream(batch, "ref_entropy")


class Random:
    """Chance, as the control of every selection: a hash of (seed, step, sample, column), uniform in [0, 1).

    A hash instead of a generator, so that a token's score depends neither on the rank or micro-batch that holds it nor on what
    was drawn before: resuming and resharding change nothing.
    """

    streams: ClassVar[tuple[str, ...]] = ()
    needs_stats: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, stats: TokenStats, batch: TokenBatch, progress: Progress) -> Tensor:
        device = batch.sample_id.device
        state = _mix(torch.tensor(self.seed, dtype=torch.int64, device=device))
        column = torch.arange(batch.labels.shape[1], device=device)
        for counter in (torch.tensor(progress.step, device=device), batch.source_id[:, None], batch.sample_id[:, None], column):
            state = _mix(state ^ counter)
        return _shift_right(state, 40).float() * 2.0**-24  # 24 bits, all that fp32 holds


def stream(batch: TokenBatch, name: str) -> Tensor:
    """A per-token stream of the batch.

    Raises:
        DataError: the data layer was not told to read it.
    """
    found = batch.streams.get(name)
    if found is None:
        have = ", ".join(sorted(batch.streams)) or "none"
        raise DataError(
            f"objective: the batch carries no stream {name!r} (it has: {have}); name its sidecar under data.train[].streams "
            "(written by `megarpt score`), or set objective.reference to compute it during training"
        )
    return found.detach()


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift of int64, which torch only shifts arithmetically."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """A bijection of 64-bit words in which every input bit flips half of the output bits (the splitmix64 finalizer)."""
    value = value + -0x61C8864680B583EB
    value = (value ^ _shift_right(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift_right(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift_right(value, 31)
