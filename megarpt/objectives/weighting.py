"""Scores to weights: the only place where tokens are selected.

Dims: b micro-batch, s sequence length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.errors import ConfigError
from megarpt.ops.token_select import select_top_fraction, select_top_fraction_rows
from megarpt.structs import TokenBatch

Scope = Literal["sequence", "microbatch", "rank", "global_batch"]
Combine = Literal["intersection", "union"]
Scores = Sequence[Sequence[Tensor]]  # for every scorer of the objective, for every micro-batch: [b, s] fp32


class TokenWeights(NamedTuple):
    """What every token of a micro-batch is worth."""

    weight: Tensor  # [b, s] fp32 >= 0, 0 wherever `loss_mask` is False
    threshold: Tensor | None  # [] fp32, the lowest score that was kept; None when there is no single one
    previous_threshold: Tensor | None = None  # [] fp32, of the step before, NaN when unknown; None where nobody compares
    sets: tuple[TokenWeights, ...] = ()  # the choices that this one was combined from


class TokenWeighting(ABC):
    """Turns the scores of a set of micro-batches into weights. Only the call has to be written; the rest has defaults."""

    num_scorers: int = 1  # how many rankings it chooses by
    selects: bool = True  # False when every valid token counts alike
    spans_micro_batches: bool = False  # True when no weight is known before the scores of all micro-batches of a step are
    learns_from_steps: bool = False  # True when `settle` is to be called after every step

    @abstractmethod
    def __call__(self, scores: Scores, batches: Sequence[TokenBatch], group: dist.ProcessGroup | None) -> list[TokenWeights]:
        """One result per micro-batch. Only a weighting that spans micro-batches looks across them or uses `group`."""

    def guess(self, scores: Scores, batches: Sequence[TokenBatch]) -> list[TokenWeights]:
        """What the call would say if these scores were all there are. To be written where the call changes a state."""
        return self(scores, batches, None)

    def settle(self, scores: Scores, batches: Sequence[TokenBatch], group: dist.ProcessGroup | None) -> list[TokenWeights]:
        """After a step, with the scores of all its micro-batches: learn for the next, and say what the exact choice was."""
        raise NotImplementedError(f"{type(self).__name__} learns nothing from steps")

    def state_dict(self) -> dict[str, float | None]:
        """What the next step depends on, equal on every rank. Waits for the device."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        assert not state, "who has a state restores it"


class Uniform(TokenWeighting):
    """Every valid token counts 1: ordinary language modeling."""

    num_scorers = 0
    selects = False

    def __call__(self, scores: Scores, batches: Sequence[TokenBatch], group: dist.ProcessGroup | None) -> list[TokenWeights]:
        return [TokenWeights(batch.loss_mask.float(), None) for batch in batches]


