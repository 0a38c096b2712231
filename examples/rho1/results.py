"""What the runs of the experiment say: results.json, the tables, the plot. Computed from those that are finished.

python examples/rho1/results.py runs/rho1         # at any time, also while the experiment is running
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import selection  # the demo's, found through the line above

from megarpt.corpus.indexed import CorpusIndex
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.train.metrics_file import read_metrics

MIXES = {"noisy": "Target, code and web noise", "offtarget": "Target and clean text about something else"}
ARMS = {
    "clm": "all tokens (CLM)",
    "excess40": "top 40% by excess loss",
    "excess60": "top 60% by excess loss",
    "excess80": "top 80% by excess loss",
    "random60": "random 60%",
    "loss60": "top 60% by own loss",
}
BEFORE = {"base": "initialization", "reference": "reference model"}
TUNED = {"clm-tuned": "CLM, tuned on clean text", "excess60-tuned": "excess loss 60%, tuned on clean text"}
PAIRED_WITH = {**{arm: "clm" for arm in ARMS if arm != "clm"}, "excess60-tuned": "clm-tuned"}
"""Run -> the run of the same seed and mix that its differences are taken from."""

MEASURES = ("heldout_nats", "heldout_top1", "code_nats", "code_top1")
KINDS = {
    "clean": "target",
    "injected": "noise inside target pages",
    "code": "Python source",
    "noise": "pages of noise",
    "header": "C and C++ headers",
    "manual": "man page source",
    "configuration": "configuration, licences",
}
COLORS = {
    "clm": "#64748b",
    "excess40": "#f4a07f",
    "excess60": "#e4572e",
    "excess80": "#8f2d13",
    "random60": "#38a3a5",
    "loss60": "#7e5bef",
}
GRID_COLOR = "#e5e7eb"
WIDE = 140
"""Columns of a terminal that shows every column of the tables."""


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation on all tokens of the held-out parts."""

    tokens: int  # the model has read in this run
    order: str  # hash of the samples that it has read, in order
    heldout_nats: float
    heldout_top1: float
    code_nats: float
    code_top1: float


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    seed: int
    mix: str
    name: str  # an arm, or a key of BEFORE or TUNED
    points: tuple[Point, ...]

    def final(self, measure: str) -> float:
        return float(getattr(self.points[-1], measure))


Runs = Mapping[tuple[str, str, int], Run]  # by mix, name and seed
Spread = dict[str, Any]  # mean, sd (None for one seed), values by seed


def read_runs(out: Path) -> dict[tuple[str, str, int], Run]:
    """All finished runs below `out`.

    Raises:
        ValueError: two arms of a seed and mix did not start alike, or did not read the same tokens in the same order.
    """
    runs = {}
    for path in sorted(out.glob("seed*/*-*/exit.json")):
        if json.loads(path.read_text())["status"] != "finished":
            continue
        mix, name = path.parent.name.split("-", 1)
        seed = int(path.parent.parent.name.removeprefix("seed"))
        points = tuple(
            Point(
                int(line["tokens/seen"]),
                str(line["data/order"]),
                float(line["valid/heldout/loss_nats"]),
                float(line["valid/heldout/top1"]),
                float(line["valid/code/loss_nats"]),
                float(line["valid/code/top1"]),
            )
            for line in read_metrics(path.parent / "metrics.jsonl", "valid")
        )
        runs[mix, name, seed] = Run(seed, mix, name, points)
    for (mix, name, seed), run in runs.items():
        clm = runs.get((mix, "clm", seed))
        if clm is None or name not in ARMS:
            continue
        if [(p.tokens, p.order) for p in run.points] != [(p.tokens, p.order) for p in clm.points]:
            raise ValueError(f"seed {seed}, {mix}: {name} and clm did not read the same tokens in the same order")
        if run.points[0].heldout_nats != clm.points[0].heldout_nats:
            raise ValueError(f"seed {seed}, {mix}: {name} and clm did not start from the same weights")
    return runs


def spread(values: Mapping[int, float]) -> Spread:
    """Mean and standard deviation over seeds."""
    each = list(values.values())
    return {
        "mean": statistics.fmean(each),
        "sd": statistics.stdev(each) if len(each) > 1 else None,
        "by_seed": {str(seed): value for seed, value in sorted(values.items())},
    }


def summarize(runs: Runs) -> dict[str, dict[str, dict[str, Spread]]]:
    """mix -> run -> measure, and `<measure>_minus_clm` of the pairs of one seed -> mean, sd and values."""
    summary: dict[str, dict[str, dict[str, Spread]]] = {}
    for mix in MIXES:
        for name in (*BEFORE, *ARMS, *TUNED):
            of_seed = {run.seed: run for (m, n, _), run in runs.items() if (m, n) == (mix, name)}
            if not of_seed:
                continue
            row = summary.setdefault(mix, {})[name] = {
                measure: spread({seed: run.final(measure) for seed, run in of_seed.items()}) for measure in MEASURES
            }
            pairs = {
                seed: (run, runs[mix, PAIRED_WITH[name], seed])
                for seed, run in of_seed.items()
                if name in PAIRED_WITH and (mix, PAIRED_WITH[name], seed) in runs
            }
            for measure in MEASURES if pairs else ():
                differences = {seed: run.final(measure) - other.final(measure) for seed, (run, other) in pairs.items()}
                row[f"{measure}_minus_clm"] = spread(differences)
    return summary


