#!/usr/bin/env python
"""Join tokenized corpora into one, checking every hash on the way.

    python tools/merge_corpora.py --input corpora/a corpora/b --output-prefix corpora/ab

All inputs must have been made with the same tokenizer. The result equals preprocessing all texts in one run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megarpt.corpus.console import ToolParser, run_tool, stop_signals
from megarpt.corpus.merge import merge


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="prefixes of the corpora, in order")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the result, without ending")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of this name")
    args = parser.parse_args(argv)
    with stop_signals() as stop:
        merge(args.input, args.output_prefix, stop, overwrite=args.overwrite)


if __name__ == "__main__":
    sys.exit(run_tool(main))
