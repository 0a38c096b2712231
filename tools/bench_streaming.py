"""Peak memory, time and longest sequence of a step with streamed layers, against recomputing and against keeping everything.

    python tools/bench_streaming.py                                         # language modeling, minutes on a CPU
    python tools/bench_streaming.py --objective lm policy --lengths 1024 2048 4096 --json streaming.json --plot streaming.png
    python tools/bench_streaming.py --lengths 4096 --vocab 131072 --contenders recompute,streamed --chunks 2048 1024

Every contender is one model with the same weights, as a run builds it (megatron-core's DDP with its fp32 gradient buffers), and
does forward and backward of the same single-document sequence; the optimizer is not in it. They run in turn within each round,
in one process; the tables show medians.

    none            nothing is recomputed
    recompute       megatron-core's full recomputation, every layer
    selective       megatron-core's selective recomputation of core attention and MLP
    recompute_head  recompute, with megarpt's head in place of the plain one
    streamed        megarpt's streamed layers and head, once for each of --chunks

The first three have the plain head: whole logits by megatron-core's own output layer, softmax in fp32 by torch. The objectives:

    lm              mean cross-entropy of all tokens
    policy          clipped policy gradient (ratio within 1 +- 0.2) on the last three quarters of the sequence, with the k3
                    estimate of the KL divergence from a reference at weight 0.04; the plain head's log-probabilities come from
                    log_softmax and gather

Columns: MB alive at the worst moment beyond weights, gradient buffers and batch (counted from the allocator's events on a
CPU), over `recompute` and over the limit; seconds (CPU seconds of all threads, wall on a GPU), over the same two; relative
differences of loss and gradients from the first contender, which in fp32 must be rounding or the tool fails. The limit is that
of an exact method that recomputes: in memory the inputs of the layers, in time the matrix products (the layers' four times, the
head's three times, causal attention's by half) at the rate this machine reaches in the same run.

    python tools/bench_streaming.py --cap-mb 600 --contenders recompute,recompute_head,streamed --max-length 65536

Instead: the longest sequence that stays under a cap. Every length is run and its peak measured; the answer is a length that
fits, and `next` one at most 6% longer that does not.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megarpt.device import runtime

DEVICE = argparse.ArgumentParser(add_help=False)
DEVICE.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
MACHINE = runtime.start(DEVICE.parse_known_args()[0].device)  # before anything that imports megatron-core

from megarpt.model.build import build_model, unwrap  # noqa: E402
from megarpt.model.forward import head_output  # noqa: E402
from megarpt.model.token_stats_gpt import HeadMode  # noqa: E402
from megarpt.parallel.context import query_ranges  # noqa: E402
from megarpt.parallel.layout import ParallelLayout, ProcessGroups  # noqa: E402
from megarpt.streaming.chunks import PackedSegments  # noqa: E402
from megarpt.structs import TokenBatch  # noqa: E402
from megarpt.testing.batches import random_batch  # noqa: E402
from megarpt.testing.configs import tiny_config  # noqa: E402
from megarpt.testing.memory import peak_bytes  # noqa: E402

CLIP, KL_WEIGHT, PROMPT_SHARE = 0.2, 0.04, 0.25  # of the policy objective
TOLERANCE = {"loss_difference": 1e-5, "gradient_difference": 1e-4}  # in fp32
CLOSE = 1.06  # the longest sequence is known when one this much longer does not fit
UNIT = 64  # tokens; lengths that are tried are multiples of it


@dataclass(frozen=True)
class Contender:
    """What is different about one model."""

    label: str
    mcore: Mapping[str, Any] = field(default_factory=dict)
    chunk_tokens: int = 0  # 0: layers are not streamed
    has_plain_head: bool = False


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
CONTENDERS = {
    "none": Contender("nothing recomputed", has_plain_head=True),
    "recompute": Contender("full recompute", FULL, has_plain_head=True),
    "selective": Contender("selective recompute", SELECTIVE, has_plain_head=True),
    "recompute_head": Contender("full recompute + chunked head", FULL),
}
STREAMED = "streamed"

Objective = Callable[[torch.nn.Module, TokenBatch, bool], Tensor]  # model, batch, has plain head -> loss


def language_model(model: torch.nn.Module, batch: TokenBatch, has_plain_head: bool) -> Tensor:
    """Mean cross-entropy."""
    if has_plain_head:
        return F.cross_entropy(plain_logits(model, batch).flatten(0, 1).float(), batch.labels.flatten())
    weight = torch.full(batch.labels.shape, 1.0 / batch.labels.numel(), device=batch.labels.device)  # known beforehand
    return -(weight * head_output(model, batch, HeadMode.LOGPROB, weight)[0]).sum()


def clipped_policy_gradient(model: torch.nn.Module, batch: TokenBatch, has_plain_head: bool) -> Tensor:
    """Of the tokens of the completion, which are those of `loss_mask`."""
    if has_plain_head:
        logprob = plain_logits(model, batch).float().log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
    else:
        logprob = head_output(model, batch, HeadMode.LOGPROB)[0]
    old, reference, advantage = (batch.streams[name] for name in ("old_logprob", "ref_logprob", "advantage"))
    ratio = (logprob - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    kl = (reference - logprob).exp() - (reference - logprob) - 1
    mask = batch.loss_mask
    return ((KL_WEIGHT * kl - surrogate) * mask).sum() / mask.sum()


OBJECTIVES: dict[str, tuple[str, Objective]] = {
    "lm": ("language modeling", language_model),
    "policy": ("clipped policy gradient", clipped_policy_gradient),
}


def plain_logits(model: torch.nn.Module, batch: TokenBatch) -> Tensor:
    """[b, s, v], by megatron-core's own head."""
    b, s = batch.tokens.shape
    packed = PackedSegments(
        qkv_format="sbhd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=s,
        max_seqlen_kv=s,
        ranges=query_ranges(batch.cu_seqlens, b * s, 0, 1),
    )
    tokens, positions = batch.tokens.view(1, -1), batch.position_ids.view(1, -1)
    logits = model(input_ids=tokens, position_ids=positions, attention_mask=None, packed_seq_params=packed)
    return logits.view(b, s, -1)


