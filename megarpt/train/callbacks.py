"""The eight moments of a run that something may be attached to.

Events are few and typed. They are called on every rank, in the order of the callbacks; a callback that writes decides by
itself on which rank. An exception in a callback stops the run: what must not do so handles its own errors.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from megarpt.structs import Progress, StepReport
from megarpt.train.reports import EvaluationResult


class Callback:
    """Base of all callbacks: does nothing at any moment."""

    def on_fit_start(self, progress: Progress) -> None:
        """Before the first step of this attempt; `progress` is where it resumes."""

    def on_step_start(self, progress: Progress) -> None:
        """Before a step; `progress.step` steps are done."""

    def on_step_end(self, report: StepReport, progress: Progress) -> None:
        """After a step, skipped or not; `progress` counts it."""

    def on_skipped_step(self, report: StepReport, progress: Progress) -> None:
        """After `on_step_end` of a step that was not finite."""

    def on_evaluation(self, results: Mapping[str, EvaluationResult], progress: Progress) -> None:
        """After all held-out corpora were evaluated."""

    def on_save(self, checkpoint: Path, progress: Progress) -> None:
        """After a checkpoint is complete."""

    def on_fit_end(self, progress: Progress) -> None:
        """After the last step, when the run reached its end or was told to stop."""

    def on_error(self, error: BaseException, progress: Progress) -> None:
        """When an exception leaves the loop; it goes on after all callbacks were told."""


class CallbackList(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)

    def on_fit_start(self, progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_fit_start(progress)

    def on_step_start(self, progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_step_start(progress)

    def on_step_end(self, report: StepReport, progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_step_end(report, progress)

    def on_skipped_step(self, report: StepReport, progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_skipped_step(report, progress)

    def on_evaluation(self, results: Mapping[str, EvaluationResult], progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_evaluation(results, progress)

    def on_save(self, checkpoint: Path, progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_save(checkpoint, progress)

    def on_fit_end(self, progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_fit_end(progress)

    def on_error(self, error: BaseException, progress: Progress) -> None:
        for callback in self._callbacks:
            callback.on_error(error, progress)


class HangWatch(Callback):
    """Writes the stacks of all threads when a step does not end in time; a hang in a collective shows where each rank waits."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        """`path` is the file of this rank; the clock starts anew with every event, so `timeout_s` bounds a step or a save."""
        self._path, self._timeout_s = path, timeout_s
        self._file: TextIO | None = None

    def on_fit_start(self, progress: Progress) -> None:
        self._file = self._path.open("a", encoding="utf-8")
        self._restart()

    def on_step_end(self, report: StepReport, progress: Progress) -> None:
        self._restart()

    def on_evaluation(self, results: Mapping[str, EvaluationResult], progress: Progress) -> None:
        self._restart()

    def on_save(self, checkpoint: Path, progress: Progress) -> None:
        self._restart()

    def on_fit_end(self, progress: Progress) -> None:
        self._stop()

    def on_error(self, error: BaseException, progress: Progress) -> None:
        self._stop()

    def _restart(self) -> None:
        if self._file is not None:
            faulthandler.dump_traceback_later(self._timeout_s, repeat=True, file=self._file)

    def _stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None
