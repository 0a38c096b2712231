#!/usr/bin/env python
"""Published models (Hugging Face's safetensors) to checkpoints and back.

    python tools/convert_checkpoint.py import --hf TinyLlama-1.1B --output models/tinyllama-1.1b
    python tools/convert_checkpoint.py export --checkpoint runs/rho1 --output published/rho1
    python tools/convert_checkpoint.py verify --hf TinyLlama-1.1B --checkpoint models/tinyllama-1.1b

What `import` makes is taken by model.init_from, objective.reference.checkpoint, `megarpt score`, `evaluate` and `generate`.
Needs the extra hf: pip install -e '.[hf]'. See docs/convert.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarpt.config.hf_settings import FAMILIES
from megarpt.corpus.console import ToolParser, positive, run_tool
from megarpt.errors import CheckpointError

if TYPE_CHECKING:
    from megarpt.device.runtime import Runtime

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parser() -> ToolParser:
    parser = ToolParser(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="import|export|verify", parser_class=ToolParser)

    verb = verbs.add_parser("import", description="Make a checkpoint from a folder of Hugging Face's.")
    verb.add_argument(
        "--hf", type=Path, required=True, metavar="FOLDER", help="with config.json, *.safetensors and a tokenizer"
    )
    verb.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the checkpoint to make")
    verb.add_argument(
        "--vocab-size",
        type=positive,
        metavar="N",
        help="rows of the vocabulary to keep, from the tokenizer's size (default: all)",
    )
    verb.add_argument(
        "--seq-length",
        type=positive,
        metavar="N",
        help="windows of evaluate, limit of generate (default: the model's, up to 4096)",
    )
    verb.add_argument("--tokenizer", metavar="FILE", help="default: the folder's tokenizer.json, else its tokenizer.model")
    verb.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="KEY",
        help="of config.json, known to change nothing; may be repeated",
    )

    verb = verbs.add_parser("export", description="Make a folder as Hugging Face publishes it.")
    verb.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder, a checkpoint or an export")
    verb.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    verb.add_argument("--family", choices=sorted(FAMILIES), help="its model_type (default: the first that computes the model)")
    verb.add_argument("--dtype", choices=sorted(_DTYPES), help="of the weights (default: as they are stored)")
    verb.add_argument("--max-shard-mb", type=positive, default=5000, metavar="MB", help="of one file (default: 5000)")

    verb = verbs.add_parser("verify", description="Compare the logits of both sides on random tokens, in fp32.")
    verb.add_argument("--hf", type=Path, required=True, metavar="FOLDER")
    verb.add_argument("--checkpoint", required=True, metavar="RUN")
    verb.add_argument("--sequences", type=positive, default=2, metavar="N", help="default: 2")
    verb.add_argument("--tokens", type=positive, default=64, metavar="N", help="of each sequence (default: 64)")
    verb.add_argument("--seed", type=int, default=1, help="of the tokens (default: 1)")
    verb.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="X", help="largest difference, as a share of the largest logit (1e-4)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from megarpt.device import runtime  # only now: `--help` needs no torch

    machine = runtime.start("cpu")
    try:
        _convert(args, machine)
    finally:
        machine.close()


def _convert(args: argparse.Namespace, machine: Runtime) -> None:
    import torch

    from megarpt.run import convert  # only now: it imports megatron-core, which needs a runtime that was started

    if args.verb == "import":
        convert.import_model(
            args.hf,
            args.output,
            machine,
            vocab_size=args.vocab_size,
            seq_length=args.seq_length,
            tokenizer=args.tokenizer,
            ignored=args.ignore_key,
        )
    elif args.verb == "export":
        dtype = getattr(torch, _DTYPES[args.dtype]) if args.dtype else None
        convert.export_model(
            args.checkpoint, args.output, family=args.family, dtype=dtype, max_shard_bytes=args.max_shard_mb * 1_000_000
        )
    else:
        verdict = convert.verify(
            args.hf, args.checkpoint, machine, num_sequences=args.sequences, num_tokens=args.tokens, seed=args.seed
        )
        print(
            f"{verdict.num_tokens} tokens: logits differ by at most {verdict.max_difference:.2e} (largest logit "
            f"{verdict.max_logit:.1f}); the likeliest next token is the same after {verdict.same_choice:.2%}"
        )
        if not verdict.max_difference <= args.tolerance * verdict.max_logit:
            raise CheckpointError(f"{args.checkpoint} does not compute what {args.hf} computes; were both made from one model?")


if __name__ == "__main__":
    sys.exit(run_tool(main))
