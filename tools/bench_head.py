"""Time and memory of the language-model head: hidden states to per-token loss to gradients.

    python tools/bench_head.py --shape 4096x256x8192 --dtype float32 bfloat16 --kept 1.0 0.6
    python tools/bench_head.py --shape 4096x512x32000 --dtype bfloat16 --contenders plain,megarpt,compile --json head.jsonl

Every contender computes the same thing: per-token losses, the sum of those a 0/1 weight keeps, and the gradients of hidden
states and weight. The weight is applied after the loss, as token selection has to. Contenders run in turn within each round, in
one process; seconds are the best round's. `floor` is the three matrix products alone, all tokens kept, in buffers that are
reused: the limit of any method that drops nothing. Peak bytes are what is allocated beyond inputs, at the worst moment, with
the two gradients included.

On Linux the C library returns large buffers to the system after each use and pays for fresh pages at the next; pass
--reuse-memory to make it keep them for every contender alike.
With more than one thread on a machine that others use, set OMP_WAIT_POLICY=passive, or waiting threads are what is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megarpt.ops.linear_logprob import linear_logprob

Step = Callable[[], object]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels -> per-token nll [t]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Whole logits, softmax in fp32: what nearly every training script does."""
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")


def contenders(names: list[str]) -> dict[str, Loss]:
    """Name -> per-token loss."""
    known: dict[str, Callable[[], Loss]] = {
        "plain": lambda: plain,
        "compile": lambda: torch.compile(plain, dynamic=False),
        "torch_none": lambda: lambda x, w, y: F.linear_cross_entropy(x, w, y, reduction="none"),
        "megarpt": lambda: lambda x, w, y: -linear_logprob(x, w, y)[0],
        "megarpt_recompute": lambda: lambda x, w, y: -linear_logprob(x, w, y, keep_bytes=0)[0],
        "megarpt_chunk256": lambda: lambda x, w, y: -linear_logprob(x, w, y, chunk_tokens=256)[0],
        "megarpt_entropy": lambda: lambda x, w, y: -linear_logprob(x, w, y, entropy=True)[0],
    }
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"--contenders: got {', '.join(unknown)}; expected some of {', '.join(known)}")
    return {name: known[name]() for name in names}


def floor_step(hidden: Tensor, weight: Tensor) -> Step:
    """The three products, nothing else."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.t(), hidden, out=grad_weight)

    return step


def training_step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor, kept: Tensor) -> Step:
    """Forward, weighted sum, backward; the gradients are returned, so nothing of a step outlives it."""

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad((loss(hidden, weight, labels) * kept).sum(), (hidden, weight))

    return step


def seconds(step: Step, device: torch.device) -> tuple[float, float]:
    """CPU (all threads) and wall seconds of one step."""
    start_cpu, start = time.process_time(), time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - start_cpu, time.perf_counter() - start


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes alive at once beyond those alive at the start."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = step()
        del result
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def bench(
    shape: tuple[int, int, int], dtype: torch.dtype, kept: float, names: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One table: every contender at one shape, dtype and kept share."""
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    tokens, hidden_size, vocab = shape
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, hidden_size, generator=generator)).to(device, dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator).to(device)
    keep = (torch.rand(tokens, generator=generator).argsort() < round(kept * tokens)).float().to(device)
    steps = {"floor": floor_step(hidden, weight)}
    steps |= {name: training_step(loss, hidden, weight, labels, keep) for name, loss in contenders(names).items()}
    for step in steps.values():
        step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    flops = 6.0 * tokens * hidden_size * vocab
    which = 1 if device.type == "cuda" else 0
    floor = min(sample[which] for sample in times["floor"])
    rows = []
    for name, samples in times.items():
        best = min(sample[which] for sample in samples)
        rows.append(
            {
                "contender": name,
                "shape": "x".join(map(str, shape)),
                "dtype": str(dtype).removeprefix("torch."),
                "kept": kept,
                "threads": torch.get_num_threads(),
                "clock": "wall" if which else "cpu",
                "best_s": best,
                "median_s": statistics.median(sample[which] for sample in samples),
                "wall_s": min(sample[1] for sample in samples),
                "over_floor": best / floor,
                "gflops": flops / best / 1e9,
                "peak_bytes": 0 if name == "floor" else peak_bytes(steps[name], device),
                "reuse_memory": args.reuse_memory,
            }
        )
    return rows


def keep_freed_memory() -> None:
    """Ask the C library to hold on to freed memory instead of unmapping it (glibc: M_MMAP_MAX, M_TRIM_THRESHOLD)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(-4, 0) and mallopt(-1, -1)):
        sys.exit("--reuse-memory: this C library has no mallopt; run without it")


def show(rows: list[dict[str, Any]]) -> None:
    """Print one table."""
    first = rows[0]
    print(
        f"\n{first['shape']} {first['dtype']}, {first['kept']:.0%} kept, {first['threads']} thread(s), {first['clock']} seconds"
    )
    print(f"{'':>20} {'best s':>9} {'median s':>9} {'x floor':>8} {'GFLOP/s':>9} {'peak MB':>9}")
    for row in rows:
        times = f"{row['best_s']:>9.4f} {row['median_s']:>9.4f} {row['over_floor']:>8.2f}"
        print(f"{row['contender']:>20} {times} {row['gflops']:>9.0f} {row['peak_bytes'] / 1e6:>9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["4096x256x8192"], help="tokens x hidden x vocabulary")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--kept", nargs="+", type=float, default=[1.0, 0.6], help="share of tokens with a non-zero weight")
    parser.add_argument(
        "--contenders", default="plain,megarpt,megarpt_recompute", help="comma-separated; also compile, torch_none"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--reuse-memory", action="store_true", help="let the C library keep freed memory (see above)")
    parser.add_argument("--json", help="append one line per row to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.reuse_memory:
        keep_freed_memory()
    for text in args.shape:
        numbers = text.split("x")
        if len(numbers) != 3 or not all(number.isdigit() and int(number) > 0 for number in numbers):
            sys.exit(f"--shape: got {text!r}; expected tokens x hidden x vocabulary, such as 4096x256x8192")
        tokens, hidden, vocab = map(int, numbers)
        for dtype in args.dtype:
            for kept in args.kept:
                rows = bench((tokens, hidden, vocab), getattr(torch, dtype), kept, args.contenders.split(","), args)
                show(rows)
                if args.json:
                    with open(args.json, "a", encoding="utf-8") as out:
                        out.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
