"""The demo's corpus: clean text is clean, noise is where it is said to be, nothing held out is trained on."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[3] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

corpus = importlib.import_module("corpus")
noise = importlib.import_module("noise")

SIZES = {"mix": 60_000, "base": 60_000, "reference": 60_000, "heldout": 20_000, "probe": 10_000}

PROSE = (
    "The function returns a new list that holds the elements of the first one in reverse order, and it leaves the first one as "
    "it is. If the list is empty, an empty list is returned."
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus from the standard library alone."""
    out = tmp_path_factory.mktemp("corpus")
    corpus.build(out, SIZES, packages=(), seed=1, workers=1)
    return out


def read(out: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        (PROSE, True),
        ("x = compute(a, b, c) + other_thing(d, e) if flag else None; return x, y, z and so on it goes.", False),
        (">>> the list of the things that are in it and for that it is what it is to be.", False),
        ("Too short to tell.", False),
        ("Parameters Returns Raises Examples Notes References Attributes Methods Warnings Yields Todo Index Section.", False),
        ("The value of " + "\u00e9" * 3 + " is that of the function and it is not the one that was given to it at all.", False),
        ("the +--+--+ of | the | a | is | and it {{}} == that for the table of the things that are in it.", False),
    ],
)
def test_prose_filter(paragraph: str, expected: bool) -> None:
    assert corpus.is_prose(paragraph) is expected


def test_markup_is_removed_from_prose() -> None:
    block = ".. note::\n   The class :class:`~torch.nn.Linear` takes ``bias`` and :ref:`more <link>`,\n   **not** `less`::"
    assert corpus.strip_markup(block) == "The class torch.nn.Linear takes bias and more, not less:"


def test_documentation_leaves_the_code(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(f"\"\"\"{PROSE}\n\n>>> example(1)\n\"\"\"\n\n\ndef f(x):\n    '''{PROSE}'''\n    return x + 1\n")
    module = corpus.read_module("module", str(path))
    assert module is not None
    assert module.paragraphs == (PROSE, PROSE)
    assert "return x + 1" in module.code
    assert "reverse order" not in module.code


def test_a_file_that_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "latin1.py"
    path.write_bytes(b"# caf\xe9\n")
    assert corpus.read_module("latin1", str(path)) is None


def test_near_duplicates_are_found() -> None:
    duplicates = corpus.NearDuplicates()
    assert not duplicates.is_duplicate(PROSE)
    assert duplicates.is_duplicate(PROSE.replace("reverse", "sorted").upper())
    assert not duplicates.is_duplicate("An entirely different sentence about the way in which a socket is closed by its peer.")


@pytest.mark.parametrize("seed", range(20))
def test_injected_noise_is_where_it_is_said_to_be(seed: int) -> None:
    text = "\n\n".join([PROSE, PROSE.replace("list", "tuple"), PROSE.replace("list", "set")])
    noisy, spans = noise.inject(text, random.Random(seed))
    kept, position = [], 0
    for start, end in spans:
        assert position <= start < end <= len(noisy)
        kept.append(noisy[position:start])
        position = end
    kept.append(noisy[position:])
    assert "".join(kept).split() == text.split()


def test_noise_depends_on_the_seed_alone() -> None:
    assert noise.inject(PROSE, random.Random(3)) == noise.inject(PROSE, random.Random(3))
    assert noise.page(random.Random(3), PROSE) == noise.page(random.Random(3), PROSE)
    assert noise.page(random.Random(3), PROSE) != noise.page(random.Random(4), PROSE)


@pytest.mark.parametrize("block", noise.BLOCKS, ids=lambda block: block.__name__)
def test_every_kind_of_noise_gives_text(block: Callable[[random.Random], str]) -> None:
    texts = {block(random.Random(seed)) for seed in range(30)}
    assert all(texts) and len(texts) > 4


def test_mojibake_is_what_a_wrong_decoding_gives() -> None:
    assert noise.mojibake("don't") == "donâ€™t"


def test_parts_have_their_sizes_and_kinds(built: Path) -> None:
    summary = json.loads((built / "corpus.json").read_text())
    for part, size in SIZES.items():
        assert 0.9 * size <= summary["parts"][part]["bytes"] <= size + 20_000
    for part in ("heldout", "reference"):
        assert {document["kind"] for document in read(built, part)} == {"clean"}
    assert {document["kind"] for document in read(built, "mix")} == {"clean", "code", "noise"}
    mix = summary["parts"]["mix"]
    for kind, share in noise.MIX_SHARES.items():
        assert mix[f"{kind}_bytes"] / mix["bytes"] == pytest.approx(share, abs=0.12)


def test_no_module_is_in_two_clean_parts(built: Path) -> None:
    sources = {part: {d["source"] for d in read(built, part) if d["kind"] == "clean"} for part in SIZES}
    for part, others in ((p, [o for o in SIZES if o != p]) for p in SIZES):
        for other in others:
            assert not sources[part] & sources[other]


def test_held_out_text_is_not_in_training(built: Path) -> None:
    training = [corpus.word_shingles(d["text"]) for part in ("mix", "base", "reference") for d in read(built, part)]
    seen = set().union(*training)
    for document in read(built, "heldout"):
        shingles = corpus.word_shingles(document["text"])
        assert len(shingles & seen) <= corpus.MAX_OVERLAP * len(shingles)


def page_of_words(number: int) -> str:
    rng = random.Random(number)
    return " ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(80))


@pytest.mark.parametrize("is_leaked", [True, False])
def test_held_out_text_that_leaks_is_dropped(is_leaked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = ("heldout", "probe", "reference", "base", "mix")
    pages = {part: page_of_words(number) for number, part in enumerate(parts)}
    code = "\n".join([pages["heldout"] if is_leaked else "x = 1"] * 400)
    modules = [corpus.Module(part, (page,), code if part == "mix" else "") for part, page in pages.items()]
    monkeypatch.setattr(corpus, "read_modules", lambda packages, workers: modules)
    monkeypatch.setattr(corpus, "split_of", lambda name, seed: name)
    summary = corpus.build(tmp_path, SIZES, packages=(), seed=1, workers=1)
    assert summary["heldout_dropped_for_overlap"] == int(is_leaked)
    assert len(read(tmp_path, "heldout")) == int(not is_leaked)


def test_too_little_text_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus, "read_modules", lambda packages, workers: [])
    with pytest.raises(ValueError, match="no clean English"):
        corpus.build(tmp_path, SIZES, packages=(), seed=1, workers=1)


def test_same_seed_same_bytes_and_another_seed_others(built: Path, tmp_path: Path) -> None:
    corpus.build(tmp_path / "same", SIZES, packages=(), seed=1, workers=2)
    corpus.build(tmp_path / "other", SIZES, packages=(), seed=2, workers=1)
    for part in SIZES:
        original = (built / f"{part}.jsonl").read_bytes()
        assert (tmp_path / "same" / f"{part}.jsonl").read_bytes() == original
        assert (tmp_path / "other" / f"{part}.jsonl").read_bytes() != original
