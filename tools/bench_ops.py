"""Time and memory of the language-model head: hidden states to per-token loss to gradients, against everybody's.

    python tools/bench_ops.py                                   # the shapes of docs/benchmarks.md that take a minute
    python tools/bench_ops.py --shape 4096x512x32000 4096x512x131072 --dtype bfloat16 --kept 1.0 0.6 --json ops.json
    python tools/bench_ops.py --contenders plain,megarpt,compile --device cuda

Every contender gets the same hidden states, weight, labels and 0/1 weights, and computes the weighted sum of the per-token
losses and the gradients of hidden states and weight. The weights are applied after the loss, as token selection has to, but
for the contenders that say otherwise. They run in turn within each round, in one process; the table shows medians. What cannot
run here is named with its reason.

    plain         hidden @ weight.T, cross_entropy in fp32: what nearly every training script does
    compile       the same under torch.compile
    mcore         megatron-core's vocab_parallel_cross_entropy over one rank; mcore_fused its fused form
    torch_linear  torch.nn.functional.linear_cross_entropy, reduction="none"; its losses are in the inputs' dtype
    cce           cut-cross-entropy (optional: pip install cut-cross-entropy triton); on a CPU its torch.compile form
    liger         Liger-Kernel's fused linear cross-entropy (optional: pip install liger-kernel triton), on a GPU only; it
                  makes the gradients in the forward pass for one upstream number, so it cannot use weights known only
                  afterwards: its sum is over all tokens
    megarpt       linear_logprob: nothing held from forward to backward
    megarpt_keep  linear_logprob that holds the logits, as the other contenders do
    megarpt_known linear_logprob that is told the weights, as language modeling can: the gradients are made in the forward
                  pass, from 128 MiB of logits at a time
    floor         the three matrix products alone, all tokens kept, in reused buffers

Columns: seconds (CPU seconds of all threads, wall on a GPU), over plain, over floor, share of the rate that the products of
`floor` reach, and peak MB: bytes beyond inputs and the two gradients at the worst moment.

On Linux the C library returns large buffers to the system after each use and pays for fresh pages at the next, which costs the
contenders with large buffers most; --reuse-memory makes it keep them, for every contender alike, as megarpt's own runs do.
With more than one thread on a machine that others use, set OMP_WAIT_POLICY=passive, or waiting threads are what is measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megarpt.device import runtime

MACHINE = runtime.start("auto", reuse_memory="--reuse-memory" in sys.argv)  # before anything that imports megatron-core

from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy  # noqa: E402
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # noqa: E402

from megarpt.ops import _ext  # noqa: E402
from megarpt.ops.linear_logprob import linear_logprob  # noqa: E402
from megarpt.parallel.layout import ParallelLayout  # noqa: E402
from megarpt.testing.memory import peak_bytes  # noqa: E402

KNOWN = 128 * 2**20  # bytes of logits at a time, train.head_keep_mib's default

Step = Callable[[], object]
Loss = Callable[..., Tensor]  # hidden, weight, labels, weights of the tokens -> per-token nll [t], or its sum []


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
    """Whole logits, softmax in fp32."""
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")


def mcore(cross_entropy: Callable[..., Tensor], *arguments: Any) -> Loss:
    """Whole logits, megatron-core's loss of them; it wants [s, b, v]."""
    return lambda x, w, y, _: cross_entropy((x @ w.t())[:, None].float(), y[:, None], *arguments)[:, 0]


def cut_cross_entropy() -> Loss:
    """Apple's; without a GPU only its torch.compile form runs."""
    from cut_cross_entropy import linear_cross_entropy

    form = "cce" if MACHINE.device.type == "cuda" else "torch_compile"
    return lambda x, w, y, _: linear_cross_entropy(x, w, y, impl=form, reduction="none")


