"""One progress line, live or in a log."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from megarpt.structs import StepReport
from megarpt.train.progress import ProgressLine, clock_time, compact, step_fields


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="megarpt.train.progress")
    return caplog


def test_a_log_gets_the_first_line_one_every_interval_and_the_last(clock: Clock, log: pytest.LogCaptureFixture) -> None:
    with ProgressLine("train", 1000, interval_s=10.0, clock=clock) as line:
        for done in range(10, 1001, 10):
            clock.now += 1.0
            line.update(done, {"loss": f"{done / 100:.1f}"})
    shown = log.messages
    assert len(shown) == 1 + 9 + 1
    assert shown[0].startswith("train   1%  10 tok/s  0:01:39 left  loss 0.1  10/1k tok")
    assert shown[-1] == "train 100%  10 tok/s  0:00:00 left  loss 10.0  1k/1k tok"


def test_the_last_line_is_not_repeated(clock: Clock, log: pytest.LogCaptureFixture) -> None:
    with ProgressLine("score", 10, clock=clock) as line:
        line.update(10)
    assert len(log.messages) == 1


def test_resumed_work_does_not_count_in_the_rate(clock: Clock) -> None:
    line = ProgressLine("train", 2000, completed=1000, clock=clock)
    assert line.rate == 0.0 and line.seconds_left is None
    clock.now += 10.0
    line.update(1100)
    assert line.rate == pytest.approx(10.0) and line.seconds_left == pytest.approx(90.0)


def test_the_rate_follows_a_change_of_speed(clock: Clock) -> None:
    line = ProgressLine("train", 10**6, clock=clock)
    done = 0
    for step in range(400):
        clock.now += 1.0
        done += 100 if step < 200 else 10
        line.update(done)
    assert line.rate == pytest.approx(10.0, rel=0.05)


def test_a_terminal_gets_a_live_bar_without_a_thread(clock: Clock) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with ProgressLine("train", 100, console=console, clock=clock) as line:
        clock.now += 1.0
        line.update(50, {"loss": "1.25", "kept": "60%"})
        console.print("a log line")
        clock.now += 1.0
        line.update(100)
    shown = out.getvalue()
    assert "loss 1.25  kept 60%" in shown and "100%" in shown and "a log line" in shown


def test_what_a_training_step_shows_fits_into_80_columns(clock: Clock) -> None:
    out = io.StringIO()
    with ProgressLine("train", 3_000_000_000, console=Console(file=out, force_terminal=True, width=80), clock=clock) as line:
        clock.now += 1000.0
        line.update(123_000_000, {"loss": "10.2857", "kept": "60%", "mem": "71.2GB"})
        line.update(123_000_000, {"valid/a_long_name": "3.1234"})
    shown = out.getvalue()
    assert "123k tok/s  6:29:50 left  loss 10.2857  kept 60%  mem 71.2GB" in shown
    assert "train" in shown and "  4%" in shown and "\N{HORIZONTAL ELLIPSIS}" not in shown and "valid" not in shown


def test_drawing_is_limited(clock: Clock) -> None:
    out = io.StringIO()
    line = ProgressLine("train", 10**6, console=Console(file=out, force_terminal=True, width=100), clock=clock)
    line.update(1)
    size = len(out.getvalue())
    for done in range(2, 1000):
        clock.now += 1e-4
        line.update(done)
    assert len(out.getvalue()) == size
    line.close()


def test_other_ranks_show_nothing(clock: Clock, log: pytest.LogCaptureFixture) -> None:
    out = io.StringIO()
    with ProgressLine("train", 10, console=Console(file=out, force_terminal=True), is_writer=False, clock=clock) as line:
        line.update(5)
    assert out.getvalue() == "" and not log.messages


def test_fields_of_a_step() -> None:
    report = StepReport(
        loss_nats=3.21456, grad_norm=1.0, learning_rate=1e-3, num_tokens=6, skipped=False, metrics={"select/kept_fraction": 0.6}
    )
    assert step_fields(report, 1.5e9) == {"loss": "3.2146", "kept": "60%", "mem": "1.5GB"}
    skipped = StepReport(loss_nats=float("nan"), grad_norm=1.0, learning_rate=1e-3, num_tokens=6, skipped=True, metrics={})
    assert step_fields(skipped) == {"loss": "nan (skipped)"}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.7, "1000"),
        (1000, "1k"),
        (12345, "12.3k"),
        (999_600, "1000k"),
        (4.56e6, "4.56M"),
        (7e9, "7G"),
        (15e12, "15T"),
    ],
)
def test_compact(number: float, text: str) -> None:
    assert compact(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (183845, "2d 3h")])
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