class TopFraction(TokenWeighting):
    """The best-scored share of the valid tokens counts 1, the rest 0.

    Exactly floor(fraction * valid + 0.5) tokens are kept, at least one (none when none is valid); equal scores are told apart
    by the token's position in the run's data, NaN scores come last. fraction 1.0 keeps every valid token.

    Args:
        fraction: in (0, 1].
        scope: the set within which tokens compete: one sequence; one micro-batch; `rank`, all micro-batches of a step on one
            data-parallel rank (the tensor- and context-parallel ranks that share its samples see the same scores and choose
            alike); or the whole global batch, which is exact over micro-batches and ranks and does not depend on how the batch
            is split among them.

    Cost: rank and global_batch need the scores of a whole step before its first loss, that is, a forward pass that only scores
        when a step has more than one micro-batch.
    Collectives: global_batch only, over the group it is given: see `select_top_fraction`.
    Source: Rho-1 (arXiv 2404.07965), equation 5.
    """

    def __init__(self, fraction: float, scope: Scope = "global_batch") -> None:
        if not 0.0 < fraction <= 1.0:
            raise ConfigError(f"objective.fraction: got {fraction}, expected a number in (0, 1]")
        if scope not in get_args(Scope):
            raise ConfigError(f"objective.scope: got {scope!r}, expected one of {', '.join(get_args(Scope))}")
        self.fraction = fraction
        self.scope = scope
        self.spans_micro_batches = scope in ("rank", "global_batch")
        self.threshold: float | Tensor | None = None  # of the last step; global_batch only, where it is the same on all ranks

    def __call__(self, scores: Scores, batches: Sequence[TokenBatch], group: dist.ProcessGroup | None) -> list[TokenWeights]:
        (own,) = scores
        if self.scope == "sequence":
            pairs = zip(own, batches, strict=True)
            masks = [select_top_fraction_rows(score, batch.loss_mask, self.fraction) for score, batch in pairs]
            return [TokenWeights(mask.float(), None) for mask in masks]
        if self.scope == "microbatch":
            return [self._select([score], [batch], None)[0] for score, batch in zip(own, batches, strict=True)]
        if self.scope == "rank":
            return self._select(own, batches, None)
        chosen = self._select(own, batches, group)
        previous = own[0].new_full((), torch.nan) if self.threshold is None else torch.as_tensor(self.threshold).to(own[0])
        self.threshold = chosen[0].threshold
        return [each._replace(previous_threshold=previous) for each in chosen]

    def guess(self, scores: Scores, batches: Sequence[TokenBatch]) -> list[TokenWeights]:
        return self._select(scores[0], batches, None) if self.scope == "global_batch" else self(scores, batches, None)

    def state_dict(self) -> dict[str, float | None]:
        return {"threshold": None if self.threshold is None else float(self.threshold)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.threshold = state["threshold"]

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


class LaggedTopFraction(TokenWeighting):
    """A token counts 1 when its score reaches what the global batch of the step before asked for.

    The threshold is exact, but of the step before: the k-th best score over all its micro-batches and ranks. So no weight waits
    for the scores of other micro-batches, and the share that is kept is close to `fraction` instead of equal to it: tokens that
    tie with the threshold are all kept, and while scores fall quickly, as from random weights, few are kept. How far the choice
    is from the exact one of the same step is measured after the step. Without a step before, tokens compete within their
    micro-batch. fraction 1.0 keeps every valid token.

    A step without a valid token, or whose threshold is not a number or infinite because scores are, leaves the threshold as it
    is.

    Args:
        fraction: in (0, 1].

    Cost: no scoring pass. One exact selection after the step, over scores that are there already.
    Collectives: none in the call; in `settle` those of `select_top_fraction`, over the group it is given.
    """

    learns_from_steps = True

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.threshold: float | None = None  # of the step before
        self._within_micro_batch = TopFraction(fraction, "microbatch")
        self._exact = TopFraction(fraction, "global_batch")

    def __call__(self, scores: Scores, batches: Sequence[TokenBatch], group: dist.ProcessGroup | None) -> list[TokenWeights]:
        if self.threshold is None:
            return self._within_micro_batch(scores, batches, None)
        (own,) = scores
        threshold = own[0].new_full((), self.threshold)
        kept = [batch.loss_mask & self._reaches(score, threshold) for score, batch in zip(own, batches, strict=True)]
        return [TokenWeights(each.float(), threshold) for each in kept]

    def settle(self, scores: Scores, batches: Sequence[TokenBatch], group: dist.ProcessGroup | None) -> list[TokenWeights]:
        exact = self._exact(scores, batches, group)
        assert exact[0].threshold is not None
        if (threshold := float(exact[0].threshold)) < torch.inf:  # which NaN is not
            self.threshold = threshold
        return exact

    def state_dict(self) -> dict[str, float | None]:
        return {"threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.threshold = state["threshold"]

    def _reaches(self, score: Tensor, threshold: Tensor) -> Tensor:
        return torch.ones_like(score, dtype=torch.bool) if self.fraction >= 1.0 else score >= threshold


class Combination(TokenWeighting):
    """A token counts 1 when both of two rankings keep it, or when one of them does.

    Each set is chosen by itself, by its own score, as if the other were not there. How much their combination keeps follows
    from the data: two sets of 70% have between 40% and 70% in common.

    Args:
        first: by the objective's first scorer.
        second: by its second scorer, in the same scope.
        combine: `intersection` or `union`.

    Collectives: those of both.
    Source: Rho-1, section 3.4 and appendix H (loss and entropy of the reference).
    """

    num_scorers = 2

    def __init__(self, first: TokenWeighting, second: TokenWeighting, combine: Combine) -> None:
        self.first, self.second = first, second
        self.combine = {"intersection": torch.minimum, "union": torch.maximum}[combine]
        self.spans_micro_batches = first.spans_micro_batches
        self.learns_from_steps = first.learns_from_steps

    def __call__(self, scores: Scores, batches: Sequence[TokenBatch], group: dist.ProcessGroup | None) -> list[TokenWeights]:
        return self._combined(self.first(scores[:1], batches, group), self.second(scores[1:], batches, group))

    def guess(self, scores: Scores, batches: Sequence[TokenBatch]) -> list[TokenWeights]:
        return self._combined(self.first.guess(scores[:1], batches), self.second.guess(scores[1:], batches))

    def settle(self, scores: Scores, batches: Sequence[TokenBatch], group: dist.ProcessGroup | None) -> list[TokenWeights]:
        return self._combined(self.first.settle(scores[:1], batches, group), self.second.settle(scores[1:], batches, group))

    def state_dict(self) -> dict[str, float | None]:
        return {**self.first.state_dict(), **{f"second_{name}": value for name, value in self.second.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first.load_state_dict({name: state[name] for name in self.first.state_dict()})
        self.second.load_state_dict({name: state[f"second_{name}"] for name in self.second.state_dict()})

    def _combined(self, first: Sequence[TokenWeights], second: Sequence[TokenWeights]) -> list[TokenWeights]:
        pairs = zip(first, second, strict=True)
        return [TokenWeights(self.combine(a.weight, b.weight), None, sets=(a, b)) for a, b in pairs]


def token_order(batch: TokenBatch) -> Tensor:
    """Position of every token in the run's data, whatever rank and micro-batch hold it.

    Shapes: -> [b, s] int64, non-negative and unique within a run where `sample_index` is; negative for padding samples.
    """
    s = batch.labels.shape[1]
    return batch.sample_index[:, None] * s + torch.arange(s, device=batch.labels.device)
