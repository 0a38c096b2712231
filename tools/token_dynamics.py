#!/usr/bin/env python
"""Show what a training did to single tokens: learned, unlearned, known from the start, never learned.

    python tools/token_dynamics.py runs/clm                             # its checkpoints, on its own data.valid
    python tools/token_dynamics.py runs/clm --corpus data/held_out --output dynamics
    python tools/token_dynamics.py exported/a exported/b exported/c --corpus data/held_out --output dynamics
    torchrun --nproc-per-node 8 tools/token_dynamics.py runs/clm        # the same on eight GPUs

A line is fitted to every token's loss over the checkpoints (Rho-1, appendix D.1). A token whose line falls by more than
--threshold nats from first to last is H->L, one whose line rises by more is L->H; the others are L->L or H->H, as their last
loss is at most the mean of all or above it. At least three checkpoints are needed: train with checkpoint.interval_steps=N and
checkpoint.keep_every_steps=N.

Losses are kept in OUTPUT/losses, named by the hash of the weights: the same command, or one with more checkpoints, scores only
what is new, and goes on after a signal. OUTPUT/token_dynamics.json and .png hold the result.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megarpt.corpus.atomic import atomic_write_json, write_errors
from megarpt.corpus.console import ToolParser, non_negative, positive, run_tool
from megarpt.corpus.indexed import CorpusIndex, bin_path
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.errors import ConfigError, DataError, ExtensionError
from megarpt.log import setup_logging

if TYPE_CHECKING:
    from megarpt.device.runtime import Runtime

COLORS = {"H->L": "#0072B2", "L->H": "#D55E00", "L->L": "#009E73", "H->H": "#CC79A7"}  # apart also for the colour-blind
MARKERS = {"H->L": "o", "L->H": "^", "L->L": "s", "H->H": "D"}
CONTEXT_TOKENS = 24  # on each side of an example


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.plot:
        require_matplotlib()
    # Read by OpenMP when torch is loaded; threads that wait by spinning stop each other on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from megarpt.device import runtime

    started = runtime.start(args.device)
    setup_logging(rank=started.rank, world_size=started.world_size)  # the other ranks are silent
    run(args, started)
    started.close()


def run(args: argparse.Namespace, started: Runtime) -> None:
    """Score what is not scored yet, classify, write and show."""
    # On a CPU megatron-core must not be imported before the device is started.
    from megarpt.run.checkpoint_losses import find_sources, places, score_sources
    from megarpt.train.token_dynamics import classify_tokens

    sources = find_sources(args.sources)
    corpus, output = args.corpus or own_corpus(sources[-1]), args.output or own_folder(args.sources)
    losses = score_sources(
        sources, corpus, output / "losses", started, micro_batch_size=args.micro_batch_size, device=args.device
    )
    if started.rank > 0:
        return
    x, axis = places(losses)
    classes = classify_tokens([each.values for each in losses], x, args.threshold)
    examples = pick_examples(classes.of_token, losses, corpus, open_tokenizer(args.tokenizer, sources), args)
    result = {
        "corpus": corpus,
        "threshold_nats": args.threshold,
        "axis": axis,
        "checkpoints": [
            {"name": each.name, "step": each.step, "tokens_seen": each.tokens_seen, "x": at, "losses": each.prefix}
            for each, at in zip(losses, x, strict=True)
        ],
        "tokens": int(classes.counts.sum()),
        "tokens_not_finite": classes.num_not_finite,
        "mean_loss_nats": classes.all_mean_losses.tolist(),
        "classes": describe(classes),
        "examples": {name: [vars(each) for each in chosen] for name, chosen in examples.items()},
    }
    written = [output / "token_dynamics.json"]
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        atomic_write_json(written[0], result)
        if args.plot:
            written.append(output / "token_dynamics.png")
            draw(result, written[-1])
        if args.npz:
            written.append(output / "tokens.npz")
            save_tokens(written[-1], classes.of_token, losses, x, corpus)
    show(result, written, Console(highlight=False))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument(
        "sources", nargs="+", help="a run folder, or checkpoints, exports and sidecars of `megarpt score`, oldest first"
    )
    parser.add_argument("--corpus", metavar="PREFIX", help="held-out corpus (default: the run's only data.valid)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN/token_dynamics")
    parser.add_argument("--threshold", type=nats, default=0.2, metavar="NATS", help="of the fitted change (default: 0.2)")
    parser.add_argument("--examples", type=non_negative, default=4, metavar="N", help="tokens shown per class (default: 4)")
    parser.add_argument("--seed", type=non_negative, default=0, help="which examples are shown")
    parser.add_argument("--tokenizer", help="decodes the examples, when only sidecars are given")
    parser.add_argument("--npz", action="store_true", help="also write OUTPUT/tokens.npz: class and losses of every token")
    parser.add_argument("--no-plot", dest="plot", action="store_false", help="leave the picture out")
    parser.add_argument(
        "--micro-batch-size", type=positive, default=8, metavar="N", help="windows per forward pass (default: 8)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA when it is usable")
    return parser.parse_args(argv)


def nats(text: str) -> float:
    """An argparse type: a number, 0 or above."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of nats, 0 or above")
    return number


