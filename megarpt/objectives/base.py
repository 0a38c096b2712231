"""What an objective is: a number for every token, from statistics of that token.

An objective never sees logits. It gets `TokenStats` (log-probability and, on request, entropy of every token), the batch and
the progress of the run, and returns sums. Sums, an integer token count, and one global division make the result independent
of micro-batching and of the parallel layout.

Dims: b micro-batch, s sequence length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from megarpt.errors import CheckpointError
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


class Objective(ABC):
    """Per-token statistics to a loss. Only the call has to be written: by default nothing is chosen before it and nothing is
    remembered after it."""

    streams: tuple[str, ...] = ()  # names of `TokenBatch.streams` it needs; checked against the data before step 0
    needs_entropy: bool = False
    needs_stats: bool = True  # False when `select` knows from the data alone what every token is worth, before the model runs

    @property
    def spans_micro_batches(self) -> bool:
        """Whether the weights have to be chosen for all micro-batches together, by `select`, before they are trained on."""
        return False

    @property
    def guesses(self) -> bool:
        """Whether `guess` can be asked, so that the head need not wait for the choice."""
        return False

    @property
    def learns_from_steps(self) -> bool:
        """Whether `settle` is to be called after every step."""
        return False

    @property
    def awaits_a_step(self) -> bool:
        """Whether the choice is to follow from the step before, and there was none."""
        return False

    @abstractmethod
    def __call__(
        self, stats: TokenStats, batch: TokenBatch, chosen: TokenWeights | None, progress: Progress
    ) -> ObjectiveOutput:
        """Loss and metrics of one micro-batch.

        Args:
            stats: of the model that trains, differentiable.
            chosen: what `select` returned for this micro-batch; None when nothing was decided beforehand.
        """

    def select(
        self,
        stats: Sequence[TokenStats] | None,
        batches: Sequence[TokenBatch],
        progress: Progress,
        group: dist.ProcessGroup | None,
    ) -> list[TokenWeights]:
        """Weights of every micro-batch of a step; the loss of a token is then its weight times its nll, and the head may make
        its gradient at once. Asked only of an objective without `needs_stats`, or that spans micro-batches.
        """
        raise NotImplementedError(f"{type(self).__name__} chooses nothing beforehand")

    def guess(self, stats: TokenStats, batch: TokenBatch, progress: Progress) -> Tensor:
        """[b, s] what the tokens of a micro-batch will be worth, as well as it can be said; where it is wrong the head computes
        a token again. Changes no state and uses no other rank. Asked only of an objective that guesses, while the head knows
        some of the statistics: `batch.loss_mask` is False where it does not.
        """
        raise NotImplementedError(f"{type(self).__name__} does not guess")

    def settle(self, work: Sequence[tuple[TokenBatch, ObjectiveOutput]], group: dist.ProcessGroup | None) -> dict[str, Metric]:
        """Learn from the step that was just run. Asked only of an objective that learns from steps."""
        raise NotImplementedError(f"{type(self).__name__} learns nothing from steps")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same choice and the same numbers. Waits for the device."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: it is not such a state.
        """
        if state:
            raise CheckpointError(f"objective state: got the entries {sorted(state)}, expected none")
