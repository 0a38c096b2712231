"""A trace of a few steps by torch's profiler, for Perfetto or TensorBoard."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.profiler import ProfilerActivity, profile, schedule

from megarpt.config.schema import ProfileConfig
from megarpt.corpus.atomic import write_errors
from megarpt.device.runtime import Runtime
from megarpt.train.timers import StepTimers

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records the steps that `profile.steps` names on the ranks that `profile.ranks` names; a context around the run.

    The step before the first one warms the profiler up, and its events are thrown away; so the first step of an attempt is
    never recorded. Until then, and on other ranks, nothing runs.
    """

    def __init__(self, cfg: ProfileConfig, folder: Path, runtime: Runtime, timers: StepTimers, *, done: int) -> None:
        """`folder` takes the traces; `done` steps are behind this run when it starts."""
        self._cfg, self._folder, self._runtime, self._timers = cfg, folder, runtime, timers
        self._profile: profile | None = None
        self._first, self._last = 0, 0
        if cfg.steps is not None:
            logger.info("steps %d to %d of ranks %s are to be traced to %s", *cfg.steps, cfg.ranks, folder)
        if cfg.steps is not None and runtime.rank in cfg.ranks:
            self._first, self._last = max(cfg.steps[0], done + 2), cfg.steps[1]
            if self._first > self._last:
                logger.warning(
                    "profile.steps %s are behind: the run goes on from step %d, no trace is written", cfg.steps, done
                )
        self._prepare(done)

    def after_step(self, step: int) -> None:
        """`step` steps are done: begin, go on or write."""
        if self._profile is not None:
            self._profile.step()
            if step >= self._last:
                self._write()
        self._prepare(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._profile is not None:
            self._stop()
            logger.warning("the run ended before step %d: no trace of profile.steps is written", self._last)

    def _prepare(self, done: int) -> None:
        """Start when the next step is the one before the first."""
        if done + 2 != self._first or self._first > self._last:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._runtime.is_cuda else [])]
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=self._last - self._first + 1, repeat=1),
            record_shapes="shapes" in self._cfg.record,
            profile_memory="memory" in self._cfg.record,
            with_stack="stacks" in self._cfg.record,
        )
        self._profile.start()
        self._timers.is_profiled = True

    def _stop(self) -> profile:
        assert self._profile is not None
        ended, self._profile = self._profile, None
        self._timers.is_profiled = False
        ended.stop()
        return ended

    def _write(self) -> None:
        ended = self._stop()
        path = self._folder / f"steps_{self._first:08d}-{self._last:08d}_rank{self._runtime.rank}.pt.trace.json.gz"
        temporary = path.with_name(f".{path.name}")  # the suffix has torch compress it
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                ended.export_chrome_trace(str(temporary))
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        logger.info(
            "trace of steps %d to %d: %s; open it in https://ui.perfetto.dev, or `tensorboard --logdir %s` with "
            "torch-tb-profiler installed",
            self._first,
            self._last,
            path,
            self._folder,
        )
