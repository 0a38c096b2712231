"""What the runs of the experiment say: results.json, the tables, the plot. Computed from the seeds that are finished.

python examples/rpt/rpt_results.py runs/rpt         # at any time, also while the experiment is running
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megarpt.errors import DataError
from megarpt.rl.scaling_law import ScalingLaw, fit_scaling_law
from megarpt.train.metrics_file import read_metrics

BANDS = ("easy", "medium", "hard", "all")
ROWS = {
    "base plain": "base model, plain",
    "continued_tokens plain": "more plain pretraining, same tokens",
    "continued_time plain": "more plain pretraining, same time",
    "sft plain": "after the warm start, plain",
    "sft greedy": "after the warm start, reasoning",
    "rpt plain": "after RPT, plain",
    "rpt greedy": "after RPT, reasoning",
}
"""Model and mode of `megarpt evaluate`, and what the tables call them."""

COLORS = {
    "base plain": "#94a3b8",
    "continued_tokens plain": "#64748b",
    "continued_time plain": "#334155",
    "sft plain": "#f7c8ae",
    "sft greedy": "#f4a07f",
    "rpt plain": "#38a3a5",
    "rpt greedy": "#e4572e",
}
SEED_COLORS = ("#e4572e", "#38a3a5", "#7e5bef", "#d49a00", "#334155")
GRID_COLOR = "#e5e7eb"
ENDS = 0.1
"""The share of steps at either end whose rewards are compared."""

BOOTSTRAP = 200
"""Fits for the intervals of a law."""

Spread = dict[str, Any]  # mean, sd (None for one seed), values by seed


@dataclass(frozen=True, slots=True)
class Spent:
    """What reinforcement took, without its evaluations."""

    gradient_tokens: int  # sampled tokens whose gradient was taken
    read_tokens: int  # that went through the model for that, prompts and padding included
    sampled_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Point:
    """Validation after some steps."""

    step: int
    tokens: int  # read for training until then
    reward: float
    by_band: dict[str, float]


@dataclass(frozen=True, slots=True)
class Seed:
    """A finished seed."""

    seed: int
    rewards: tuple[float, ...]  # mean of every step
    lengths: tuple[float, ...]  # tokens of a completion, mean of every step
    points: tuple[Point, ...]
    accuracy: dict[str, dict[str, float]]  # "model mode" -> band -> share
    prompts: dict[str, int]  # band -> how many for validation
    tokens: dict[str, int]  # model -> tokens it read in its own run
    seconds: dict[str, float]  # stage -> how long it took
    spent: Spent

    def growth(self) -> tuple[float, float]:
        """Mean reward of the first and of the last steps."""
        n = max(1, round(ENDS * len(self.rewards)))
        return statistics.fmean(self.rewards[:n]), statistics.fmean(self.rewards[-n:])


def spent_by(run: Path) -> Spent:
    """What a finished run of `megarpt rl` took.

    Raises:
        DataError: it has not logged every step.
    """
    lines = list(read_metrics(run / "metrics.jsonl", "train"))
    if not lines or len(lines) != lines[-1]["step"]:
        raise DataError(f"{run}: {len(lines)} steps are logged, expected all; set logging.interval_steps to 1")
    return Spent(
        int(lines[-1]["tokens/trained"]),
        int(lines[-1]["tokens/seen"]),
        round(sum(float(line["rl/sampled_tokens"]) for line in lines)),
        sum(float(line["time/iteration_s"]) for line in lines),
    )


def tokens_per_second(run: Path) -> float:
    """How fast a finished run of `megarpt pretrain` read tokens.

    Raises:
        DataError: it logged less than two steps.
    """
    lines = list(read_metrics(run / "metrics.jsonl", "train"))
    if len(lines) < 2:
        raise DataError(f"{run}: {len(lines)} steps are logged, expected at least 2; lower logging.interval_steps")
    first, last = ({key: float(line[key]) for key in ("tokens/seen", "time/elapsed_s")} for line in (lines[0], lines[-1]))
    return (last["tokens/seen"] - first["tokens/seen"]) / (last["time/elapsed_s"] - first["time/elapsed_s"])


def read_seed(folder: Path) -> Seed:
    """All numbers of a finished seed."""
    train = list(read_metrics(folder / "rpt" / "metrics.jsonl", "train"))
    valid = list(read_metrics(folder / "rpt" / "metrics.jsonl", "valid"))
    evaluations = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))}
    results = {
        f"{model} {mode}": bands
        for model, evaluation in evaluations.items()
        for mode, bands in evaluation["questions"]["heldout"]["results"].items()
    }
    stages = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "stages").glob("*.json"))}
    models = ("base", "sft", "continued_tokens", "continued_time")
    return Seed(
        seed=int(folder.name.removeprefix("seed")),
        rewards=tuple(float(line["rl/reward_mean"]) for line in train),
        lengths=tuple(float(line["rl/length_mean_tokens"]) for line in train),
        points=tuple(_point(line) for line in valid),
        accuracy={name: {band: bands[band]["accuracy"] for band in BANDS if band in bands} for name, bands in results.items()},
        prompts={band: numbers["questions"] for band, numbers in results["rpt greedy"].items()},
        tokens={model: _tokens_seen(folder / model) for model in models},
        seconds={name: float(stage["seconds"]) for name, stage in stages.items()},
        spent=spent_by(folder / "rpt"),
    )


def _point(line: Mapping[str, Any]) -> Point:
    prefix = "valid/heldout/"
    bands = {band: float(line[tag]) for band in BANDS if (tag := f"{prefix}band/{band}/accuracy") in line}
    return Point(int(line["step"]), int(line["tokens/seen"]), float(line[f"{prefix}reward_mean"]), bands)


def _tokens_seen(run: Path) -> int:
    return int(json.loads((run / "exit.json").read_text(encoding="utf-8"))["tokens_seen"])


def read_seeds(out: Path) -> list[Seed]:
    """The finished seeds below `out`."""
    folders = (path.parent.parent for path in out.glob("seed*/results/rpt.json"))
    is_done = "finished"
    found = [
        folder
        for folder in folders
        if is_done in json.loads((folder / "stages" / "evaluate.json").read_text())  # and not under way
    ]
    return [read_seed(folder) for folder in sorted(found)]


def spread(values: Mapping[int, float]) -> Spread:
    """Mean and standard deviation over seeds."""
    each = list(values.values())
    return {
        "mean": statistics.fmean(each),
        "sd": statistics.stdev(each) if len(each) > 1 else None,
        "by_seed": {str(seed): value for seed, value in sorted(values.items())},
    }


def law_of(points: Sequence[Point], band: str = "all") -> ScalingLaw | None:
    """The law through validation accuracies after the start; None where there are too few different ones."""
    chosen = [(point.tokens, point.reward if band == "all" else point.by_band.get(band)) for point in points if point.tokens]
    known = [(tokens, score) for tokens, score in chosen if score is not None]
    tokens, scores = [each for each, _ in known], [each for _, each in known]
    try:
        return fit_scaling_law(tokens, scores, limit_range=(0.0, 1.0), bootstrap=BOOTSTRAP)
    except DataError:
        return None


def write_results(out: Path) -> dict[str, Any]:
    """Collect what is finished and write `results.json`, which is whole at any moment."""
    seeds = read_seeds(out)
    laws = {band: law_of([point for seed in seeds for point in seed.points], band) for band in BANDS}
    results = {
        "accuracy": {
            row: {
                band: spread({seed.seed: seed.accuracy[row][band] for seed in seeds if band in seed.accuracy[row]})
                for band in BANDS
                if any(band in seed.accuracy[row] for seed in seeds)
            }
            for row in ROWS
            if seeds and all(row in seed.accuracy for seed in seeds)
        },
        "laws": {band: asdict(law) for band, law in laws.items() if law is not None},
        "seeds": [asdict(seed) for seed in seeds],
    }
    partial = out / "results.json.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, out / "results.json")
    return results


def write(out: Path, console: Console) -> None:
    """results.json, results.md, rpt.png, and the tables on the terminal."""
    results, seeds = write_results(out), read_seeds(out)
    if not seeds:
        console.print(f"No seed in {out} is finished yet.", markup=False)
        return
    count = f"mean ± sd of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    tables = {
        f"Next-token accuracy on held-out prompts, %, {count}": accuracy_table(results["accuracy"], seeds),
        "Reward, and what it took": growth_table(seeds),
        "Validation accuracy = A / tokens^alpha + P*": law_table(results["laws"]),
    }
    texts = []
    for title, (header, lines) in tables.items():
        grid = Table(title=title, title_justify="left")
        for number, column in enumerate(header):
            grid.add_column(column, justify="left" if number == 0 else "right")
        for line in lines:
            grid.add_row(*line)
        console.print(grid)
        rules = ["---"] + ["---:"] * (len(header) - 1)
        texts.append("\n".join([f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in (header, rules, *lines))]))
    (out / "results.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    plot(out / "rpt.png", seeds, results["accuracy"])
    console.print(f"numbers  {out / 'results.json'}\ntables   {out / 'results.md'}\nplot     {out / 'rpt.png'}", markup=False)
    minutes = sum(sum(seed.seconds.values()) for seed in seeds) / 60
    console.print(f"{minutes:.1f} minutes of stages in all")


def accuracy_table(accuracy: Mapping[str, Mapping[str, Spread]], seeds: Sequence[Seed]) -> tuple[list[str], list[list[str]]]:
    """Header and lines."""
    bands = [band for band in BANDS if any(band in row for row in accuracy.values())]
    prompts = {band: statistics.fmean(seed.prompts.get(band, 0) for seed in seeds) for band in bands}
    header = ["", *(f"{band} ({prompts[band]:.0f})" for band in bands)]
    return header, [
        [ROWS[row], *(shown(values[band]) if band in values else "-" for band in bands)] for row, values in accuracy.items()
    ]


def growth_table(seeds: Sequence[Seed]) -> tuple[list[str], list[list[str]]]:
    """Header and lines, one for each seed."""
    header = ["seed", "first 10%", "last 10%", "ratio", "held out before", "after", "ratio", "tokens of a completion"]
    header += ["gradient tokens", "minutes of RPT"]
    lines = []
    for seed in seeds:
        (first, last), before, after = seed.growth(), seed.points[0].reward, seed.points[-1].reward
        n = max(1, round(ENDS * len(seed.lengths)))
        lengths = statistics.fmean(seed.lengths[:n]), statistics.fmean(seed.lengths[-n:])
        lines.append(
            [str(seed.seed), f"{first:.3f}", f"{last:.3f}", ratio(last, first)]
            + [f"{before:.3f}", f"{after:.3f}", ratio(after, before)]
            + [f"{lengths[0]:.1f} to {lengths[1]:.1f}", f"{seed.spent.gradient_tokens:,}", f"{seed.spent.seconds / 60:.1f}"]
        )
    return header, lines


def law_table(laws: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines, one for each band."""
    header = ["band", "A", "alpha", "P*", "95% of P*", "R²", "points"]
    return header, [
        [
            band,
            f"{law['a']:.3g}",
            f"{law['alpha']:.2f}",
            f"{law['limit']:.3f}",
            "{:.3f} to {:.3f}".format(*law["limit_interval"]),
            f"{law['r_squared']:.3f}",
            str(law["num_points"]),
        ]
        for band, law in laws.items()
    ]


