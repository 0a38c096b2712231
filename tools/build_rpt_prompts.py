#!/usr/bin/env python
"""Find the positions of a corpus at which a proxy model is uncertain of the next token, and write them as prompts for RL:
PREFIX_train.jsonl, PREFIX_valid.jsonl and the manifest PREFIX.json.

    python tools/build_rpt_prompts.py --proxy runs/proxy --corpus corpora/math --output-prefix prompts/math
    python tools/build_rpt_prompts.py --proxy runs/proxy --corpus corpora/math --output-prefix prompts/math_hard \\
        --thresholds 1.0,1.5,2.0 --max-per-document 16 --max-context-tokens 512

Uncertainty is the entropy of the proxy's 16 likeliest next tokens, in nats. Documents are either for training or for
validation. Killed at any moment, the same command goes on behind the last documents that are on disk, and ends with the same
files. megarpt/rl/prompts.py describes the records; the proxy's tokenizer must be the corpus', and the policy's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megarpt.corpus.console import ToolParser, non_negative, positive, run_tool

if TYPE_CHECKING:
    from megarpt.device.runtime import Runtime


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    # Read by OpenMP when torch is loaded; threads that wait by spinning stop each other on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from megarpt.device import runtime

    started = runtime.start(args.device)
    run(args, started)
    started.close()


def run(args: argparse.Namespace, started: Runtime) -> None:
    """Mine, and say what was found."""
    # On a CPU megatron-core must not be imported before the device is started.
    from megarpt.rl.mining import Thresholds
    from megarpt.run.mining import mine
    from megarpt.run.mining_job import MiningOptions

    given = {name: value for name, value in vars(args).items() if name != "device"}
    options = MiningOptions(**given | {"thresholds": Thresholds(*args.thresholds)})
    show(args.output_prefix, mine(options, started), Console(highlight=False))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    group = parser.add_argument_group("what is read")
    group.add_argument("--proxy", required=True, metavar="PATH", help="run folder or checkpoint of the proxy model")
    group.add_argument("--corpus", required=True, metavar="PREFIX", help="tokenized corpus, of the proxy's tokenizer")
    group.add_argument("--seq-length", type=positive, metavar="N", help="tokens the proxy reads at once (default: its run's)")
    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--thresholds",
        type=three_numbers,
        default=(0.5, 1.0, 1.5),
        metavar="E,M,H",
        help="nats from which on a position is easy, medium and hard (default: 0.5,1.0,1.5)",
    )
    group.add_argument("--keep-easy", action="store_true", help="keep positions below the first threshold too, as `trivial`")
    group.add_argument("--max-per-document", type=positive, default=64, metavar="N", help="positions (default: 64)")
    group.add_argument("--max-prompts", type=positive, default=100_000, metavar="N", help="for training (default: 100000)")
    group.add_argument("--max-valid-prompts", type=positive, default=1000, metavar="N", help="for validation (default: 1000)")
    group.add_argument(
        "--valid-fraction", type=float, default=0.05, metavar="F", help="share of documents for validation (default: 0.05)"
    )
    group.add_argument(
        "--min-context-tokens",
        type=positive,
        default=1,
        metavar="N",
        help="skip positions nearer to the beginning (default: 1)",
    )
    group.add_argument("--seed", type=non_negative, default=0, help="which positions and documents are chosen (default: 0)")
    group = parser.add_argument_group("what is written")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the files, without ending")
    group.add_argument(
        "--max-context-tokens", type=positive, default=1024, metavar="N", help="of a context; the last ones (default: 1024)"
    )
    group.add_argument(
        "--continuation-bytes",
        type=positive,
        default=64,
        metavar="N",
        help="at least so many bytes of the continuation; longer answers are wrong (default: 64)",
    )
    group.add_argument("--restart", action="store_true", help="throw away an unfinished job or finished prompts of this name")
    group = parser.add_argument_group("how it runs")
    group.add_argument("--micro-batch-size", type=positive, default=8, metavar="N", help="texts at a time (default: 8)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA when it is usable")
    return parser.parse_args(argv)


def three_numbers(text: str) -> tuple[float, ...]:
    """An argparse type: three numbers with commas between them."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected three numbers of nats such as 0.5,1.0,1.5")
    return numbers


def show(prefix: str, manifest: dict[str, Any], console: Console) -> None:
    """A summary, on the terminal."""
    table = Table()
    bands = list(manifest["positions"])
    for column in ("", *bands, "documents"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("hard enough, within the cap of a document", *(f"{manifest['positions'][band]:,}" for band in bands), "")
    for split, counts in manifest["prompts"].items():
        numbers = [counts.get(band, 0) for band in bands]
        table.add_row(split, *(f"{number:,}" for number in numbers), f"{manifest['documents'][split]:,}")
    console.print(table)
    console.print(f"written: {prefix}_train.jsonl, {prefix}_valid.jsonl", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_tool(main))
