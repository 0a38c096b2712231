"""`megarpt plan`: what a training step will need and cost, before anything is allocated."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megarpt.config.schema import LanguageModelConfig, PlanOptions
from megarpt.corpus.atomic import write_errors
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import EXIT_OK, ConfigError, DataError, ExtensionError
from megarpt.streaming.activations import WAYS, Way, chunk_lengths
from megarpt.streaming.plan import GB, SMALLEST_CHUNK, Cost, Memory, Situation, gb

_CLASSES = ("parameters", "gradients", "optimizer", "layer_inputs", "layer_working_set", "head")
_COLORS: Mapping[Way, str] = {"plain": "tab:red", "recomputed": "tab:blue", "streamed": "tab:green"}
_POINTS = 48  # of a curve


@dataclass(frozen=True, slots=True)
class WayReport:
    """One way to train."""

    memory: Memory
    largest_tensors: Sequence[tuple[str, str, float]]  # (class, tensor, bytes) at the worst moment
    largest_sequence: int  # tokens of data.seq_length that fit the card; 0 when none does
    cost: Cost
    time: float  # relative to plain with the same head
    time_without_kept_logits: float  # relative to the same
    time_with_all_logits_kept: float


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """Streamed with one length of chunks."""

    chunk_tokens: int
    chunks: int
    total: float
    largest_sequence: int


@dataclass(frozen=True, slots=True)
class PlanReport:
    """All that is shown."""

    situation: Situation
    streamed: Situation  # the same, within the budget
    card_gb: float
    budget_gb: float | None
    ways: Mapping[Way, WayReport]
    chunks: Sequence[ChunkReport]
    chunk_within_budget: int | None  # 0 when not even the smallest fits; None without a budget
    whole_logits_bytes: float


def run(cfg: LanguageModelConfig, options: PlanOptions) -> int:
    """Print the plan of a run (or one JSON object) on standard output.

    Raises:
        ConfigError: the layout does not fit the ranks, the model is of a kind that cannot be planned, or the size of the
            vocabulary is not known.
        ExtensionError: a plot was asked for and matplotlib is not installed.
        DataError: the plot cannot be written.
    """
    report = plan(cfg, options)
    if options.plot is not None:
        draw(report, Path(options.plot), title=cfg.model.preset)
    if options.json_output:
        sys.stdout.write(json.dumps(_content(report), indent=2, allow_nan=False) + "\n")
    else:
        show(report, title=cfg.model.preset)
    return EXIT_OK


def plan(cfg: LanguageModelConfig, options: PlanOptions) -> PlanReport:
    """Everything that can be known from the configuration."""
    device = cfg.run.device if options.device == "auto" else options.device
    situation = Situation.of(cfg, vocab_size=_vocab_size(cfg), on_cpu=device == "cpu", world_size=options.world_size)
    budget_gb = options.budget_gb or cfg.stream.memory_budget_gb
    streamed, chunk = situation, None
    if budget_gb is not None:
        found = situation.within(budget_gb * GB, may_keep=cfg.train.head_keep_mib is None)
        streamed, chunk = found or situation, found.chunk_tokens if found else 0
    ways = {way: _way(streamed if way == "streamed" else situation, way, options.card_gb * GB, situation) for way in WAYS}
    return PlanReport(
        situation=situation,
        streamed=streamed,
        card_gb=options.card_gb,
        budget_gb=budget_gb,
        ways=ways,
        chunks=_chunks(situation, options.card_gb * GB),
        chunk_within_budget=chunk,
        whole_logits_bytes=situation.whole_logits_bytes(),
    )


def _vocab_size(cfg: LanguageModelConfig) -> int:
    if cfg.model.vocab_size is not None:
        return cfg.model.vocab_size
    try:
        return load_tokenizer(cfg.data.tokenizer).vocab_size
    except DataError as error:
        raise ConfigError(
            f"data.tokenizer: {error}; to plan without it, give the size of its vocabulary: model.vocab_size=32000"
        ) from error


def _way(situation: Situation, way: Way, card_bytes: float, baseline: Situation) -> WayReport:
    none, everything = replace(situation, keep_bytes=0), replace(situation, keep_bytes=2**62)
    plain = baseline.cost("plain").total
    tensors = sorted(situation.peak(way).entries.items(), key=lambda item: -item[1])
    return WayReport(
        memory=situation.memory(way),
        largest_tensors=[(kind, name, size) for (kind, name), size in tensors[:8] if size],
        largest_sequence=situation.largest_sequence(way, card_bytes),
        cost=situation.cost(way),
        time=situation.cost(way).total / plain,
        time_without_kept_logits=none.cost(way).total / plain,
        time_with_all_logits_kept=everything.cost(way).total / plain,
    )


def _chunks(situation: Situation, card_bytes: float) -> list[ChunkReport]:
    lengths = [SMALLEST_CHUNK]
    while lengths[-1] < situation.rank_tokens:
        lengths.append(2 * lengths[-1])
    reports = []
    for length in lengths:
        each = replace(situation, chunk_tokens=min(length, situation.rank_tokens))
        _, count, _ = chunk_lengths(each.shape, each.work("streamed"))
        reports.append(
            ChunkReport(each.chunk_tokens, count, each.memory("streamed").total, each.largest_sequence("streamed", card_bytes))
        )
    return reports


def show(report: PlanReport, title: str) -> None:
    """The plan for people."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(Text(f"{title}: {_layout(report)}", style="bold"))
    table = Table("GB per rank", title=None)
    for way in WAYS:
        table.add_column(way, justify="right")
    ways = [report.ways[way] for way in WAYS]
    for name in _CLASSES:
        table.add_row(name.replace("_", " "), *(gb(getattr(each.memory, name)) for each in ways))
    table.add_section()
    fits = [each.memory.total <= report.card_gb * GB for each in ways]
    table.add_row(
        "total",
        *(Text(gb(each.memory.total), style="bold" if ok else "bold red") for each, ok in zip(ways, fits, strict=True)),
    )
    table.add_row("  reached in", *(each.memory.worst_moment for each in ways))
    table.add_row(f"longest sequence on {report.card_gb:g} GB", *(_sequence(each.largest_sequence) for each in ways))
    table.add_section()
    table.add_row("time, relative to plain", *(f"{each.time:.2f}" for each in ways))
    table.add_row("  layers recomputed", *(_share(each.cost.recomputation, report) for each in ways))
    table.add_row("  keys and values projected again", *(_share(each.cost.key_value_projection, report) for each in ways))
    table.add_row("  logits recomputed", *(_share(each.cost.head_recomputation, report) for each in ways))
    table.add_row("with no logits kept", *(f"{each.time_without_kept_logits:.2f}" for each in ways))
    table.add_row("with all logits kept", *(f"{each.time_with_all_logits_kept:.2f}" for each in ways))
    console.print(table)
    chunks = Table("stream.chunk_tokens", "chunks", "GB per rank", f"longest sequence on {report.card_gb:g} GB")
    for column in chunks.columns:
        column.justify = "right"
    for each in report.chunks:
        is_within = report.budget_gb is not None and each.total <= report.budget_gb * GB
        chunks.add_row(
            str(each.chunk_tokens),
            str(each.chunks),
            Text(gb(each.total), style="green" if is_within else ""),
            _sequence(each.largest_sequence),
        )
    console.print(chunks)
    for line in _notes(report):
        console.print(Text(line), soft_wrap=True)


