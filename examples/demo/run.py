"""The demo: token selection (Rho-1) against ordinary language modeling, on real text, from nothing.

    python examples/demo/run.py                      # `make demo`
    python examples/demo/run.py --smoke              # `make smoke`, about two minutes
    python examples/demo/run.py --device cuda --out runs/demo_gpu

It builds a corpus, trains a tokenizer, tokenizes, trains a common initialization on the web mix, continues it on clean text
to get the reference model, scores the students' corpus with it, trains two students on the same tokens, evaluates both on
clean held-out text, and reports. Every step is a command that is shown and can be typed; what is done is kept, so the same
command continues an interrupted demo. README.md beside this file explains what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pipeline import Command, Pipeline, Stage, StageFailed, Stopped, only_one, remove, show_failure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = ("base", "reference", "mix", "heldout", "probe")
PROMPT = "Return a new array with the same"
RESULTS = ("verdict.json", "demo.png", "selection.html")


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is. The values that the YAML files hold already are those of the full demo."""

    bytes: dict[str, int]  # of each part of the corpus
    vocab_size: int
    tokens: dict[str, int]  # each model trains on
    evaluation_interval_steps: int
    overrides: tuple[str, ...] = ()  # of every model


SCALES = {
    "full": Scale(
        {"base": 3_600_000, "reference": 1_700_000, "mix": 1_100_000, "heldout": 120_000, "probe": 100_000},
        2048,
        {"base": 1_500_000, "reference": 600_000, "clm": 420_000, "slm": 420_000},
        30,
    ),
    "smoke": Scale(
        {"base": 700_000, "reference": 500_000, "mix": 400_000, "heldout": 60_000, "probe": 60_000},
        2048,
        {"base": 200_000, "reference": 120_000, "clm": 120_000, "slm": 120_000},
        15,
    ),
    "tiny": Scale(
        {"base": 60_000, "reference": 60_000, "mix": 40_000, "heldout": 8_000, "probe": 20_000},
        512,
        {"base": 5_120, "reference": 5_120, "clm": 5_120, "slm": 5_120},
        10,
        (
            "model.mcore.num_layers=1",
            "model.mcore.hidden_size=32",
            "model.mcore.num_attention_heads=2",
            "model.mcore.num_query_groups=2",
            "model.mcore.ffn_hidden_size=64",
            "data.seq_length=64",
            "optimizer.lr_warmup_tokens=0",
        ),
    ),
}


def build_stages(out: Path, scale: Scale, device: str) -> list[Stage]:
    """The demo, as commands."""
    data, tokenizer = out / "data", out / "tokenizer.model"
    sizes = [item for part in PARTS for item in (f"--{part}-bytes", str(scale.bytes[part]))]
    text = {part: out / "corpus" / f"{part}.jsonl" for part in PARTS}

    def pretrain(name: str) -> Command:
        return Command(("megarpt", "pretrain", _shown(HERE / f"{name}.yaml"), *overrides(name, out, scale, device)), name)

    def tokenize(part: str) -> Command:
        argv = ("python", "tools/preprocess_corpus.py", "--input", str(text[part]), "--text-key", "text")
        argv += ("--output-prefix", str(data / part), "--tokenizer", str(tokenizer), "--append-eod", "--workers", "1")
        return Command(argv, f"tokenize_{part}")

    def score(model: str, part: str, output: str) -> Command:
        argv = ("megarpt", "score", "--reference", str(out / model), "--corpus", str(data / part))
        return Command((*argv, "--output-prefix", str(data / output), "--device", device), f"score_{part}_{model}")

    def evaluate(model: str) -> Command:
        argv = ("megarpt", "evaluate", str(out / model), "--corpus", f"heldout={data / 'heldout'}", "--output", "json")
        return Command((*argv, "--device", device), f"evaluate_{model}", out / "results" / f"{model}.json")

    probe = ("python", "tools/show_selection.py", str(out / "slm"), "--reference", str(out / "reference"))
    probe += ("--corpus", str(data / "probe"), "--documents", "all", "--max-shown", "1000000")
    probe += ("--json", str(out / "results" / "probe.json"), "--device", device)
    generate = ("megarpt", "generate", str(out / "slm"), "--prompt", PROMPT, "--max-new-tokens", "40", "--temperature", "0.7")
    return [
        Stage(
            "corpus",
            "Corpus: documentation, source code and web noise found on this machine",
            (Command(("python", _shown(HERE / "corpus.py"), "--out", str(out / "corpus"), *sizes), "corpus"),),
            (out / "corpus",),
            files=(HERE / "corpus.py", HERE / "noise.py"),
        ),
        Stage(
            "tokenizer",
            f"Tokenizer: sentencepiece, {scale.vocab_size} pieces",
            (
                Command(
                    ("python", "tools/train_tokenizer.py", "--input", str(text["base"]), str(text["reference"]))
                    + ("--text-key", "text", "--vocab-size", str(scale.vocab_size), "--output", str(tokenizer)),
                    "tokenizer",
                ),
            ),
            (tokenizer,),
            needs=("corpus",),
        ),
        Stage(
            "tokenize",
            "Tokenize: Megatron's .bin/.idx for every part",
            tuple(tokenize(part) for part in PARTS),
            (data,),
            needs=("tokenizer",),
            side_by_side=True,
        ),
        Stage(
            "base",
            "Initialization: a model trained on the web mix",
            (pretrain("base"),),
            (out / "base",),
            needs=("tokenize",),
            files=(HERE / "base.yaml",),
        ),
        Stage(
            "reference",
            "Reference model: the initialization, trained further on clean text",
            (pretrain("reference"),),
            (out / "reference",),
            needs=("base",),
            files=(HERE / "reference.yaml",),
        ),
        Stage(
            "score",
            "Score: the reference model's loss on every token of the students' corpus",
            (score("reference", "mix", "mix_ref_nll"),),
            tuple(data / f"mix_ref_nll{suffix}" for suffix in (".bin", ".idx", ".json")),
            needs=("reference",),
        ),
        Stage(
            "students",
            "Students, side by side: all tokens (CLM) | the 60% with the highest excess loss (SLM)",
            (pretrain("clm"), pretrain("slm")),
            (out / "clm", out / "slm"),
            needs=("score",),
            files=(HERE / "clm.yaml", HERE / "slm.yaml"),
            side_by_side=True,
        ),
        Stage(
            "evaluate",
            "Evaluate: held-out clean text, which tokens were kept, a generated sentence",
            (
                *(evaluate(model) for model in ("clm", "slm")),
                Command(probe, "show_selection"),
                Command((*generate, "--device", device), "generate", out / "results" / "generated.txt"),
            ),
            (out / "results",),
            needs=("students",),
            side_by_side=True,
        ),
    ]


