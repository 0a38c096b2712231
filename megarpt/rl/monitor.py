"""What a person sees of a run with rollouts: one line of metrics an iteration, and one progress line.

The progress line shows, always in this order and with a dash where there is no number:

    reward    mean reward of the completions that were judged
    format    share of completions in the asked-for format
    length    mean tokens of a completion
    entropy   nats a token, where the objective reports it
    kl        nats a token: to the reference where there is one, else to the weights that drew the rollouts
    clip      share of trained tokens whose ratio is clipped
    dead      share of groups that teach nothing
    cut       share of completions that were cut off
    gap       nats a token between the log-probabilities of the engine and of the trainer
    generate/verify/score/train   percent of the time of an iteration; what is missing to 100 is the rest

On a terminal that is too narrow the last ones are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from megarpt.errors import ConfigError
from megarpt.structs import Progress, StepReport
from megarpt.train.metrics import MetricLog
from megarpt.train.perf import PerfMeter
from megarpt.train.progress import ProgressLine, compact

PHASES = ("generate", "verify", "score", "train")
REST = "rest"  # of an iteration: publishing weights, batching, logging

_CLIPPED = ("policy/clipped_low", "policy/clipped_high", "policy/clipped_dual")
_KL = ("policy/kl_ref_nats", "policy/kl_old_k3_nats")


class RlMonitor:
    """Told about each iteration on every rank; what it is given decides which ranks write.

    An iteration is one line of kind `train` in `metrics.jsonl`, at the step of its last update, where that step is due. Times
    are means over the iterations since the line before.
    """

    def __init__(self, log: MetricLog, line: ProgressLine, perf: PerfMeter | None = None) -> None:
        """
        Args:
            log: of the run.
            line: counts optimizer steps.
            perf: times the updates; their rates join the line of metrics.
        """
        self._log, self._line, self._perf = log, line, perf
        self._begin()

    def step(
        self,
        reports: Sequence[StepReport],
        progress: Progress,
        metrics: Mapping[str, float],
        seconds: Mapping[str, float],
        *,
        tokens: int = 0,
    ) -> None:
        """After the updates of an iteration.

        Args:
            reports: of its optimizer steps.
            progress: after them.
            metrics: of its rollouts, over all ranks; see `megarpt.rl.statistics.summary`.
            seconds: what it spent on each of `PHASES`, and on `rest`, which may be left out.
            tokens: that the updates fed through the model, over all ranks.

        Raises:
            ConfigError: `seconds` names a phase that there is none of.
            DataError: the log cannot be written.
        """
        if unknown := sorted(set(seconds) - {*PHASES, REST}):
            raise ConfigError(
                f"rollout monitor: got times of {', '.join(unknown)}, expected those of {', '.join(PHASES)}, {REST}"
            )
        report = combined(reports)
        self._iterations += 1
        self._sampled_tokens += metrics.get("rl/sampled_tokens", 0.0)
        for name, value in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value
        if self._perf is not None:
            self._perf.count_tokens(tokens)
        if self._log.is_due(progress.step) or report.skipped:
            perf = {} if self._perf is None else self._perf.scalars()
            self._log.step(report, progress, {**metrics, **perf, **self._times()})
            self._begin()
        self._line.update(progress.step, fields({**report.metrics, **metrics}, seconds))

    def _begin(self) -> None:
        self._seconds: dict[str, float] = {}
        self._iterations, self._sampled_tokens = 0, 0.0

    def _times(self) -> dict[str, float]:
        tags = {f"time/{name}_s": value / self._iterations for name, value in self._seconds.items()}
        tags["time/iteration_s"] = sum(self._seconds.values()) / self._iterations
        generating = self._seconds.get("generate", 0.0)
        if generating > 0.0:
            tags["perf/sampled_tokens_per_s"] = self._sampled_tokens / generating
        return tags


def combined(reports: Sequence[StepReport]) -> StepReport:
    """The optimizer steps of an iteration as one: means over their trained tokens, the largest gradient norm, the last
    learning rate, and skipped if one of them was.

    Raises:
        ConfigError: there is none.
    """
    if not reports:
        raise ConfigError("rollout monitor: got no report of an optimizer step, expected at least one an iteration")
    if len(reports) == 1:
        return reports[0]
    tags = dict.fromkeys(tag for report in reports for tag in report.metrics)
    return StepReport(
        loss_nats=_mean([(report.loss_nats, report.num_tokens) for report in reports]),
        grad_norm=_largest([report.grad_norm for report in reports]),
        learning_rate=reports[-1].learning_rate,
        num_tokens=sum(report.num_tokens for report in reports),
        skipped=any(report.skipped for report in reports),
        metrics={
            tag: _mean([(report.metrics[tag], report.num_tokens) for report in reports if tag in report.metrics])
            for tag in tags
        },
    )


def fields(metrics: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, str]:
    """What an iteration shows on the progress line, in order."""
    clipped = [metrics[tag] for tag in _CLIPPED if tag in metrics]
    total = sum(seconds.values())
    split = "/".join(f"{100.0 * seconds.get(name, 0.0) / total:.0f}" for name in PHASES) + "%" if total > 0.0 else "-"
    return {
        "reward": _shown(metrics.get("rl/reward_mean"), "{:.3f}".format),
        "format": _shown(metrics.get("rl/format_rate"), _percent),
        "length": _shown(metrics.get("rl/length_mean_tokens"), compact),
        "entropy": _shown(metrics.get("policy/entropy_nats"), "{:.2f}".format),
        "kl": _shown(next((metrics[tag] for tag in _KL if tag in metrics), None), "{:.2g}".format),
        "clip": _shown(sum(clipped) if clipped else None, "{:.1%}".format),
        "dead": _shown(metrics.get("rl/dead_groups"), _percent),
        "cut": _shown(metrics.get("rl/truncated_share"), _percent),
        "gap": _shown(metrics.get("policy/sampler_gap_nats"), "{:.1e}".format),
        "/".join(PHASES): split,
    }


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _percent(share: float) -> str:
    return f"{100.0 * share:.0f}%"


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    total = sum(weight for _, weight in weighted)
    if total == 0:  # no update trained on a token: all count alike
        return sum(value for value, _ in weighted) / len(weighted)
    return sum(value * weight for value, weight in weighted if weight) / total


def _largest(values: Sequence[float]) -> float:
    """`max` that does not lose a NaN."""
    return math.nan if any(map(math.isnan, values)) else max(values)