def kept_shares(folder: Path, mix: str, fraction: float = 0.6) -> dict[str, float] | None:
    """Which share of each kind of the mix's tokens the trained student of one seed would keep; None before it is scored."""
    reference, student = (folder / "data" / f"mix_{mix}_{name}" for name in ("ref_nll", "student_nll"))
    if not student.with_name(student.name + ".json").exists():
        return None
    tokenizer = load_tokenizer(str(folder / "tokenizer.model"))
    documents = [json.loads(line) for line in (folder / "corpus" / f"mix_{mix}.jsonl").read_text("utf-8").splitlines()]
    streams = (read_documents(prefix) for prefix in (folder / "data" / f"mix_{mix}", student, reference))
    kinds: list[str] = []
    excess: list[float] = []
    for document, ids, own, others in zip(documents, *streams, strict=True):
        spans = selection.token_spans(tokenizer, ids.tolist(), document["text"])
        kinds += [selection.token_kind(document, begin, end) for begin, end in spans]
        excess += (own - others)[: len(spans)].tolist()  # without the end of the document
    scores, names = np.array(excess), np.array(kinds)
    predicted = np.isfinite(scores)
    kept = scores >= np.quantile(scores[predicted], 1.0 - fraction)
    return {kind: float(kept[here].mean()) for kind in KINDS if (here := predicted & (names == kind)).any()}


def read_documents(prefix: Path) -> list[np.ndarray]:
    """The values of every document of an indexed file."""
    index = CorpusIndex(prefix)
    return [index.read_document(number) for number in range(index.num_documents)]


def write_results(out: Path) -> dict[str, Any]:
    """Collect what is finished and write `results.json`, which is whole at any moment."""
    runs = read_runs(out)
    seconds = [json.loads(path.read_text()) for path in out.glob("seed*/stages/*.json")]
    shares: dict[str, dict[str, dict[str, float]]] = {}
    for folder in sorted(out.glob("seed*")):
        for mix in MIXES:
            share = kept_shares(folder, mix)
            if share is not None:
                shares.setdefault(mix, {})[folder.name.removeprefix("seed")] = share
    results = {
        "summary": summarize(runs),
        "kept_share_of_excess60": shares,
        "stage_minutes": round(sum(stage["seconds"] for stage in seconds if "finished" in stage) / 60, 1),
        "runs": [
            {"seed": run.seed, "mix": run.mix, "name": run.name, "points": [asdict(point) for point in run.points]}
            for run in runs.values()
        ],
    }
    partial = out / "results.json.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, out / "results.json")
    return results


