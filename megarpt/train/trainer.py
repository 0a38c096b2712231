"""When things happen in a run; what a step is stands in `step.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megarpt.config.schema import LanguageModelConfig
from megarpt.data.batches import TokenBatches
from megarpt.errors import NumericsError, StopRequested
from megarpt.train.checkpoint import CheckpointManager, SavedCheckpoint
from megarpt.train.monitor import Monitor
from megarpt.train.reports import EvaluationResult
from megarpt.train.rundir import RunDir
from megarpt.train.sharded import from_rank_0
from megarpt.train.signals import StopSignal
from megarpt.train.spikes import SpikeGuard, Verdict
from megarpt.train.state import TrainState
from megarpt.train.step import TrainStep
from megarpt.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Trainer:
    """Steps, evaluations and checkpoints until the configured number of tokens has been seen."""

    def __init__(
        self,
        cfg: LanguageModelConfig,
        step: TrainStep,
        batches: TokenBatches,
        state: TrainState,
        *,
        evaluate: Callable[..., Mapping[str, EvaluationResult]],
        save: Callable[[TrainState], None],
        restore: Callable[[], TrainState | None],
        checkpoints: CheckpointManager,
        monitor: Monitor,
        run: RunDir,
        stop: StopSignal,
        watchdog: Watchdog,
        spikes: SpikeGuard | None = None,
    ) -> None:
        self.cfg, self.step, self.batches, self.state = cfg, step, batches, state
        self._evaluate, self._save, self._restore, self.checkpoints = evaluate, save, restore, checkpoints
        self.monitor, self.run, self.stop, self.watchdog, self.spikes = monitor, run, stop, watchdog, spikes
        self.step_samples = cfg.batch.global_batch_size
        self.step_tokens = self.step_samples * cfg.data.seq_length
        self.total_steps = total_steps(cfg)
        self.evaluated_at: int | None = None
        self.saved_at: int | None = None

    def fit(self) -> TrainState:
        """Train to the end.

        Raises:
            StopRequested: a signal asked for it; a checkpoint was saved.
            NumericsError: too many steps in a row were skipped, or too many rollbacks made; the checkpoints are from before.
        """
        try:
            self._fit()
        except StopRequested:
            self.save()
            self.finish_saving()
            raise
        return self.state

    def _fit(self) -> None:
        cfg, start = self.cfg, self.state.progress.step
        self.saved_at = start if start > 0 else None
        # The attempt before may have ended after the checkpoint and before the evaluation of the same step.
        if from_rank_0(self.monitor.log.has_evaluation(start)):
            self.evaluated_at = start
        elif _every(cfg.evaluation.interval_steps, start) if start > 0 else cfg.evaluation.at_start:
            self.evaluate()
        while self.state.progress.step < self.total_steps:
            self.stop.check(f"at step {self.state.progress.step}")
            if not self.train_step():
                self.roll_back()
                continue
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

    def train_step(self) -> bool:
        """One optimizer step and its record; False when the run has to be rolled back."""
        self.watchdog.beat(f"step {self.state.progress.step + 1}")
        with self.monitor.perf.step():
            with self.monitor.perf.data_wait():
                micro_batches = self.batches.next_step()
            report = self.step(micro_batches, self.state.progress)
        verdict = self.spikes.take_verdict() if self.spikes is not None else Verdict()
        self.state = self.state.after_step(
            report,
            samples=self.step_samples,
            tokens_seen=self.step_tokens,
            data_order=self.batches.data_order,
            is_spike=verdict.is_spike,
        )
        if self.spikes is not None:
            totals = {"optim/spikes_total": self.state.spikes_total, "optim/rollbacks_total": len(self.state.left_out)}
            report = replace(report, metrics={**report.metrics, **verdict.scores, **totals})
        self.run.record(self.state.progress, counts=self.state.counts())
        self.monitor.step(report, self.state, self.step_tokens, self.step.outputs, self.step.first_output)
        if self.state.skipped_in_a_row > self.cfg.train.max_skipped_steps:
            self.finish_saving()
            raise NumericsError(
                f"{self.state.skipped_in_a_row} steps in a row (up to step {self.state.progress.step}) were skipped, because "
                "loss or gradient was not finite or a spike, expected at most train.max_skipped_steps = "
                f"{self.cfg.train.max_skipped_steps}; the batches are in {self.run.dump_dir}, the checkpoints in "
                f"{self.run.checkpoint_dir} are intact: lower optimizer.lr or look at the dumped text, then run again"
            )
        return not (verdict.is_held and self.cfg.stability.on_spike == "rollback" and bool(self.saved_at))

    def roll_back(self) -> None:
        """Go on from the newest checkpoint, behind the samples that were read since: the spike is not met again.

        Raises:
            NumericsError: there were too many rollbacks.
        """
        self.watchdog.beat("rolling back")
        self.finish_saving()
        spiked, end = self.state, self.batches.consumed_samples
        if len(spiked.left_out) >= self.cfg.stability.max_rollbacks:
            raise NumericsError(
                f"step {spiked.progress.step} is a spike after {len(spiked.left_out)} rollbacks, expected at most "
                f"stability.max_rollbacks = {self.cfg.stability.max_rollbacks}; the batches are in {self.run.dump_dir}, the "
                f"checkpoints in {self.run.checkpoint_dir} are intact: lower optimizer.lr or look at the dumped text"
            )
        saved = self._restore()
        assert saved is not None, "a checkpoint of this run cannot be gone"
        first = self.batches.consumed_samples
        self.batches.move_to(end)
        self.state = spiked.rolled_back_to(saved, first=first, end=end)
        self.saved_at, self.evaluated_at = self.state.progress.step, None
        self.monitor.log.rewind(self.state.progress)
        self.run.record(self.state.progress, counts=self.state.counts())
        logger.info(
            "rolled back from step %d to %d; samples %d to %d are left out (rollback %d of at most %d)",
            spiked.progress.step,
            self.state.progress.step,
            first,
            end - 1,
            len(self.state.left_out),
            self.cfg.stability.max_rollbacks,
        )

    def evaluate(self) -> None:
        """Held-out loss of all corpora, on all tokens. A signal stops it between two batches, and it is made anew later."""
        step = self.state.progress.step

        def on_batch() -> None:
            self.watchdog.beat(f"evaluation after step {step}")
            self.stop.check(f"in the evaluation after step {step}")

        with self.monitor.phase("evaluation"):
            results = self._evaluate(on_batch=on_batch, step=step)
        self.monitor.evaluation(results, self.state.progress)
        self.evaluated_at = step

    def save(self) -> None:
        """Begin a checkpoint, with its metrics on disk before it; never of parameters that are not finite."""
        if self.state.skipped_in_a_row and not self.step.parameters_are_finite():
            logger.error("parameters are not finite at step %d: no checkpoint is saved", self.state.progress.step)
            return
        self.finish_saving()
        self.watchdog.beat(f"save after step {self.state.progress.step}")
        self.monitor.log.flush()
        self.step.gather_parameters()
        self._save(
            replace(
                self.state,
                data=self.batches.state_dict(),
                selection=self.step.selection_state(),
                spikes=self.spikes.state_dict() if self.spikes is not None else {},
            )
        )
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


def total_steps(cfg: LanguageModelConfig) -> int:
    """Optimizer steps that see train.train_tokens tokens, rounded up."""
    return -(-cfg.train.train_tokens // (cfg.batch.global_batch_size * cfg.data.seq_length))


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
