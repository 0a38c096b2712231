"""Configuration to objective. A new scorer or weighting is a class and one line here."""

from __future__ import annotations

from collections.abc import Callable

from megarpt.config.schema import ObjectiveConfig
from megarpt.objectives.language_model import WeightedLanguageModel
from megarpt.objectives.scoring import ExcessLoss, Loss, Random, ReferenceEntropy, ReferenceLoss, TokenScorer
from megarpt.objectives.weighting import Combination, LaggedTopFraction, TokenWeighting, TopFraction, Uniform

SCORERS: dict[str, Callable[[int], TokenScorer | None]] = {
    "none": lambda seed: None,
    "excess_loss": lambda seed: ExcessLoss(),
    "loss": lambda seed: Loss(),
    "reference_loss": lambda seed: ReferenceLoss(),
    "reference_entropy": lambda seed: ReferenceEntropy(),
    "random": Random,
}
WEIGHTINGS: dict[str, Callable[[ObjectiveConfig], TokenWeighting]] = {
    "uniform": lambda cfg: Uniform(),
    "top_fraction": lambda cfg: _top_fraction(cfg),
}


def build_objective(cfg: ObjectiveConfig, seed: int, num_sources: int = 1) -> WeightedLanguageModel:
    """The objective of a run.

    Args:
        seed: of the random scorer.
        num_sources: corpora in the training blend.
    Raises:
        ConfigError: top_fraction without a scorer.
    """
    second = SCORERS[cfg.second.scorer](seed) if cfg.second is not None else None
    return WeightedLanguageModel(SCORERS[cfg.scorer](seed), WEIGHTINGS[cfg.weighting](cfg), num_sources, second)


def _top_fraction(cfg: ObjectiveConfig) -> TokenWeighting:
    first = _one_set(cfg, cfg.fraction)
    return first if cfg.second is None else Combination(first, _one_set(cfg, cfg.second.fraction), cfg.combine)


def _one_set(cfg: ObjectiveConfig, fraction: float) -> TokenWeighting:
    if cfg.scope == "lagged_global_batch":
        return LaggedTopFraction(fraction)
    return TopFraction(fraction, cfg.scope)
