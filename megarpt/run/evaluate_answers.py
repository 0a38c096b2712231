"""`megarpt evaluate --questions`: how often a trained model answers rightly, and how sure that is.

Questions get one answer of the likeliest tokens, and some that are sampled for pass@k. Next-token prompts are also asked
without a thought: what reasoning adds is the difference of the two, on the same contexts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megarpt.config.schema import EvaluateAnswersOptions, RLConfig, TrainingConfig, VerifierConfig
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_OK, ConfigError
from megarpt.log import terminal
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.rl.embedded_engine import EmbeddedEngine
from megarpt.rl.evaluation import PLAIN, EvaluatedPrompts, PlainNextToken, evaluate_prompts, stop_tokens
from megarpt.rl.pass_at_k import Interval, bootstrap_interval, wilson_interval
from megarpt.rl.prompts import load_prompts
from megarpt.rl.rollout import RolloutEngine, Sampling
from megarpt.rl.structs import Prompt
from megarpt.rl.tasks import build_verifier
from megarpt.rl.templates import PromptTemplate
from megarpt.rl.verifiers import Closeable, Verifier
from megarpt.run.pretrained import load_pretrained
from megarpt.train.failures import together
from megarpt.train.progress import ProgressLine
from megarpt.train.signals import StopSignal

_NEW_TOKENS = 256  # of an answer, where nothing says how many
_EVERYTHING = "all"  # in place of a band
_COLUMNS = ("band", "measure", "of", "right", "95%", "reward", "format", "cut off", "unknown", "tokens")

Numbers = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What is asked and how it is judged: the options, and where they are silent those of the run."""

    template: str | None  # None where all is plain
    verifiers: Sequence[VerifierConfig]
    max_new_tokens: int
    max_prompt_tokens: int
    stop: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Prompts of one file, to be answered in one way."""

    name: str
    mode: str  # plain, greedy or sampled
    prompts: Sequence[Prompt]
    sampling: Sampling
    group_size: int = 1


def run(options: EvaluateAnswersOptions, runtime: Runtime) -> int:
    """Evaluate and print a table, or one JSON object, on standard output.

    Raises:
        ConfigError: options that do not go together, or neither they nor the run say what to ask.
        DataError: a file cannot be read, or its answers are not those that the verifiers need.
        StopRequested: a signal to any rank; nothing is printed.
    """
    with StopSignal(runtime) as stop:
        return _run(options, runtime, stop)


def _run(options: EvaluateAnswersOptions, runtime: Runtime, stop: StopSignal) -> int:
    _refuse_idle_options(options)
    ks = _ks(options)
    layout = ParallelLayout.resolve(options.parallel, runtime.world_size)
    groups = layout.initialize(seed=0)
    stop.check("before reading the model")
    trained = load_pretrained(options.checkpoint, runtime, layout, groups, options.parallel)
    task = _task(options, trained.config)
    parts = together(partial(_parts, options, task, trained.tokenizer))
    engine = EmbeddedEngine(
        trained.network,
        trained.tokenizer,
        groups,
        runtime.device,
        max_sequence_length=task.max_prompt_tokens + task.max_new_tokens,
        max_batch=options.max_batch,
    )
    with ExitStack() as stack:
        verifier: Verifier = PlainNextToken()
        if any(part.mode != "plain" for part in parts):
            verifier = build_verifier(task.verifiers, where="--verifier")
            if isinstance(verifier, Closeable):
                stack.callback(verifier.close)
        stop.check("before the first question")
        results = _evaluate(engine, verifier, parts, groups, stop, is_writer=runtime.rank == 0)
    if runtime.rank == 0:
        report = _report(options, parts, results, ks)
        if options.output == "json":
            sys.stdout.write(json.dumps({"checkpoint": str(trained.checkpoint), "questions": report}, indent=2) + "\n")
        else:
            _show(str(trained.checkpoint), report)
    return EXIT_OK


def _ks(options: EvaluateAnswersOptions) -> tuple[int, ...]:
    """The k of pass@k, rising."""
    n = options.samples
    if too_large := [k for k in options.k if k > n]:
        raise ConfigError(f"--k: got {too_large[0]}, expected at most the {n} answers of --samples; raise --samples")
    powers = [1 << i for i in range(n.bit_length())]
    return tuple(sorted(set(options.k or ([*powers, n] if n else []))))


def _refuse_idle_options(options: EvaluateAnswersOptions) -> None:
    """Options that cannot take effect together with others."""
    given = options.model_fields_set
    if options.mode == "plain":
        if idle := given & {"template", "verifiers", "samples", "greedy", "max_new_tokens", "stop"}:
            raise ConfigError(f"--mode: got plain, which asks for one token without a template and ignores {_flags(idle)}")
    elif not options.samples:
        if not options.greedy:
            raise ConfigError("--samples: got 0 with --no-greedy, expected at least 1; there is no answer to draw")
        if idle := given & {"temperature", "top_k", "top_p"}:
            raise ConfigError(f"--samples: got 0, expected at least 1 with {_flags(idle)}; the greedy answer ignores them")


def _flags(names: Iterable[str]) -> str:
    return ", ".join(sorted(f"--{'verifier' if name == 'verifiers' else name.replace('_', '-')}" for name in names))


def _task(options: EvaluateAnswersOptions, config: TrainingConfig) -> _Task:
    run = config if isinstance(config, RLConfig) else None
    template = options.template or (run.data.template if run else None)
    verifiers = options.verifiers or (run.verifiers if run else [])
    max_new_tokens = options.max_new_tokens or (run.rollout.max_new_tokens if run else _NEW_TOKENS)
    if options.mode == "plain":
        template, verifiers, max_new_tokens = None, [], PLAIN.max_new_tokens
    elif missing := [name for name, value in (("--template", template), ("--verifier", verifiers)) if not value]:
        raise ConfigError(
            f"{' and '.join(missing)}: missing, expected where the run is none of `megarpt rl`, whose own would be taken; "
            "for example --template question --verifier math"
        )
    length = config.data.seq_length
    room = length - max_new_tokens
    max_prompt_tokens = options.max_prompt_tokens or min(room, run.data.max_prompt_tokens if run else room)
    if not 0 < max_prompt_tokens <= room:
        raise ConfigError(
            f"--max-new-tokens: prompts of up to {max(max_prompt_tokens, 1)} tokens and {max_new_tokens} new ones exceed the "
            f"{length} tokens the model was trained on; lower --max-new-tokens or --max-prompt-tokens"
        )
    return _Task(
        template=template,
        verifiers=verifiers,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        stop=options.stop if options.stop is not None else (run.rollout.stop if run else ()),
    )


def _parts(options: EvaluateAnswersOptions, task: _Task, tokenizer: Tokenizer) -> list[_Part]:
    """All that is to be drawn, file by file."""
    ends = () if options.mode == "plain" else stop_tokens(tokenizer, task.stop, where="--stop")
    greedy = Sampling(max_new_tokens=task.max_new_tokens, temperature=0.0, stop_tokens=ends)
    sampled = Sampling(
        max_new_tokens=task.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_tokens=ends,
        seed=options.seed,
    )
    parts = []
    for name, path in options.questions.items():
        load = partial(_load, path, tokenizer, options.max_questions)
        prompts = load(task.template or "plain", task.max_prompt_tokens)
        asks_next_tokens = all("continuation" in prompt.answer for prompt in prompts)
        if options.mode == "plain" and not asks_next_tokens:
            raise ConfigError(f"--mode: got plain, but {path} holds questions, expected next-token prompts; leave --mode out")
        if asks_next_tokens and options.mode != "reasoning":
            bare = prompts
            if task.template is not None:  # the same contexts, without what is put around them
                bare = load("plain", task.max_prompt_tokens - PromptTemplate(task.template, tokenizer).num_tokens)
            parts.append(_Part(name=name, mode="plain", prompts=bare, sampling=PLAIN))
        if options.mode != "plain" and options.greedy:
            parts.append(_Part(name=name, mode="greedy", prompts=prompts, sampling=greedy))
        if options.mode != "plain" and options.samples:
            parts.append(_Part(name=name, mode="sampled", prompts=prompts, sampling=sampled, group_size=options.samples))
    return parts


def _load(path: str, tokenizer: Tokenizer, limit: int | None, template: str, max_prompt_tokens: int) -> list[Prompt]:
    return load_prompts(path, tokenizer, template=template, max_prompt_tokens=max_prompt_tokens)[:limit]


def _evaluate(
    engine: RolloutEngine,
    verifier: Verifier,
    parts: Sequence[_Part],
    groups: ProcessGroups,
    stop: StopSignal,
    *,
    is_writer: bool,
) -> list[EvaluatedPrompts]:
    total = sum(len(part.prompts) * part.group_size for part in parts)
    results = []
    done = 0
    with ProgressLine("evaluate", total, unit="answer", console=terminal(), is_writer=is_writer) as line:
        line.update(0)

        def progress(part: _Part) -> Callable[[int], None]:
            def advance(prompts: int) -> None:
                line.update(done + prompts * part.group_size, {"of": f"{part.name} {part.mode}"})
                stop.check("in the evaluation")

            return advance

        for part in parts:
            results.append(
                evaluate_prompts(
                    engine,
                    PlainNextToken() if part.mode == "plain" else verifier,
                    part.prompts,
                    group_size=part.group_size,
                    sampling=part.sampling,
                    groups=groups,
                    on_prompts=progress(part),
                )
            )
            done += len(part.prompts) * part.group_size
    return results


def _report(
    options: EvaluateAnswersOptions, parts: Sequence[_Part], results: Sequence[EvaluatedPrompts], ks: Sequence[int]
) -> dict[str, Numbers]:
    """name of the file -> mode -> band -> numbers."""
    report: dict[str, Numbers] = {name: {"file": path, "results": {}} for name, path in options.questions.items()}
    for part, evaluated in zip(parts, results, strict=True):
        bands = {_EVERYTHING: evaluated, **{band: evaluated.of_band(band) for band in evaluated.bands}}
        report[part.name]["results"][part.mode] = {
            band: _numbers(of_band, part.mode, ks, options.seed) for band, of_band in bands.items()
        }
    return report


def _numbers(evaluated: EvaluatedPrompts, mode: str, ks: Sequence[int], seed: int) -> Numbers:
    tally = evaluated.tally()
    n = tally.num_completions
    numbers: Numbers = {
        "questions": tally.num_prompts,
        "answers": n,
        "right": tally.num_right,
        "unknown": tally.num_unknown,
        "accuracy": tally.accuracy,
    }
    if mode == "sampled":
        numbers["pass_at_k"] = {str(k): _pass_at(evaluated, k, seed) for k in ks}
    else:
        numbers["interval"] = _pair(wilson_interval(tally.num_right, tally.num_judged))
    if mode == "plain":
        firsts = [reward.parts["first_token"] for rewards in evaluated.rewards for reward in rewards]
        return numbers | {"first_token_accuracy": sum(firsts) / n}
    return numbers | {
        "reward_mean": tally.reward_mean,
        "format_rate": tally.format_rate,
        "truncated_share": tally.num_truncated / n,
        "length_mean_tokens": tally.length_mean_tokens,
    }


def _pass_at(evaluated: EvaluatedPrompts, k: int, seed: int) -> Numbers:
    values = evaluated.pass_at(k)
    if not len(values):
        return {"questions": 0, "value": None, "interval": None}
    interval = bootstrap_interval(values, seed=seed)
    return {"questions": len(values), "value": float(values.mean()), "interval": _pair(interval)}


def _pair(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _show(checkpoint: str, report: Mapping[str, Numbers]) -> None:
    console = Console()
    console.print(checkpoint, soft_wrap=True)
    for name, file in report.items():
        console.print(_table(name, file))
    console.print("95% intervals: Wilson's; of pass@k the bootstrap's over questions")


def _table(name: str, file: Numbers) -> Table:
    """What was found out about one file, at most 80 columns wide."""
    table = Table(title=f"{name}: {file['file']}", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("band", "measure") else "right")
    for mode, bands in file["results"].items():
        for band, numbers in bands.items():
            for measure, number, value, interval in _measures(mode, numbers):
                table.add_row(band, measure, f"{number:,}", _percent(value), _span(interval), *_rest(numbers))
    return table


def _measures(mode: str, numbers: Numbers) -> list[tuple[str, int, float | None, list[float] | None]]:
    """(what, of how many questions, its value, its interval)"""
    if mode != "sampled":
        return [(mode, numbers["questions"], numbers["accuracy"], numbers["interval"])]
    return [(f"pass@{k}", each["questions"], each["value"], each["interval"]) for k, each in numbers["pass_at_k"].items()]


def _rest(numbers: Numbers) -> list[str]:
    """The columns that are of the answers and not of a measure."""
    reward, length = numbers.get("reward_mean"), numbers.get("length_mean_tokens")
    return [
        "-" if reward is None else f"{reward:.3f}",
        _percent(numbers.get("format_rate")),
        _percent(numbers.get("truncated_share")),
        f"{numbers['unknown']:,}",
        "-" if length is None else f"{length:.1f}",
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _span(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}%"
