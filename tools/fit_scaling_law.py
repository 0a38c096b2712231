#!/usr/bin/env python
"""Fit a score against the compute spent: P(C) = A / C^alpha + P*, the law of the RPT paper (equation 5).

    python tools/fit_scaling_law.py runs/rpt                                         # reward against tokens trained on
    python tools/fit_scaling_law.py runs/rpt --score valid/hard/accuracy --score valid/easy/accuracy
    python tools/fit_scaling_law.py runs/rpt --compute rl/sampled_tokens --cumulative --scale 2.5e7    # FLOPs of a token
    python tools/fit_scaling_law.py runs/seed1 runs/seed2 runs/seed3                 # the points of all together
    python tools/fit_scaling_law.py accuracy.csv                                     # columns: compute, then one or more scores

Prints A, alpha, P* and R^2 with intervals of a residual bootstrap, and draws points and laws to RUN/scaling_law.png. Points of
one training run depend on each other, and a reward of training is noisy: where lines of metrics are more than --bins, they are
averaged over so many bins of equal width in the logarithm of compute. P* is a share unless --limit says otherwise.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megarpt.corpus.atomic import atomic_write_json, write_errors
from megarpt.corpus.console import ToolParser, non_negative, positive, run_tool
from megarpt.errors import ConfigError, DataError, ExtensionError
from megarpt.rl.scaling_law import ScalingLaw, fit_scaling_law
from megarpt.train.metrics_file import read_metrics

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # apart also for the colour-blind
MARKERS = ("o", "^", "s", "D", "v", "P")
TAGS_SHOWN = 12

Points = list[tuple[float, float]]  # (compute, score)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    fits: dict[str, tuple[Points, ScalingLaw]] = {}
    for name, found in read_sources(args).items():
        points = sorted((compute * args.scale, score) for compute, score in found if compute > 0)
        points = [each for each in points if each[0] >= (args.least or 0.0)]
        if left_out := len(found) - len(points):
            why = f"less than {args.least:g} was spent" if args.least else "no compute was spent yet"
            what = "1 point" if left_out == 1 else f"{left_out} points"
            console.print(f"{what} of {name} {'is' if left_out == 1 else 'are'} left out: {why}")
        if 0 < args.bins < len(points):
            points = binned(points, args.bins)
        law = fit_scaling_law(
            [compute for compute, _ in points],
            [score for _, score in points],
            limit_range=args.limit,
            bootstrap=args.bootstrap,
            confidence=args.confidence,
            seed=args.seed,
        )
        fits[name] = (points, law)
    written = []
    if args.plot:
        draw(fits, args.plot, args.axis)
        written.append(args.plot)
    if args.json:
        laws = [{"score": name, **strict(asdict(law)), "points": points} for name, (points, law) in fits.items()]
        atomic_write_json(args.json, {"compute": args.axis, "laws": laws})
        written.append(args.json)
    show(fits, args.axis, written, console)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="run folders or metrics files; or tables, as *.csv with a header")
    parser.add_argument("--score", action="append", metavar="TAG", help="what is fitted; repeatable (default: rl/reward_mean)")
    parser.add_argument("--compute", default="tokens/seen", metavar="TAG", help="what is spent (default: %(default)s)")
    parser.add_argument("--cumulative", action="store_true", help="the compute of a line is that of its step: add them up")
    parser.add_argument("--scale", type=above_zero, default=1.0, metavar="X", help="times this, such as FLOPs of a token")
    parser.add_argument("--least", type=above_zero, metavar="C", help="leave out points of less compute, after the scale")
    parser.add_argument("--unit", metavar="TEXT", help="of the compute after that, for the picture")
    parser.add_argument("--bins", type=non_negative, metavar="N", help="0 for none (default: 24, or none for tables)")
    parser.add_argument(
        "--limit", type=span, default=(0.0, 1.0), metavar="LOW,HIGH", help="where P* may lie, or: free (default: 0,1)"
    )
    parser.add_argument("--bootstrap", type=positive, default=1000, metavar="N", help="fits for the intervals (default: 1000)")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="F", help="of the intervals (default: 0.95)")
    parser.add_argument("--seed", type=non_negative, default=0, help="of the bootstrap")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="the picture (default: scaling_law.png, in RUN if that is one)"
    )
    parser.add_argument("--no-plot", action="store_true", help="leave the picture out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write laws and points")
    args = parser.parse_args(argv)
    if not 0.0 < args.confidence < 1.0:
        parser.error(f"--confidence: got {args.confidence:g}, expected a share between 0 and 1")
    is_table = args.sources[0].suffix == ".csv"
    args.bins = (0 if is_table else 24) if args.bins is None else args.bins
    args.axis = args.unit or ("compute" if is_table else args.compute) + (f" * {args.scale:g}" if args.scale != 1.0 else "")
    folder = args.sources[0] if len(args.sources) == 1 and args.sources[0].is_dir() else Path()
    args.plot = None if args.no_plot else args.plot or folder / "scaling_law.png"
    return args


def above_zero(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return number


def span(text: str) -> tuple[float, float]:
    """An argparse type: a smaller and a larger number, or free."""
    if text == "free":
        return -math.inf, math.inf
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not low < high:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a smaller and a larger number such as 0,1, or free")
    return low, high


def read_sources(args: argparse.Namespace) -> dict[str, Points]:
    """Points by the name of their score.

    Raises:
        ConfigError: a source is not there.
        DataError: a source is damaged, or has no such points.
    """
    found: dict[str, Points] = {}
    for source in args.sources:
        path = source / "metrics.jsonl" if source.is_dir() else source
        if not path.is_file():
            raise ConfigError(f"{source}: neither a run folder, nor a metrics file, nor a table; name one of these")
        one = read_table(path) if path.suffix == ".csv" else read_run(path, args)
        for name, points in one.items():
            found.setdefault(name, []).extend(points)
    return found


def read_run(path: Path, args: argparse.Namespace) -> dict[str, Points]:
    """Points of a metrics file: of every line that has both tags, or with --cumulative every line that has the score."""
    names = args.score or ["rl/reward_mean"]
    found: dict[str, Points] = {name: [] for name in names}
    tags: dict[str, None] = {}
    total = 0.0
    for line in read_metrics(path):
        tags |= dict.fromkeys(tag for tag, value in line.items() if isinstance(value, (int, float)))
        spent = line.get(args.compute)
        if args.cumulative:
            total += float(spent) if isinstance(spent, (int, float)) else 0.0
            spent = total
        for name in names:
            score = line.get(name)
            if isinstance(spent, (int, float)) and isinstance(score, (int, float)) and math.isfinite(score):
                found[name].append((float(spent), float(score)))
    for name, points in found.items():
        if not points:
            wanted = sorted(tag for tag in tags if tag.startswith(("rl/", "valid/")))[:TAGS_SHOWN]
            raise DataError(f"{path}: no line has both {args.compute} and {name}; it has {', '.join(wanted) or 'no scores'}")
    return found


def read_table(path: Path) -> dict[str, Points]:
    """Points of a table: computes in the first column, scores in the others, an empty cell where there is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not rows:
        raise DataError(f"{path}: no header; the first line names the columns, such as compute,score")
    if len(rows[0]) < 2:
        raise DataError(f"{path}: got the columns {rows[0]}, expected a column of computes and at least one of scores")
    found: dict[str, Points] = {name: [] for name in rows[0][1:]}
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(rows[0]):
            raise DataError(f"{path}, line {number}: got {len(row)} cells, expected {len(rows[0])}")
        for name, cell in zip(rows[0][1:], row[1:], strict=True):
            if cell.strip():
                found[name].append((_number(row[0], path, number), _number(cell, path, number)))
    return found


