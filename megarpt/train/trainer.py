"""Training on given text: what a step reads and records, rollbacks, held-out loss. `run_loop.py` says when things happen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from megarpt.config.schema import LanguageModelConfig
from megarpt.data.batches import TokenBatches
from megarpt.errors import NumericsError
from megarpt.train.checkpoint import CheckpointManager
from megarpt.train.monitor import Monitor
from megarpt.train.reports import EvaluationResult
from megarpt.train.run_loop import RunLoop, Surroundings
from megarpt.train.rundir import RunDir
from megarpt.train.signals import StopSignal
from megarpt.train.spikes import SpikeGuard, Verdict
from megarpt.train.state import TrainState
from megarpt.train.step import TrainStep
from megarpt.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Trainer(RunLoop):
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
        super().__init__(
            step,
            state,
            Surroundings(
                save=save,
                checkpoints=checkpoints,
                log=monitor.log,
                perf=monitor.perf,
                run=run,
                stop=stop,
                watchdog=watchdog,
            ),
            total_steps=total_steps(cfg),
            max_skipped_steps=cfg.train.max_skipped_steps,
            evaluation=cfg.evaluation,
            checkpoint=cfg.checkpoint,
        )
        self.cfg, self.batches, self.monitor, self.spikes = cfg, batches, monitor, spikes
        self._evaluate, self._restore = evaluate, restore
        self.step_samples = cfg.batch.global_batch_size
        self.step_tokens = self.step_samples * cfg.data.seq_length

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
        self.give_up_on_skipped_steps()
        if verdict.is_held and self.cfg.stability.on_spike == "rollback" and self.saved_at:
            self.roll_back()
            return False
        return True

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

    def state_to_save(self) -> TrainState:
        """The state with the positions of the data, the selection rule and the spike guard."""
        return replace(
            self.state,
            data=self.batches.state_dict(),
            selection=self.step.selection_state(),
            spikes=self.spikes.state_dict() if self.spikes is not None else {},
        )


def total_steps(cfg: LanguageModelConfig) -> int:
    """Optimizer steps that see train.train_tokens tokens, rounded up."""
    return -(-cfg.train.train_tokens // (cfg.batch.global_batch_size * cfg.data.seq_length))