def require_matplotlib() -> None:
    """Now, rather than after an hour of scoring."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ExtensionError(
            f"the picture needs matplotlib ({error}); it is in the extra `demo`: pip install -e .[demo], or pass --no-plot"
        ) from error


def own_corpus(source: Path) -> str:
    """The held-out corpus of the run that a checkpoint is of."""
    from megarpt.run.pretrained import only_held_out
    from megarpt.train.checkpoint_files import read_config

    if not source.is_dir():
        raise ConfigError("--corpus: a sidecar does not say where its corpus lies; name its prefix")
    return only_held_out(read_config(source)).path


def own_folder(sources: Sequence[str]) -> Path:
    """Inside the run folder, when that is what was given."""
    if len(sources) == 1 and (Path(sources[0]) / "checkpoints").is_dir():
        return Path(sources[0]) / "token_dynamics"
    raise ConfigError("--output: name a folder for the result; it is only left out when one run folder is given")


def open_tokenizer(spec: str | None, sources: Sequence[Path]) -> Tokenizer | None:
    """What decodes the examples; None when nobody says."""
    from megarpt.run.tokenizer_files import find_tokenizer
    from megarpt.train.checkpoint_files import read_config

    if spec is not None:
        return load_tokenizer(spec)
    checkpoint = next((source for source in sources if source.is_dir()), None)
    return find_tokenizer(read_config(checkpoint), checkpoint) if checkpoint is not None else None


@dataclass(frozen=True)
class Example:
    """One token of a class, in its document."""

    position: int  # in the corpus
    before: str
    token: str
    after: str
    losses_nats: list[float]


def pick_examples(
    of_token: np.ndarray, losses: Sequence[Any], corpus: str, tokenizer: Tokenizer | None, args: argparse.Namespace
) -> dict[str, list[Example]]:
    """Tokens drawn at random from each class; none without a tokenizer.

    Raises:
        DataError: the tokenizer is not the corpus' own.
    """
    from megarpt.corpus.manifest import CorpusManifest
    from megarpt.train.samples import token_pieces
    from megarpt.train.token_dynamics import CLASSES

    if tokenizer is None:
        return {}
    expected = CorpusManifest.load(corpus).tokenizer
    if tokenizer.sha256 != expected.sha256:
        raise DataError(f"--tokenizer: got {tokenizer.name} ({tokenizer.sha256[:12]}), expected {expected.name} of {corpus}")
    index, rng = CorpusIndex(corpus), np.random.default_rng(args.seed)
    ids = np.memmap(bin_path(corpus), mode="r", dtype=index.dtype)
    starts = index.pointers // index.dtype.itemsize
    examples: dict[str, list[Example]] = {}
    for number, name in enumerate(CLASSES):
        members = np.flatnonzero(of_token == number)
        examples[name] = []
        for position in rng.choice(members, size=min(args.examples, len(members)), replace=False).tolist():
            document = int(np.searchsorted(starts, position, side="right")) - 1
            begin = max(int(starts[document]), position - CONTEXT_TOKENS)
            end = min(int(starts[document] + index.lengths[document]), position + 1 + CONTEXT_TOKENS)
            pieces = token_pieces(tokenizer.decode, ids[begin:end].tolist())
            at = position - begin
            token = pieces[at] or tokenizer.token_text(int(ids[position]))  # a part of a character, or a special token
            curve = [round(float(each.values[position]), 4) for each in losses]
            examples[name].append(Example(position, "".join(pieces[:at]), token, "".join(pieces[at + 1 :]), curve))
    return examples


def describe(classes: Any) -> dict[str, dict[str, Any]]:
    """The classes by name, as plain values; null where a class is empty."""
    from megarpt.train.token_dynamics import CLASSES, MEANINGS

    def plain(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    return {
        name: {
            "meaning": MEANINGS[i],
            "tokens": int(classes.counts[i]),
            "share": float(classes.shares[i]),
            "mean_fitted_change_nats": plain(classes.mean_change[i]),
            "mean_loss_nats": [plain(value) for value in classes.mean_losses[i]],
        }
        for i, name in enumerate(CLASSES)
    }


def save_tokens(path: Path, of_token: np.ndarray, losses: Sequence[Any], x: Sequence[float], corpus: str) -> None:
    """Every classified token: position in the corpus, id, class (an index into `classes`), and its loss at every checkpoint."""
    from megarpt.train.token_dynamics import CLASSES, IGNORED

    position = np.flatnonzero(of_token != IGNORED)
    index = CorpusIndex(corpus)
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez_compressed(
        temporary,
        classes=np.array(CLASSES),
        x=np.array(x),
        position=position,
        token_id=np.memmap(bin_path(corpus), mode="r", dtype=index.dtype)[position],
        token_class=of_token[position],
        losses=np.stack([each.values[position] for each in losses]),
    )
    temporary.replace(path)


def draw(result: dict[str, Any], path: Path) -> None:
    """Left: mean loss of each class over the checkpoints. Right: how many tokens they have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    x = [each["x"] for each in result["checkpoints"]]
    scale, unit = _scale(x[-1]) if result["axis"] == "tokens seen" else (1.0, "")
    for name, each in result["classes"].items():
        if each["tokens"]:
            label = f"{name}  {each['meaning']}"
            style = {"color": COLORS[name], "marker": MARKERS[name], "markersize": 4.5, "linewidth": 2.0}
            left.plot([value / scale for value in x], each["mean_loss_nats"], label=label, **style)
    left.plot(
        [value / scale for value in x], result["mean_loss_nats"], color="#6b7280", linestyle=(0, (4, 3)), label="all tokens"
    )
    left.set_xlabel(f"{result['axis']}{f' ({unit})' if unit else ''}")
    left.set_ylabel("mean loss (nats)")
    left.set_title("Loss by class of token", loc="left", weight="bold")
    left.grid(color="#e5e7eb", linewidth=0.8)
    left.set_axisbelow(True)
    left.margins(x=0.02)
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=3)
    names = list(result["classes"])[::-1]
    shares = [100 * result["classes"][name]["share"] for name in names]
    bars = right.barh(names, shares, color=[COLORS[name] for name in names])
    right.bar_label(bars, [f"{share:.1f}%" for share in shares], padding=4)
    right.set_xlim(0, 1.25 * max(shares))
    right.set_title(f"Share of {result['tokens']:,} tokens", loc="left", weight="bold")
    right.tick_params(length=0)
    right.set_xticks([])
    for axes, hidden in ((left, ["top", "right"]), (right, ["top", "right", "bottom", "left"])):
        axes.spines[hidden].set_visible(False)
    figure.savefig(path, dpi=150)