def write(out: Path, console: Console) -> None:
    """results.json, results.md, rho1.png, and the tables on the terminal."""
    results = write_results(out)
    summary = results["summary"]
    if not any("clm" in rows for rows in summary.values()):
        console.print(f"No student in {out} is finished yet.", markup=False)
        return
    texts = []
    for mix, rows in summary.items():
        if "clm" not in rows:
            continue
        header, lines = table(rows)
        seeds = count(rows["clm"])
        title = f"{MIXES[mix]} ({mix}), " + (f"mean ± sd of {seeds} seeds" if seeds > 1 else "one seed")
        columns = len(header) if console.width >= WIDE else len(header) - 2  # all of them are in results.md
        grid = Table(title=title, title_justify="left")
        for number, column in enumerate(header[:columns]):
            grid.add_column(column, justify="left" if number == 0 else "right")
        for line in lines:
            grid.add_row(*line[:columns])
        console.print(grid)
        rules = ["---"] + ["---:"] * (len(header) - 1)
        texts.append("\n".join([f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in (header, rules, *lines))]))
    for mix, by_seed in results["kept_share_of_excess60"].items():
        kinds = [kind for kind in KINDS if any(kind in share for share in by_seed.values())]
        means = {kind: statistics.fmean(share[kind] for share in by_seed.values() if kind in share) for kind in kinds}
        texts.append(f"{mix}: kept of " + ", ".join(f"{KINDS[kind]} {100 * mean:.0f}%" for kind, mean in means.items()))
        console.print(texts[-1], highlight=False)
    (out / "results.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    plot(out / "rho1.png", {(run["mix"], run["name"], run["seed"]): _run(run) for run in results["runs"]}, summary)
    console.print(f"numbers  {out / 'results.json'}\ntables   {out / 'results.md'}\nplot     {out / 'rho1.png'}", markup=False)
    console.print(f"{results['stage_minutes']} minutes of stages in all")


def table(rows: Mapping[str, Mapping[str, Spread]]) -> tuple[list[str], list[list[str]]]:
    """One mix: header and lines."""
    header = ["", "held-out nats", "minus CLM", "top-1, %", "minus CLM", "code, nats", "minus CLM"]
    lines = []
    for name, label in {**BEFORE, **ARMS, **TUNED}.items():
        if name not in rows:
            continue
        line = [label if count(rows[name]) == count(rows["clm"]) else f"{label} ({count(rows[name])} of the seeds)"]
        for measure, scale, digits in (("heldout_nats", 1, 3), ("heldout_top1", 100, 2), ("code_nats", 1, 3)):
            line.append(shown(rows[name][measure], scale, digits))
            difference = rows[name].get(f"{measure}_minus_clm")
            line.append("" if difference is None else shown(difference, scale, digits, signed=True))
        lines.append(line)
    return header, lines


def count(row: Mapping[str, Spread]) -> int:
    """Over how many seeds a row is."""
    return len(row["heldout_nats"]["by_seed"])


def shown(value: Spread, scale: float, digits: int, *, signed: bool = False) -> str:
    """`mean ± sd`, or the mean alone for one seed."""
    mean = f"{scale * value['mean']:{'+' if signed else ''}.{digits}f}"
    return mean if value["sd"] is None else f"{mean} ± {scale * value['sd']:.{digits}f}"


def _run(record: Mapping[str, Any]) -> Run:
    points = tuple(Point(**point) for point in record["points"])
    return Run(record["seed"], record["mix"], record["name"], points)


def mean_curve(runs: Iterable[Run]) -> tuple[list[int], list[float]]:
    """Tokens, and the mean over seeds of the held-out loss there."""
    curves = [run.points for run in runs]
    tokens = [point.tokens for point in curves[0]]
    return tokens, [statistics.fmean(curve[i].heldout_nats for curve in curves) for i in range(len(tokens))]


def plot(path: Path, runs: Runs, summary: Mapping[str, Mapping[str, Mapping[str, Spread]]]) -> None:
    """A row for each mix: mean curves, then the differences to CLM in loss and in accuracy, with every seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9ca3af"})
    mixes = [mix for mix in MIXES if "clm" in summary.get(mix, {})]
    figure, grid = plt.subplots(
        len(mixes), 3, figsize=(11, 3.4 * len(mixes)), width_ratios=(1.5, 1, 1), layout="constrained", squeeze=False
    )
    for mix, (left, middle, right) in zip(mixes, grid, strict=True):
        for arm in (arm for arm in ARMS if arm in summary[mix]):
            tokens, nats = mean_curve(run for (m, name, _), run in runs.items() if (m, name) == (mix, arm))
            x = [each / 1e3 for each in tokens]
            left.plot(x, nats, color=COLORS[arm], linewidth=2, marker="o", markersize=3, label=ARMS[arm])
        left.set_xlabel("tokens read by the student (thousand)")
        left.set_ylabel("held-out loss (nats per token)")
        left.set_title(MIXES[mix], loc="left", weight="bold")
        left.grid(color=GRID_COLOR, linewidth=0.8)
        left.set_axisbelow(True)
        arms = [arm for arm in ARMS if "heldout_nats_minus_clm" in summary[mix].get(arm, {})]
        _differences(middle, summary[mix], arms, "heldout_nats", 1.0, "loss minus CLM's (nats)")
        _differences(right, summary[mix], arms, "heldout_top1", 100.0, "top-1 accuracy minus CLM's (points)")
        right.set_yticklabels([])
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _differences(
    axes: Any, rows: Mapping[str, Mapping[str, Spread]], arms: Sequence[str], measure: str, scale: float, title: str
) -> None:
    """Bars of the mean difference to CLM, their sd as whiskers, the seeds as dots."""
    for place, arm in enumerate(reversed(arms)):
        difference = rows[arm][f"{measure}_minus_clm"]
        whisker = None if difference["sd"] is None else scale * difference["sd"]
        axes.barh(place, scale * difference["mean"], xerr=whisker, color=COLORS[arm], height=0.62, ecolor="#1f2937", capsize=3)
        values = [scale * value for value in difference["by_seed"].values()]
        axes.plot(values, [place] * len(values), "o", color="white", markeredgecolor="#1f2937", markersize=4)
    axes.axvline(0.0, color="#64748b", linewidth=1)
    axes.set_yticks(range(len(arms)), [ARMS[arm] for arm in reversed(arms)])
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="left", fontsize=9)
    axes.grid(axis="x", color=GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: results.py FOLDER, for example results.py runs/rho1\n")
        return 2
    write(Path(sys.argv[1]), Console(highlight=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
