"""What the command-line tools share: the wrapper of `main`, signals, and progress."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from megarpt.errors import EXIT_CONFIG, EXIT_OK, EXIT_RESUMABLE, MegarptError
from megarpt.log import setup_logging, terminal

logger = logging.getLogger(__name__)

_PLAIN_INTERVAL_S = 5.0


class Stopped(MegarptError):
    """The job was asked to stop and can go on later."""

    exit_code = EXIT_RESUMABLE


class ToolParser(argparse.ArgumentParser):
    """argparse whose mistakes leave with the exit code of a configuration error."""

    def __init__(self, description: str | None, **kwargs: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and how the command is used."""
        self.print_usage(sys.stderr)
        self.exit(EXIT_CONFIG, f"{self.prog}: error: {message}; `{self.prog} --help` explains the options\n")


def run_tool(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a tool: log lines and errors go to standard error, expected errors come without a traceback."""
    setup_logging()
    try:
        return main(argv) or EXIT_OK
    except MegarptError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; run the same command again\n")
        return EXIT_RESUMABLE
    except BrokenPipeError:  # the reader of standard output, such as `head`, has seen enough
        sys.stderr.close()
        return EXIT_OK


def positive(text: str) -> int:
    """An argparse type: an integer above 0."""
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer above 0")
    return number


def non_negative(text: str) -> int:
    """An argparse type: an integer, 0 or above."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer, 0 or above")
    return int(text)


def part(text: str) -> tuple[int, int]:
    """An argparse type: I/N, the number of a share from 0 and the count of shares."""
    number, _, count = text.partition("/")
    if not number.isdigit() or not count.isdigit() or int(number) >= int(count):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected I/N with I from 0 to N-1, for example 0/16")
    return int(number), int(count)


class StopSignal:
    """Whether SIGINT or SIGTERM came; jobs look at it where stopping loses nothing."""

    def __init__(self) -> None:
        self.name = ""

    def check(self, again: str = "run the same command again to go on from there") -> None:
        """Raises: Stopped: a signal came."""
        if self.name:
            raise Stopped(f"stopped by {self.name}; what was finished is kept: {again}")


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Catch SIGINT and SIGTERM for the time of a job; outside the main thread signals are left alone."""
    stop = StopSignal()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.name = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class ProgressLine:
    """A bar on a terminal, a line every few seconds in a log."""

    def __init__(self, label: str, total: int, *, unit: str = "B") -> None:
        """`unit` "B" shows sizes in MB, anything else is a plain count."""
        self._label, self._total, self._unit = label, max(total, 1), unit
        self._began = self._last = time.monotonic()
        self._bar: Any = None
        self._start = 0
        console = terminal()
        if console is not None:
            from rich import progress  # only on a terminal: a batch job does not pay for it

            amount = progress.DownloadColumn() if unit == "B" else progress.MofNCompleteColumn()
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                amount,
                progress.TextColumn("{task.fields[note]}"),
                progress.TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(label, total=self._total, note="")
            self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start_at(self, done: int) -> None:
        """What an earlier run had already done counts for the share, not for the speed."""
        self._start = done

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of the total is done."""
        done = min(done, self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._last < _PLAIN_INTERVAL_S:
            return
        self._last = now
        rate = (done - self._start) / (now - self._began)
        left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else "time left unknown"
        scale, unit = (1e6, "MB") if self._unit == "B" else (1, self._unit)
        logger.info(
            "%s: %3.0f%%, %.0f of %.0f %s, %.1f %s/s, %s%s",
            self._label,
            100 * done / self._total,
            done / scale,
            self._total / scale,
            unit,
            rate / scale,
            unit,
            f"{note}, " if note else "",
            left,
        )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
