"""The demo's verdict: curves, table, plot, kept tokens. Computed from what the runs wrote, whatever it is.

python examples/demo/report.py runs/demo         # again, from finished runs
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

import selection  # a sibling file

from megarpt.run.selection_page import Selection
from megarpt.train.metrics_file import read_metrics

CLM_COLOR, SLM_COLOR, GRID_COLOR = "#64748b", "#e4572e", "#e5e7eb"
AGREEMENT_NATS = 1e-3
"""How far the evaluation of a finished checkpoint may be from the last point of its curve."""


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation on all held-out tokens."""

    tokens: int  # the student has read
    nats: float
    top1: float


def read_curve(run: Path) -> list[Point]:
    """The evaluations of a run, in order."""
    points = [
        Point(int(line["tokens/seen"]), float(line["valid/heldout/loss_nats"]), float(line["valid/heldout/top1"]))
        for line in read_metrics(run / "metrics.jsonl")
        if line["kind"] == "valid"
    ]
    return sorted(points, key=lambda point: point.tokens)


def tokens_to_reach(curve: Sequence[Point], nats: float) -> float | None:
    """Tokens after which `curve` first comes down to `nats`, linear between evaluations; None when it never does."""
    previous: Point | None = None
    for point in curve:
        if point.nats <= nats:
            if previous is None:
                return float(point.tokens)
            return previous.tokens + (point.tokens - previous.tokens) * (previous.nats - nats) / (previous.nats - point.nats)
        previous = point
    return None


def write(out: Path, seconds: Mapping[str, float], console: Console) -> None:
    """Compute the verdict, write verdict.json, demo.png and selection.html, show it all.

    Raises:
        ValueError: a checkpoint's evaluation does not agree with the curve of its run.
    """
    clm, slm = read_curve(out / "clm"), read_curve(out / "slm")
    reference = read_curve(out / "reference")[-1]
    for name, curve in (("clm", clm), ("slm", slm)):
        measured = json.loads((out / "results" / f"{name}.json").read_text())["corpora"]["heldout"]
        if abs(measured["loss_nats"] - curve[-1].nats) > AGREEMENT_NATS:
            raise ValueError(f"{out / name}: checkpoint has {measured['loss_nats']} nats, its curve ends at {curve[-1].nats}")
    chosen = Selection.read_json(out / "results" / "probe.json")
    pages = selection.read_pages(out, chosen)
    shares = selection.kept_shares(pages)
    needed = tokens_to_reach(slm, clm[-1].nats)
    share = None if needed is None else needed / clm[-1].tokens
    verdict = {
        "tokens_share_to_match": share,
        "clm_final_nats": clm[-1].nats,
        "slm_final_nats": slm[-1].nats,
        "clm_final_top1": clm[-1].top1,
        "slm_final_top1": slm[-1].top1,
        "initial_nats": clm[0].nats,
        "initial_top1": clm[0].top1,
        "reference_nats": reference.nats,
        "reference_top1": reference.top1,
        "student_tokens": clm[-1].tokens,
        "fraction": chosen.fraction,
        "kept_share": shares,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
    }
    (out / "verdict.json").write_text(json.dumps(verdict, indent=2) + "\n")
    (out / "selection.html").write_text(selection.html_page(chosen, pages, shares), encoding="utf-8")
    plot(out / "demo.png", clm, slm, needed, shares)
    show(out, clm, slm, reference, share, shares, pages, verdict["total_seconds"], console)


