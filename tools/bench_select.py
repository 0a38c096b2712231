"""Time of one exact selection on one rank: compiled, in plain torch, and beside what torch itself has.

    python tools/bench_select.py --scores 1e6 16e6 --fraction 0.6 --json select.json

`kthvalue` and `topk` are torch's and do less: they know one rank, and kthvalue keeps all scores equal to the last or none. The
limit is one read of the scores and one write of the mask at the speed of `copy_`, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megarpt.ops import _ext
from megarpt.ops.token_select import SelectionSums, global_threshold, select_excess, select_top_fraction, selection_sums


def kthvalue(score: Tensor, fraction: float) -> Tensor:
    """Everything from the k-th largest score upwards."""
    n = score.numel()
    return score >= score.kthvalue(n - round(fraction * n) + 1).values


def topk(score: Tensor, fraction: float) -> Tensor:
    """The k largest, ties as they come."""
    best = score.topk(round(fraction * score.numel()), sorted=False).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(0, best, True)


def in_parts(logprob: Tensor, reference: Tensor, valid: Tensor, fraction: float, order: Tensor) -> SelectionSums:
    """As training does it, where any scorer goes with any weighting."""
    score = -logprob - reference
    mask = select_top_fraction(score, valid, fraction, order=order).mask
    return selection_sums(-logprob, score, reference, valid, mask)


def in_torch(call: Callable[[], object]) -> Callable[[], object]:
    """The same without the extension."""

    def run() -> None:
        with mock.patch.object(_ext, "_C", None):
            call()

    return run


def contenders(n: int, fraction: float) -> dict[str, Callable[[], object]]:
    """Name -> one selection of n scores."""
    generator = torch.Generator().manual_seed(0)
    score, reference = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
    logprob = -score
    valid, order, equal = torch.ones(n, dtype=torch.bool), torch.arange(n), torch.zeros(n)
    mask, copy = torch.empty_like(valid), torch.empty_like(score)
    ours: dict[str, Callable[[], object]] = {
        "select_top_fraction": lambda: select_top_fraction(score, valid, fraction, order=order),
        "select_top_fraction, all equal": lambda: select_top_fraction(equal, valid, fraction, order=order),
        "select_excess": lambda: select_excess(logprob, reference, valid, fraction, order=order),
        "select_excess, in its three parts": lambda: in_parts(logprob, reference, valid, fraction, order),
        "global_threshold": lambda: global_threshold(score, valid, fraction),
    }
    plain = {f"{name}, plain torch": in_torch(call) for name, call in ours.items()}
    peers: dict[str, Callable[[], object]] = {
        "kthvalue": lambda: kthvalue(score, fraction),
        "topk": lambda: topk(score, fraction),
        "limit": lambda: (copy.copy_(score), mask.copy_(valid)),
    }
    return ours | plain | peers


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """Median CPU time of all threads."""
    call()
    samples = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        samples.append(1e3 * (time.process_time() - start))
    return statistics.median(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", nargs="+", type=float, default=[1e6, 16e6], help="how many, on this rank")
    parser.add_argument("--fraction", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = {
        int(n): {name: milliseconds(call, args.rounds) for name, call in contenders(int(n), args.fraction).items()}
        for n in args.scores
    }
    console = Console()
    console.print(f"extension: {_ext.describe()}; {args.threads} thread(s), CPU milliseconds, medians of {args.rounds}")
    table = Table("", *(f"{n:,} scores" for n in times))
    for name in next(iter(times.values())):
        table.add_row(name, *(f"{column[name]:.1f}" for column in times.values()))
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"fraction": args.fraction, "threads": args.threads, "cpu_ms": times}, indent=1))


if __name__ == "__main__":
    main()
