"""Builds the demo's corpus from text that is on every machine after installation. Nothing is downloaded.

    python examples/demo/corpus.py --out runs/demo/corpus

Writes five jsonl files of `{"text": ..., "source": ..., "kind": ..., "noise": [[start, end], ...]}` and `corpus.json`:

- `heldout.jsonl`    clean English documentation; every curve of the demo is measured on all of it
- `reference.jsonl`  clean English documentation from other modules; only the reference model trains on it
- `mix.jsonl`        what the students train on: clean documentation from yet other modules with web noise in its midst,
                     Python source code, and pages of web noise
- `base.jsonl`       the same kind of mix from other modules; the common initialization is trained on it
- `probe.jsonl`      the same again, little of it, to look at which tokens selection keeps

Clean English is what is left of docstrings (standard library, torch, numpy, ...) and of the interpreter's help topics after
examples, signatures, tables and formulas are filtered out and near duplicates are removed. The parts are disjoint by module,
so no page of one part is continued in another. Docstrings are cut out of the source code that goes into the mix: otherwise
the held-out text would be in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import noise  # a sibling file, found through the line above also when this file is imported by its path

logger = logging.getLogger("demo.corpus")

PACKAGES = (
    "torch",
    "numpy",
    "sympy",
    "networkx",
    "matplotlib",
    "megatron.core",
    "pydantic",
    "jinja2",
    "mpmath",
    "fsspec",
    "rich",
)
"""Read besides the standard library: dependencies of the demo with much documentation in their docstrings."""

SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "site-packages", "idlelib", "lib2to3", "__pycache__", "onnx"}

FUNCTION_WORDS = frozenset(
    "the a an of to is in and for that be this it if as with are or by on from not will when which can has have was its "
    "may must should than then these they used does each other such only into at all any no but also where so".split()
)

PAGE_CHARS = 4000
"""A module's documentation is cut into pages of about this length."""

SPLITS = (("heldout", 0.07), ("probe", 0.03), ("reference", 0.38), ("base", 0.38), ("mix", 0.14))
"""Shares of the modules; which module goes where depends on its name and the seed alone."""

MIXED = ("probe", "base", "mix")
"""Parts with code and noise; the others are clean."""

