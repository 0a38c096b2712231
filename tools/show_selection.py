#!/usr/bin/env python
"""Show which tokens of a text selection keeps: one HTML page, to be opened in any browser.

    python tools/show_selection.py runs/rho1 --reference runs/reference                      # of the run's own data.valid
    python tools/show_selection.py runs/rho1 --reference runs/reference --corpus data/web --documents 0,17
    python tools/show_selection.py runs/rho1 --reference data/web_ref_nll --corpus data/web  # a sidecar of `megarpt score`
    python tools/show_selection.py runs/rho1 --reference runs/reference --text "The quick brown fox" --fraction 0.5
    python tools/show_selection.py runs/clm --scorer loss --file README.md --file LICENSE

Tokens are scored in the windows, and chosen by the rule, that the student was trained with; options replace parts of the rule.
Those of a corpus compete with --max-tokens others spread evenly over it, as in a batch of training: alone, each document would
keep the same share. A text of your own competes with nothing but itself unless --corpus is given too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.table import Table

from megarpt.config.schema import ObjectiveConfig
from megarpt.corpus.console import ToolParser, non_negative, positive, run_tool
from megarpt.errors import DataError

if TYPE_CHECKING:
    from megarpt.device.runtime import Runtime
    from megarpt.run.selection_page import Selection

SCORERS = [name for name in get_args(ObjectiveConfig.model_fields["scorer"].annotation) if name != "none"]
SCOPES = get_args(ObjectiveConfig.model_fields["scope"].annotation)
TITLE_CHARACTERS = 60


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    # Read by OpenMP when torch is loaded; threads that wait by spinning stop each other on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from megarpt.device import runtime

    started = runtime.start(args.device)
    run(args, started)
    started.close()


def run(args: argparse.Namespace, started: Runtime) -> None:
    """Score, choose, write and say what was written."""
    # On a CPU megatron-core must not be imported before the device is started.
    from megarpt.run.selection import SelectionOptions, select_tokens
    from megarpt.run.selection_page import write_page

    texts = [(" ".join(text.split())[:TITLE_CHARACTERS], text) for text in args.text] + [
        (path.name, read_text(path)) for path in args.file
    ]
    options = SelectionOptions(
        student=args.student,
        reference=args.reference,
        corpus=args.corpus,
        documents=args.documents,
        num_documents=args.num_documents,
        texts=tuple(texts),
        scorer=args.scorer,
        fraction=args.fraction,
        scope=args.scope,
        max_shown=args.max_shown,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    selection = select_tokens(options, started)
    if args.json:
        selection.write_json(args.json)
    if args.output:
        write_page(args.output, selection)
    show(selection, [path for path in (args.output, args.json) if path], Console(highlight=False))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("student", help="run folder or checkpoint of the model whose selection is shown")
    parser.add_argument("--reference", metavar="PATH", help="run folder, checkpoint or sidecar (default: the student's own)")
    parser.add_argument("--corpus", metavar="PREFIX", help="tokenized corpus (default: the run's only data.valid)")
    parser.add_argument("--documents", type=numbers, metavar="N,N", help="which documents of it, counted from 0; or: all")
    parser.add_argument("--num-documents", type=positive, default=3, metavar="N", help="else so many at random (default: 3)")
    parser.add_argument("--seed", type=non_negative, default=0, help="which ones those are")
    parser.add_argument("--max-shown", type=positive, default=4000, metavar="N", help="tokens of each document (default: 4000)")
    parser.add_argument("--text", action="append", default=[], help="a text of your own instead; repeatable")
    parser.add_argument("--file", action="append", default=[], type=Path, help="the same from a file of UTF-8; repeatable")
    parser.add_argument("--scorer", choices=SCORERS, help="what tokens are ranked by (default: the run's, or excess_loss)")
    parser.add_argument("--fraction", type=float, metavar="F", help="share that is kept (default: the run's, or 0.6)")
    parser.add_argument("--scope", choices=SCOPES, help="which tokens compete (default: the run's, or global_batch)")
    parser.add_argument(
        "--max-tokens", type=non_negative, default=1 << 16, metavar="N", help="of the corpus that compete too (default: 65536)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: selection.html, or none with --json)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every shown token with its numbers")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA when it is usable")
    args = parser.parse_args(argv)
    if args.documents is not None and (args.text or args.file):
        parser.error("--documents: got together with --text or --file, expected one or the other to be shown")
    if args.output is None and args.json is None:
        args.output = Path("selection.html")
    return args


def numbers(text: str) -> tuple[int, ...] | str:
    """An argparse type: numbers of documents."""
    if text == "all":
        return text
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers such as 0,3,7, or all")
    return tuple(int(part) for part in parts)


def read_text(path: Path) -> str:
    """The content of a file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--file: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--file: {path}: byte {error.start} is not UTF-8; convert the file first") from error


def show(selection: Selection, written: Sequence[Path], console: Console) -> None:
    """A summary, on the terminal."""
    rule = f"the best {100 * selection.fraction:g}% by {selection.scorer}, scope {selection.scope}"
    threshold = "" if selection.threshold is None else f", threshold {selection.threshold:+.4g}"
    table = Table(title=f"{rule}{threshold}", title_justify="left")
    for column in ("text", "tokens", "kept", "student", "reference"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for document in selection.documents:
        share = document.kept_share
        means = []
        for name in ("loss", "reference_loss"):
            values = [value for token in document.tokens if (value := getattr(token, name)) is not None]
            means.append(f"{sum(values) / len(values):.3f}" if values else "-")
        kept = "-" if share is None else f"{100 * share:.1f}%"
        table.add_row(document.title, f"{len(document.tokens):,}", kept, *means)
    console.print(table)
    console.print(f"{selection.num_kept:,} of {selection.num_competing:,} competing tokens are kept; losses are mean nats")
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_tool(main))
