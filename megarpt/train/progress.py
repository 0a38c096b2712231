"""One progress line: a live bar on a terminal, a plain log line now and then otherwise.

The bar shares the console of the log (`megarpt.log.terminal()`), so log lines appear above it. It has no thread: it is drawn
when the loop reports, at most five times a second, which keeps it safe in processes that fork.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

if TYPE_CHECKING:  # torch is not loaded to format a number
    from megarpt.structs import StepReport

logger = logging.getLogger(__name__)

_BAR_WIDTH = 8  # with it, everything a training step shows fits into 80 columns
_DRAW_INTERVAL_S = 0.2
_RATE_SPACING_S = 0.5  # one point of the rate's window
_RATE_POINTS = 60


class ProgressLine:
    """How far a loop is; a context manager. Used for training, evaluation and scoring.

    `with ProgressLine("train", total, unit="tok", console=terminal()) as line: ... line.update(done, loss="3.21")`
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        unit: str = "tok",
        completed: int = 0,
        console: Console | None = None,
        is_writer: bool = True,
        interval_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the line.

        Args:
            description: the first word of the line.
            total: where the loop ends, in `unit`.
            unit: what is counted, as it appears behind "/s".
            completed: where the loop starts; not counted in the rate.
            console: the terminal's console; None logs plain lines.
            is_writer: False shows nothing.
            interval_s: seconds between plain lines.
            clock: seconds, monotonic.
        """
        self._description, self._total, self._unit = description, total, unit
        self._interval_s, self._clock, self._is_writer = interval_s, clock, is_writer
        self._fields: dict[str, str] = {}
        self._completed = completed
        self._points: deque[tuple[float, int]] = deque([(clock(), completed)], maxlen=_RATE_POINTS)
        self._shown_at, self._shown_completed = clock(), -1
        self._is_closed = False
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if is_writer and console is not None:
            self._bar = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ignore")),
                BarColumn(bar_width=_BAR_WIDTH),
                TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True, overflow="ignore")),
                TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True, overflow="crop")),
                console=console,
                auto_refresh=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(description, total=total, completed=completed, status="")

    @property
    def rate(self) -> float:
        """Units per second over the last half minute or so; 0 until anything is known."""
        (start, first), now = self._points[0], self._clock()
        return (self._completed - first) / (now - start) if now > start else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None while it is unknown."""
        return (self._total - self._completed) / self.rate if self.rate > 0 else None

    def update(self, completed: int, fields: Mapping[str, str] | None = None) -> None:
        """Report where the loop is; `fields` are shown behind rate and time left, and stay until they are replaced."""
        if not self._is_writer:
            return
        self._completed = completed
        self._fields.update(fields or {})
        now = self._clock()
        if now - self._points[-1][0] >= _RATE_SPACING_S:
            self._points.append((now, completed))
        is_first = self._shown_completed < 0
        if is_first or now - self._shown_at >= (_DRAW_INTERVAL_S if self._bar is not None else self._interval_s):
            self._show(now)

    def close(self) -> None:
        """Show where the loop ended."""
        if self._is_closed:
            return
        self._is_closed = True
        now = self._clock()
        if self._is_writer and self._shown_completed != self._completed:
            self._show(now)
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def status(self, width: int | None = None) -> str:
        """Rate, time left, fields and the count, as many of them as fit into `width` characters."""
        parts = [f"{compact(self.rate)} {self._unit}/s"]
        if self.seconds_left is not None:
            parts.append(f"{clock_time(self.seconds_left)} left")
        parts += [f"{name} {value}" for name, value in self._fields.items()]
        parts.append(f"{compact(self._completed)}/{compact(self._total)} {self._unit}")
        text = ""
        for part in parts:
            longer = f"{text}  {part}" if text else part
            if width is None or len(longer) <= width:
                text = longer
        return text

    def _show(self, now: float) -> None:
        self._shown_at, self._shown_completed = now, self._completed
        if self._bar is not None:
            taken = len(self._description) + _BAR_WIDTH + len(" 100%") + 2
            status = self.status(self._bar.console.width - taken)
            self._bar.update(self._task, completed=self._completed, status=status)
            self._bar.refresh()
        else:
            share = self._completed / self._total if self._total else 1.0
            logger.info("%s %3.0f%%  %s", self._description, 100.0 * share, self.status())


def step_fields(report: StepReport, memory_bytes: float | None = None) -> dict[str, str]:
    """What a training step shows on its line."""
    fields = {"loss": f"{report.loss_nats:.4f}" + (" (skipped)" if report.skipped else "")}
    kept = report.metrics.get("select/kept_fraction")
    if kept is not None:
        fields["kept"] = f"{100.0 * kept:.0f}%"
    if memory_bytes is not None:
        fields["mem"] = f"{compact(memory_bytes)}B"
    return fields


def compact(number: float) -> str:
    """A number in at most five characters or so: 950, 12.3k, 4.56M."""
    for limit, divisor, suffix in ((1e3, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "G")):
        if abs(number) < limit:
            return f"{number / divisor:.3g}{suffix}" if abs(number / divisor) < 999.5 else f"{number / divisor:.0f}{suffix}"
    return f"{number / 1e12:.3g}T"


def clock_time(seconds: float) -> str:
    """1:02:03, or 2d 3h when it takes days."""
    days, rest = divmod(round(seconds), 86400)
    return f"{days}d {rest // 3600}h" if days else f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