def _number(cell: str, path: Path, line: int) -> float:
    try:
        return float(cell)
    except ValueError:
        raise DataError(f"{path}, line {line}: got {cell!r}, expected a number") from None


def binned(points: Points, count: int) -> Points:
    """Means of compute (geometric) and score over bins of equal width in the logarithm of compute."""
    if not points:
        return points
    logs = np.log([compute for compute, _ in points])
    width = (logs[-1] - logs[0]) / count
    bins: dict[int, Points] = {}
    for log, (_, score) in zip(logs.tolist(), points, strict=True):
        bins.setdefault(min(int((log - logs[0]) / width), count - 1) if width > 0 else 0, []).append((log, score))
    return [
        (math.exp(sum(log for log, _ in each) / len(each)), sum(score for _, score in each) / len(each))
        for each in bins.values()
    ]


def draw(fits: Mapping[str, tuple[Points, ScalingLaw]], path: Path, axis: str) -> None:
    """Points and laws over the logarithm of compute; the limit of each as a dashed line.

    Raises:
        ExtensionError: matplotlib is not installed.
        DataError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExtensionError(
            f"the picture needs matplotlib ({error}); it is in the extra `demo`: pip install -e .[demo], or pass --no-plot"
        ) from error
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for i, (name, (points, law)) in enumerate(fits.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        x = [compute for compute, _ in points]
        axes.plot(x, [score for _, score in points], marker, color=color, markersize=4.5, linestyle="none")
        dense = np.geomspace(x[0], x[-1], 200)
        label = f"{name}: {formula(law)},  R² {law.r_squared:.3f}"
        axes.plot(dense, law.score(dense), color=color, linewidth=2.0, label=label)
        if not law.is_alpha_at_edge:
            axes.axhline(law.limit, color=color, linestyle=(0, (4, 3)), linewidth=1.0)
    axes.set(xscale="log", xlabel=axis)
    axes.set_title("Score against compute", loc="left", weight="bold")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.14))
    with write_errors(path):
        figure.savefig(path, dpi=150)


def formula(law: ScalingLaw) -> str:
    """The law as it is printed."""
    sign = "-" if law.a < 0 else "+"
    return f"{law.limit:.3f} {sign} {abs(law.a):.3g} / C^{law.alpha:.3g}"


def strict(values: Mapping[str, object]) -> dict[str, object]:
    """JSON has no infinity: text instead."""

    def plain(value: object) -> object:
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in values.items()}


def show(fits: Mapping[str, tuple[Points, ScalingLaw]], axis: str, written: Sequence[Path], console: Console) -> None:
    """The laws, on the terminal."""
    table = Table(title=f"P(C) = A / C^alpha + P*, C: {axis}", title_justify="left")
    for column in ("score", "points", "A", "alpha", "P*", "R^2", "first", "last"):
        table.add_column(column, justify="left" if column == "score" else "right", no_wrap=column != "score")
    for name, (points, law) in fits.items():
        cells = [
            f"{value:.4g}\n[{low:.3g}, {high:.3g}]"
            for value, (low, high) in (
                (law.a, law.a_interval),
                (law.alpha, law.alpha_interval),
                (law.limit, law.limit_interval),
            )
        ]
        ends = f"{points[0][1]:.4f}", f"{points[-1][1]:.4f}"
        table.add_row(name, str(law.num_points), *(cell.replace("[", "\\[") for cell in cells), f"{law.r_squared:.4f}", *ends)
    console.print(table)
    confidence = 100 * next(iter(fits.values()))[1].confidence
    console.print(
        f"in brackets: {confidence:g}% intervals of a residual bootstrap, if the law is right and points are independent"
    )
    for name, (_, law) in fits.items():
        if law.is_alpha_at_edge:
            console.print(
                f"{name}: the points do not determine the law: alpha lies at the end of its range, P* and A mean little"
            )
        elif law.is_limit_at_edge:
            console.print(f"{name}: P* lies at the end of the range of --limit; the points alone would put it beyond")
    if written:
        console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_tool(main))
