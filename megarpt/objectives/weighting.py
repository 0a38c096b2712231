"""Scores to weights: the only place where tokens are selected.

Dims: b micro-batch, s sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.errors import ConfigError
from megarpt.ops.token_select import select_top_fraction, select_top_fraction_rows
from megarpt.structs import TokenBatch

Scope = Literal["sequence", "microbatch", "global_batch"]


class TokenWeights(NamedTuple):
    """What every token is worth."""

    weight: Tensor  # [b, s] fp32 >= 0, 0 wherever `loss_mask` is False
    threshold: Tensor | None  # [] fp32, the lowest score that was kept; None when there is no single one


class TokenWeighting(Protocol):
    """Turns the scores of a set of micro-batches into weights."""

    needs_score: bool
    selects: bool  # False when every valid token counts alike
    selects_globally: bool  # True when the set is all micro-batches of a step on all data-parallel ranks

    def __call__(
        self, scores: Sequence[Tensor | None], batches: Sequence[TokenBatch], group: dist.ProcessGroup | None
    ) -> list[TokenWeights]:
        """One result per micro-batch. Only a weighting that selects globally looks across them or uses `group`."""
        ...


class Uniform:
    """Every valid token counts 1: ordinary language modeling."""

    needs_score = False
    selects = False
    selects_globally = False

    def __call__(
        self, scores: Sequence[Tensor | None], batches: Sequence[TokenBatch], group: dist.ProcessGroup | None
    ) -> list[TokenWeights]:
        return [TokenWeights(batch.loss_mask.float(), None) for batch in batches]


class TopFraction:
    """The best-scored share of the valid tokens counts 1, the rest 0.

    Exactly floor(fraction * valid + 0.5) tokens are kept, at least one (none when none is valid); equal scores are told apart
    by the token's position in the run's data, NaN scores come last. fraction 1.0 keeps every valid token.

    Args:
        fraction: in (0, 1].
        scope: the set within which tokens compete: one sequence, one micro-batch on one rank, or the whole global batch.
            global_batch is exact over micro-batches and ranks and does not depend on how the batch is split among them.

    Collectives: global_batch only, over the group it is given: see `megarpt.ops.token_select.select_top_fraction`.
    Source: Rho-1 (arXiv 2404.07965), equation 5.
    """

    needs_score = True
    selects = True

    def __init__(self, fraction: float, scope: Scope = "global_batch") -> None:
        if not 0.0 < fraction <= 1.0:
            raise ConfigError(f"objective.fraction: got {fraction}, expected a number in (0, 1]")
        if scope not in ("sequence", "microbatch", "global_batch"):
            raise ConfigError(f"objective.scope: got {scope!r}, expected sequence, microbatch or global_batch")
        self.fraction = fraction
        self.scope = scope
        self.selects_globally = scope == "global_batch"

    def __call__(
        self, scores: Sequence[Tensor | None], batches: Sequence[TokenBatch], group: dist.ProcessGroup | None
    ) -> list[TokenWeights]:
        known = [score for score in scores if score is not None]
        if len(known) != len(batches):
            raise ConfigError(
                "objective.weighting top_fraction: got no scores; set objective.scorer to what should rank tokens"
            )
        if self.scope == "sequence":
            masks = [select_top_fraction_rows(*pair, self.fraction) for pair in _pairs(known, batches)]
            return [TokenWeights(mask.float(), None) for mask in masks]
        if self.scope == "microbatch":
            return [self._select([score], [batch], None)[0] for score, batch in zip(known, batches, strict=True)]
        return self._select(known, batches, group)

    def _select(
        self, scores: Sequence[Tensor], batches: Sequence[TokenBatch], group: dist.ProcessGroup | None
    ) -> list[TokenWeights]:
        """Tokens of all given micro-batches, and of all ranks of the group, compete with each other."""
        mask, threshold, _ = select_top_fraction(
            torch.cat([score.flatten() for score in scores]),
            torch.cat([batch.loss_mask.flatten() for batch in batches]),
            self.fraction,
            group,
            torch.cat([token_order(batch).flatten() for batch in batches]),
        )
        parts = mask.float().split([score.numel() for score in scores])
        return [TokenWeights(part.view_as(score), threshold) for part, score in zip(parts, scores, strict=True)]


def token_order(batch: TokenBatch) -> Tensor:
    """Position of every token in the run's data, whatever rank and micro-batch hold it.

    Shapes: -> [b, s] int64, non-negative and unique within a run where `sample_index` is; negative for padding samples.
    """
    s = batch.labels.shape[1]
    return batch.sample_index[:, None] * s + torch.arange(s, device=batch.labels.device)


def _pairs(scores: Sequence[Tensor], batches: Sequence[TokenBatch]) -> list[tuple[Tensor, Tensor]]:
    return [(score, batch.loss_mask) for score, batch in zip(scores, batches, strict=True)]
