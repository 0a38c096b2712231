"""Loss spikes: a step is judged by the steps before it, and its update held back before it does harm.

The z-score is robust: distance above the median in units of 1.4826 times the median absolute deviation, which is the standard
deviation where steps are normally distributed and does not move when some of them are not.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

from megarpt.config.schema import StabilityConfig

logger = logging.getLogger(__name__)

_MAD_TO_SIGMA = 1.4826
_SMALLEST_SIGMA = 1e-3  # of the median: steps that hardly differ do not make a spike of the next difference


class Verdict(NamedTuple):
    """What the guard found of one step."""

    scores: Mapping[str, float] = MappingProxyType({})  # tag -> z-score; empty while the window is not full
    is_spike: bool = False
    is_held: bool = False  # whether the update was held back for it


class SpikeGuard:
    """Judges loss and gradient norm of each step before its update; the `guard` of `TrainStep`."""

    def __init__(self, cfg: StabilityConfig, *, agree: Callable[[bool], bool], shows: bool = True) -> None:
        """Begin with an empty window.

        Args:
            cfg: threshold, window and what to do.
            agree: whether any rank says so. The numbers are global, but ranks may differ in their last bit.
            shows: whether this rank logs the spikes.
        """
        self._cfg, self._agree, self._shows = cfg, agree, shows
        self._loss: deque[float] = deque(maxlen=cfg.spike_window_steps)
        self._grad_norm: deque[float] = deque(maxlen=cfg.spike_window_steps)
        self._verdict: Verdict | None = None

    def __call__(self, loss_nats: float, grad_norm: float) -> bool:
        """Whether to hold back the update of a step. Collectives: one of `agree`."""
        scores = {}
        if len(self._loss) == self._cfg.spike_window_steps:
            scores = {
                "optim/loss_zscore": robust_zscore(loss_nats, self._loss),
                "optim/grad_norm_zscore": robust_zscore(grad_norm, self._grad_norm),
            }
        is_spike = self._agree(any(z > self._cfg.spike_threshold for z in scores.values()))
        is_held = is_spike and self._cfg.on_spike != "report"
        if is_spike and self._shows:
            logger.warning(
                "spike: loss %.4g (z %.1f), gradient norm %.4g (z %.1f), expected z of at most stability.spike_threshold = %g",
                loss_nats,
                scores.get("optim/loss_zscore", 0.0),
                grad_norm,
                scores.get("optim/grad_norm_zscore", 0.0),
                self._cfg.spike_threshold,
            )
        if not is_held:
            self._loss.append(loss_nats)
            self._grad_norm.append(grad_norm)
        self._verdict = Verdict(scores, is_spike, is_held)
        return is_held

    def take_verdict(self) -> Verdict:
        """The verdict of the step that was just done; a step that was not finite has an empty one."""
        verdict, self._verdict = self._verdict, None
        return verdict or Verdict()

    def state_dict(self) -> dict[str, Any]:
        """The window, as plain values."""
        return {"loss": list(self._loss), "grad_norm": list(self._grad_norm)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved window; the newest part of it when the window has become shorter, none when there was none."""
        for window, name in ((self._loss, "loss"), (self._grad_norm, "grad_norm")):
            window.clear()
            window.extend(state.get(name, ()))


def robust_zscore(value: float, history: Sequence[float] | deque[float]) -> float:
    """How far `value` lies above the median of `history`, in robust standard deviations; negative below it.

    Cost: two sorts of the window, 20 microseconds for 128 steps.
    """
    middle = median(history)
    sigma = _MAD_TO_SIGMA * median(abs(each - middle) for each in history)
    sigma = max(sigma, _SMALLEST_SIGMA * abs(middle))
    return (value - middle) / sigma if sigma > 0.0 else 0.0
