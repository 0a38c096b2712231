#!/usr/bin/env python
"""Tokenize text files into a corpus that Megatron reads: PREFIX.bin, PREFIX.idx and the manifest PREFIX.json.

    python tools/preprocess_corpus.py --input data/*.jsonl.zst --output-prefix corpora/web --tokenizer tok.model --append-eod

Inputs are jsonl, plain text or parquet; jsonl and text may be compressed (.gz, .zst). Killed at any moment, the same command
goes on at the last finished shard and ends with the same bytes; until then everything lies in PREFIX.partial/.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megarpt.corpus.console import ToolParser, non_negative, part, positive, run_tool, stop_signals
from megarpt.corpus.preprocess import PreprocessOptions, preprocess
from megarpt.corpus.readers import ReadOptions


def parser() -> ToolParser:
    parser = ToolParser(__doc__)
    group = parser.add_argument_group("what is read")
    group.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, or quoted patterns such as 'd/*.gz'")
    group.add_argument("--text-key", default="text", help="jsonl: the key of the text; parquet: the column (default: text)")
    group.add_argument(
        "--format", choices=["jsonl", "text", "parquet"], help="what the files are, when their names do not say it"
    )
    group.add_argument(
        "--text-documents",
        choices=["file", "line", "paragraph"],
        default="file",
        help="plain text: what is one document; paragraphs end at blank lines (default: file)",
    )
    group.add_argument(
        "--skip-malformed",
        type=non_negative,
        default=0,
        metavar="N",
        help="skip and report up to N malformed lines; by default the first one stops the job",
    )
    group.add_argument(
        "--max-document-mb", type=positive, default=64, metavar="MB", help="longer documents are malformed (default: 64)"
    )
    group.add_argument(
        "--part",
        type=part,
        default=(0, 1),
        metavar="I/N",
        help="only share I (from 0) of N of the files; tools/merge_corpora.py joins the N corpora (default: all of them)",
    )
    group = parser.add_argument_group("how it is tokenized")
    group.add_argument(
        "--tokenizer", required=True, help="a sentencepiece .model, a Hugging Face tokenizer.json, or the word bytes"
    )
    group.add_argument("--append-eod", action="store_true", help="end every document that is not empty with the eod token")
    group.add_argument("--eod-token", metavar="TOKEN", help="the eod token, when the tokenizer does not have a usual one")
    group.add_argument(
        "--backend",
        choices=["auto", "gigatoken", "reference"],
        default="auto",
        help="auto: gigatoken where its ids equal the reference library's on samples of the inputs (default)",
    )
    group = parser.add_argument_group("what is written")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the corpus, without ending")
    group.add_argument("--restart", action="store_true", help="throw away an unfinished job or a finished corpus of this name")
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="worker processes; any number gives the same bytes (default: the CPUs of this process, here %(default)s)",
    )
    group.add_argument(
        "--shard-mb", type=positive, default=16, metavar="MB", help="text per shard, the unit of resuming (default: 16)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    options = PreprocessOptions(
        inputs=args.input,
        output_prefix=args.output_prefix,
        tokenizer=args.tokenizer,
        append_eod=args.append_eod,
        eod_token=args.eod_token,
        workers=args.workers,
        format=args.format,
        read=ReadOptions(args.text_key, args.text_documents, args.max_document_mb << 20),
        skip_malformed=args.skip_malformed,
        shard_bytes=args.shard_mb << 20,
        backend=args.backend,
        restart=args.restart,
        part=args.part,
    )
    with stop_signals() as stop:
        preprocess(options, stop)


if __name__ == "__main__":
    sys.exit(run_tool(main))
