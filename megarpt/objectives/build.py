"""Configuration to objective. A new scorer or weighting is a class and one line here."""

from __future__ import annotations

from collections.abc import Callable

from megarpt.config.schema import ObjectiveConfig
from megarpt.objectives.language_model import WeightedLanguageModel
from megarpt.objectives.scoring import ExcessLoss, Loss, Random, ReferenceEntropy, ReferenceLoss, TokenScorer
from megarpt.objectives.weighting import TokenWeighting, TopFraction, Uniform

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
    "top_fraction": lambda cfg: TopFraction(cfg.fraction, cfg.scope),
}


def build_objective(cfg: ObjectiveConfig, seed: int, num_sources: int = 1) -> WeightedLanguageModel:
    """The objective of a run.

    Args:
        seed: of the random scorer.
        num_sources: corpora in the training blend.
    Raises:
        ConfigError: top_fraction without a scorer.
    """
    return WeightedLanguageModel(SCORERS[cfg.scorer](seed), WEIGHTINGS[cfg.weighting](cfg), num_sources)
