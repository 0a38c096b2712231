"""When things happen in a run; what a step is stands in `step.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megarpt.config.schema import PretrainConfig
from megarpt.data.batches import TokenBatches
from megarpt.errors import NumericsError, StopRequested
from megarpt.train.checkpoint import CheckpointManager, SavedCheckpoint
from megarpt.train.monitor import Monitor
from megarpt.train.reports import EvaluationResult
from megarpt.train.rundir import RunDir
from megarpt.train.sharded import from_rank_0
from megarpt.train.signals import StopSignal
from megarpt.train.state import TrainState
from megarpt.train.step import TrainStep

logger = logging.getLogger(__name__)


class Trainer:
    """Steps, evaluations and checkpoints until the configured number of tokens has been seen."""

    def __init__(
        self,
        cfg: PretrainConfig,
        step: TrainStep,
        batches: TokenBatches,
        state: TrainState,
        *,
        evaluate: Callable[[], Mapping[str, EvaluationResult]],
        save: Callable[[TrainState], None],
        checkpoints: CheckpointManager,
        monitor: Monitor,
        run: RunDir,
        stop: StopSignal,
    ) -> None:
        self.cfg, self.step, self.batches, self.state = cfg, step, batches, state
        self._evaluate, self._save, self.checkpoints = evaluate, save, checkpoints
        self.monitor, self.run, self.stop = monitor, run, stop
        self.step_samples = cfg.batch.global_batch_size
        self.step_tokens = self.step_samples * cfg.data.seq_length
        self.total_steps = total_steps(cfg)
        self.evaluated_at: int | None = None
        self.saved_at: int | None = None

    def fit(self) -> TrainState:
        """Train to the end.

        Raises:
            StopRequested: a signal asked for it; a checkpoint was saved.
            NumericsError: too many steps in a row were not finite; the checkpoints are those from before.
        """
        cfg, start = self.cfg, self.state.progress.step
        self.saved_at = start if start > 0 else None
        # The attempt before may have ended after the checkpoint and before the evaluation of the same step.
        if from_rank_0(self.monitor.log.has_evaluation(start)):
            self.evaluated_at = start
        elif _every(cfg.evaluation.interval_steps, start) if start > 0 else cfg.evaluation.at_start:
            self.evaluate()
        while self.state.progress.step < self.total_steps:
            if self.stop.agreed():
                self.save()
                self.finish_saving()
                raise StopRequested(
                    f"stopped on {self.stop.name} at step {self.state.progress.step}; run the same command again"
                )
            self.train_step()
            self.completed(self.checkpoints.poll())
            step = self.state.progress.step
            if _every(cfg.evaluation.interval_steps, step):
                self.evaluate()
            if _every(cfg.checkpoint.interval_steps, step):
                self.save()
        if self.evaluated_at != self.state.progress.step:
            self.evaluate()
        if self.saved_at != self.state.progress.step:
            self.save()
        self.finish_saving()
        return self.state

    def train_step(self) -> None:
        """One optimizer step and its record."""
        with self.monitor.perf.step():
            with self.monitor.perf.data_wait():
                micro_batches = self.batches.next_step()
            report = self.step(micro_batches, self.state.progress)
        self.state = self.state.after_step(
            report, samples=self.step_samples, tokens_seen=self.step_tokens, data_order=self.batches.data_order
        )
        self.run.record(self.state.progress)
        self.monitor.step(report, self.state, self.step_tokens, self.step.outputs, self.step.first_output)
        if self.state.skipped_in_a_row > self.cfg.train.max_skipped_steps:
            self.finish_saving()
            raise NumericsError(
                f"loss or gradient was not finite in {self.state.skipped_in_a_row} steps in a row (up to step "
                f"{self.state.progress.step}), expected at most train.max_skipped_steps = {self.cfg.train.max_skipped_steps}; "
                f"the batches are in {self.run.dump_dir}, the checkpoints in {self.run.checkpoint_dir} are intact: "
                "lower optimizer.lr or look at the dumped text, then run again"
            )

    def evaluate(self) -> None:
        """Held-out loss of all corpora, on all tokens."""
        with self.monitor.phase("evaluation"):
            results = self._evaluate()
        self.monitor.evaluation(results, self.state.progress)
        self.evaluated_at = self.state.progress.step

    def save(self) -> None:
        """Begin a checkpoint, with its metrics on disk before it; never of parameters that are not finite."""
        if self.state.skipped_in_a_row and not self.step.parameters_are_finite():
            logger.error("parameters are not finite at step %d: no checkpoint is saved", self.state.progress.step)
            return
        self.finish_saving()
        self.monitor.log.flush()
        self.step.gather_parameters()
        self._save(replace(self.state, data=self.batches.state_dict(), selection=self.step.objective.state_dict()))
        self.saved_at = self.state.progress.step
        self.completed(self.checkpoints.poll())

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written."""
        self.completed(self.checkpoints.finish())

    def completed(self, checkpoints: Sequence[SavedCheckpoint]) -> None:
        """Record checkpoints that have become complete."""
        for saved in checkpoints:
            self.run.record(saved.progress, saved.path)
            self.monitor.perf.add("save_stall", saved.stall_s)
            self.monitor.perf.add("save", saved.seconds)
        self.run.record(self.state.progress)


def total_steps(cfg: PretrainConfig) -> int:
    """Optimizer steps that see train.train_tokens tokens, rounded up."""
    return -(-cfg.train.train_tokens // (cfg.batch.global_batch_size * cfg.data.seq_length))


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