def build(contender: Contender, longest: int, args: argparse.Namespace, groups: ProcessGroups) -> torch.nn.Module:
    """The model of a contender, as a run would build it."""
    shape = {
        "num_layers": args.layers,
        "hidden_size": args.hidden,
        "num_attention_heads": args.heads,
        "num_query_groups": args.kv_heads,
        "ffn_hidden_size": args.ffn,
    }
    cfg = tiny_config(
        **{
            "model.mcore": shape | dict(contender.mcore),
            "model.make_vocab_size_divisible_by": 1,  # the plain head would give probability to rows that are padding
            "stream": {"layers": True, "chunk_tokens": contender.chunk_tokens} if contender.chunk_tokens else {},
            "data.seq_length": longest,
            "train.precision": "bf16" if args.dtype == "bfloat16" else "fp32",
            "train.head_keep_mib": args.head_keep_mib,
        }
    )
    torch.manual_seed(1)
    (model,) = build_model(cfg, ParallelLayout(), groups, MACHINE, vocab_size=args.vocab)
    return model.train()


def make_batch(tokens: int, vocab: int, model: torch.nn.Module, objective: str) -> TokenBatch:
    """One sequence; for a policy also what rollouts bring: log-probabilities near the model's own, and advantages."""
    batch = random_batch(1, tokens, vocab, seed=0)
    names = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")
    batch = replace(batch, **{name: getattr(batch, name).to(MACHINE.device) for name in names})
    if objective != "policy":
        return batch
    with torch.no_grad():
        logprob, _ = head_output(model, batch, HeadMode.LOGPROB)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 1, tokens, generator=generator).to(MACHINE.device)
    streams = {
        "old_logprob": (logprob + 0.2 * noise[0]).clamp(max=0.0),
        "ref_logprob": (logprob + 0.2 * noise[1]).clamp(max=0.0),
        "advantage": 1.0 + noise[2],  # not around 0, where the loss would be a difference of nearly equal sums
    }
    is_completion = batch.position_ids >= PROMPT_SHARE * tokens
    return replace(batch, streams=streams, loss_mask=is_completion)


