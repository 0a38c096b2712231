"""Reinforcement of sampled completions: PPO's clipped surrogate over tokens, of which GRPO, DAPO, ProRL and RPT are settings.

Four log-probabilities of the same token meet here, and all must be of the same distribution (temperature included):
the current policy's, which has the gradient; the old policy's, that is the weights at the start of the iteration, by this
trainer; the sampler's, that is the same weights as the engine that drew the token computed them; the reference's.

Streams, [b, s] fp32 like every stream, aligned with `labels`; entries where `loss_mask` is False are never looked at:
    advantage       the same at all tokens of a rollout
    old_logprob     nats; needed off policy
    ref_logprob     nats; needed for a KL term, and measured wherever it is there
    rollout_logprob nats, the sampler's; needed for importance weights, and measured wherever it is there
    rollout_share   1 / the number of tokens of the rollout that train; needed for the reduction "rollout"
    rollout_end     1 at the last token of a rollout that trains, 0 elsewhere; needed for the reduction "rollout"

Dims: b micro-batch, s sequence length.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from megarpt.errors import ConfigError, DataError
from megarpt.objectives.base import Metric, Objective, ObjectiveOutput
from megarpt.objectives.weighting import TokenWeights
from megarpt.structs import Progress, TokenBatch, TokenStats

KlEstimator = Literal["k1", "k2", "k3"]
Reduction = Literal["token", "rollout"]


class ClippedPolicyGradient(Objective):
    """Sum over trained tokens of -importance * surrogate + kl_coef * KL - entropy_coef * entropy.

    With r = exp(current - old) and advantage A the surrogate is min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). Where it is
    clipped it is a constant: its gradient is exactly 0, however large r is.

    The reduction "token" divides the sum by the number of trained tokens, so that every token counts alike. "rollout" divides
    it by the number of rollouts after each was averaged over its tokens: every token is weighted by `rollout_share` in the sum,
    and `num_tokens` counts the tokens that end a rollout. Both are sums over tokens, and the count is an integer, so that
    neither depends on how rollouts are packed, nor on micro-batches or ranks. A rollout that is masked as a whole is not
    counted; one that trains with its `rollout_end` masked would be missing in the division.

    KL terms estimate KL(current || reference) at tokens that were drawn from the policy, with d = reference - current:

        k1 = -d                 unbiased; its gradient is 0 on average: as a loss it is noise and holds the policy nowhere
        k2 = d^2 / 2            biased; on policy its gradient is on average that of KL(current || reference)
        k3 = exp(d) - d - 1     unbiased, never negative; on policy its gradient is on average that of KL(reference || current)

    The gradients of k2 and k3 agree to first order in d. A KL in the reward is the matter of the loop, not of this term.

    Args:
        clip_low: r below 1 - clip_low adds nothing more where A < 0; in [0, 1].
        clip_high: r above 1 + clip_high adds nothing more where A > 0; 0 or more, inf for no bound.
        dual_clip: c > 1: where A < 0, r above c adds nothing more, and the surrogate is never below c * A. None for no bound.
        kl_coef: weight of the KL term; 0 leaves it out.
        kl_estimator: which estimate has the gradient. The metric is k3 in any case.
        entropy_coef: weight of the entropy, which is a bonus: a larger entropy is a lower loss.
        reduction: "token" or "rollout".
        on_policy: the old policy is the current one. r is then exactly 1, nothing is clipped, the gradient is that of
            -A * logprob, and no `old_logprob` is read. False for more than one update with the same rollouts.
        max_importance_ratio: C: the surrogate is weighted by min(exp(old - sampler), C), without a gradient through it (old is
            the current policy on policy). At least 1; None for no weighting.
        log_entropy: report the entropy even though it is no part of the loss. It costs what the bonus costs.

    Raises:
        ConfigError: a number is out of its range, or a name is unknown.

    Collectives: none.
    Source: clipping, PPO (arXiv 1707.06347), equation 7, with two bounds as in DAPO (arXiv 2503.14476); the reduction "token",
        DAPO, though over all tokens of a step and not over those of each group; the reduction "rollout", and k3 in the loss,
        GRPO (arXiv 2402.03300), equations 3 and 4; dual clip, arXiv 1912.09729; k1, k2, k3, J. Schulman, "Approximating KL
        divergence" (2020); truncated importance weights against the sampler, F. Yao et al., "Your efficient RL framework
        secretly brings you off-policy RL training" (2025). What the gradients of the estimates are on average is checked in
        the tests.
    """

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: KlEstimator = "k2",
        entropy_coef: float = 0.0,
        reduction: Reduction = "token",
        on_policy: bool = True,
        max_importance_ratio: float | None = None,
        log_entropy: bool = False,
    ) -> None:
        # NaN fails every comparison, and so every one of these
        _require(0.0 <= clip_low <= 1.0, "clip_low", clip_low, "a number in [0, 1]")
        _require(clip_high >= 0.0, "clip_high", clip_high, "0 or more, inf for no bound")
        _require(dual_clip is None or 1.0 < dual_clip < math.inf, "dual_clip", dual_clip, "a number above 1, or none")
        _require(0.0 <= kl_coef < math.inf, "kl_coef", kl_coef, "0 or more: it draws towards the reference")
        _require(kl_estimator in get_args(KlEstimator), "kl_estimator", kl_estimator, "one of k1, k2, k3")
        _require(0.0 <= entropy_coef < math.inf, "entropy_coef", entropy_coef, "0 or more: it is a bonus")
        _require(reduction in get_args(Reduction), "reduction", reduction, "one of token, rollout")
        in_range = max_importance_ratio is None or max_importance_ratio >= 1.0
        _require(
            in_range, "max_importance_ratio", max_importance_ratio, "1 or more, or none: below 1 it would shrink every token"
        )
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.kl_coef, self.kl_estimator, self.entropy_coef = kl_coef, kl_estimator, entropy_coef
        self.reduction, self.on_policy, self.max_importance_ratio = reduction, on_policy, max_importance_ratio
        self.needs_entropy = log_entropy or entropy_coef != 0.0
        needed = {
            "advantage": True,
            "old_logprob": not on_policy,
            "ref_logprob": kl_coef != 0.0,
            "rollout_logprob": max_importance_ratio is not None,
            "rollout_share": reduction == "rollout",
            "rollout_end": reduction == "rollout",
        }
        self.streams = tuple(name for name, is_needed in needed.items() if is_needed)

    def __call__(
        self, stats: TokenStats, batch: TokenBatch, chosen: TokenWeights | None, progress: Progress
    ) -> ObjectiveOutput:
        """Loss and metrics of one micro-batch.

        Args:
            stats: of the model that trains, differentiable; the entropy where `needs_entropy`.
            chosen: None; nothing is chosen beforehand.
        Raises:
            DataError: the batch lacks a stream that the settings need.
        """
        assert chosen is None
        if missing := [name for name in self.streams if name not in batch.streams]:
            have = ", ".join(sorted(batch.streams)) or "none"
            raise DataError(
                f"objective: the batch carries no stream {', '.join(missing)}, which the settings need (it has: {have})"
            )
        tokens = self._read(stats, batch)
        cuts = self._cuts(tokens)
        policy = -tokens.importance * self._surrogate(tokens, cuts)
        loss = policy
        if self.kl_coef != 0.0:
            assert tokens.reference is not None
            loss = loss + self.kl_coef * kl_estimate(tokens.logprob, tokens.reference, self.kl_estimator)
        if self.entropy_coef != 0.0:
            assert tokens.entropy is not None
            loss = loss - self.entropy_coef * tokens.entropy
        weight, num_units = self._reduction(batch)
        metrics: dict[str, Metric] = {"policy/loss": ((weight * policy.detach()).sum(dtype=torch.float64), num_units.double())}
        metrics |= self._token_metrics(tokens, cuts, batch.loss_mask)
        return ObjectiveOutput((weight * loss).sum(), num_units, metrics, -stats.logprob.detach(), weight, ())

    def _read(self, stats: TokenStats, batch: TokenBatch) -> _Tokens:
        """Everything about the tokens, with harmless zeros wherever nothing trains: 0 * NaN is NaN, and so is its gradient, but
        `where` stops both."""
        mask = batch.loss_mask
        have = {name: torch.where(mask, values.detach(), 0.0) for name, values in batch.streams.items() if name in _STREAMS}
        logprob = torch.where(mask, stats.logprob, 0.0)
        old = logprob.detach() if self.on_policy else have["old_logprob"]
        sampler = have.get("rollout_logprob")
        importance = torch.ones_like(old)
        if self.max_importance_ratio is not None:
            assert sampler is not None
            importance = (old - sampler).exp().clamp(max=self.max_importance_ratio)
        entropy = None
        if self.needs_entropy:
            assert stats.entropy is not None
            entropy = torch.where(mask, stats.entropy, 0.0)
        return _Tokens(logprob, old, have["advantage"], sampler, have.get("ref_logprob"), importance, entropy)

    def _cuts(self, tokens: _Tokens) -> _Cuts:
        ratio, advantage = (tokens.logprob.detach() - tokens.old).exp(), tokens.advantage
        low = (advantage < 0.0) & (ratio < 1.0 - self.clip_low)
        high = (advantage > 0.0) & (ratio > 1.0 + self.clip_high)
        dual = torch.zeros_like(low) if self.dual_clip is None else (advantage < 0.0) & (ratio > self.dual_clip)
        return _Cuts(low, high, dual)

    def _surrogate(self, tokens: _Tokens, cuts: _Cuts) -> Tensor:
        # Where the ratio does not count it may overflow, and inf * 0 would be the gradient: it is replaced before `exp`.
        is_constant = cuts.low | cuts.high | cuts.dual | (tokens.advantage == 0.0)
        ratio = torch.where(is_constant, 0.0, tokens.logprob - tokens.old).exp()
        ratio = torch.where(cuts.low, 1.0 - self.clip_low, ratio)
        ratio = torch.where(cuts.high, 1.0 + self.clip_high, ratio)
        if self.dual_clip is not None:
            ratio = torch.where(cuts.dual, self.dual_clip, ratio)
        return ratio * tokens.advantage

    def _reduction(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """(what each token counts in the sum, [b, s] fp32; how many units the sum is divided by, [] int32)."""
        mask = batch.loss_mask
        if self.reduction == "token":
            return mask.float(), mask.sum(dtype=torch.int32)
        weight = torch.where(mask, batch.streams["rollout_share"], 0.0)
        return weight, (mask & (batch.streams["rollout_end"] > 0.0)).sum(dtype=torch.int32)

    @torch.no_grad()
    def _token_metrics(self, tokens: _Tokens, cuts: _Cuts, mask: Tensor) -> dict[str, Metric]:
        """Means over all trained tokens, whatever the reduction. Which there are depends on the settings and on which streams
        the data carries, never on values."""
        log_ratio = tokens.logprob.detach() - tokens.old
        values = {
            "policy/ratio": log_ratio.exp(),
            "policy/clipped_low": cuts.low,
            "policy/clipped_high": cuts.high,
            "policy/kl_old_k1_nats": -log_ratio,
            "policy/kl_old_k3_nats": torch.expm1(log_ratio) - log_ratio,
        }
        if self.dual_clip is not None:
            values["policy/clipped_dual"] = cuts.dual
        if tokens.reference is not None:
            values["policy/kl_ref_nats"] = kl_estimate(tokens.logprob, tokens.reference, "k3")
        if tokens.entropy is not None:
            values["policy/entropy_nats"] = tokens.entropy
        if tokens.sampler is not None:
            gap = tokens.old - tokens.sampler
            values |= {"policy/sampler_gap_nats": gap.abs(), "policy/sampler_gap_squared_nats2": gap.square()}
            if self.max_importance_ratio is not None:
                values["policy/importance"] = tokens.importance
                values["policy/importance_truncated"] = gap.exp() > self.max_importance_ratio
        count = mask.sum().double()
        return {name: (torch.where(mask, value, 0.0).sum(dtype=torch.float64), count) for name, value in values.items()}


def kl_estimate(logprob: Tensor, reference: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimates of KL(current || reference) from tokens drawn from the current policy; see `ClippedPolicyGradient`.

    Args:
        logprob: nats, of the current policy, differentiable.
        reference: nats, of the reference. Of a token that it finds more than 88 nats likelier k3 is infinite.

    Shapes: both the same -> the same, nats.
    """
    difference = reference - logprob
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.expm1(difference) - difference  # `exp` - 1 would lose the digits of a small difference


class _Tokens(NamedTuple):
    """Of every token, 0 where nothing trains; [b, s] each, nats where it is a log-probability."""

    logprob: Tensor  # differentiable; the rest is not
    old: Tensor
    advantage: Tensor
    sampler: Tensor | None
    reference: Tensor | None
    importance: Tensor  # what the surrogate is weighted by
    entropy: Tensor | None  # differentiable


class _Cuts(NamedTuple):
    """At which bound the surrogate of a token is constant; [b, s] bool each, at most one of them."""

    low: Tensor
    high: Tensor
    dual: Tensor


_STREAMS = ("advantage", "old_logprob", "ref_logprob", "rollout_logprob")  # those that are a number of the token


def _require(is_fine: bool, name: str, got: object, expected: str) -> None:
    if not is_fine:
        raise ConfigError(f"objective.{name}: got {got!r}, expected {expected}")
