"""`megarpt inspect-run`: a report of a run folder, whatever state the run is in."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megarpt.corpus.atomic import write_errors
from megarpt.errors import EXIT_OK, ExtensionError
from megarpt.train.progress import clock_time, compact
from megarpt.train.run_report import RunReport, read_run

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 60
_ATTEMPTS_SHOWN = 8
_STATUS_STYLE = {"finished": "green", "running": "cyan", "resumable": "yellow"}


def run(folder: str, *, as_json: bool = False, plot: str | None = None) -> int:
    """Print the report of a run folder (or one JSON object) on standard output.

    Raises:
        ConfigError: the folder holds no run.
        ExtensionError: a plot was asked for and matplotlib is not installed.
        DataError: the plot cannot be written.
    """
    report = read_run(Path(folder))
    if plot is not None:
        draw(report, Path(plot))
    if as_json:
        content = asdict(report) | {"status": report.status}
        if report.goodput is not None:
            content["goodput"]["share"] = report.goodput.share
        sys.stdout.write(json.dumps(_strict(content), indent=2, allow_nan=False) + "\n")
    else:
        show(report)
    return EXIT_OK


def show(report: RunReport) -> None:
    """The report for people."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(Text(f"{report.folder}: {report.status}", style=f"bold {_STATUS_STYLE.get(report.status, 'red')}"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, lines in (
        ("progress", _progress(report)),
        ("training loss", _loss(report)),
        ("held-out loss", _valid(report)),
        ("speed", _speed(report)),
        ("a step", _step(report)),
        ("time", _time(report)),
        ("attempts", _attempts(report)),
        ("stragglers", _stragglers(report)),
        ("selection", _selection(report)),
        ("stability", _stability(report)),
        ("checkpoints", _checkpoints(report)),
        ("traces", iter(report.traces)),
        ("problems", iter(report.problems)),
    ):
        for i, line in enumerate(lines):
            table.add_row("" if i else name, Text(line, style="red" if name == "problems" else ""))
    console.print(table)


def sparkline(values: Sequence[float], width: int = _CURVE_WIDTH) -> str:
    """A curve of `width` characters at most, each the mean of its share of the values; what is not finite is a cross."""
    shares = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [statistics.fmean(share) for share in shares if share]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] if math.isfinite(mean) else "×" for mean in means)


