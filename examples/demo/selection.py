"""Which tokens selection keeps, on text whose noise is known.

The probe documents are made like the students' mix, and `corpus.py` recorded what in them is clean text, injected noise, code
or a page of noise. The reference model and the trained student scored each of their tokens; the excess loss is the
difference, and the best 60% are what the student would train on.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.text import Text

from megarpt.corpus.indexed import CorpusIndex
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer

KINDS = {
    "clean": "clean English",
    "injected": "noise inside clean pages",
    "code": "Python source",
    "noise": "pages of noise",
}


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a probe document."""

    text: str
    kind: str  # a key of KINDS
    excess: float  # nats, student minus reference; NaN where the token is never predicted
    kept: bool


@dataclass(frozen=True, slots=True)
class Page:
    """A probe document, token by token."""

    source: str
    kind: str
    tokens: tuple[Token, ...]


def read_pages(out: Path, fraction: float) -> list[Page]:
    """The probe documents with what selection makes of them."""
    tokenizer = load_tokenizer(str(out / "tokenizer.model"))
    documents = [json.loads(line) for line in (out / "corpus" / "probe.jsonl").read_text(encoding="utf-8").splitlines()]
    corpus = read_documents(out / "data" / "probe")
    students = read_documents(out / "data" / "probe_slm")
    references = read_documents(out / "data" / "probe_reference")
    excess = [student - reference for student, reference in zip(students, references, strict=True)]
    flat = np.concatenate(excess)
    threshold = np.quantile(flat[np.isfinite(flat)], 1.0 - fraction)
    pages = []
    for document, ids, scores in zip(documents, corpus, excess, strict=True):
        spans = token_spans(tokenizer, ids, document["text"])
        tokens = tuple(
            Token(document["text"][begin:end], token_kind(document, begin, end), float(score), score >= threshold)
            for (begin, end), score in zip(spans, scores, strict=False)  # the scores go on to the end-of-document token
        )
        pages.append(Page(document["source"], document["kind"], tokens))
    return pages


def read_documents(prefix: Path) -> list[np.ndarray]:
    """The values of every document of an indexed file."""
    index = CorpusIndex(prefix)
    return [index.read_document(number) for number in range(index.num_documents)]


def token_spans(tokenizer: Tokenizer, ids: np.ndarray, text: str) -> list[tuple[int, int]]:
    """The characters each token stands for; one that ends in the midst of a character leaves it to the token that completes it.

    Raises:
        ValueError: the tokens are not those of the text.
    """
    pieces = [tokenizer.token_bytes(int(token)) or b"" for token in ids]  # the end-of-document token has no bytes
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
        kept = [token.kept for page in pages for token in page.tokens if token.kind == kind and np.isfinite(token.excess)]
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


def html_page(pages: list[Page], shares: dict[str, float | None], fraction: float, limit: int = 12) -> str:
    """A page to open in a browser: kept tokens on green, injected noise underlined, the excess loss on hovering."""
    rows = "".join(
        f"<tr><td>{KINDS[kind]}</td><td><div class=bar style='width:{100 * share:.0f}px'></div></td>"
        f"<td>{100 * share:.0f}%</td></tr>"
        for kind, share in shares.items()
        if share is not None
    )
    order = {"clean": 0, "code": 1, "noise": 2}
    chosen = sorted(pages, key=lambda page: order[page.kind])
    clean = [page for page in chosen if page.kind == "clean"][: limit - 4]
    others = [page for kind in ("code", "noise") for page in [p for p in chosen if p.kind == kind][:2]]
    body = "".join(
        f"<h2>{html.escape(page.source)} <small>{KINDS[page.kind]}</small></h2><pre>{''.join(map(_span, page.tokens))}</pre>"
        for page in clean + others
    )
    return _HTML.format(percent=f"{100 * fraction:.0f}", rows=rows, body=body)


def _span(token: Token) -> str:
    classes = ("k" if token.kept else "d") + (" n" if token.kind == "injected" else "")
    return f'<span class="{classes}" title="{token.excess:+.2f} nats">{html.escape(token.text)}</span>'


_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Which tokens selection keeps</title><style>
:root {{ color-scheme: light dark; --keep: #c8f0d0; --drop: #9aa0a6; --ink: #1f2328; --paper: #fff; }}
@media (prefers-color-scheme: dark) {{ :root {{ --keep: #14532d; --drop: #6b7280; --ink: #e6e6e6; --paper: #16181b; }} }}
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); }}
h2 {{ font-size: 1rem; margin: 2rem 0 .3rem; }} small {{ font-weight: normal; color: var(--drop); }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; margin: 0; }}
.k {{ background: var(--keep); border-radius: 2px; }} .d {{ color: var(--drop); }}
.n {{ text-decoration: underline wavy #d97706 1px; text-underline-offset: 3px; }}
.bar {{ background: var(--keep); height: .9rem; border-radius: 2px; }} td {{ padding: 0 .6rem 0 0; }}
</style></head><body>
<h1>Which tokens selection keeps</h1>
<p>The student reads everything and trains on the {percent}% of tokens with the highest excess loss: its own loss minus the
reference model's. <span class="k">Kept</span>, <span class="d">dropped</span>, and <span class="n">noise that was put into the
text</span>. Hover over a token for its excess loss. Kept share by what the token is:</p>
<table>{rows}</table>
{body}
</body></html>
"""
