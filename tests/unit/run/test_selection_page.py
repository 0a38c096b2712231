"""The page of kept tokens: legible, safe, by itself, and readable without colour."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import DataError
from megarpt.run.selection_page import (
    Selection,
    ShownDocument,
    ShownToken,
    render,
    token_texts,
    write_page,
)

KEPT = ShownToken(5, " the", True, loss=3.0, reference_loss=1.0, score=2.0, rank=1)
DROPPED = ShownToken(6, "<b>", False, loss=1.0, reference_loss=4.0, score=-3.0, rank=2)
FIRST = ShownToken(7, "A")


def selection(*tokens: ShownToken, **changed: object) -> Selection:
    made = Selection(
        student="runs/s (step_1)",
        reference="runs/r",
        scorer="excess_loss",
        fraction=0.5,
        scope="global_batch",
        threshold=2.0,
        num_competing=2,
        num_kept=1,
        documents=(ShownDocument("a & b", tokens),),
    )
    return replace(made, **changed)


class Spans(HTMLParser):
    """The tokens of the documents: (classes, data-t, text)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[set[str], str, str]] = []
        self.tags: set[str] = set()
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        if tag == "span" and values.get("data-t") is not None:
            self.found.append((set((values["class"] or "").split()), values["data-t"] or "", ""))
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "span"

    def handle_data(self, data: str) -> None:
        if self._inside:
            classes, about, text = self.found[-1]
            self.found[-1] = (classes, about, text + data)


def test_tokens_carry_their_state_and_their_numbers() -> None:
    first, kept, dropped = Spans(render(selection(FIRST, KEPT, DROPPED))).found
    assert "u" in first[0] and "never predicted" in first[1] and first[2] == "A"
    assert "k" in kept[0] and "d" in dropped[0] and dropped[2] == "<b>"  # apart by class, not by colour alone
    assert kept[1] == 'token 5  " the"  kept\nstudent 3.000   reference 1.000   excess +2.000   rank 1 of 2'
    assert dropped[1].endswith("excess -3.000   rank 2 of 2")
    assert {"c0", "c1", "c2", "c3"} & kept[0] and {"n1", "n2", "n3"} & dropped[0]


def test_the_page_says_how_it_was_chosen() -> None:
    page = html.unescape(re.sub(r"<[^>]+>", " ", render(selection(KEPT, DROPPED))))
    for words in ("runs/s (step_1)", "runs/r", "best 50% by excess loss", "+2", "1 of 2 tokens, 50.0%", "a & b", "50% kept"):
        assert words in page
    assert "student minus reference" in page and "never predicted" in page


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '" onmouseover="x', "</pre><img src=x>", "&lt;", "{title}", "\u202e\x00\x1b[2J", "'"]
)
def test_text_is_data(text: str) -> None:
    page = render(
        selection(
            replace(KEPT, text=text), DROPPED, student=text, documents=(ShownDocument(text, (replace(KEPT, text=text),)),)
        )
    )
    spans = Spans(page)
    assert spans.tags <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h1",
            "h2",
            "dl",
            "dt",
            "dd",
            "p",
            "span",
            "small",
            "section",
            "pre",
            "i",
        )
    }
    assert all(letter.isprintable() or letter == "\n" for letter in page)
    ((_, about, shown),) = spans.found
    if text.isprintable():
        assert shown == text and json.dumps(text) in about


def test_the_page_needs_nothing_from_outside() -> None:
    page = render(selection(replace(KEPT, text="http://example.org/a.js"), DROPPED))
    assert "default-src 'none'" in page
    assert not re.search(r"<script|<link|<img|<iframe|\bsrc=|\bhref=|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_what_cannot_be_seen_is_shown() -> None:
    texts = ["\n", "  ", "\t", "a b", "", "\x07"]
    shown = [text for _, _, text in Spans(render(selection(*(replace(KEPT, text=text) for text in texts)))).found]
    assert shown == ["↵\n", "··", "⇥\t", "a b", "∅", "⟨U+0007⟩"]


def test_bytes_of_a_character_are_shown_until_it_is_complete() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = [*"aé".encode(), *"日".encode(), 0xFF, ord("b"), 0xC3, tokenizer.eod or 0, 0xA9]
    texts = token_texts(tokenizer, ids)
    assert texts[:6] == ["a", "⟨C3⟩", "é", "⟨E6⟩", "⟨97⟩", "日"]
    assert texts[6:9] == ["\\xff", "b", "⟨C3⟩"]
    assert texts[9:] == [tokenizer.token_text(256), "\\xa9"]  # a special token ends what was waiting


def test_marks_and_shares() -> None:
    document = ShownDocument("d", (replace(KEPT, mark="noise"), DROPPED))
    page = render(
        selection(documents=(document,)), title="T", marks={"noise": "put in"}, shares={"clean <text>": 0.75, "none": 0.0}
    )
    first, second = Spans(page).found
    assert "m" in first[0] and "m" not in second[0] and "put in" in first[1]
    assert "clean &lt;text&gt;" in page and "75%" in page and "put in</span>" in page


@pytest.mark.parametrize("values", [(2.0, 0.0, -2.0), (1e-3, -1e-3, 5e-4), (4e4, 0.0, -1.0), (0.0, 0.0, 0.0)])
def test_the_scale_fits_the_values(values: tuple[float, ...]) -> None:
    tokens = [ShownToken(1, "x", True, loss=value, reference_loss=0.0, score=value, rank=1) for value in values]
    for value, (classes, _, _) in zip(values, Spans(render(selection(*tokens))).found, strict=True):
        (shade,) = classes - {"t", "k"}
        assert (shade[0] == "n") == (value < 0 and shade != "c0") and (
            abs(value) < max(map(abs, values)) or value == 0.0 or shade != "c0"
        )


def test_without_an_excess_the_score_is_shown_from_the_threshold() -> None:
    tokens = [ShownToken(1, "x", score > 5.0, loss=score, score=score, rank=1) for score in (9.0, 5.0, 1.0)]
    page = render(selection(*tokens, scorer="loss", reference="", threshold=5.0))
    shades = [next(iter(classes - {"t", "k", "d"})) for classes, _, _ in Spans(page).found]
    assert shades[0][0] == "c" and shades[0] != "c0" and shades[1] == "c0" and shades[2][0] == "n"
    assert "score, from the threshold" in page and "score +9" in page


def test_a_score_that_is_no_number_has_no_rank() -> None:
    ((classes, about, _),) = Spans(render(selection(ShownToken(1, "x", False, loss=None, score=None, rank=2)))).found
    assert "c0" in classes and "not a number" in about


def test_json_and_back(tmp_path: Path) -> None:
    made = selection(FIRST, KEPT, DROPPED)
    made.write_json(tmp_path / "s.json")
    assert Selection.read_json(tmp_path / "s.json") == made
    write_page(tmp_path / "s.html", made)
    assert (tmp_path / "s.html").read_text(encoding="utf-8") == render(made)
    (tmp_path / "s.json").write_text('{"documents": [{}]}')
    with pytest.raises(DataError, match="not a selection"):
        Selection.read_json(tmp_path / "s.json")