def draw(report: RunReport, path: Path) -> None:
    """Loss over tokens and speed over steps, as a picture in the format of the file's suffix.

    Raises:
        ExtensionError: matplotlib is not installed.
        DataError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExtensionError(f"--plot needs matplotlib ({error}); pip install -e .[demo], or leave --plot out") from error
    figure = Figure(figsize=(8, 7), layout="constrained")
    loss, speed = figure.subplots(2, 1)
    if report.curve:
        loss.plot([t for _, t, _ in report.curve], [x for _, _, x in report.curve], linewidth=0.8, label="training")
    for name, points in report.valid.items():
        loss.plot([t for _, t, _ in points], [x for _, _, x in points], marker="o", markersize=3, label=f"held-out {name}")
    loss.set(xlabel="tokens seen", ylabel="nats/token", title=report.folder)
    if report.curve or report.valid:
        loss.legend()
    speed.plot([step for step, _ in report.speed_curve], [rate for _, rate in report.speed_curve], linewidth=0.8)
    speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
    with write_errors(path):
        figure.savefig(path)


def _progress(report: RunReport) -> Iterator[str]:
    if not report.progress:
        yield "no metrics line yet"
        return
    step, total = report.progress["step"], report.total_steps
    share = f" of {total} ({100 * step / total:.0f}%)" if total else ""
    seen, trained = (compact(report.progress.get(name, 0)) for name in ("tokens_seen", "tokens_trained"))
    line = f"step {step}{share}, {seen} tokens seen, {trained} trained on"
    if report.is_alive and report.last_line_unix_s is not None:
        line += f", last line {clock_time(max(0.0, time.time() - report.last_line_unix_s))} ago"
        if total and "time/step_s" in report.speed:
            line += f", about {clock_time((total - step) * report.speed['time/step_s'])} of stepping left"
    yield line


def _loss(report: RunReport) -> Iterator[str]:
    losses = [loss for _, _, loss in report.curve]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        yield sparkline(losses)
        recent = finite[-20:]
        mean = f"mean of the last {len(recent)} {statistics.fmean(recent):.4f}"
        yield f"first {finite[0]:.4f}, last {finite[-1]:.4f}, {mean} nats/token"


def _valid(report: RunReport) -> Iterator[str]:
    for name, points in report.valid.items():
        (_, _, first), (at, _, last), (step, _, best) = points[0], points[-1], min(points, key=lambda point: point[2])
        yield f"{name}: first {first:.4f}, last {last:.4f} at step {at}, best {best:.4f} at step {step}"


def _speed(report: RunReport) -> Iterator[str]:
    speed = report.speed
    if "perf/tokens_per_s" not in speed:
        return
    parts = [f"{compact(speed['perf/tokens_per_s'])} tokens/s"]
    if "perf/tokens_per_s_per_device" in speed:
        parts.append(f"{compact(speed['perf/tokens_per_s_per_device'])} for each device")
    if "perf/tflops_per_device" in speed:
        parts.append(f"{speed['perf/tflops_per_device']:.3g} TFLOP/s for each device")
    if "perf/mfu" in speed:
        parts.append(f"MFU {100 * speed['perf/mfu']:.1f}%")
    if "mem/peak_bytes" in speed:
        parts.append(f"{compact(speed['mem/peak_bytes'])}B at most")
    yield f"{', '.join(parts)} (medians)"


def _step(report: RunReport) -> Iterator[str]:
    total = sum(report.step_parts.values())
    if total > 0:
        parts = [f"{name} {100 * s / total:.1f}%" for name, s in sorted(report.step_parts.items(), key=lambda p: -p[1])]
        yield f"{total:.3g} s: {', '.join(parts)}"


def _time(report: RunReport) -> Iterator[str]:
    good = report.goodput
    if good is None or good.wall_s <= 0:
        return
    yield f"goodput {100 * good.share:.1f}%: {clock_time(good.useful_s)} of useful steps in {clock_time(good.wall_s)}"
    lost = {
        "steps done again": good.redone_s,
        "evaluation": good.evaluation_s,
        "saving": good.save_s,
        "between attempts": good.between_s,
        "start and other": good.other_s,
    }
    yield ", ".join(f"{name} {100 * seconds / good.wall_s:.1f}%" for name, seconds in lost.items())


def _attempts(report: RunReport) -> Iterator[str]:
    attempts = report.attempts
    if not attempts:
        return
    yield f"{len(attempts)}, {len(attempts) - 1} restarts"
    for number, attempt in list(enumerate(attempts, 1))[-_ATTEMPTS_SHOWN:]:
        code = "" if attempt.exit_code is None else f" (exit code {attempt.exit_code})"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.started))
        line = f"{number}: {when}, {clock_time(attempt.ended - attempt.started)} on {attempt.host}, {attempt.status}{code}"
        yield f"{line} at step {attempt.step}{f': {attempt.message}' if attempt.message else ''}"


def _stragglers(report: RunReport) -> Iterator[str]:
    if not report.stragglers:
        return
    found = report.stragglers
    yield (
        f"slowest over median: {found['median_spread']:.2f} in the middle, {found['largest_spread']:.2f} at most, "
        f"{found['comparisons']} comparisons"
    )
    often, last = found["most_often"], found["last"]
    yield f"most often rank {often['rank']} on {often['host'] or 'an unknown host'}, {often['times']} times"
    where = f"rank {last['rank']} on {last['host'] or 'an unknown host'}"
    yield f"last {where}, {last['spread']:.2f} times the median, step {last['step']}"


def _selection(report: RunReport) -> Iterator[str]:
    found = report.selection
    if "kept_fraction" not in found:
        return
    parts = [f"kept {100 * found['kept_fraction']:.1f}%"]
    parts += [f"threshold {found['threshold']:.4g}"] if "threshold" in found else []
    losses = [f"{name} {found[f'{name}_loss_nats']:.4f}" for name in ("all", "kept", "dropped") if f"{name}_loss_nats" in found]
    parts += [f"loss of {', '.join(losses)} nats/token"] if losses else []
    yield f"{'; '.join(parts)} (means of the last lines)"


def _stability(report: RunReport) -> Iterator[str]:
    counts = [f"{tag.removeprefix('optim/').removesuffix('_total')} {value:g}" for tag, value in report.totals.items()]
    if counts or report.num_dumps:
        yield ", ".join([*counts, f"{report.num_dumps} dumped batches"])


def _checkpoints(report: RunReport) -> Iterator[str]:
    for each in report.checkpoints:
        size = "manifest damaged" if each.num_bytes is None else f"{compact(each.num_bytes)}B"
        yield f"{each.name}: {size}"
    for name in report.set_aside:
        yield f"{name}: set aside"
    if not report.checkpoints:
        yield "none"


def _strict(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return value
