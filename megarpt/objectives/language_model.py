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
from megarpt.objectives.base import Metric, Objective, ObjectiveOutput
from megarpt.objectives.scoring import TokenScorer
from megarpt.objectives.weighting import TokenWeighting, TokenWeights
from megarpt.ops.token_select import selection_sums
from megarpt.structs import Progress, TokenBatch, TokenStats

_NO_STATS = TokenStats(logprob=torch.empty(0), entropy=None)  # for scorers that read none


class WeightedLanguageModel(Objective):
    """Sum over tokens of weight * nll, to be divided by the number of tokens whose weight is not zero.

    With weights of 0 and 1 that is the mean over kept tokens (Rho-1, equation 4). With every weight 1 it is ordinary language
    modeling, to the last bit. Dropped tokens stay in the context of the others; what their own loss is, be it NaN, reaches
    neither loss nor gradient.

    Args:
        scorer: ranks tokens; None when the weighting needs no ranking.
        weighting: turns ranks into weights.
        num_sources: corpora in the blend; with more than one, the kept share of each is a metric.
        second_scorer: ranks tokens for a weighting that combines two rankings.

    Collectives: none in the call. `select` and `settle` use the weighting's.
    """

    def __init__(
        self,
        scorer: TokenScorer | None,
        weighting: TokenWeighting,
        num_sources: int = 1,
        second_scorer: TokenScorer | None = None,
    ) -> None:
        self.scorers = tuple(each for each in (scorer, second_scorer) if each is not None)
        if len(self.scorers) != weighting.num_scorers:
            raise ConfigError(
                f"objective.scorer: got {len(self.scorers)} scorers, of which 'none' is not one; expected the "
                f"{weighting.num_scorers} that objective.weighting ranks by"
            )
        self.weighting = weighting
        self.num_sources = num_sources
        self.streams: tuple[str, ...] = tuple(dict.fromkeys(name for each in self.scorers for name in each.streams))
        self.needs_stats = any(each.needs_stats for each in self.scorers)  # otherwise weights follow from the data alone
        self.needs_entropy = any(each.needs_entropy for each in self.scorers)

    @property
    def spans_micro_batches(self) -> bool:
        """Whether the weights have to be chosen for all micro-batches together, by `select`, before they are trained on."""
        return self.weighting.spans_micro_batches

    @property
    def guesses(self) -> bool:
        """Whether weights depend on the statistics, which is when they have to be guessed."""
        return self.needs_stats

    @property
    def learns_from_steps(self) -> bool:
        """Whether `settle` is to be called after every step."""
        return self.weighting.learns_from_steps

    @property
    def awaits_a_step(self) -> bool:
        """Whether the choice is to follow from the step before, and there was none."""
        return self.learns_from_steps and None in self.weighting.state_dict().values()

    @torch.no_grad()
    def select(
        self,
        stats: Sequence[TokenStats] | None,
        batches: Sequence[TokenBatch],
        progress: Progress,
        group: dist.ProcessGroup | None,
    ) -> list[TokenWeights]:
        """Weights of every micro-batch of a step. Without `needs_stats` the stats may be None.

        Call it once per step, on every rank of `group` (the ranks that hold other samples of the same global batch: data
        parallel, never tensor, context or pipeline).
        """
        assert stats is not None or not self.needs_stats
        stats = [_NO_STATS] * len(batches) if stats is None else stats
        scores = [self._scores(one, batch, progress) for one, batch in zip(stats, batches, strict=True)]
        return self.weighting(self._by_scorer(scores), batches, group)

    @torch.no_grad()
    def guess(self, stats: TokenStats, batch: TokenBatch, progress: Progress) -> Tensor:
        """[b, s] weights by the choice among the tokens whose statistics are known, those that `batch.loss_mask` has."""
        return self.weighting.guess(self._by_scorer([self._scores(stats, batch, progress)]), [batch])[0].weight

    @torch.no_grad()
    def settle(self, work: Sequence[tuple[TokenBatch, ObjectiveOutput]], group: dist.ProcessGroup | None) -> dict[str, Metric]:
        """Let the weighting learn from the scores of the step that was just run, and compare its choice with the exact one.

        Call it once per step, after the backward passes, on every rank of `group`, with all micro-batches of this rank.
        """
        batches = [batch for batch, _ in work]
        exact = self.weighting.settle(self._by_scorer([out.scores for _, out in work]), batches, group)
        kept = torch.cat([out.weight.flatten() for _, out in work]) > 0.0
        right = torch.cat([each.weight.flatten() for each in exact]) > 0.0
        return {
            "select/overlap_with_exact": (_count(kept & right), _count(right)),
            "select/jaccard_with_exact": (_count(kept & right), _count(kept | right)),
        }

    def __call__(
        self, stats: TokenStats, batch: TokenBatch, chosen: TokenWeights | None, progress: Progress
    ) -> ObjectiveOutput:
        """Loss and metrics of one micro-batch.

        Args:
            stats: of the model that trains, differentiable.
            chosen: what `select` returned for this micro-batch; None lets the weighting decide within the micro-batch.
        Raises:
            ConfigError: chosen is None although the weighting needs all micro-batches.
        """
        scores = self._scores(stats, batch, progress)
        if chosen is None:
            if self.spans_micro_batches:
                raise ConfigError(
                    "objective.scope rank or global_batch: got no weights for a micro-batch; expected those of "
                    "WeightedLanguageModel.select, called once per step with the statistics of all micro-batches"
                )
            (chosen,) = self.weighting(self._by_scorer([scores]), [batch], None)
        kept = chosen.weight > 0.0
        nll = -stats.logprob
        # where, not a product: 0 * NaN is NaN, and so is its gradient
        loss_sum = torch.where(kept, chosen.weight * nll, 0.0).sum()
        num_tokens = kept.sum(dtype=torch.int32)
        token_loss = nll.detach()
        metrics: dict[str, Metric] = {"train/loss_nats": (loss_sum.detach(), num_tokens.float())}
        if self.weighting.selects:
            metrics |= self._selection_metrics(token_loss, scores, chosen, batch)
        return ObjectiveOutput(loss_sum, num_tokens, metrics, token_loss, chosen.weight, scores)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same choice and the same numbers. Waits for the device."""
        return dict(self.weighting.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: it is not such a state.
        """
        expected = self.weighting.state_dict()
        if state.keys() != expected.keys():
            raise CheckpointError(f"selection state: got the entries {sorted(state)}, expected {sorted(expected)}")
        self.weighting.load_state_dict(state)

    def _scores(self, stats: TokenStats, batch: TokenBatch, progress: Progress) -> tuple[Tensor, ...]:
        return tuple(scorer(stats, batch, progress).detach() for scorer in self.scorers)

    def _by_scorer(self, scores: Sequence[tuple[Tensor, ...]]) -> list[list[Tensor]]:
        return [[each[i] for each in scores] for i in range(len(self.scorers))]

    @torch.no_grad()
    def _selection_metrics(
        self, nll: Tensor, scores: Sequence[Tensor], chosen: TokenWeights, batch: TokenBatch
    ) -> dict[str, Metric]:
        """What tells a selection that works from a run that diverges: the dropped tokens' loss may rise for ever."""
        valid, kept, previous = batch.loss_mask, chosen.weight > 0.0, chosen.previous_threshold
        ref_nll = batch.streams.get("ref_nll")
        score = scores[0] if scores else None
        if len(scores) > 1:  # NaN where one of the scores is, and otherwise the first
            score = torch.where(scores[1].isnan(), scores[1], scores[0])
        sums = selection_sums(nll, score, ref_nll, valid, kept, previous)
        metrics = {
            "select/kept_fraction": (sums.num_kept, sums.num_valid),
            "select/all_loss_nats": (sums.nll_valid, sums.num_valid),
            "select/kept_loss_nats": (sums.nll_kept, sums.num_kept),
            "select/dropped_loss_nats": (sums.nll_dropped, sums.num_valid - sums.num_kept),
        }
        if scores:
            metrics["select/nan_scores"] = (sums.num_nan_scores, sums.num_valid)
        if ref_nll is not None:
            metrics["select/ref_nll_nats"] = (sums.reference_nll, sums.num_known)
            metrics["select/excess_nats"] = (sums.excess, sums.num_known)
        if chosen.threshold is not None:
            metrics["select/threshold"] = _where_finite(chosen.threshold)
        if previous is not None:
            is_known = (~previous.isnan()).double()
            agreement = (sums.num_agreeing * is_known, sums.num_valid * is_known)
            metrics["select/agreement_with_previous_threshold"] = agreement
        for i, one in enumerate(chosen.sets):
            metrics[f"select/kept_fraction/set_{i}"] = (_count(one.weight > 0.0), sums.num_valid)
            if one.threshold is not None:
                metrics[f"select/threshold/set_{i}"] = _where_finite(one.threshold)
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


def _where_finite(value: Tensor) -> Metric:
    finite = value.isfinite()
    return torch.where(finite, value, 0.0), finite.float()