def liger() -> Loss:
    """Liger-Kernel's, summed over all tokens."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

    return lambda x, w, y, _: Fused.apply(x, w, y, None, None, -100, 0.0, 0.0, "sum")[0]


CONTENDERS: dict[str, Callable[[], Loss]] = {
    "plain": lambda: plain,
    "compile": lambda: torch.compile(plain, dynamic=False),
    "mcore": lambda: mcore(vocab_parallel_cross_entropy),
    "mcore_fused": lambda: mcore(fused_vocab_parallel_cross_entropy, torch.distributed.group.WORLD),
    "torch_linear": lambda: lambda x, w, y, _: F.linear_cross_entropy(x, w, y, reduction="none"),
    "cce": cut_cross_entropy,
    "liger": liger,
    "megarpt": lambda: lambda x, w, y, _: -linear_logprob(x, w, y).logprob,
    "megarpt_keep": lambda: lambda x, w, y, _: -linear_logprob(x, w, y, keep_bytes=1 << 50).logprob,
    "megarpt_known": lambda: lambda x, w, y, k: -linear_logprob(x, w, y, keep_bytes=KNOWN, known_gradient=-k).logprob,
    "megarpt_entropy": lambda: lambda x, w, y, _: -linear_logprob(x, w, y, entropy=True).logprob,
}


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
        nll = loss(hidden, weight, labels, kept)
        return torch.autograd.grad((nll * kept).sum() if nll.dim() else nll, (hidden, weight))

    return step


def seconds(step: Step) -> float:
    """CPU seconds of all threads of one step; on a GPU wall seconds."""
    if MACHINE.device.type == "cuda":
        torch.accelerator.synchronize()
        start = time.perf_counter()
        step()
        torch.accelerator.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    step()
    return time.process_time() - start


def bench(shape: tuple[int, int, int], dtype: torch.dtype, kept: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One table: every contender at one shape, dtype and kept share."""
    device = MACHINE.device
    generator = torch.Generator().manual_seed(0)
    tokens, hidden_size, vocab = shape
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, hidden_size, generator=generator)).to(device, dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator).to(device)
    keep = (torch.rand(tokens, generator=generator).argsort() < round(kept * tokens)).float().to(device)
    steps, failures = {"floor": floor_step(hidden, weight)}, {}
    steps["floor"]()
    for name in args.contenders.split(","):
        try:
            steps[name] = training_step(CONTENDERS[name](), hidden, weight, labels, keep)
            steps[name]()
        except (ImportError, RuntimeError) as error:  # a package that is not there, or not for this device; out of memory
            steps.pop(name, None)
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    median = {name: statistics.median(samples) for name, samples in times.items()}
    results_bytes = hidden.numel() * hidden.itemsize + weight.numel() * weight.itemsize
    rows = []
    for name in args.contenders.split(","):
        row = {
            "contender": name,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "kept": kept,
            "threads": torch.get_num_threads(),
            "device": MACHINE.device_name,
            "reuse_memory": args.reuse_memory,
        }
        if name in failures:
            rows.append(row | {"failure": failures[name]})
            continue
        rows.append(
            row
            | {
                "median_s": median[name],
                "best_s": min(times[name]),
                "over_plain": median[name] / median["plain"] if "plain" in median else None,
                "over_floor": median[name] / median["floor"],
                "share_of_peak": median["floor"] / median[name],
                "extra_bytes": peak_bytes(steps[name], device) - results_bytes,
            }
        )
    rows.append(rows[0] | {"contender": "floor", "median_s": median["floor"], "over_floor": 1.0, "extra_bytes": None})
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print one table."""
    first = rows[0]
    rate = 6.0 * torch.tensor(first["shape"], dtype=torch.float64).prod().item() / rows[-1]["median_s"] / 1e9
    shape = "x".join(map(str, first["shape"]))
    clock = "wall" if MACHINE.device.type == "cuda" else "CPU"
    title = f"{shape} {first['dtype']}, {first['kept']:.0%} kept, {first['threads']} thread(s); products: {rate:.0f} GFLOP/s"
    table = Table("", f"{clock} s", "x plain", "x floor", "of peak", "peak MB", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[:-1]:
        if "failure" in row:
            table.add_row(row["contender"], "", "", "", "", "", style="dim")
            continue
        over_plain = "" if row["over_plain"] is None else f"{row['over_plain']:.2f}"
        numbers = (f"{row['median_s']:.3f}", over_plain, f"{row['over_floor']:.2f}", f"{row['share_of_peak']:.0%}")
        style = "bold" if row["contender"].startswith("megarpt") else None
        table.add_row(row["contender"], *numbers, f"{row['extra_bytes'] / 1e6:.1f}", style=style)
    console.print(table)
    for row in rows[:-1]:
        if "failure" in row:
            console.print(f"  {row['contender']} does not run here: {row['failure']}", style="dim", highlight=False)


def parse_shape(text: str) -> tuple[int, int, int]:
    numbers = text.split("x")
    if len(numbers) != 3 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected tokens x hidden x vocabulary, such as 4096x512x32000")
    return int(numbers[0]), int(numbers[1]), int(numbers[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["4096x512x32000"] if MACHINE.device.type == "cpu" else ["8192x4096x128256"]
    parser.add_argument("--shape", nargs="+", type=parse_shape, default=list(map(parse_shape, default)))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--kept", nargs="+", type=float, default=[1.0, 0.6], help="share of tokens with a non-zero weight")
    parser.add_argument(
        "--contenders",
        default="plain,compile,mcore,mcore_fused,torch_linear,cce,liger,megarpt,megarpt_keep,megarpt_known",
        help=f"comma-separated, some of {', '.join(CONTENDERS)}",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reuse-memory", action="store_true", help="let the C library keep freed memory (see above)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    args = parser.parse_args()
    unknown = sorted(set(args.contenders.split(",")) - set(CONTENDERS))
    if unknown:
        sys.exit(f"--contenders: got {', '.join(unknown)}; expected some of {', '.join(CONTENDERS)}")
    torch.set_num_threads(args.threads)
    ParallelLayout().initialize(seed=1)  # megatron-core's losses ask for its groups
    console = Console()
    console.print(f"{MACHINE.device_name}, torch {torch.__version__}, extension: {_ext.describe()}", highlight=False)
    results = []
    for shape in args.shape:
        for dtype in args.dtype:
            for kept in args.kept:
                results.append(bench(shape, getattr(torch, dtype), kept, args))
                show(results[-1], console)
    if args.json:
        report = {
            "machine": platform.processor(),
            "torch": torch.__version__,
            "rows": [row for rows in results for row in rows],
        }
        args.json.write_text(json.dumps(report, indent=1))
    MACHINE.close()


if __name__ == "__main__":
    main()