def _layout(report: PlanReport) -> str:
    situation, shape = report.situation, report.situation.shape
    ranks = shape.tp * shape.pp * shape.cp * shape.dp
    sizes = ", ".join(f"{name} {size}" for name in ("tp", "cp", "pp", "dp") if (size := getattr(shape, name)) > 1)
    return (
        f"sequences of {situation.seq_length} x micro-batch of {situation.micro_batch_size} on {ranks} "
        f"rank{'s' if ranks > 1 else ''}{f' ({sizes})' if sizes else ''}, {'bf16' if shape.item_bytes == 2 else 'fp32'}, "
        f"{'CPU' if shape.on_cpu else 'CUDA'} kernels"
    )


def _notes(report: PlanReport) -> list[str]:
    situation = report.situation
    lines = []
    if report.budget_gb is not None:
        if report.chunk_within_budget:
            lines.append(
                f"within {report.budget_gb:g} GB, and shown above: stream.chunk_tokens {report.chunk_within_budget}, "
                f"train.head_keep_mib {report.streamed.keep_bytes // 2**20}"
            )
        else:
            lines.append(f"within {report.budget_gb:g} GB: not even chunks of {SMALLEST_CHUNK} tokens fit")
    else:
        lines.append(
            f"streamed in chunks of {situation.chunk_tokens} tokens; the head holds {situation.keep_bytes / 2**20:.0f} MiB of "
            "logits"
        )
    lines.append(
        f"a head that makes all logits at once would take {gb(report.whole_logits_bytes)} GB of its own in each of the three"
    )
    stages = sorted({each.memory.stage for each in report.ways.values()})
    if situation.shape.pp > 1:
        lines.append(f"pipeline: the stage that needs most ({', '.join(map(str, stages))} of {situation.shape.pp}) is shown")
    lines.append(
        "a sequence is data.seq_length, at this batch.micro_batch_size, as one document; a GB is 10^9 bytes; time counts "
        "floating-point operations. Not in it: the driver, communication buffers, fragmentation, a reference model."
    )
    return lines


