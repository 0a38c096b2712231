#!/usr/bin/env python
"""Train a sentencepiece tokenizer that gives back every text unchanged.

    python tools/train_tokenizer.py --input data/*.jsonl --vocab-size 32000 --output tok.model

Pieces: 0 <unk>, 1 <s>, 2 </s> (the end of a document), 256 bytes, then what is learned. A manifest is written to OUTPUT.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megarpt.corpus.console import ToolParser, non_negative, positive, run_tool, stop_signals
from megarpt.corpus.readers import ReadOptions
from megarpt.corpus.sentencepiece_training import TrainingOptions, train_tokenizer


def parser() -> ToolParser:
    parser = ToolParser(__doc__)
    group = parser.add_argument_group("what is read")
    group.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, or quoted patterns such as 'd/*.gz'")
    group.add_argument("--text-key", default="text", help="jsonl: the key of the text; parquet: the column (default: text)")
    group.add_argument(
        "--format", choices=["jsonl", "text", "parquet"], help="what the files are, when their names do not say it"
    )
    group.add_argument(
        "--text-documents", choices=["file", "line", "paragraph"], default="file", help="plain text: what is one document"
    )
    group.add_argument("--skip-malformed", type=non_negative, default=0, metavar="N", help="skip up to N malformed lines")
    group.add_argument(
        "--max-document-mb", type=positive, default=64, metavar="MB", help="longer documents are malformed (default: 64)"
    )
    group.add_argument(
        "--max-bytes", type=positive, default=100_000_000, metavar="N", help="train on a sample of this size (default: 100 MB)"
    )
    group.add_argument(
        "--max-sentences", type=positive, default=2_000_000, metavar="N", help="and of at most this many pieces of 4 KB"
    )
    group.add_argument("--seed", type=non_negative, default=1234, help="of the sample (default: 1234)")
    group = parser.add_argument_group("what is trained")
    group.add_argument("--vocab-size", type=positive, required=True, metavar="N", help="pieces, all special ones included")
    group.add_argument(
        "--model-type", choices=["bpe", "unigram"], default="bpe", help="default: bpe, which is much faster to use"
    )
    group.add_argument(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="spell letters outside the vocabulary as bytes; without it they become <unk> (default: on)",
    )
    group.add_argument(
        "--split-digits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="every digit is a piece of its own (default: on)",
    )
    group.add_argument("--character-coverage", type=float, default=0.9995, help="share of letters with a piece of their own")
    group = parser.add_argument_group("how it runs")
    group.add_argument("--output", required=True, metavar="FILE", help="the model, usually NAME.model")
    group.add_argument("--overwrite", action="store_true", help="replace a model of this name")
    group.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), metavar="N")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    options = TrainingOptions(
        inputs=args.input,
        output=args.output,
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        byte_fallback=args.byte_fallback,
        split_digits=args.split_digits,
        character_coverage=args.character_coverage,
        format=args.format,
        read=ReadOptions(args.text_key, args.text_documents, args.max_document_mb << 20),
        skip_malformed=args.skip_malformed,
        max_sentences=args.max_sentences,
        max_bytes=args.max_bytes,
        seed=args.seed,
        threads=args.threads,
        overwrite=args.overwrite,
    )
    with stop_signals() as stop:
        tokenizer = train_tokenizer(options, stop)
    print(f"{args.output}: {tokenizer.vocab_size} pieces, end of document {tokenizer.eod}, sha256 {tokenizer.sha256}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
