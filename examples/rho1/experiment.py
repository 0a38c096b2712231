"""The experiment: which tokens to train on, on two mixes, over several seeds.

    python examples/rho1/experiment.py             # 3 seeds, about an hour on one core
    python examples/rho1/experiment.py --seeds 1   # more seeds later: what is done is kept
    python examples/rho1/experiment.py --smoke     # every step, one seed, two arms, some minutes; the models hardly learn

For every seed: corpora (mixes.py) and a tokenizer; then, for every mix, an initialization, a reference model, its losses on
the students' corpus, six students that share everything but the choice of tokens, and two of them tuned on clean text. The
models are the demo's (examples/demo/*.yaml); what differs is on the command lines, which are shown. `results.json` is
rewritten after every finished run; results.py makes the tables and the plot of it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import results  # a sibling file
from pipeline import Command, Pipeline, Stage, StageFailed, Stopped, only_one, show_failure  # the demo's

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
ROOT = HERE.parents[1]
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "clm": ("clm.yaml", ()),
    "excess40": ("slm.yaml", ("objective.fraction=0.4",)),
    "excess60": ("slm.yaml", ("objective.fraction=0.6",)),
    "excess80": ("slm.yaml", ("objective.fraction=0.8",)),
    "random60": ("clm.yaml", ("objective.scorer=random", "objective.weighting=top_fraction", "objective.fraction=0.6")),
    "loss60": ("clm.yaml", ("objective.scorer=loss", "objective.weighting=top_fraction", "objective.fraction=0.6")),
}
"""Name of an arm -> the demo's file it starts from, and its objective."""

TUNED = ("clm", "excess60")
"""Arms that are tuned on clean text at the end."""

