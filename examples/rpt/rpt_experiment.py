"""The experiment: reinforcement pre-training of a small model, against more of plain pretraining, over several seeds.

    python examples/rpt/rpt_experiment.py             # 3 seeds, side by side; README.md says how long it takes
    python examples/rpt/rpt_experiment.py --seeds 5   # more seeds later: what is done is kept
    python examples/rpt/rpt_experiment.py --seed 2    # this one alone
    python examples/rpt/rpt_experiment.py --smoke     # every step, one seed, small; the model learns little

For every seed: a corpus (dials.py), a base model, prompts where it is uncertain, a warm start that teaches the format of an
answer, reinforcement on the prompts, and two models that go on with plain pretraining instead: for as many tokens as
reinforcement took gradients of, and for as long as it took. Every step is a command that is shown and can be typed; what is
done is kept, so the same command continues an interrupted run. rpt_results.py makes the tables and plots.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import rpt_results  # a sibling file
from pipeline import Command, Pipeline, Stage, StageFailed, Stopped, only_one, show_failure  # the demo's

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOKENIZED = ("pretrain", "rpt", "heldout")
MINED = ("rpt", "heldout")
THRESHOLDS = "1.5,2.0,2.25"
"""Nats from which on a position is easy, medium and hard. A move is drawn from three, ln 3 = 1.1 nats, and no thought tells
which; the end of many moves is one of ten, ln 10 = 2.3 nats, for a model that cannot follow them."""

EVALUATED = {
    "base": ("plain",),
    "sft": ("both", "--template", "minimal", "--verifier", "next_token", "--max-new-tokens", "48"),
    "rpt": ("both",),
    "continued_tokens": ("plain",),
    "continued_time": ("plain",),
}
"""Model -> how it is asked."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is. The values that the YAML files and dials.py hold already are those of the full experiment."""

    documents: dict[str, int] = field(default_factory=dict)  # of parts of the corpus
    base: tuple[str, ...] = ()  # overrides
    sft: tuple[str, ...] = ()
    rl: tuple[str, ...] = ()
    thresholds: str = THRESHOLDS


SCALES = {
    "full": Scale(),
    "smoke": Scale(
        {"pretrain": 20_000, "rpt": 300, "heldout": 100, "format": 200, "replay": 200},
        ("train.train_tokens=60_000", "optimizer.lr_warmup_tokens=2_000"),
        ("train.train_tokens=40_000", "optimizer.lr_warmup_tokens=2_000"),
        ("train.train_steps=10", "rollout.prompts_per_step=4", "evaluation.interval_steps=2", "evaluation.max_prompts=16"),
        "0.5,1.0,1.5",
    ),
}


def build_stages(out: Path, seed: int, scale: Scale, device: str) -> list[Stage]:
    """What one seed needs up to the end of reinforcement, as commands."""
    text, data, prompts = out / "corpus", out / "data", out / "prompts"
    sizes = [item for part, count in scale.documents.items() for item in (f"--{part}-documents", str(count))]
    corpus = ("python", _shown(HERE / "dials.py"), "--out", str(text), "--seed", str(seed), *sizes)

    def tokenize(part: str) -> Command:
        argv = ("python", "tools/preprocess_corpus.py", "--input", str(text / f"{part}.jsonl"), "--text-key", "text")
        argv += ("--output-prefix", str(data / part), "--tokenizer", "bytes", "--append-eod", "--workers", "1")
        return Command(argv, f"tokenize_{part}")

    def mine(part: str) -> Command:
        argv = ("python", "tools/build_rpt_prompts.py", "--proxy", str(out / "base"), "--corpus", str(data / part))
        argv += ("--output-prefix", str(prompts / part), "--thresholds", scale.thresholds, "--valid-fraction", "0")
        return Command((*argv, "--micro-batch-size", "64", "--device", device), f"mine_{part}")

    base = (f"data.train.0.path={data / 'pretrain'}", *scale.base)
    sft = (f"model.init_from={out / 'base'}", f"data.train.0.path={text / 'format.jsonl'}")
    sft += (f"data.train.1.path={text / 'replay.jsonl'}", *scale.sft)
    rl = (f"model.init_from={out / 'sft'}", f"data.train={prompts / 'rpt_train.jsonl'}")
    rl += (f"data.valid.heldout={prompts / 'heldout_train.jsonl'}", *scale.rl)
    return [
        Stage("corpus", f"Seed {seed}: corpus", (Command(corpus, "corpus"),), (text,), files=(HERE / "dials.py",)),
        Stage("tokenize", f"Seed {seed}: tokenize", tuple(tokenize(part) for part in TOKENIZED), (data,), ("corpus",)),
        _train("pretrain", "base", "pretrain.yaml", "base model", out, seed, device, ("tokenize",), base),
        Stage(
            "mine", f"Seed {seed}: prompts where it is uncertain", tuple(mine(part) for part in MINED), (prompts,), ("base",)
        ),
        _train("sft", "sft", "sft.yaml", "warm start", out, seed, device, ("base",), sft),
        _train("rl", "rpt", "rl.yaml", "reinforcement", out, seed, device, ("sft", "mine"), rl),
    ]