def overrides(name: str, out: Path, scale: Scale, device: str) -> list[str]:
    """What differs from the YAML file of a model; nothing for the full demo in runs/demo."""
    if device == "auto" and scale is SCALES["full"] and str(out) == "runs/demo":
        return []
    corpus = {"clm": "mix", "slm": "mix"}.get(name, name)
    settings = [f"run.dir={out / name}", f"run.device={device}", f"data.tokenizer={out / 'tokenizer.model'}"]
    settings += [f"data.train.0.path={out / 'data' / corpus}", f"data.valid.heldout={out / 'data' / 'heldout'}"]
    settings += [f"train.train_tokens={scale.tokens[name]}"]
    settings += [] if name == "base" else [f"model.init_from={out / 'base'}"]
    settings += [f"data.train.0.streams.ref_nll={out / 'data' / 'mix_ref_nll'}"] if name == "slm" else []
    if name in ("clm", "slm"):
        settings.append(f"evaluation.interval_steps={scale.evaluation_interval_steps}")
    return settings + list(scale.overrides)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything the demo writes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA when it is usable")
    parser.add_argument("--smoke", action="store_true", help="a two-minute version, in runs/smoke unless --out is given")
    parser.add_argument("--restart", action="store_true", help="start anew instead of keeping what is done")
    parser.add_argument("--scale", choices=tuple(SCALES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    scale = SCALES[args.scale or ("smoke" if args.smoke else "full")]
    out = Path("runs/smoke") if args.smoke and args.out == Path("runs/demo") else args.out
    console = Console(highlight=False)
    with only_one(out) as is_alone:
        if not is_alone:
            console.print(f"Another demo is running in {out}. Wait for it, or choose another folder with --out.")
            return 1
        pipeline = Pipeline(out, build_stages(out, scale, args.device), console)
        if args.restart:
            pipeline.remove_all()
        remove([out / name for name in RESULTS])  # a verdict belongs to the runs beside it or is not there
        try:
            pipeline.run()
        except StageFailed as failure:
            show_failure(console, failure)
            return failure.code
        except Stopped as stopped:
            console.print(f"\nStopped by {stopped}. The same command continues from here; --restart starts anew.")
            return 128 + stopped.signum
        (out / "stages" / "seconds.json").write_text(json.dumps(pipeline.seconds, indent=2) + "\n")
        import report  # matplotlib and numpy, needed only now

        report.write(out, pipeline.seconds, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
