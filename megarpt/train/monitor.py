"""What a run shows and records while it goes: metrics, progress line, speed, stragglers, traces, dumps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megarpt.objectives.base import ObjectiveOutput
from megarpt.structs import Progress, StepReport, TokenBatch
from megarpt.train.dump import BatchDumper
from megarpt.train.metrics import MetricLog
from megarpt.train.perf import Interlude, PerfMeter
from megarpt.train.profiler import StepProfiler
from megarpt.train.progress import ProgressLine, step_fields
from megarpt.train.reports import EvaluationResult
from megarpt.train.state import TrainState
from megarpt.train.stragglers import StragglerWatch

Output = tuple[TokenBatch, ObjectiveOutput]


@dataclass(frozen=True, slots=True)
class Monitor:
    """The observers of a run, told about each step, evaluation and save on every rank; each decides what it writes."""

    log: MetricLog
    line: ProgressLine
    perf: PerfMeter
    stragglers: StragglerWatch
    profiler: StepProfiler
    dumper: BatchDumper
    decode: Callable[[Sequence[int]], str]

    def phase(self, name: Interlude) -> AbstractContextManager[None]:
        """Around an evaluation, so that it does not count as training time."""
        return self.perf.phase(name)

    def step(
        self,
        report: StepReport,
        state: TrainState,
        tokens: int,
        work: Sequence[Output],
        first: Callable[[], Output | None],
    ) -> None:
        """After a step that fed `tokens` tokens.

        Args:
            report: of the step.
            state: after it.
            tokens: over all ranks.
            work: this rank's micro-batches and what the objective said of them; empty before the last pipeline stage.
            first: gives the first of them to all stages; asked on every rank, when a sample is due.
        """
        progress = state.progress
        self.perf.count_tokens(tokens)
        self.stragglers.after_step(progress.step)
        extra: dict[str, float] = {}
        if self.log.is_due(progress.step) or report.skipped:
            extra = {**self.perf.scalars(), **self.stragglers.scalars(), "optim/skipped_total": float(state.skipped_total)}
        self.log.step(report, progress, extra)
        self.line.update(progress.tokens_seen, step_fields(report, extra.get("mem/peak_bytes")))
        if report.skipped:
            self.dumper.dump(progress.step, work, report)
        elif self.log.wants_tokens(progress.step):
            sample = first()
            if sample is not None:
                self.log.tokens(*sample, self.decode, progress)
        self.profiler.after_step(progress.step)

    def evaluation(self, results: Mapping[str, EvaluationResult], progress: Progress) -> None:
        """After all held-out corpora were evaluated."""
        self.log.evaluation(results, progress)
        fields = {f"valid/{name}": f"{result.loss_nats:.4f}" for name, result in results.items()}
        self.line.update(progress.tokens_seen, fields)