def draw(report: PlanReport, path: Path, title: str) -> None:
    """Memory over sequence length for the three ways, and the card, in the format of the file's suffix.

    Raises:
        ExtensionError: matplotlib is not installed.
        DataError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExtensionError(f"--plot needs matplotlib ({error}); pip install -e .[demo], or leave --plot out") from error
    situation = report.situation
    longest = max(2 * situation.seq_length, *(int(1.25 * each.largest_sequence) for each in report.ways.values()))
    unit = 2 * situation.shape.cp * situation.shape.tp
    lengths = sorted({max(1, longest * i // (_POINTS * unit)) * unit for i in range(1, _POINTS + 1)})
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for way in WAYS:
        base = report.streamed if way == "streamed" else situation
        totals = [replace(base, seq_length=length).memory(way).total / GB for length in lengths]
        axes.plot(lengths, totals, color=_COLORS[way], label=way)
    axes.axhline(report.card_gb, color="black", linestyle="--", linewidth=1, label=f"card, {report.card_gb:g} GB")
    axes.axvline(situation.seq_length, color="grey", linestyle=":", linewidth=1, label="data.seq_length")
    axes.set(xlabel="tokens per sequence", ylabel="GB per rank", title=f"{title}: {_layout(report)}")
    axes.title.set_fontsize("small")
    axes.set_xlim(0, longest)
    axes.set_ylim(0, 1.6 * max(report.card_gb, report.ways["streamed"].memory.total / GB))
    axes.legend()
    with write_errors(path):
        figure.savefig(path)


def _content(report: PlanReport) -> dict[str, Any]:
    """For programs; bytes, tokens and floating-point operations per token."""
    situation = report.situation
    content = asdict(report)
    content["situation"].pop("shape")
    content["streamed"].pop("shape")
    content["layout"] = {name: getattr(situation.shape, name) for name in ("tp", "pp", "cp", "dp")}
    for way, each in report.ways.items():
        content["ways"][way]["memory"] |= {"total": each.memory.total, "worst_moment": each.memory.worst_moment}
        content["ways"][way]["cost"]["total"] = each.cost.total
    return content


def _sequence(tokens: int) -> str:
    return f"{tokens:,}" if tokens else "none"


def _share(operations: float, report: PlanReport) -> str:
    return f"{operations / report.ways['plain'].cost.total:.3f}"