def plot(
    path: Path,
    clm: Sequence[Point],
    slm: Sequence[Point],
    needed: float | None,
    shares: Mapping[str, float | None],
) -> None:
    """Left: held-out loss against tokens and the crossing. Right: which kinds of tokens were kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9ca3af"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(2.2, 1), layout="constrained")
    scale, unit = (1e6, "million") if clm[-1].tokens >= 1e6 else (1e3, "thousand")
    final = clm[-1].nats
    for curve, color, label in ((clm, CLM_COLOR, "all tokens (CLM)"), (slm, SLM_COLOR, "top 60% by excess loss (SLM)")):
        x, y = [point.tokens / scale for point in curve], [point.nats for point in curve]
        left.plot(x, y, color=color, linewidth=2.2, marker="o", markersize=3.5, label=label)
        left.annotate(
            f"{y[-1]:.3f}", (x[-1], y[-1]), (6, 0), textcoords="offset points", color=color, va="center", weight="bold"
        )
    left.axhline(final, color=CLM_COLOR, linewidth=1, linestyle=(0, (4, 3)))
    if needed is not None:
        left.plot([needed / scale] * 2, [left.get_ylim()[0], final], color=SLM_COLOR, linewidth=1, linestyle=(0, (2, 2)))
        left.plot(
            needed / scale, final, "o", markersize=9, markerfacecolor="white", markeredgecolor=SLM_COLOR, markeredgewidth=2
        )
        left.annotate(
            f"selection reaches\nordinary training's\nfinal loss after\n{100 * needed / clm[-1].tokens:.0f}% of its tokens",
            (needed / scale, final),
            (0.03, 0.06),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": SLM_COLOR, "shrinkB": 7, "relpos": (0.7, 1.0)},
            color=SLM_COLOR,
        )
    left.set_xlabel(f"tokens read by the student ({unit})")
    left.set_ylabel("loss on all held-out tokens (nats)")
    left.set_title("Held-out clean English", loc="left", weight="bold")
    left.grid(color=GRID_COLOR, linewidth=0.8)
    left.set_axisbelow(True)
    left.margins(x=0.02)
    left.legend(frameon=False, loc="upper right")
    known = [(selection.KINDS[kind], value) for kind, value in shares.items() if value is not None]
    labels, values = [label for label, _ in known][::-1], [100 * value for _, value in known][::-1]
    bars = right.barh(labels, values, color=[SLM_COLOR if label == selection.KINDS["clean"] else "#cbd5e1" for label in labels])
    right.bar_label(bars, [f"{value:.0f}%" for value in values], padding=4)
    right.set_xlim(0, 109)
    right.set_title("Share of tokens kept", loc="left", weight="bold")
    right.tick_params(length=0)
    right.spines[["bottom", "left"]].set_visible(False)
    right.set_xticks([])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show(
    out: Path,
    clm: Sequence[Point],
    slm: Sequence[Point],
    reference: Point,
    share: float | None,
    shares: Mapping[str, float | None],
    pages: list[selection.Page],
    total_seconds: float,
    console: Console,
) -> None:
    """The same, on the terminal."""
    table = Table(title="All held-out clean tokens", title_justify="left")
    for column in ("model", "trained on", "nats/token", "perplexity", "top-1"):
        table.add_column(column, justify="left" if column in ("model", "trained on") else "right")
    for name, trained_on, point in (
        ("initialization", "web mix", clm[0]),
        ("reference", "+ clean text", reference),
        ("CLM student", "+ mix, all tokens", clm[-1]),
        ("SLM student", "+ mix, top 60% by excess loss", slm[-1]),
    ):
        style = "bold" if name == "SLM student" else ""
        cells = (f"{point.nats:.4f}", f"{math.exp(point.nats):.1f}", f"{100 * point.top1:.2f}%")
        table.add_row(name, trained_on, *cells, style=style)
    console.print()
    console.print(table)
    kinds = ", ".join(f"{selection.KINDS[kind]} {100 * value:.0f}%" for kind, value in shares.items() if value is not None)
    console.print(f"Kept share by kind of token: {kinds}\n")
    has_colors = console.color_system is not None
    legend = "green: kept   dim: dropped" if has_colors else "in ⟦ ⟧: dropped, the rest: kept"
    console.print(Panel(selection.terminal_sample(pages, has_colors), title=legend, title_align="left"))
    generated = (out / "results" / "generated.txt").read_text(encoding="utf-8").strip()
    console.print(Panel(generated, title="the SLM student continues a sentence", title_align="left"), markup=False)
    console.print(Panel(verdict_sentence(share, clm, slm), title="verdict", title_align="left", border_style="green"))
    console.print(f"plot        {out / 'demo.png'}\nselection   {out / 'selection.html'}\nnumbers     {out / 'verdict.json'}")
    console.print(f"dashboard   tensorboard --logdir {out}")
    console.print(f"{total_seconds / 60:.1f} minutes of stages in all")


def verdict_sentence(share: float | None, clm: Sequence[Point], slm: Sequence[Point]) -> str:
    """The verdict in words."""
    gain = clm[-1].nats - slm[-1].nats
    top1 = 100 * (slm[-1].top1 - clm[-1].top1)
    ending = f"It ends {abs(gain):.3f} nats {'lower' if gain >= 0 else 'higher'}, with top-1 accuracy {top1:+.2f} points."
    if share is None:
        return f"Selection never reaches ordinary training's final held-out loss ({clm[-1].nats:.4f} nats). {ending}"
    return f"Selection reaches ordinary training's final held-out loss with {100 * share:.0f}% of the tokens. {ending}"


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: report.py RUN_FOLDER, for example report.py runs/demo\n")
        return 2
    out = Path(sys.argv[1])
    write(out, json.loads((out / "stages" / "seconds.json").read_text()), Console(highlight=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