def ratio(value: float, other: float) -> str:
    return f"{value / other:.1f}" if other > 0.0 else "-"


def shown(value: Spread) -> str:
    """`mean ± sd` in per cent, or the mean alone for one seed."""
    mean = f"{100 * value['mean']:.1f}"
    return mean if value["sd"] is None else f"{mean} ± {100 * value['sd']:.1f}"


def plot(path: Path, seeds: Sequence[Seed], accuracy: Mapping[str, Mapping[str, Spread]]) -> None:
    """Rewards over steps, validation over compute with its law, accuracies by band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9ca3af"})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), width_ratios=(1, 1, 1.3), layout="constrained")
    _rewards(left, seeds)
    _law(middle, seeds)
    _accuracies(right, accuracy)
    for axes in (left, middle, right):
        axes.grid(axis="y" if axes is right else "both", color=GRID_COLOR, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(0.0, 1.02)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rewards(axes: Any, seeds: Sequence[Seed]) -> None:
    for number, seed in enumerate(seeds):
        color = SEED_COLORS[number % len(SEED_COLORS)]
        axes.plot(range(1, len(seed.rewards) + 1), seed.rewards, color=color, linewidth=1, alpha=0.5)
        steps, rewards = [point.step for point in seed.points], [point.reward for point in seed.points]
        axes.plot(steps, rewards, color=color, linewidth=2, marker="o", markersize=4, label=f"seed {seed.seed}, held out")
    axes.set_xlabel("step")
    axes.set_title("mean reward: thin, of training; with dots, held out", loc="left", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _law(axes: Any, seeds: Sequence[Seed]) -> None:
    for number, seed in enumerate(seeds):
        points = [point for point in seed.points if point.tokens]
        color = SEED_COLORS[number % len(SEED_COLORS)]
        axes.plot([point.tokens for point in points], [point.reward for point in points], "o", color=color, markersize=4)
        law = law_of(points)
        if law is not None:
            first, last = points[0].tokens, points[-1].tokens
            x = [first * (last / first) ** (i / 100) for i in range(101)]
            label = f"A = {law.a:.3g}, α = {law.alpha:.2f}, P* = {law.limit:.2f}, R² = {law.r_squared:.2f}"
            axes.plot(x, law.score(x), color=color, linewidth=1.5, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("tokens read for training")
    axes.set_title("held-out reward and A / C^α + P*", loc="left", fontsize=9)
    if axes.get_legend_handles_labels()[0]:  # too few points have no law
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def _accuracies(axes: Any, accuracy: Mapping[str, Mapping[str, Spread]]) -> None:
    bands = [band for band in BANDS if any(band in row for row in accuracy.values())]
    width = 0.85 / max(1, len(accuracy))
    for number, (row, values) in enumerate(accuracy.items()):
        for place, band in enumerate(bands):
            if band not in values:
                continue
            x = place + (number - (len(accuracy) - 1) / 2) * width
            label = ROWS[row] if place == 0 else None
            axes.bar(x, values[band]["mean"], width=width, color=COLORS[row], label=label)
            each = list(values[band]["by_seed"].values())
            axes.plot([x] * len(each), each, "o", color="white", markeredgecolor="#1f2937", markersize=3)
    axes.set_xticks(range(len(bands)), bands)
    axes.set_title("next-token accuracy on held-out prompts; dots: seeds", loc="left", fontsize=9)
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: rpt_results.py FOLDER, for example rpt_results.py runs/rpt\n")
        return 2
    write(Path(sys.argv[1]), Console(highlight=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
