"""Builds the corpora of the experiment for one seed. Nothing is downloaded; the demo's builder does most of the work.

    python examples/rho1/mixes.py --out runs/rho1/seed1/corpus --seed 1

Two mixes are made of the same clean English pages (the target) and of different other text:

- `noisy`      the demo's: the pages with web noise in their midst, Python source code, pages of web noise
- `offtarget`  the pages as they are, and text that is clean but about something else: Python source code, C and C++ headers,
               the source of man pages, configuration files and licences. There is no noise in it

Both have a `base_` part, on which the initialization is trained, and a `mix_` part for the students. Beside them lie
`reference` (clean pages, for the reference models), `finetune` (clean pages that no model has read), `heldout` (clean pages,
on which everything is measured) and `code` (Python source code, held out as well). The seed decides which module or file goes
into which part, the order and the noise.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import random
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import corpus  # the demo's, found through the line above

logger = logging.getLogger("rho1.mixes")

MIXES = ("noisy", "offtarget")
CLEAN_PARTS = {"heldout": "heldout", "finetune": "probe", "reference": "reference"}
"""Part of this experiment -> part of the demo whose modules it takes."""

OFFTARGET_SHARES = {"clean": 0.45, "code": 0.20, "header": 0.15, "manual": 0.10, "configuration": 0.10}
"""Of a mix in bytes. Where the machine has too little of a kind, Python source code takes its place."""

KINDS = ("clean", "code", "noise", "header", "manual", "configuration")
MAX_FILE_BYTES = 400_000
PAGES_PER_FILE = 6
"""So that one large file does not make up a kind."""


def offtarget_files() -> dict[str, list[tuple[str, Path]]]:
    """Kind -> (name, path) of the files of that kind on this machine."""
    paths = sysconfig.get_paths()
    packages, licences = Path(paths["purelib"]), Path("/usr/share/common-licenses")
    roots = {
        "header": ((packages, ("*.h", "*.hpp", "*.cuh")), (Path(paths["include"]), ("*.h",))),
        "manual": tuple((Path(f"/usr/share/man/man{section}"), ("*.gz",)) for section in range(1, 9)),
        "configuration": (
            (packages, ("*.cmake", "*.toml", "*.yaml", "*.json", "LICENSE*", "COPYING*", "NOTICE*")),
            (Path(paths["stdlib"]), ("*.cfg", "*.toml")),
            (licences, ("*",)),
            (Path("/usr/share/doc"), ("copyright",)),
        ),
    }
    found = {}
    for kind, places in roots.items():
        found[kind] = sorted(
            {
                (f"{kind}:{path.relative_to(root)}", path)
                for root, patterns in places
                for pattern in patterns
                for path in root.rglob(pattern)
                if path.is_file() and path.suffix != ".py"
            }
        )
    return found


def read_text(path: Path) -> str | None:
    """A file's text; None when it is too large or not UTF-8."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):  # unreadable, a broken archive, another encoding
        return None


def offtarget_pages(kind: str, files: Sequence[tuple[str, Path]], parts: Mapping[str, int], seed: int) -> dict[str, list[Any]]:
    """Pages of one kind for each of `parts` (name -> bytes), by file; near duplicates are left out."""
    order = list(files)
    random.Random(f"{seed}:{kind}").shuffle(order)
    duplicates = corpus.NearDuplicates()
    pages: dict[str, list[Any]] = {part: [] for part in parts}
    missing = dict(parts)
    for name, path in order:
        part = corpus.split_of(name, seed)
        if missing.get(part, 0) <= 0:
            if not any(size > 0 for size in missing.values()):
                break
            continue
        for page in islice(_pages_of(name, path, kind), PAGES_PER_FILE):
            if not duplicates.is_duplicate(page.text):
                pages[part].append(page)
                missing[part] -= len(page.text.encode())
    return pages


def _pages_of(name: str, path: Path, kind: str) -> Iterator[Any]:
    text = "\n".join(line[:300].rstrip() for line in (read_text(path) or "").splitlines())
    for start in range(0, len(text) - 300, corpus.PAGE_CHARS):
        yield corpus.Document(text[start : start + corpus.PAGE_CHARS], name, kind)


def build(out: Path, sizes: Mapping[str, int], *, packages: Sequence[str], seed: int, workers: int) -> dict[str, Any]:
    """Writes all parts, each of about `sizes[part]` bytes (`base` and `mix` for either mix), and returns the summary that is
    also in `corpus.json`."""
    clean, code = corpus.split_pages(corpus.read_modules(packages, workers), seed)
    parts = {part: corpus.take(clean[modules], sizes[part]) for part, modules in CLEAN_PARTS.items()}
    parts["code"] = corpus.take(code["heldout"], sizes["code"])
    wanted = {part: sizes[part] for part in ("base", "mix")}
    others = {
        kind: offtarget_pages(kind, files, {p: int(size * OFFTARGET_SHARES[kind]) for p, size in wanted.items()}, seed)
        for kind, files in offtarget_files().items()
    }
    for part, size in wanted.items():
        parts[f"{part}_noisy"] = corpus.web_documents(clean[part], code[part], size, seed, part)
        chosen = corpus.take(clean[part], int(size * OFFTARGET_SHARES["clean"]))
        chosen += [page for pages in others.values() for page in pages[part]]
        filled = sum(len(page.text.encode()) for page in chosen)
        chosen += corpus.take(code[part], size - filled)
        parts[f"{part}_offtarget"] = corpus.shuffled(chosen, f"{seed}:{part}:order")
    training = [pages for part, pages in parts.items() if part not in ("heldout", "code")]
    heldout, largest = corpus.not_in_training(parts["heldout"], training)
    summary: dict[str, Any] = {
        "seed": seed,
        "python": sys.version.split()[0],
        "heldout_dropped_for_overlap": len(parts["heldout"]) - len(heldout),
        "heldout_largest_overlap": round(largest, 4),
        "parts": {},
    }
    parts["heldout"] = heldout
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in parts.items():
        summary["parts"][name] = corpus.write_jsonl(out / f"{name}.jsonl", documents, KINDS)
    (out / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the jsonl files")
    for part, size in (
        ("base", 2_900_000),
        ("mix", 950_000),
        ("reference", 1_150_000),
        ("finetune", 110_000),
        ("heldout", 130_000),
        ("code", 40_000),
    ):
        parser.add_argument(f"--{part}-bytes", type=int, default=size, help="size of the part (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides the split, the order and the noise")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that parse sources")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sizes = {part: getattr(args, f"{part}_bytes") for part in ("base", "mix", "reference", "finetune", "heldout", "code")}
    summary = build(args.out, sizes, packages=corpus.PACKAGES, seed=args.seed, workers=args.workers)
    for name, part in summary["parts"].items():
        kinds = ", ".join(f"{kind} {part[f'{kind}_bytes']:,}" for kind in KINDS if part[f"{kind}_bytes"])
        logger.info("%-16s %6d documents %10d bytes: %s", name, part["documents"], part["bytes"], kinds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
