"""Which tokens selection keeps, on text whose noise is known.

The probe documents are made like the students' mix, and `corpus.py` recorded what in them is clean text, injected noise, code
or a page of noise. `tools/show_selection.py` scored their tokens with the trained student and the reference model and chose
among them as the student would; here its result is put beside what was recorded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.text import Text

from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.run.selection_page import Selection, ShownDocument, ShownToken, render

KINDS = {
    "clean": "clean English",
    "injected": "noise inside clean pages",
    "code": "Python source",
    "noise": "pages of noise",
}


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a probe document."""

    text: str  # its characters; a token that ends inside one has none
    kind: str  # a key of KINDS
    shown: ShownToken

    @property
    def kept(self) -> bool:
        return bool(self.shown.kept)


@dataclass(frozen=True, slots=True)
class Page:
    """A probe document, token by token."""

    source: str
    kind: str
    tokens: tuple[Token, ...]


def read_pages(out: Path, selection: Selection) -> list[Page]:
    """The probe documents with what selection makes of them."""
    tokenizer = load_tokenizer(str(out / "tokenizer.model"))
    documents = [json.loads(line) for line in (out / "corpus" / "probe.jsonl").read_text(encoding="utf-8").splitlines()]
    pages = []
    for document, chosen in zip(documents, selection.documents, strict=True):
        spans = token_spans(tokenizer, [token.id for token in chosen.tokens], document["text"])
        tokens = tuple(
            Token(document["text"][begin:end], token_kind(document, begin, end), token)
            for (begin, end), token in zip(spans, chosen.tokens, strict=False)  # these go on to the end-of-document token
        )
        pages.append(Page(document["source"], document["kind"], tokens))
    return pages


def token_spans(tokenizer: Tokenizer, ids: list[int], text: str) -> list[tuple[int, int]]:
    """The characters each token stands for; one that ends in the midst of a character leaves it to the token that completes it.

    Raises:
        ValueError: the tokens are not those of the text.
    """
    pieces = [tokenizer.token_bytes(token) or b"" for token in ids]  # the end-of-document token has no bytes
    if b"".join(pieces) != text.encode():
        raise ValueError(f"tokens and text differ: {text[:60]!r}; the corpus and its tokens are not from the same run")
    starts = [0] + [index for index, byte in enumerate(text.encode() + b" ") if byte & 0xC0 != 0x80][1:]  # of each character
    ends = np.searchsorted(starts, np.cumsum([len(piece) for piece in pieces]), side="right") - 1
    begins = [0, *ends[:-1]]
    return [(int(begin), int(end)) for begin, end, piece in zip(begins, ends, pieces, strict=True) if piece]


def token_kind(document: dict, begin: int, end: int) -> str:
    """What the characters `begin` to `end` of a probe document are."""
    if document["kind"] != "clean":
        return str(document["kind"])
    middle = (begin + end) / 2
    return "injected" if any(start <= middle < stop for start, stop in document["noise"]) else "clean"


def kept_shares(pages: list[Page]) -> dict[str, float | None]:
    """Kept share of the predicted tokens of each kind; None where there are none."""
    shares: dict[str, float | None] = {}
    for kind in KINDS:
        kept = [token.kept for page in pages for token in page.tokens if token.kind == kind and token.shown.kept is not None]
        shares[kind] = sum(kept) / len(kept) if kept else None
    return shares


def terminal_sample(pages: list[Page], has_colors: bool, characters: int = 1100) -> Text:
    """The beginning of a clean page with some injected noise: kept tokens bright, dropped ones dim or in ⟦ ⟧."""

    def mixture(page: Page) -> float:
        shown = [token.kind for token in excerpt(page, characters)]
        share = shown.count("injected") / max(1, len(shown))
        return -abs(share - 0.3) if page.kind == "clean" and len(shown) > characters // 8 else -9.0

    text = Text()
    for is_kept, tokens in groupby(excerpt(max(pages, key=mixture), characters), key=lambda token: token.kept):
        run = "".join(token.text for token in tokens)
        if has_colors:
            text.append(run, style="bold green" if is_kept else "dim")
        else:
            text.append(run if is_kept else f"⟦{run}⟧")
    return text


def excerpt(page: Page, characters: int) -> list[Token]:
    """The first tokens of a page that make up `characters`."""
    shown, size = [], 0
    for token in page.tokens:
        shown.append(token)
        size += len(token.text)
        if size >= characters:
            break
    return shown


def html_page(selection: Selection, pages: list[Page], shares: dict[str, float | None], limit: int = 12) -> str:
    """The page of `tools/show_selection.py`: some documents of each kind, injected noise marked, and shares by kind."""
    clean = [page for page in pages if page.kind == "clean"][: limit - 4]
    others = [page for kind in ("code", "noise") for page in [p for p in pages if p.kind == kind][:2]]
    documents = tuple(
        ShownDocument(
            f"{page.source} ({KINDS[page.kind]})",
            tuple(replace(token.shown, mark="injected" if token.kind == "injected" else "") for token in page.tokens),
        )
        for page in clean + others
    )
    return render(
        replace(selection, documents=documents),
        marks={"injected": "noise that was put into the text"},
        shares={KINDS[kind]: share for kind, share in shares.items() if share is not None},
    )
