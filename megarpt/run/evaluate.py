"""`megarpt evaluate`: held-out loss of a trained model, on every token."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial

from rich.console import Console
from rich.table import Table

from megarpt.config.schema import EvaluateOptions, HeldOutCorpus
from megarpt.data.build import build_eval_sets, open_held_out
from megarpt.data.samples import SampleDataset
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_OK, ConfigError
from megarpt.log import terminal
from megarpt.parallel.layout import ParallelLayout
from megarpt.run.contents import verify_contents
from megarpt.run.pretrained import load_pretrained
from megarpt.train.evaluation import evaluate
from megarpt.train.progress import ProgressLine
from megarpt.train.reports import EvaluationResult
from megarpt.train.signals import StopSignal


def run(options: EvaluateOptions, runtime: Runtime) -> int:
    """Evaluate and print a table, or one JSON object, on standard output.

    Raises:
        ConfigError: there is nothing to evaluate on.
        StopRequested: a signal to any rank; nothing is printed.
    """
    with StopSignal(runtime) as stop:
        return _run(options, runtime, stop)


def _run(options: EvaluateOptions, runtime: Runtime, stop: StopSignal) -> int:
    layout = ParallelLayout.resolve(options.parallel, runtime.world_size)
    groups = layout.initialize(seed=0)
    stop.check("before reading the model")
    trained = load_pretrained(
        options.checkpoint, runtime, layout, groups, options.parallel, micro_batch_size=options.micro_batch_size
    )
    cfg = trained.config
    given = {name: HeldOutCorpus(path=prefix) for name, prefix in options.corpora.items()}
    datasets: Mapping[str, SampleDataset]
    datasets = open_held_out(cfg, trained.tokenizer, given) if given else build_eval_sets(cfg, trained.tokenizer)
    if not datasets:
        raise ConfigError(
            "--corpus: the run has no held-out text in data.valid, so name at least one corpus: --corpus NAME=PREFIX; "
            "questions are evaluated with --questions FILE"
        )
    verify_contents([*datasets.values()], runtime, on_block=partial(stop.check_here, "while reading the corpora"))
    micro_batch_size = cfg.batch.micro_batch_size
    per_batch = micro_batch_size * cfg.data.seq_length * groups.dp_size
    total = sum(min(d.num_windows * d.seq_length, options.max_tokens or sys.maxsize) for d in datasets.values())
    done = 0
    with ProgressLine("evaluate", total, console=terminal(), is_writer=runtime.rank == 0) as line:

        def advance() -> None:
            nonlocal done
            done += per_batch
            line.update(min(done, total))
            stop.check("in the evaluation")

        results = evaluate(
            [trained.network],
            datasets,
            groups,
            runtime.device,
            micro_batch_size=micro_batch_size,
            max_tokens=options.max_tokens,
            on_batch=advance,
        )
    if runtime.rank == 0:
        report = {name: _numbers(result) for name, result in results.items()}
        if options.output == "json":
            sys.stdout.write(json.dumps({"checkpoint": str(trained.checkpoint), "corpora": report}, indent=2) + "\n")
        else:
            Console().print(_table(str(trained.checkpoint), report))
    return EXIT_OK


def _numbers(result: EvaluationResult) -> dict[str, float | int | None]:
    return {
        "loss_nats": result.loss_nats,
        "ppl": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "top1": result.top1,
        "tokens": result.num_tokens,
    }


def _table(checkpoint: str, report: dict[str, dict[str, float | int | None]]) -> Table:
    table = Table(title=checkpoint)
    for column in ("corpus", "nats/token", "perplexity", "bits/byte", "top-1", "tokens"):
        table.add_column(column, justify="left" if column == "corpus" else "right")
    for name, numbers in report.items():
        bits = numbers["bits_per_byte"]
        table.add_row(
            name,
            f"{numbers['loss_nats']:.4f}",
            f"{numbers['ppl']:.3f}",
            "-" if bits is None else f"{bits:.4f}",
            f"{100 * (numbers['top1'] or 0.0):.2f}%",
            f"{numbers['tokens']:,}",
        )
    return table
