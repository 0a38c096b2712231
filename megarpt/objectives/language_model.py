"""Next-token prediction with a weight per token: ordinary language modeling, Rho-1 and its controls are settings of this.

Dims: b micro-batch, s sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.errors import CheckpointError, ConfigError
from megarpt.objectives.base import ObjectiveOutput
from megarpt.objectives.scoring import TokenScorer
from megarpt.objectives.weighting import TokenWeighting, TokenWeights
from megarpt.structs import Progress, TokenBatch, TokenStats

Metric = tuple[Tensor, Tensor]  # (numerator, denominator), [] fp32 each


class WeightedLanguageModel:
    """Sum over tokens of weight * nll, to be divided by the number of tokens whose weight is not zero.

    With weights of 0 and 1 that is the mean over kept tokens (Rho-1, equation 4). With every weight 1 it is ordinary language
    modeling, to the last bit. Dropped tokens stay in the context of the others; what their own loss is, be it NaN, reaches
    neither loss nor gradient.

    Args:
        scorer: ranks tokens; None when the weighting needs no ranking.
        weighting: turns ranks into weights.
        num_sources: corpora in the blend; with more than one, the kept share of each is a metric.

    Collectives: none in the call. `select` uses the weighting's.
    """

    def __init__(self, scorer: TokenScorer | None, weighting: TokenWeighting, num_sources: int = 1) -> None:
        if weighting.needs_score and scorer is None:
            raise ConfigError(
                "objective.scorer: got 'none', expected a scorer that objective.weighting top_fraction can rank by"
            )
        self.scorer = scorer
        self.weighting = weighting
        self.num_sources = num_sources
        self.streams: tuple[str, ...] = () if scorer is None else scorer.streams
        self.needs_entropy = scorer is not None and scorer.needs_entropy
        self._threshold: float | Tensor | None = None  # of the step under way, for a global selection
        self._previous_threshold: float | Tensor | None = None  # of the step before

    @property
    def selects_globally(self) -> bool:
        """Whether the weights have to be chosen for all micro-batches together, by `select`, before they are trained on."""
        return self.weighting.selects_globally

    @torch.no_grad()
    def select(
        self, stats: Sequence[TokenStats], batches: Sequence[TokenBatch], progress: Progress, group: dist.ProcessGroup | None
    ) -> list[Tensor]:
        """Weights [b, s] of every micro-batch of a step.

        Call it once per step, on every rank of `group` (the ranks that hold other samples of the same global batch: data and
        context parallel, never tensor or pipeline).
        """
        scores = [self._score(one, batch, progress) for one, batch in zip(stats, batches, strict=True)]
        weights = self.weighting(scores, batches, group)
        if self.selects_globally and weights:
            self._previous_threshold, self._threshold = self._threshold, weights[0].threshold
        return [one.weight for one in weights]

    def __call__(self, stats: TokenStats, batch: TokenBatch, weight: Tensor | None, progress: Progress) -> ObjectiveOutput:
        """Loss and metrics of one micro-batch.

        Args:
            stats: of the model that trains, differentiable.
            weight: what `select` returned for this micro-batch; None lets the weighting decide within the micro-batch.
        Raises:
            ConfigError: weight is None although the weighting selects over the global batch.
        """
        score = self._score(stats, batch, progress)
        threshold: float | Tensor | None
        if weight is None:
            if self.selects_globally:
                raise ConfigError(
                    "objective.scope global_batch: got no weights for a micro-batch; expected those of "
                    "WeightedLanguageModel.select, called once per step with the statistics of all micro-batches"
                )
            weight, threshold = self.weighting([score], [batch], None)[0]
        else:
            threshold = self._threshold
        kept = weight > 0.0
        nll = -stats.logprob
        # where, not a product: 0 * NaN is NaN, and so is its gradient
        loss_sum = torch.where(kept, weight * nll, 0.0).sum()
        num_tokens = kept.sum(dtype=torch.int32)
        token_loss = nll.detach()
        metrics: dict[str, Metric] = {"train/loss_nats": (loss_sum.detach(), num_tokens.float())}
        if self.weighting.selects:
            metrics |= self._selection_metrics(token_loss, score, TokenWeights(weight, _tensor(threshold, weight)), batch)
        return ObjectiveOutput(loss_sum, num_tokens, metrics, token_loss, weight, score)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to report the same numbers: the last step's threshold. Waits for the device."""
        return {"threshold": None if self._threshold is None else float(self._threshold)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: it is not such a state.
        """
        if set(state) != {"threshold"}:
            raise CheckpointError(f"selection state: got the entries {sorted(state)}, expected ['threshold']")
        self._threshold = state["threshold"]

    def _score(self, stats: TokenStats, batch: TokenBatch, progress: Progress) -> Tensor | None:
        return None if self.scorer is None else self.scorer(stats, batch, progress).detach()

    @torch.no_grad()
    def _selection_metrics(
        self, nll: Tensor, score: Tensor | None, chosen: TokenWeights, batch: TokenBatch
    ) -> dict[str, Metric]:
        """What tells a selection that works from a run that diverges: the dropped tokens' loss may rise for ever."""
        valid, kept = batch.loss_mask, chosen.weight > 0.0
        dropped = valid & ~kept
        metrics = {
            "select/kept_fraction": (_count(kept), _count(valid)),
            "select/all_loss_nats": (_masked_sum(nll, valid), _count(valid)),
            "select/kept_loss_nats": (_masked_sum(nll, kept), _count(kept)),
            "select/dropped_loss_nats": (_masked_sum(nll, dropped), _count(dropped)),
        }
        if score is not None:
            metrics["select/nan_scores"] = (_count(valid & score.isnan()), _count(valid))
        ref_nll = batch.streams.get("ref_nll")
        if ref_nll is not None:
            known = valid & ~ref_nll.isnan()
            metrics["select/ref_nll_nats"] = (_masked_sum(ref_nll, known), _count(known))
            metrics["select/excess_nats"] = (_masked_sum(nll - ref_nll, known), _count(known))
        if chosen.threshold is not None:
            finite = chosen.threshold.isfinite()
            metrics["select/threshold"] = (torch.where(finite, chosen.threshold, 0.0), finite.float())
        if self.selects_globally and self._previous_threshold is not None and score is not None:
            same = valid & ((score >= _tensor(self._previous_threshold, score)) == kept)
            metrics["select/agreement_with_previous_threshold"] = (_count(same), _count(valid))
        if self.num_sources > 1:
            metrics |= self._kept_by_source(valid, kept, batch.source_id)
        return metrics

    def _kept_by_source(self, valid: Tensor, kept: Tensor, source_id: Tensor) -> dict[str, Metric]:
        """One entry per corpus of the blend, present or not, so that every rank reports the same names."""
        counts = torch.zeros(2, self.num_sources, device=valid.device)
        per_sample = torch.stack([kept.sum(dim=1), valid.sum(dim=1)]).float()  # [2, b]
        counts.index_add_(1, source_id.clamp(0, self.num_sources - 1), per_sample)
        return {f"select/kept_fraction/source_{i}": (counts[0, i], counts[1, i]) for i in range(self.num_sources)}


def _count(mask: Tensor) -> Tensor:
    return mask.sum().float()


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum()


def _tensor(value: float | Tensor | None, like: Tensor) -> Any:
    return None if value is None else torch.as_tensor(value, dtype=like.dtype, device=like.device)
