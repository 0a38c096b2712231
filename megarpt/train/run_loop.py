"""When things happen in a run, whatever it trains on: steps, evaluations, checkpoints, and the end."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megarpt.config.schema import CheckpointConfig, EvaluationConfig, RLEvaluationConfig
from megarpt.errors import NumericsError, StopRequested
from megarpt.train.checkpoint import CheckpointManager, SavedCheckpoint
from megarpt.train.metrics import MetricLog
from megarpt.train.perf import PerfMeter
from megarpt.train.rundir import RunDir
from megarpt.train.sharded import from_rank_0
from megarpt.train.signals import StopSignal
from megarpt.train.state import TrainState
from megarpt.train.step import TrainStep
from megarpt.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every run has around its steps."""

    save: Callable[[TrainState], None]
    checkpoints: CheckpointManager
    log: MetricLog
    perf: PerfMeter
    run: RunDir
    stop: StopSignal
    watchdog: Watchdog


class RunLoop(ABC):
    """Steps, evaluations and checkpoints until the configured number of steps is done."""

    def __init__(
        self,
        step: TrainStep,
        state: TrainState,
        around: Surroundings,
        *,
        total_steps: int,
        max_skipped_steps: int,
        evaluation: EvaluationConfig | RLEvaluationConfig,
        checkpoint: CheckpointConfig,
    ) -> None:
        self.step, self.state, self.total_steps, self.max_skipped_steps = step, state, total_steps, max_skipped_steps
        self.evaluation, self.checkpoint = evaluation, checkpoint
        self._save, self.checkpoints = around.save, around.checkpoints
        self.log, self.perf, self.run, self.stop = around.log, around.perf, around.run, around.stop
        self.watchdog = around.watchdog
        self.evaluated_at: int | None = None
        self.saved_at: int | None = None

    def fit(self) -> TrainState:
        """Train to the end.

        Raises:
            StopRequested: a signal asked for it; a checkpoint was saved.
            NumericsError: training is unstable; the checkpoints are from before.
        """
        try:
            self._fit()
        except StopRequested:
            self.save()
            self.finish_saving()
            raise
        return self.state

    def _fit(self) -> None:
        evaluation, start = self.evaluation, self.state.progress.step
        self.saved_at = start if start > 0 else None
        # The attempt before may have ended after the checkpoint and before the evaluation of the same step.
        if from_rank_0(self.log.has_evaluation(start)):
            self.evaluated_at = start
        elif _every(evaluation.interval_steps, start) if start > 0 else evaluation.at_start:
            self.evaluate()
        while self.state.progress.step < self.total_steps:
            self.stop.check(f"at step {self.state.progress.step}")
            if not self.train_step():
                continue
            self.completed(self.checkpoints.poll())
            step = self.state.progress.step
            if _every(evaluation.interval_steps, step):
                self.evaluate()
            if _every(self.checkpoint.interval_steps, step):
                self.save()
        if self.evaluated_at != self.state.progress.step:
            self.evaluate()
        if self.saved_at != self.state.progress.step:
            self.save()
        self.finish_saving()

    @abstractmethod
    def train_step(self) -> bool:
        """One step and its record; False when the run went back and is to go on from there."""

    @abstractmethod
    def evaluate(self) -> None:
        """Measure on what is held out, record it, and set `evaluated_at`."""

    @abstractmethod
    def state_to_save(self) -> TrainState:
        """The state with the positions of everything that has one."""

    def give_up_on_skipped_steps(self) -> None:
        """End the run when too many steps in a row changed nothing.

        Raises:
            NumericsError: they did.
        """
        if self.state.skipped_in_a_row <= self.max_skipped_steps:
            return
        self.finish_saving()
        raise NumericsError(
            f"{self.state.skipped_in_a_row} steps in a row (up to step {self.state.progress.step}) were skipped, because "
            f"loss or gradient was not finite or a spike, expected at most train.max_skipped_steps = {self.max_skipped_steps}; "
            f"the batches are in {self.run.dump_dir}, the checkpoints in {self.run.checkpoint_dir} are intact: lower "
            "optimizer.lr or look at the dumped text, then run again"
        )

    def save(self) -> None:
        """Begin a checkpoint, with its metrics on disk before it; never of parameters that are not finite."""
        if self.state.skipped_in_a_row and not self.step.parameters_are_finite():
            logger.error("parameters are not finite at step %d: no checkpoint is saved", self.state.progress.step)
            return
        self.finish_saving()
        self.watchdog.beat(f"save after step {self.state.progress.step}")
        self.log.flush()
        self.step.gather_parameters()
        self._save(self.state_to_save())
        self.saved_at = self.state.progress.step
        self.completed(self.checkpoints.poll())

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written."""
        self.completed(self.checkpoints.finish())

    def completed(self, checkpoints: Sequence[SavedCheckpoint]) -> None:
        """Record checkpoints that have become complete."""
        for saved in checkpoints:
            self.run.record(saved.progress, saved.path)
            self.perf.add("save_stall", saved.stall_s)
            self.perf.add("save", saved.seconds)
        self.run.record(self.state.progress)


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