def build_comparison(out: Path, seed: int, device: str, before: Sequence[Stage]) -> list[Stage]:
    """What follows, once it is known what reinforcement took: `before` and these stages."""
    spent = rpt_results.spent_by(out / "rpt")
    speed = rpt_results.tokens_per_second(out / "base")
    tokens = {"continued_tokens": spent.gradient_tokens, "continued_time": round(spent.seconds * speed)}
    stages = []
    for name, count in tokens.items():
        more = (f"model.init_from={out / 'base'}", f"data.train.0.path={out / 'data' / 'rpt'}")
        more += (f"data.train.1.path={out / 'data' / 'pretrain'}", f"train.train_tokens={count}")
        more += (f"optimizer.lr_warmup_tokens={count // 20}",)
        title = f"plain pretraining, {'the same tokens' if name == 'continued_tokens' else 'the same time'}"
        stages.append(_train("pretrain", name, "continued.yaml", title, out, seed, device, ("rpt",), more))

    def evaluate(model: str) -> Command:
        mode, *task = EVALUATED[model]
        argv = ("megarpt", "evaluate", str(out / model), "--questions", f"heldout={out / 'prompts' / 'heldout_train.jsonl'}")
        argv += ("--mode", mode, *task, "--max-batch", "128", "--output", "json", "--device", device)
        return Command(argv, f"evaluate_{model}", out / "results" / f"{model}.json")

    commands = tuple(evaluate(model) for model in EVALUATED)
    needs = ("base", "sft", "rpt", *tokens)
    return [*before, *stages, Stage("evaluate", f"Seed {seed}: evaluate", commands, (out / "results",), needs)]


def _train(
    command: str, name: str, file: str, title: str, out: Path, seed: int, device: str, needs: Sequence[str], more: Sequence[str]
) -> Stage:
    overrides = (f"run.dir={out / name}", f"run.seed={seed}", f"run.device={device}", *more)
    run = Command(("megarpt", command, _shown(HERE / file), *overrides), name)
    return Stage(name, f"Seed {seed}: {title}", (run,), (out / name,), tuple(needs), (HERE / file,))


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def one_stage(out: Path, seeds: int, more: Sequence[str]) -> Stage:
    """All seeds side by side, each a command that runs its own stages."""
    script, name = ("python", _shown(HERE / "rpt_experiment.py"), "--out", str(out)), "seed{}".format
    commands = [(*script, "--seed", str(seed), "--of", str(seeds), *more) for seed in range(1, seeds + 1)]
    title = f"{seeds} seeds, side by side: corpus, base model, prompts, warm start, reinforcement, comparison, evaluation"
    return Stage("seeds", title, tuple(Command(argv, name(i)) for i, argv in enumerate(commands, 1)), (), side_by_side=True)


def run_seed(out: Path, seed: int, seeds: int, scale: Scale, device: str, console: Console) -> None:
    """All stages of a seed, one of some that share the machine."""
    folder = out / f"seed{seed}"
    stages = build_stages(folder, seed, scale, device)
    Pipeline(folder, stages, console, sharers=seeds).run()
    Pipeline(folder, build_comparison(folder, seed, device, stages), console, sharers=seeds).run()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for everything it writes (default: runs/rpt, or runs/rpt_smoke)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1 on (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="only this one, without the report")
    parser.add_argument("--of", type=int, default=1, help=argparse.SUPPRESS)  # so many seeds share the machine
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA when it is usable")
    parser.add_argument("--smoke", action="store_true", help="one seed, very small")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    out = args.out or Path("runs/rpt_smoke" if args.smoke else "runs/rpt")
    scale, seeds = SCALES["smoke" if args.smoke else "full"], 1 if args.smoke else args.seeds
    console = Console(highlight=False)
    with only_one(out / f"seed{args.seed}" if args.seed else out) as is_alone:
        if not is_alone:
            console.print(f"Another experiment is running in {out}. Wait for it, or choose another folder with --out.")
            return 1
        try:
            if args.seed:
                run_seed(out, args.seed, args.of, scale, args.device, console)
                return 0
            more = ("--device", args.device, *(("--smoke",) if args.smoke else ()))
            Pipeline(out, (one_stage(out, seeds, more),), console).run()
        except StageFailed as failure:
            show_failure(console, failure)
            return failure.code
        except Stopped as stopped:
            console.print(f"\nStopped by {stopped}. The same command continues from here.")
            return 128 + stopped.signum
        rpt_results.write(out, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