class Step:
    """Forward and backward of one contender; `loss` is that of the last call."""

    def __init__(self, model: torch.nn.Module, contender: Contender, objective: str, batch: TokenBatch) -> None:
        self.model, self._contender, self._batch = model, contender, batch
        self._objective, self.loss = OBJECTIVES[objective][1], math.nan

    def __call__(self) -> None:
        loss = self._objective(self.model, self._batch, self._contender.has_plain_head)
        loss.backward()
        self.loss = loss.item()

    def reset(self) -> None:
        """Gradients to zero, as a run does before a step."""
        self.model.zero_grad_buffer()  # type: ignore[operator]


def peak_of(step: Step) -> int | None:
    """Peak bytes of a step; None where the device has not that much memory."""
    step.reset()
    try:
        return peak_bytes(step, MACHINE.device)
    except torch.OutOfMemoryError:
        return None


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of all threads; on a GPU wall seconds."""
    MACHINE.synchronize()
    clock = time.perf_counter if MACHINE.is_cuda else time.process_time
    start = clock()
    call()
    MACHINE.synchronize()
    return clock() - start


def product_rate(args: argparse.Namespace) -> float:
    """FLOP/s of a matrix product of the MLP, at its best."""
    dtype, rows = getattr(torch, args.dtype), 4096
    a, b = (torch.randn(n, args.hidden).to(MACHINE.device, dtype) for n in (rows, 2 * args.ffn))
    return 2 * rows * args.hidden * 2 * args.ffn / min(seconds(lambda: a @ b.t()) for _ in range(20))


def limit_seconds(tokens: int, rate: float, args: argparse.Namespace) -> float:
    """The matrix products of a step that computes its layers twice."""
    hidden, kv_size = args.hidden, args.kv_heads * (args.hidden // args.heads)
    layer = hidden * (2 * hidden + 2 * kv_size + 3 * args.ffn) + hidden * tokens  # causal: half of 2 x hidden x tokens
    return tokens * (8 * args.layers * layer + 6 * hidden * args.vocab) / rate


def limit_bytes(tokens: int, args: argparse.Namespace) -> int:
    """The inputs of all layers."""
    return args.layers * tokens * args.hidden * getattr(torch, args.dtype).itemsize


def gradient_difference(model: torch.nn.Module, other: torch.nn.Module) -> float:
    """Norm of the difference of all gradients over their norm."""
    difference = norm = 0.0
    for own, its in zip(model.parameters(), other.parameters(), strict=True):
        a, b = own.main_grad, its.main_grad  # type: ignore[attr-defined]
        difference += (a - b).square().sum().item()
        norm += b.square().sum().item()
    return math.sqrt(difference / norm)


def bench(objective: str, tokens: int, models: Mapping[str, torch.nn.Module], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each contender, and one for the limit."""
    batch = make_batch(tokens, args.vocab, next(iter(models.values())), objective)
    everyone = {name: Step(model, args.named[name], objective, batch) for name, model in models.items()}
    peaks = {name: peak_of(step) for name, step in everyone.items()}
    steps = {name: step for name, step in everyone.items() if peaks[name] is not None}
    shared: dict[str, Any] = {"objective": objective, "tokens": tokens}
    rows = [shared | {"contender": name, "peak_bytes": peaks[name]} for name in everyone]
    if steps:
        first = next(iter(steps.values()))
        losses = {name: abs(step.loss - first.loss) / abs(first.loss) for name, step in steps.items()}
        gradients = {name: gradient_difference(step.model, first.model) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    rates = []
    for _ in range(args.rounds):
        rates.append(product_rate(args))
        for name, step in steps.items():
            step.reset()
            times[name].append(seconds(step))
    limit = {"peak_bytes": limit_bytes(tokens, args), "median_s": limit_seconds(tokens, max(rates), args)}
    for row, name in zip(rows, everyone, strict=True):
        if name in steps:
            row |= {"median_s": statistics.median(times[name]), "samples_s": times[name], "loss": steps[name].loss}
            row |= {"loss_difference": losses[name], "gradient_difference": gradients[name]}
    rows.append(shared | {"contender": "limit", "products_flop_per_s": max(rates)} | limit)
    baseline = next((row for row in rows if row["contender"] == "recompute"), rows[0])
    for row in rows:
        for key, short in (("peak_bytes", "peak"), ("median_s", "time")):
            row[f"{short}_over_recompute"] = _ratio(row, baseline, key) if baseline["contender"] == "recompute" else None
            row[f"{short}_over_limit"] = _ratio(row, rows[-1], key)
    return rows


def _ratio(row: Mapping[str, Any], other: Mapping[str, Any], key: str) -> float | None:
    if row.get(key) is None or other.get(key) is None:
        return None
    return float(row[key] / other[key])


def longest_sequence(peak: Callable[[int], float], cap: float, most: int) -> dict[int, float]:
    """Peaks by length, of as many lengths as it takes to know the longest that stays under the cap.

    Args:
        peak: bytes of a step of this many tokens; infinite where it does not run.
        cap: bytes.
        most: tokens; longer sequences are not tried.
    """
    measured: dict[int, float] = {}
    tokens: int | None = min(16 * UNIT, most)
    while tokens is not None:
        measured[tokens] = peak(tokens)
        tokens = next_length(measured, cap, most)
    return measured


def next_length(measured: Mapping[int, float], cap: float, most: int) -> int | None:
    """Where to look next: where the line through two lengths next to the cap meets it, kept within the bracket."""
    fits = sorted(tokens for tokens, size in measured.items() if size <= cap)
    above = min((tokens for tokens, size in measured.items() if size > cap), default=None)
    if not fits:
        return _round(above / 2) if above is not None and above > UNIT else None
    low = fits[-1]
    if above is None:
        if low >= most:
            return None
        guess = 2 * low if len(fits) == 1 else 1.02 * _crossing(fits[-2], low, measured, cap)  # rather one that does not fit
        return min(max(_round(guess), low + UNIT), 4 * low, most)
    if above <= CLOSE * low or above - low <= UNIT:
        return None
    known = measured[above] != math.inf
    guess = _crossing(low, above, measured, cap) if known else (low * above) ** 0.5
    margin = 1 + (CLOSE - 1) / 2
    guess = min(max(guess, low * margin), above / margin)
    return min(max(_round(guess), low + UNIT), above - UNIT)


def _crossing(a: int, b: int, measured: Mapping[int, float], cap: float) -> float:
    slope = (measured[b] - measured[a]) / (b - a)
    return a + (cap - measured[a]) / slope if slope > 0 else 4.0 * b


def _round(tokens: float) -> int:
    return max(UNIT, int(tokens) // UNIT * UNIT)


def search(name: str, objective: str, args: argparse.Namespace, groups: ProcessGroups, console: Console) -> dict[str, Any]:
    """The longest sequence of one contender under the cap."""
    contender, cap = args.named[name], args.cap_mb * 1e6
    model = build(contender, args.max_length, args, groups)

    def peak(tokens: int) -> float:
        size = peak_of(Step(model, contender, objective, make_batch(tokens, args.vocab, model, objective)))
        told = "out of memory" if size is None else f"{size / 1e6:.4g} MB"
        console.print(f"  {name}, {tokens} tokens: {told}", style="dim", highlight=False)
        return math.inf if size is None else float(size)

    measured = longest_sequence(peak, cap, args.max_length)
    return {
        "objective": objective,
        "contender": name,
        "cap_bytes": cap,
        "longest": max((tokens for tokens, size in measured.items() if size <= cap), default=0),
        "next": min((tokens for tokens, size in measured.items() if size > cap), default=None),
        "peak_bytes": {str(tokens): size for tokens, size in sorted(measured.items()) if size < math.inf},
    }


def _text(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value / scale, form)


def _label(name: str, args: argparse.Namespace) -> str:
    return args.named[name].label if name in args.named else "limit of recomputing"


def show(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace, console: Console) -> None:
    """One table for an objective, all lengths."""
    clock = "wall s" if MACHINE.is_cuda else "CPU s"
    over = ("/ recompute", "/ limit")
    table = Table("tokens", "", "peak MB", *over, clock, *over, "loss diff.", "gradient diff.", box=box.MARKDOWN)
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for row in rows:
        size = "out of memory" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.4g}"
        cells = [size, _text(row["peak_over_recompute"], ".3f"), _text(row["peak_over_limit"], ".1f")]
        cells += [_text(row.get("median_s"), ".2f"), _text(row["time_over_recompute"], ".2f")]
        cells += [_text(row["time_over_limit"], ".2f")]
        cells += [_text(row.get(key), ".1e") for key in ("loss_difference", "gradient_difference")]
        table.add_row(str(row["tokens"]), _label(row["contender"], args), *cells)
    console.print(f"\n{OBJECTIVES[rows[0]['objective']][0]}, {describe(args)}", highlight=False)
    console.print(table)
    largest = {key: max(row.get(key) or 0.0 for row in rows) for key in ("loss_difference", "gradient_difference")}
    told = ", ".join(f"{key.removesuffix('_difference')} {value:.1e}" for key, value in largest.items())
    console.print(f"largest relative differences from {_label(rows[0]['contender'], args)}: {told}", highlight=False)


def show_longest(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace, console: Console) -> None:
    """One table for an objective."""
    table = Table("", "longest, tokens", "its peak MB", "next", "its peak MB", "/ recompute", box=box.MARKDOWN)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        sizes = [_text(row["peak_bytes"].get(str(row[key])), ".4g", 1e6) for key in ("longest", "next")]
        following = "not tried" if row["next"] is None else str(row["next"])
        cells = (str(row["longest"]), sizes[0], following, sizes[1], _text(row["over_recompute"], ".2f"))
        table.add_row(_label(row["contender"], args), *cells)
    what = OBJECTIVES[rows[0]["objective"]][0]
    console.print(f"\nlongest sequence under {args.cap_mb:g} MB, {what}, {describe(args)}", highlight=False)
    console.print(table)


def describe(args: argparse.Namespace) -> str:
    shape = f"{args.layers} layers x {args.hidden}, vocabulary {args.vocab}, {args.dtype}"
    return f"{shape}, {MACHINE.device_name if MACHINE.is_cuda else f'{args.threads} thread(s)'}"


def draw(curves: Mapping[str, Mapping[str, Mapping[int, float]]], args: argparse.Namespace) -> None:
    """Peak memory against sequence length; `curves` by objective and contender."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(curves), 4.8), layout="constrained")
    for axes, (objective, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, points in lines.items():
            places = sorted(points)
            style = {"linestyle": "--", "color": "gray"} if name == "limit" else {"marker": "o", "markersize": 4}
            label = "layer inputs alone" if name == "limit" else _label(name, args)
            axes.plot(places, [points[n] / 1e6 for n in places], label=label, **style)
        if args.cap_mb is not None:
            axes.axhline(args.cap_mb, color="black", linewidth=0.8, linestyle=":", label="cap")
        axes.set(xscale="log", yscale="log", xlabel="sequence length, tokens", ylabel="peak memory of a step, MB")
        axes.set_title(f"{OBJECTIVES[objective][0]}\n{describe(args)}", fontsize="medium")
        if args.cap_mb is None:
            axes.set_xticks(args.lengths, [str(n) for n in args.lengths])
            axes.set_xticks([], minor=True)
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(args.plot, dpi=150)


def parse() -> argparse.Namespace:
    """Options; `named` is the contenders by name."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, parents=[DEVICE])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192], metavar="TOKENS")
    parser.add_argument("--objective", nargs="+", default=["lm"], choices=list(OBJECTIVES))
    everyone = [*CONTENDERS, STREAMED]
    parser.add_argument("--contenders", default=",".join(everyone), help=f"comma-separated, some of {', '.join(everyone)}")
    parser.add_argument("--chunks", nargs="+", type=int, default=[2048, 1024], metavar="TOKENS", help="of `streamed`")
    for name, size in (("layers", 4), ("hidden", 512), ("heads", 8), ("kv-heads", 2), ("ffn", 1408), ("vocab", 32_000)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--head-keep-mib", type=int, default=0, help="train.head_keep_mib of the contenders with megarpt's head"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cap-mb", type=float, help="instead: the longest sequence under this many MB")
    parser.add_argument("--max-length", type=int, default=65_536, help="of --cap-mb: longer sequences are not tried")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--plot", type=Path, help="draw peak memory against sequence length into this file")
    args = parser.parse_args()
    wanted = args.contenders.split(",")
    if unknown := sorted(set(wanted) - set(everyone)):
        parser.error(f"--contenders: got {', '.join(unknown)}; expected some of {', '.join(everyone)}")
    args.named = {}
    for name in wanted:
        if name == STREAMED:
            args.named |= {f"{name} {n}": Contender(f"streamed, chunk {n}", chunk_tokens=n) for n in args.chunks}
        else:
            args.named[name] = CONTENDERS[name]
    if args.plot:
        try:  # now, rather than after an hour
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            parser.error(f"--plot needs matplotlib ({error}); pip install -e .[demo], or leave --plot out")
    return args


def compare(args: argparse.Namespace, groups: ProcessGroups, console: Console, write: Callable[..., None]) -> None:
    """Every objective at every length."""
    models = {name: build(contender, max(args.lengths), args, groups) for name, contender in args.named.items()}
    weights = unwrap(next(iter(models.values()))).state_dict()
    for model in models.values():
        unwrap(model).load_state_dict(weights)
    rows: list[dict[str, Any]] = []
    for objective in args.objective:
        for tokens in args.lengths:
            rows += bench(objective, tokens, models, args)
            write(rows=rows)
            console.print(f"  {objective}, {tokens} tokens: measured", style="dim", highlight=False)
        show([row for row in rows if row["objective"] == objective], args, console)
    if args.dtype == "float32":
        wrong = [row for row in rows if any(row.get(key, 0.0) > most for key, most in TOLERANCE.items())]
        if wrong:
            names = ", ".join(f"{row['contender']} ({row['objective']}, {row['tokens']} tokens)" for row in wrong)
            sys.exit(f"contenders compute different things, so nothing above is a comparison: {names}; expected {TOLERANCE}")
    if args.plot:
        curves: dict[str, dict[str, dict[int, float]]] = {}
        for row in (row for row in rows if row["peak_bytes"] is not None):
            curves.setdefault(row["objective"], {}).setdefault(row["contender"], {})[row["tokens"]] = row["peak_bytes"]
        draw(curves, args)


def search_all(args: argparse.Namespace, groups: ProcessGroups, console: Console, write: Callable[..., None]) -> None:
    """The longest sequences for every objective."""
    rows: list[dict[str, Any]] = []
    for objective in args.objective:
        found = []
        for name in args.named:
            found.append(search(name, objective, args, groups, console))
            write(longest=rows + found)
        baseline = next((row["longest"] for row in found if row["contender"] == "recompute"), 0)
        rows += [row | {"over_recompute": row["longest"] / baseline if baseline else None} for row in found]
        write(longest=rows)
        show_longest(rows[-len(found) :], args, console)
    if args.plot:
        curves: dict[str, dict[str, dict[int, float]]] = {}
        for row in rows:
            points = {int(n): size for n, size in row["peak_bytes"].items()}
            curves.setdefault(row["objective"], {})[row["contender"]] = points
        for lines in curves.values():
            lines["limit"] = {n: limit_bytes(n, args) for points in lines.values() for n in points}
        draw(curves, args)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    groups = ParallelLayout().initialize(seed=1)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{MACHINE.device_name}, torch {torch.__version__}", highlight=False)

    def write(**results: Any) -> None:
        if args.json:
            shape = {name: getattr(args, name) for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "dtype")}
            about = {"machine": platform.processor(), "device": MACHINE.device_name, "torch": torch.__version__}
            settings = {"threads": args.threads, "rounds": args.rounds, "head_keep_mib": args.head_keep_mib}
            args.json.write_text(json.dumps(about | shape | settings | results, indent=1) + "\n", encoding="utf-8")

    (compare if args.cap_mb is None else search_all)(args, groups, console, write)
    MACHINE.close()


if __name__ == "__main__":
    main()
