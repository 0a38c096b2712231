"""A whole training step against a plain PyTorch loop of the same model, data and seed, alternating in one process.

    python tools/bench_step.py --precision fp32 bf16 --threads 1 --output bench_step.json

Prints tokens per CPU second of both, their ratio, the largest loss difference, and the share of the limit: the time the matrix
products alone take at the rate this machine reaches in the same run.

    python tools/bench_step.py --selection --threads 1

Instead: a step of four micro-batches with a selection of 60% under every scope, reference losses at hand as from a sidecar,
over a step of ordinary language modeling.

    python tools/bench_step.py --selection-cost --threads 1 --steps 5

Instead: a model whose head is two thirds of the arithmetic, a step with a selection of 60%, with a sidecar and with an online
reference of the same size, over a step of ordinary language modeling and over the plain loop's. `recipe` is how selection is
commonly written: the reference inline, whole logits of both, a mask over the losses. `kept MiB` is train.head_keep_mib.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from megarpt.device import runtime

MACHINE = runtime.start("cpu")  # before anything that imports megatron-core

from megarpt.config.schema import ObjectiveConfig  # noqa: E402
from megarpt.model.build import build_model, unwrap  # noqa: E402
from megarpt.objectives.build import build_objective  # noqa: E402
from megarpt.parallel.layout import ParallelLayout, ProcessGroups  # noqa: E402
from megarpt.structs import Progress, TokenBatch  # noqa: E402
from megarpt.testing.batches import random_batch  # noqa: E402
from megarpt.testing.configs import tiny_config  # noqa: E402
from megarpt.testing.plain_gpt import PlainGPT  # noqa: E402
from megarpt.train.optimizer import build_optimizer  # noqa: E402
from megarpt.train.perf import PerfMeter  # noqa: E402
from megarpt.train.reference import OnlineReference  # noqa: E402
from megarpt.train.step import Annotate, TrainStep  # noqa: E402
from megarpt.train.timers import StepTimers, attach  # noqa: E402

LR = 1e-3
BATCH, SEQUENCE = 8, 512
MICRO_BATCHES, FRACTION = 4, 0.6  # of --selection


class Size(NamedTuple):
    """A model of the Llama shape."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def mcore(self) -> dict[str, int]:
        """The fields of `model.mcore`."""
        names = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
        return dict(zip(names, self, strict=False))

    @property
    def products(self) -> tuple[int, int]:
        """Multiplications of a token in the forward pass: of the layers, and of the head."""
        per_layer = self.hidden * (2 * self.hidden + 2 * self.kv_heads * self.hidden // self.heads) + 3 * self.hidden * self.ffn
        return self.layers * (per_layer + self.hidden * SEQUENCE // 2), self.hidden * self.vocab


TINY = Size(4, 256, 4, 2, 768, 8192)  # the `tiny` preset
LARGE_HEADS = {512: Size(3, 512, 8, 4, 1216, 32_768), 1024: Size(2, 1024, 16, 8, 1664, 32_768)}
"""Of --selection-cost, by width: the head is two thirds of the arithmetic."""


def train_step(
    groups: ProcessGroups,
    precision: str,
    objective: ObjectiveConfig,
    *,
    size: Size = TINY,
    keep_mib: int = 128,
    annotate: Annotate | None = None,
) -> tuple[TrainStep, Callable[[], PerfMeter], dict[str, torch.Tensor]]:
    """A step of megarpt, what has every part of it measured from then on, and the weights it starts from."""
    cfg = tiny_config(
        **{
            "model.mcore": size.mcore,
            "data.seq_length": SEQUENCE,
            "objective": objective.model_dump(),
            "train.train_tokens": 1 << 40,
            "train.precision": precision,
            "train.head_keep_mib": keep_mib,
            "optimizer": {"lr": LR, "min_lr": LR, "lr_decay_style": "constant"},
        }
    )
    torch.manual_seed(1)
    chunks = build_model(cfg, ParallelLayout(), groups, MACHINE, vocab_size=size.vocab)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, chunks, groups)
    timers = StepTimers(MACHINE.clock())
    step = TrainStep(chunks, build_objective(objective, 1), optimizer, scheduler, groups, annotate=annotate, timers=timers)

    def measured() -> PerfMeter:
        attach(timers, chunks, optimizer)
        return PerfMeter(timers=timers)

    return step, measured, unwrap(chunks[0]).state_dict()


def megarpt_step(
    groups: ProcessGroups, precision: str, *, timed: bool = False
) -> tuple[Callable[[TokenBatch], float], dict[str, torch.Tensor]]:
    """One step of megarpt, and the weights it starts from; `timed` as in a run, where every part of the step is measured."""
    step, measured, weights = train_step(groups, precision, ObjectiveConfig())
    if not timed:
        return lambda batch: step([batch], Progress()).loss_nats, weights
    meter = measured()

    def timed_step(batch: TokenBatch) -> float:
        with meter.step():
            report = step([batch], Progress())
        meter.scalars()
        return report.loss_nats

    return timed_step, weights


def plain_step(
    weights: dict[str, torch.Tensor], precision: str, compiled: bool, *, size: Size = TINY, selects: bool = False
) -> Callable[[TokenBatch], float]:
    """One step of a plain loop; bf16 through autocast, as such loops do. `selects`: by an inline reference of its size."""
    model = PlainGPT(size.vocab, size.layers, size.hidden, size.heads, size.kv_heads, size.ffn)
    model.load_mcore(weights)
    reference = copy.deepcopy(model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)

    def losses(network: PlainGPT, batch: TokenBatch) -> torch.Tensor:
        return F.cross_entropy(network(batch.tokens).flatten(0, 1).float(), batch.labels.flatten(), reduction="none")

    def loss_of(batch: TokenBatch) -> torch.Tensor:
        own = losses(model, batch)
        if not selects:
            return own.mean()
        with torch.no_grad():
            excess = own - losses(reference, batch)
            kept = torch.zeros_like(own).scatter_(0, excess.topk(int(FRACTION * own.numel())).indices, 1.0)
        return (own * kept).sum() / kept.sum()

    loss_function = torch.compile(loss_of) if compiled else loss_of

    def step(batch: TokenBatch) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
            loss = loss_function(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def product_seconds(precision: str) -> float:
    """CPU seconds of the matrix products of one step, attention included, at this machine's measured rate."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(BATCH * SEQUENCE, TINY.hidden, dtype=dtype)
    b = torch.randn(2 * TINY.ffn, TINY.hidden, dtype=dtype)
    best = min(_cpu_seconds(lambda: a @ b.t()) for _ in range(10))
    rate = 2 * a.shape[0] * a.shape[1] * b.shape[0] / best
    return 6 * BATCH * SEQUENCE * sum(TINY.products) / rate


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(groups: ProcessGroups, precision: str, steps: int, compiled: bool, timed: bool) -> dict[str, float | str]:
    """Alternate the loops over the same batches."""
    ours, weights = megarpt_step(groups, precision)
    peers = {"plain": plain_step(weights, precision, False)}
    if timed:
        peers["timed"] = megarpt_step(groups, precision, timed=True)[0]
    if compiled:
        peers["compiled"] = plain_step(weights, precision, True)
    seconds: dict[str, list[float]] = {name: [] for name in ("megarpt", *peers)}
    difference = 0.0
    for i in range(steps + 2):
        batch, losses = random_batch(BATCH, SEQUENCE, TINY.vocab, seed=i), {}
        for name, step in {"megarpt": ours, **peers}.items():
            start = time.process_time()
            losses[name] = step(batch)
            if i >= 2:  # the first two steps warm up
                seconds[name].append(time.process_time() - start)
        difference = max(difference, abs(losses["megarpt"] - losses["plain"]))
    tokens, middle = BATCH * SEQUENCE, {name: statistics.median(values) for name, values in seconds.items()}
    row: dict[str, float | str] = {
        "precision": precision,
        "threads": torch.get_num_threads(),
        "largest_loss_difference": difference,
    }
    row |= {f"{name}_tokens_per_cpu_s": tokens / value for name, value in middle.items()}
    row |= {f"ratio_to_{name}": middle[name] / middle["megarpt"] for name in peers}
    row["share_of_product_limit"] = product_seconds(precision) / middle["megarpt"]
    return row


def scored_batches(seed: int) -> list[TokenBatch]:
    """The micro-batches of a step, with reference losses that differ from the model's by about one nat."""
    size = BATCH // MICRO_BATCHES
    noise = torch.randn(BATCH, SEQUENCE, generator=torch.Generator().manual_seed(seed)) + math.log(TINY.vocab)
    rows = [slice(i * size, (i + 1) * size) for i in range(MICRO_BATCHES)]
    return [replace(random_batch(BATCH, SEQUENCE, TINY.vocab, seed, span), streams={"ref_nll": noise[span]}) for span in rows]


def compare_scopes(groups: ProcessGroups, precision: str, steps: int) -> list[dict[str, float | str]]:
    """Ordinary language modeling and every scope in turn, step by step, over the same batches."""
    objectives = {"language modeling": ObjectiveConfig()}
    for scope in get_args(ObjectiveConfig.model_fields["scope"].annotation):
        objectives[scope] = ObjectiveConfig(scorer="excess_loss", weighting="top_fraction", fraction=FRACTION, scope=scope)
    runs = {name: train_step(groups, precision, objective)[0] for name, objective in objectives.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    kept: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(steps + 2):
        batches = scored_batches(i)
        for name, step in runs.items():
            start = time.process_time()
            report = step(batches, Progress(step=i))
            if i >= 2:  # the first two steps warm up
                seconds[name].append(time.process_time() - start)
                kept[name].append(report.num_tokens / (BATCH * SEQUENCE))
    plain = statistics.median(seconds["language modeling"])
    return [
        {
            "precision": precision,
            "objective": name,
            "cpu_s": statistics.median(values),
            "times_language_modeling": statistics.median(values) / plain,
            "kept": statistics.fmean(kept[name]),
        }
        for name, values in seconds.items()
    ]


def compare_selection_cost(
    groups: ProcessGroups, precision: str, steps: int, size: Size, keep_mib: list[int]
) -> list[dict[str, float | str]]:
    """Selection with a sidecar and with an online reference against ordinary language modeling, step by step."""
    runs: dict[tuple[str, str, str], Callable[[TokenBatch], object]] = {}
    for keep in keep_mib:

        def add(name: str, scope: str, objective: ObjectiveConfig, annotate: Annotate | None = None, keep: int = keep) -> None:
            step = train_step(groups, precision, objective, size=size, keep_mib=keep, annotate=annotate)[0]
            runs[name, scope, str(keep)] = lambda batch: step([batch], Progress())

        add("language modeling", "", ObjectiveConfig())
        network = train_step(groups, precision, ObjectiveConfig(), size=size)[0].chunks[0]
        online = OnlineReference(unwrap(network), groups, ["ref_nll"])
        for scope in ("sequence", "global_batch"):
            rho1 = ObjectiveConfig(scorer="excess_loss", weighting="top_fraction", fraction=FRACTION, scope=scope)
            add("sidecar", scope, rho1)
            add("online reference", scope, rho1, online)
    weights = train_step(groups, precision, ObjectiveConfig(), size=size)[2]
    runs["plain loop", "", ""] = plain_step(weights, precision, False, size=size)
    runs["recipe", "global_batch", ""] = plain_step(weights, precision, False, size=size, selects=True)
    seconds: dict[tuple[str, str, str], list[float]] = {name: [] for name in runs}
    for i in range(steps + 1):
        noise = torch.randn(BATCH, SEQUENCE, generator=torch.Generator().manual_seed(i)) + math.log(size.vocab)
        batch = replace(random_batch(BATCH, SEQUENCE, size.vocab, seed=i), streams={"ref_nll": noise})
        for key, run in runs.items():
            spent = _cpu_seconds(lambda run=run, batch=batch: run(batch))  # type: ignore[misc]
            if i >= 1:  # the first step warms up
                seconds[key].append(spent)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    plain = middle["plain loop", "", ""]
    return [
        {
            "precision": precision,
            "step": name,
            "scope": scope,
            "kept_MiB": keep,
            "cpu_s": value,
            "times_language_modeling": value / middle.get(("language modeling", "", keep), plain),
            "times_plain_loop": value / plain,
        }
        for (name, scope, keep), value in middle.items()
    ]


def _size(size: Size) -> str:
    return f"{size.layers} layers x {size.hidden}, vocabulary {size.vocab:,}"


def show_rows(rows: list[dict[str, float | str]], title: str) -> Table:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()))
    return table


def show(rows: list[dict[str, float | str]]) -> Table:
    table = Table(title=f"training step, {_size(TINY)}, batch {BATCH} x {SEQUENCE}")
    table.add_column("")
    for row in rows:
        table.add_column(str(row["precision"]), justify="right")
    for key in [key for key in rows[0] if key != "precision"]:
        values = [row[key] for row in rows]
        table.add_row(key.replace("_", " "), *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="also the plain loop under torch.compile")
    parser.add_argument("--timed", action="store_true", help="also megarpt with every part of the step measured, as in a run")
    parser.add_argument("--selection", action="store_true", help="instead: the cost of selecting tokens, scope by scope")
    parser.add_argument("--selection-cost", action="store_true", help="instead: what a selection step costs, large head")
    parser.add_argument("--hidden", type=int, default=512, choices=LARGE_HEADS, help="width of --selection-cost's model")
    parser.add_argument("--keep-mib", nargs="+", type=int, default=[128], help="train.head_keep_mib for --selection-cost")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    if (args.selection or args.selection_cost) and (args.compiled or args.timed):
        parser.error("--compiled and --timed belong to the comparison of whole steps, not to those of selections")
    torch.set_num_threads(args.threads)
    groups = ParallelLayout().initialize(seed=1)
    if args.selection:
        rows = [row for precision in args.precision for row in compare_scopes(groups, precision, args.steps)]
        size = f"{MICRO_BATCHES} micro-batches of {BATCH // MICRO_BATCHES} x {SEQUENCE}"
        table = show_rows(rows, f"a step of {size}, {FRACTION:.0%} kept")
    elif args.selection_cost:
        model = LARGE_HEADS[args.hidden]
        rows = [
            row
            for precision in args.precision
            for row in compare_selection_cost(groups, precision, args.steps, model, args.keep_mib)
        ]
        layers, head = model.products
        size = f"{_size(model)}, batch {BATCH} x {SEQUENCE}"
        table = show_rows(rows, f"a model whose head is {head / (layers + head):.0%} of it ({size}), {FRACTION:.0%} kept")
    else:
        rows = [compare(groups, precision, args.steps, args.compiled, args.timed) for precision in args.precision]
        table = show(rows)
    Console().print(table)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    MACHINE.close()


if __name__ == "__main__":
    main()