MAX_OVERLAP = 0.1
"""A held-out document with more than this share of its 6-word sequences anywhere in training is dropped."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and, as character ranges, the noise that was put into it."""

    text: str
    source: str
    kind: str  # "clean", "code" or "noise"
    noise: tuple[tuple[int, int], ...] = ()

    def as_json(self) -> str:
        record = {"text": self.text, "source": self.source, "kind": self.kind, "noise": [list(span) for span in self.noise]}
        return json.dumps(record, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Module:
    """What one Python file gives: prose from its docstrings, and its code without them."""

    name: str
    paragraphs: tuple[str, ...]
    code: str


@dataclass(slots=True)
class NearDuplicates:
    """Remembers the 6-word sequences it has seen; a paragraph mostly made of them is a duplicate."""

    limit: float = 0.3
    _seen: set[int] = field(default_factory=set)

    def is_duplicate(self, paragraph: str) -> bool:
        """Whether `paragraph` repeats earlier ones; if not, it is remembered."""
        shingles = word_shingles(paragraph)
        known = sum(shingle in self._seen for shingle in shingles)
        if known > self.limit * len(shingles):
            return True
        self._seen.update(shingles)
        return False


def word_shingles(text: str, width: int = 6) -> set[int]:
    """Hashes of all runs of `width` lower-case words, of the whole text when it is shorter."""
    words = re.findall(r"[a-z]+", text.lower())
    return {hash(tuple(words[i : i + width])) for i in range(max(1, len(words) - width + 1))}


def strip_markup(block: str) -> str:
    """Removes reStructuredText roles, quotes and directive heads, and joins the lines."""
    text = " ".join(line.strip() for line in block.splitlines())
    text = re.sub(r"^\.\. [\w-]+::\s*", "", text)
    text = re.sub(r":[\w:.+-]+:`~?\.?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
    text = re.sub(r"`+([^`]*)`+_*", r"\1", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    return re.sub(r"\s+", " ", text).replace("::", ":").strip(" -*")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English: enough words, mostly letters, a natural share of function words."""
    words = re.findall(r"[A-Za-z]+(?:'[a-z]+)?", paragraph)
    if len(words) < 12 or len(paragraph) > 2000 or not paragraph.isascii() or not paragraph[0].isalpha():
        return False
    if paragraph[-1] not in ".:!?)" or re.search(r">>>|\\|\||[{}<>=]{2}|https?:|__\w+__|  ", paragraph):
        return False
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    function_words = sum(word.lower() in FUNCTION_WORDS for word in words)
    identifiers = len(re.findall(r"\w+(?:_\w|\.\w|\()|[a-z][A-Z]", paragraph))
    mean_length = sum(map(len, words)) / len(words)
    return (
        letters >= 0.93 * len(paragraph)
        and function_words >= 0.27 * len(words)
        and identifiers <= 0.08 * len(words)
        and 3.2 <= mean_length <= 7.0
    )


def clean_paragraphs(docstring: str) -> list[str]:
    """The English paragraphs of one docstring; examples, tables, signatures and formulas are left out."""
    blocks = re.split(r"\n\s*\n", docstring.expandtabs())
    candidates = (strip_markup(block) for block in blocks if ":math:" not in block and ">>>" not in block)
    return [paragraph for paragraph in candidates if paragraph and is_prose(paragraph)]


def read_module(name: str, path: str) -> Module | None:
    """Splits one file into documentation and code; None when it is not UTF-8.

    Every triple-quoted string is taken for documentation (torch documents its functions by passing strings around). Cutting
    at the quotes is some fifty times faster than parsing, and what it gets wrong `is_prose` throws away.
    """
    try:
        source = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    pieces = source.replace("'''", '"""').split('"""')  # code, string, code, string, ..., code
    paragraphs = [paragraph for string in pieces[1::2] for paragraph in clean_paragraphs(string)]
    code = "\n".join(line.rstrip() for line in "".join(pieces[0::2]).splitlines())
    return Module(name, tuple(paragraphs), re.sub(r"\n{3,}", "\n\n", code).strip())


def python_files(packages: Sequence[str]) -> list[tuple[str, str]]:
    """(dotted name, path) of every source file of the standard library and of those `packages` that are installed."""
    roots = [("", Path(sysconfig.get_paths()["stdlib"]))]
    for package in packages:
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots.append((package, Path(next(iter(spec.submodule_search_locations)))))
    files = []
    for prefix, root in roots:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if not SKIPPED_FOLDERS.intersection(parts):
                files.append((".".join((prefix, *parts)).strip("."), str(path)))
    return sorted(files)


def read_modules(packages: Sequence[str], workers: int) -> list[Module]:
    """All modules, sorted by name, with the help topics of the interpreter as modules of their own."""
    files = python_files(packages)
    names, paths = zip(*files, strict=True)
    with ProcessPoolExecutor(workers) as pool:
        modules = [module for module in pool.map(read_module, names, paths, chunksize=64) if module is not None]
    from pydoc_data.topics import topics  # a dict literal of half a megabyte: loaded only when a corpus is built

    for name, text in sorted(topics.items()):
        modules.append(Module(f"help({name})", tuple(clean_paragraphs(text)), ""))
    return modules


def split_of(name: str, seed: int) -> str:
    """Which part a module belongs to."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    for split, share in SPLITS:
        if position < share:
            return split
        position -= share
    return SPLITS[-1][0]


def pages(module: Module, duplicates: NearDuplicates) -> Iterator[Document]:
    """A module's clean documentation as documents of at least 300 characters."""
    page: list[str] = []
    for paragraph in module.paragraphs:
        if duplicates.is_duplicate(paragraph):
            continue
        page.append(paragraph)
        if sum(map(len, page)) >= PAGE_CHARS:
            yield Document("\n\n".join(page), module.name, "clean")
            page = []
    if sum(map(len, page)) >= 300:
        yield Document("\n\n".join(page), module.name, "clean")


def code_pages(module: Module) -> Iterator[Document]:
    """A module's code in runs of whole lines."""
    lines = module.code.splitlines()
    page: list[str] = []
    size = 0
    for line in lines:
        page.append(line[:300])
        size += len(page[-1]) + 1
        if size >= PAGE_CHARS:
            yield Document("\n".join(page), module.name, "code")
            page, size = [], 0


def take(documents: Iterable[Document], num_bytes: int) -> list[Document]:
    """The first documents that add up to `num_bytes`."""
    taken, size = [], 0
    for document in documents:
        if size >= num_bytes:
            break
        taken.append(document)
        size += len(document.text.encode())
    return taken


def shuffled(documents: Iterable[Document], key: str) -> list[Document]:
    """A seeded shuffle."""
    result = list(documents)
    random.Random(key).shuffle(result)
    return result


def web_documents(clean: Sequence[Document], code: Sequence[Document], num_bytes: int, seed: int, part: str) -> list[Document]:
    """The students' mix: noisy clean pages, code and pages of noise, in the shares of `noise.MIX_SHARES`."""
    shares = noise.MIX_SHARES
    rng = random.Random(f"{seed}:{part}:noise")
    noisy = []
    for page in clean:
        text, spans = noise.inject(page.text, rng)
        noisy.append(Document(text, page.source, "clean", spans))
    junk: list[Document] = []
    size = 0
    while size < num_bytes * shares["noise"]:
        text = noise.page(rng, rng.choice(clean).text)
        junk.append(Document(text, "web noise", "noise", ((0, len(text)),)))
        size += len(text.encode())
    chosen = take(noisy, int(num_bytes * shares["clean"])) + take(code, int(num_bytes * shares["code"])) + junk
    return shuffled(chosen, f"{seed}:{part}:order")


def split_pages(modules: Sequence[Module], seed: int) -> tuple[dict[str, list[Document]], dict[str, list[Document]]]:
    """The clean pages and the pages of code of every part, shuffled.

    Raises:
        ValueError: a part has no clean pages.
    """
    duplicates = NearDuplicates()
    clean: dict[str, list[Document]] = {split: [] for split, _ in SPLITS}
    code: dict[str, list[Document]] = {split: [] for split, _ in SPLITS}
    for module in modules:
        split = split_of(module.name, seed)
        clean[split] += pages(module, duplicates)
        code[split] += code_pages(module)
    for split, _ in SPLITS:
        clean[split] = shuffled(clean[split], f"{seed}:{split}:clean")
        code[split] = shuffled(code[split], f"{seed}:{split}:code")
    empty = [part for part, pages_of_part in clean.items() if not pages_of_part]
    if empty:
        raise ValueError(
            f"no clean English for {', '.join(empty)} in {len(modules)} modules; is the standard library complete?"
        )
    return clean, code


def not_in_training(heldout: Sequence[Document], training: Iterable[Sequence[Document]]) -> tuple[list[Document], float]:
    """The held-out documents that share next to nothing with the `training` parts, and the largest overlap that is left."""
    seen = set().union(*(word_shingles(page.text) for part in training for page in part))
    kept = [document for document in heldout if overlap(document, seen) <= MAX_OVERLAP]
    return kept, max((overlap(document, seen) for document in kept), default=0.0)


def build(out: Path, sizes: Mapping[str, int], *, packages: Sequence[str], seed: int, workers: int) -> dict[str, Any]:
    """Writes the five parts, each of about `sizes[part]` bytes, and returns the summary that is also in `corpus.json`."""
    started = time.perf_counter()
    modules = read_modules(packages, workers)
    clean, code = split_pages(modules, seed)
    parts = {
        part: web_documents(clean[part], code[part], sizes[part], seed, part)
        if part in MIXED
        else take(clean[part], sizes[part])
        for part, _ in SPLITS
    }
    heldout, largest = not_in_training(parts["heldout"], [pages for part, pages in parts.items() if part != "heldout"])
    summary: dict[str, Any] = {
        "seed": seed,
        "python": sys.version.split()[0],
        "modules": len(modules),
        "heldout_dropped_for_overlap": len(parts["heldout"]) - len(heldout),
        "heldout_largest_overlap": round(largest, 4),
        "available_clean_bytes": {part: sum(len(page.text) for page in pages) for part, pages in clean.items()},
        "parts": {},
    }
    parts["heldout"] = heldout
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in parts.items():
        summary["parts"][name] = write_jsonl(out / f"{name}.jsonl", documents)
    summary["seconds"] = round(time.perf_counter() - started, 2)
    (out / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def overlap(document: Document, seen: set[int]) -> float:
    """Share of a document's word sequences that are in `seen`."""
    shingles = word_shingles(document.text)
    return len(shingles & seen) / len(shingles)


def write_jsonl(path: Path, documents: Sequence[Document], kinds: Sequence[str] = ("clean", "code", "noise")) -> dict[str, int]:
    """One document a line; the final name appears only when the file is complete."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(document.as_json() + "\n")
    os.replace(partial, path)
    sizes = {"documents": len(documents), "bytes": sum(len(document.text.encode()) for document in documents)}
    for kind in kinds:
        sizes[f"{kind}_bytes"] = sum(len(document.text.encode()) for document in documents if document.kind == kind)
    sizes["noise_inside_clean_chars"] = sum(
        end - start for document in documents if document.kind == "clean" for start, end in document.noise
    )
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the jsonl files")
    for part, size, what in (
        ("mix", 1_100_000, "the students' corpus"),
        ("base", 3_600_000, "the corpus of the common initialization"),
        ("reference", 1_700_000, "the reference model's corpus"),
        ("heldout", 200_000, "the held-out part"),
        ("probe", 100_000, "the part on which selection is looked at"),
    ):
        parser.add_argument(f"--{part}-bytes", type=int, default=size, help=f"size of {what} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides the split, the order and the noise")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that parse sources")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sizes = {part: getattr(args, f"{part}_bytes") for part, _ in SPLITS}
    summary = build(args.out, sizes, packages=PACKAGES, seed=args.seed, workers=args.workers)
    for name, part_sizes in summary["parts"].items():
        logger.info("%-10s %6d documents %10d bytes", name, part_sizes["documents"], part_sizes["bytes"])
    logger.info("from %d modules in %.1f s", summary["modules"], summary["seconds"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
