#!/usr/bin/env python
"""Show what a tokenized corpus holds, and whether it is whole.

    python tools/inspect_corpus.py corpora/web --tokenizer tok.model --samples 3 --verify

Sizes and the index are always checked; --verify reads everything and compares the hashes. A damaged corpus ends in exit code
79.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megarpt.corpus.console import ToolParser, non_negative, positive, run_tool
from megarpt.corpus.indexed import CorpusIndex, bin_path
from megarpt.corpus.manifest import CorpusManifest, verify_corpus
from megarpt.corpus.summary import LengthSummary, sample_documents, show_document, summarize_lengths
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.errors import DataError

_BAR = 40


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("prefix", help="path of the corpus, without ending")
    parser.add_argument("--tokenizer", help="decode the samples with this; it must be the corpus' own")
    parser.add_argument("--samples", type=non_negative, default=3, metavar="N", help="documents to show (default: 3)")
    parser.add_argument("--characters", type=positive, default=300, metavar="N", help="of each sample (default: 300)")
    parser.add_argument("--seed", type=non_negative, default=0, help="which documents are shown")
    parser.add_argument("--verify", action="store_true", help="read everything: both hashes, and every id in the vocabulary")
    parser.add_argument(
        "--without-manifest", action="store_true", help="accept a corpus that another tool made; only its index is checked"
    )
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    manifest = None if args.without_manifest else verify_corpus(args.prefix, full=args.verify)
    index = CorpusIndex(args.prefix)
    if manifest is None:
        check_without_manifest(args.prefix, index)
    tokenizer = open_tokenizer(args.tokenizer, manifest) if args.tokenizer else None
    console.print(counts(args.prefix, manifest, index))
    console.print(histogram(summarize_lengths(index)))
    for number in sample_documents(index, args.samples, args.seed):
        console.rule(f"document {number}", align="left")
        console.print(Text(show_document(index, number, tokenizer, characters=args.characters)))
    if manifest is None:
        console.print("the index and the size of the .bin agree; there is no manifest to compare with")
    else:
        console.print(
            "whole: sizes, index and hashes agree" if args.verify else "sizes and index agree (--verify reads everything)"
        )


def check_without_manifest(prefix: str, index: CorpusIndex) -> None:
    """The index and the size of the `.bin` must agree."""
    expected = index.check() * index.dtype.itemsize
    try:
        size = bin_path(prefix).stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {bin_path(prefix)}: {error.strerror or error}") from error
    if size != expected:
        raise DataError(f"{bin_path(prefix)}: got {size:,} bytes, expected {expected:,} as in its index; copy it again")


def open_tokenizer(spec: str, manifest: CorpusManifest | None) -> Tokenizer:
    tokenizer = load_tokenizer(spec)
    if manifest is not None and tokenizer.sha256 != manifest.tokenizer.sha256:
        raise DataError(
            f"--tokenizer {spec}: got sha256 {tokenizer.sha256[:12]}, expected {manifest.tokenizer.sha256[:12]} "
            f"({manifest.tokenizer.name}), which made this corpus"
        )
    return tokenizer


def counts(prefix: str, manifest: CorpusManifest | None, index: CorpusIndex) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    tokens = index.check()
    rows = [("corpus", prefix), ("documents", f"{index.num_documents:,}"), ("tokens", f"{tokens:,} ({index.dtype.name})")]
    if manifest is not None:
        per_token = manifest.text_bytes / max(manifest.num_tokens, 1)
        rows += [
            ("text", f"{manifest.text_bytes:,} bytes, {per_token:.2f} per token"),
            (
                "tokenizer",
                f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids, sha256 {manifest.tokenizer.sha256[:16]}",
            ),
            ("end of document", f"{manifest.tokenizer.eod}, {'appended' if manifest.append_eod else 'not appended'}"),
            ("inputs", ", ".join(record.name for record in manifest.inputs[:5]) + (" ..." if len(manifest.inputs) > 5 else "")),
            ("malformed", f"{manifest.num_malformed:,} skipped"),
            ("made", f"{manifest.created} by megarpt {manifest.tool_version}"),
        ]
        rows += [("", f"{record.file}:{record.line}: {record.reason}") for record in manifest.malformed[:5]]
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def histogram(lengths: LengthSummary) -> Table:
    table = Table(title=f"tokens per document: {lengths.shortest:,} to {lengths.longest:,}, mean {lengths.mean:,.1f}", box=None)
    for column in ("tokens", "documents"):
        table.add_column(column, justify="right")
    table.add_column("")
    most = max((count for _first, _last, count in lengths.histogram), default=1)
    for first, last, count in lengths.histogram:
        name = f"{first:,}" if first == last else f"{first:,}-{last:,}"
        table.add_row(name, f"{count:,}", Text("█" * -(-_BAR * count // most), style="cyan"))
    return table


if __name__ == "__main__":
    sys.exit(run_tool(main))