def _scale(largest: float) -> tuple[float, str]:
    return next(
        ((size, unit) for size, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")) if largest >= size), (1.0, "")
    )


def show(result: dict[str, Any], written: Sequence[Path], console: Console) -> None:
    """The result, on the terminal."""
    title = f"{result['tokens']:,} tokens of {result['corpus']}, {len(result['checkpoints'])} checkpoints"
    table = Table(title=title, title_justify="left")
    for column in ("class", "meaning", "tokens", "share", "fitted change", "first", "last"):
        table.add_column(column, justify="left" if column in ("class", "meaning") else "right")
    for name, each in result["classes"].items():
        curve = each["mean_loss_nats"]
        change = "-" if each["mean_fitted_change_nats"] is None else f"{each['mean_fitted_change_nats']:+.3f}"
        table.add_row(
            name,
            each["meaning"],
            f"{each['tokens']:,}",
            f"{100 * each['share']:.1f}%",
            change,
            _nats(curve[0]),
            _nats(curve[-1]),
        )
    first, last = result["mean_loss_nats"][0], result["mean_loss_nats"][-1]
    table.add_row("all", "", f"{result['tokens']:,}", "", f"{last - first:+.3f}", _nats(first), _nats(last), style="dim")
    console.print(table)
    over_time = Table(title="mean loss in nats", title_justify="left")
    for column in ("checkpoint", result["axis"], *result["classes"], "all"):
        over_time.add_column(column, justify="left" if column == "checkpoint" else "right")
    for i, checkpoint in enumerate(result["checkpoints"]):
        curve = [_nats(each["mean_loss_nats"][i]) for each in result["classes"].values()]
        over_time.add_row(checkpoint["name"], f"{checkpoint['x']:,.0f}", *curve, _nats(result["mean_loss_nats"][i]))
    console.print(over_time)
    for name, chosen in ((name, chosen) for name, chosen in result["examples"].items() if chosen):
        console.print(Text(f"\n{name}  {result['classes'][name]['meaning']}", style="bold"))
        for example in chosen:
            console.print(_example(example), soft_wrap=True)
    if result["tokens_not_finite"]:
        console.print(f"\n{result['tokens_not_finite']:,} tokens are left out: some checkpoint has no finite loss for them")
    console.print(f"\nwritten: {', '.join(map(str, written))}", soft_wrap=True)


def _example(example: dict[str, Any]) -> Text:
    curve = " ".join(f"{value:.2f}" for value in example["losses_nats"])
    text = Text("  ")
    text.append(_one_line(example["before"][-48:]), style="dim")
    text.append(f"⟦{_one_line(example['token'])}⟧", style="bold")
    text.append(_one_line(example["after"][:24]), style="dim")
    return text.append(f"   {curve}", style="cyan")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else {"\n": "↵", "\t": "⇥"}.get(c, "\N{REPLACEMENT CHARACTER}") for c in text)


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(run_tool(main))
