#!/usr/bin/env python
"""Show what a policy writes and what it gets for it: one HTML page, to be opened in any browser.

    python tools/show_rollouts.py runs/rpt                          # writes runs/rpt/rollouts.html
    python tools/show_rollouts.py runs/rpt --ranges 10 --prompts 20
    python tools/show_rollouts.py runs/rpt --first 500 --last 600 --output late.html

The page is made of the samples in RUN/rollouts and of RUN/metrics.jsonl, while the run goes or after it. It needs no network
and has no scripts: curves of reward, format and length; the sampled prompts by ranges of steps, best and worst completion side
by side, the thought dimmed and the boxed answer marked; buttons that show only right, wrong or cut-off completions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megarpt.corpus.console import ToolParser, non_negative, positive, run_tool
from megarpt.rl.answers import THINK_CLOSE
from megarpt.run.rollout_page import RolloutView, read_view, write_page


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    view = read_view(args.run, num_ranges=args.ranges, groups_per_range=args.prompts, first=args.first, last=args.last)
    output = args.output or args.run / "rollouts.html"
    write_page(output, view, think_close=args.think_close.encode(), right_reward=args.right_reward)
    show(view, output, Console(highlight=False))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page (default: RUN/rollouts.html)")
    parser.add_argument("--ranges", type=positive, default=5, metavar="N", help="ranges of steps (default: 5)")
    parser.add_argument("--prompts", type=positive, default=8, metavar="N", help="prompts shown of each (default: 8)")
    parser.add_argument("--first", type=non_negative, default=0, metavar="STEP", help="leave out what was before")
    parser.add_argument("--last", type=non_negative, metavar="STEP", help="leave out what was after")
    parser.add_argument(
        "--think-close", default=THINK_CLOSE.decode(), metavar="TEXT", help="ends the thinking (default: %(default)s)"
    )
    parser.add_argument(
        "--right-reward", type=float, default=1.0, metavar="R", help="of what is right in everything (default: 1)"
    )
    args = parser.parse_args(argv)
    if not args.think_close:
        parser.error("--think-close: got an empty text, expected what ends the thinking")
    if not args.right_reward > 0.0:
        parser.error(f"--right-reward: got {args.right_reward}, expected a number above 0")
    return args


def show(view: RolloutView, output: Path, console: Console) -> None:
    """A summary, on the terminal."""
    table = Table(title=f"rollouts of {view.run}", title_justify="left")
    for column in ("steps", "prompts", "completions", "mean reward", "cut off"):
        table.add_column(column, justify="left" if column == "steps" else "right")
    for each in view.ranges:
        known = [reward for reward in each.rewards if reward is not None]
        table.add_row(
            f"{each.first:,} to {each.last:,}",
            f"{each.num_prompts:,}",
            f"{len(each.rewards):,}",
            f"{sum(known) / len(known):.3f}" if known else "-",
            f"{100 * each.num_truncated / len(each.lengths):.0f}%" if each.lengths else "-",
        )
    console.print(table)
    console.print(f"written: {output}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_tool(main))