PARTS = ("base", "mix", "reference", "finetune", "heldout", "code")
EVERY_RUN = ("logging.tensorboard=false", "logging.histogram_interval_steps=0")
BATCH = ("batch.micro_batch_size=4", "batch.global_batch_size=4")  # larger than the demo's for base and reference: faster


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is."""

    bytes: dict[str, int]  # of each part of the corpus
    tokens: dict[str, int]  # that each model trains on
    evaluation_interval_steps: int  # of the students
    vocab_size: int = 2048
    arms: tuple[str, ...] = tuple(ARMS)
    overrides: tuple[str, ...] = ()  # of every model


SCALES = {
    "full": Scale(
        {"base": 2_900_000, "mix": 950_000, "reference": 1_150_000, "finetune": 110_000, "heldout": 130_000, "code": 40_000},
        {"base": 1_000_000, "reference": 350_000, "student": 300_000, "finetune": 60_000},
        60,
    ),
    "smoke": Scale(
        {"base": 300_000, "mix": 120_000, "reference": 150_000, "finetune": 40_000, "heldout": 30_000, "code": 10_000},
        {"base": 60_000, "reference": 30_000, "student": 20_000, "finetune": 10_000},
        10,
        arms=TUNED,
        overrides=("optimizer.lr_warmup_tokens=2000",),
    ),
}


def build_stages(out: Path, seed: int, scale: Scale, device: str) -> list[Stage]:
    """All that one seed needs, as commands."""
    data, tokenizer, text = out / "data", out / "tokenizer.model", out / "corpus"
    sizes = [item for part in PARTS for item in (f"--{part}-bytes", str(scale.bytes[part]))]
    made = ["reference", "finetune", "heldout", "code", *(f"{part}_{mix}" for mix in results.MIXES for part in ("base", "mix"))]
    learned_from = [str(text / f"{part}.jsonl") for part in ("base_noisy", "base_offtarget", "reference")]

    def tokenize(part: str) -> Command:
        argv = ("python", "tools/preprocess_corpus.py", "--input", str(text / f"{part}.jsonl"), "--text-key", "text")
        argv += ("--output-prefix", str(data / part), "--tokenizer", str(tokenizer), "--append-eod", "--workers", "1")
        return Command(argv, f"tokenize_{part}")

    stages = [
        Stage(
            "corpus",
            f"Seed {seed}: corpora",
            (Command(("python", _shown(HERE / "mixes.py"), "--out", str(text), "--seed", str(seed), *sizes), "corpus"),),
            (text,),
            files=(HERE / "mixes.py", DEMO / "corpus.py", DEMO / "noise.py"),
        ),
        Stage(
            "tokenizer",
            f"Seed {seed}: tokenizer",
            (
                Command(
                    ("python", "tools/train_tokenizer.py", "--input", *learned_from, "--text-key", "text")
                    + ("--vocab-size", str(scale.vocab_size), "--output", str(tokenizer)),
                    "tokenizer",
                ),
            ),
            (tokenizer,),
            needs=("corpus",),
        ),
        Stage(
            "tokenize",
            f"Seed {seed}: tokenize",
            tuple(tokenize(part) for part in made),
            (data,),
            needs=("tokenizer",),
        ),
    ]
    for mix in results.MIXES:
        stages += _stages_of_mix(out, seed, mix, scale, device)
    return stages


def _stages_of_mix(out: Path, seed: int, mix: str, scale: Scale, device: str) -> list[Stage]:
    data, corpus = out / "data", f"mix_{mix}"

    def run(name: str, title: str, file: str, corpus: str, tokens: str, needs: str, more: Sequence[str]) -> Stage:
        name = f"{mix}-{name}"
        overrides = (f"run.dir={out / name}", f"run.seed={seed}", f"run.device={device}")
        overrides += (f"data.tokenizer={out / 'tokenizer.model'}", f"data.train.0.path={data / corpus}")
        overrides += (f"data.valid.heldout={data / 'heldout'}", f"data.valid.code={data / 'code'}")
        overrides += (f"train.train_tokens={scale.tokens[tokens]}", *more, *scale.overrides, *EVERY_RUN)
        command = Command(("megarpt", "pretrain", _shown(DEMO / file), *overrides), name)
        return Stage(name, f"Seed {seed}, {mix}: {title}", (command,), (out / name,), (needs,), (DEMO / file,))

    start = f"model.init_from={out / f'{mix}-base'}"

    def score(name: str, title: str, model: str, output: str) -> Stage:
        argv = ("megarpt", "score", "--reference", str(out / f"{mix}-{model}"), "--corpus", str(data / corpus))
        command = Command((*argv, "--output-prefix", str(data / f"{corpus}_{output}"), "--device", device), f"{mix}-{name}")
        written = tuple(data / f"{corpus}_{output}{suffix}" for suffix in (".bin", ".idx", ".json"))
        return Stage(f"{mix}-{name}", f"Seed {seed}, {mix}: {title}", (command,), written, (f"{mix}-{model}",))

    stages = [
        run("base", "initialization", "base.yaml", f"base_{mix}", "base", "tokenize", BATCH),
        run("reference", "reference model", "reference.yaml", "reference", "reference", f"{mix}-base", (start, *BATCH)),
        score("score", "reference losses", "reference", "ref_nll"),
    ]
    for arm in scale.arms:
        file, objective = ARMS[arm]
        sidecar = (f"data.train.0.streams.ref_nll={data / corpus}_ref_nll",) if file == "slm.yaml" else ()
        more = (start, *sidecar, *objective, f"evaluation.interval_steps={scale.evaluation_interval_steps}")
        stages.append(run(arm, results.ARMS[arm], file, corpus, "student", f"{mix}-score", more))
    for arm in TUNED:
        more = (f"model.init_from={out / f'{mix}-{arm}'}", "optimizer.lr_warmup_tokens=4000", "evaluation.interval_steps=0")
        name, title = f"{arm}-tuned", f"{results.ARMS[arm]}, tuned on clean text"
        stages.append(run(name, title, "clm.yaml", "finetune", "finetune", f"{mix}-{arm}", more))
    return [*stages, score("kept", "which tokens selection keeps", "excess60", "student_nll")]


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for everything it writes (default: runs/rho1, or runs/rho1_smoke)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1 on (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA when it is usable")
    parser.add_argument("--smoke", action="store_true", help="one seed, very small")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    out = args.out or Path("runs/rho1_smoke" if args.smoke else "runs/rho1")
    scale, seeds = SCALES["smoke" if args.smoke else "full"], 1 if args.smoke else args.seeds
    console = Console(highlight=False)

    def keep(stage: Stage) -> None:
        results.write_results(out)

    with only_one(out) as is_alone:
        if not is_alone:
            console.print(f"Another experiment is running in {out}. Wait for it, or choose another folder with --out.")
            return 1
        try:
            for seed in range(1, seeds + 1):
                folder = out / f"seed{seed}"
                Pipeline(folder, build_stages(folder, seed, scale, args.device), console, keep).run()
        except StageFailed as failure:
            show_failure(console, failure)
            return failure.code
        except Stopped as stopped:
            console.print(f"\nStopped by {stopped}. The same command continues from here.")
            return 128 + stopped.signum
        results.write(out, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
