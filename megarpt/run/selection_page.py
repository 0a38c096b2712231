"""A page that shows which tokens of a text are kept: one HTML file without scripts and without anything from outside.

Every token is shaded by its excess loss and carries its numbers, shown at the foot of the page while the pointer rests on it.
Kept tokens are underlined and heavier, so that they stand out without colour too. Text from a corpus is data, never markup.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megarpt.corpus.atomic import atomic_write_bytes
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import DataError
from megarpt.run.html_page import escape, page, visible

_SHADES = 3  # on each side of zero
_STRONGEST_SHARE = 0.95  # of the tokens lie within the scale


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token of a document and what selection makes of it. Units: nats."""

    id: int
    text: str  # what it adds to the text; bytes that end inside a character as ⟨E2⟩
    kept: bool | None = None  # None: never predicted, so that it cannot be kept
    loss: float | None = None  # of the student
    reference_loss: float | None = None
    score: float | None = None  # what the tokens were ranked by
    rank: int | None = None  # 1 is the best among those it competes with
    mark: str = ""  # a key of `render`'s marks

    @property
    def excess(self) -> float | None:
        """Student loss minus reference loss, None where either is unknown."""
        return None if self.loss is None or self.reference_loss is None else self.loss - self.reference_loss


@dataclass(frozen=True, slots=True)
class ShownDocument:
    """A document, token by token."""

    title: str
    tokens: tuple[ShownToken, ...]

    @property
    def kept_share(self) -> float | None:
        """Of the predicted tokens; None when there is none."""
        kept = [token.kept for token in self.tokens if token.kept is not None]
        return sum(kept) / len(kept) if kept else None


@dataclass(frozen=True, slots=True)
class Selection:
    """What was chosen, and how."""

    student: str
    reference: str  # empty when the scorer needs none
    scorer: str
    fraction: float
    scope: str
    threshold: float | None  # the lowest score that is kept; None when there is no single one
    num_competing: int  # tokens that were ranked, shown or not
    num_kept: int
    documents: tuple[ShownDocument, ...]

    @property
    def kept_share(self) -> float:
        """Of all tokens that competed."""
        return self.num_kept / self.num_competing

    def write_json(self, path: str | Path) -> None:
        """Everything, for programs."""
        atomic_write_bytes(path, json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())

    @classmethod
    def read_json(cls, path: str | Path) -> Selection:
        """What `write_json` wrote.

        Raises:
            DataError: it is not such a file.
        """
        try:
            fields = json.loads(Path(path).read_bytes())
            documents = tuple(
                ShownDocument(each["title"], tuple(ShownToken(**token) for token in each["tokens"]))
                for each in fields.pop("documents")
            )
            return cls(**fields, documents=documents)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a selection ({error!r}); write it with tools/show_selection.py --json") from error


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """What each token adds to the text.

    A token that ends inside a character shows the bytes of it as ⟨E2⟩, the token that completes it shows the character. Bytes
    that are no text show as \\xNN, special tokens by their name.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
    texts = []
    for number in ids:
        content = tokenizer.token_bytes(int(number))
        if content is None:
            decoder.reset()
            texts.append(tokenizer.token_text(int(number)))
            continue
        before = len(decoder.getstate()[0])
        text = decoder.decode(content)
        waiting = decoder.getstate()[0]
        own = waiting if text else waiting[before:]  # without what earlier tokens have shown already
        texts.append(text + "".join(f"⟨{byte:02X}⟩" for byte in own))
    return texts


def write_page(path: str | Path, selection: Selection, **options: Any) -> None:
    """`render` into a file.

    Raises:
        DataError: the file cannot be written.
    """
    atomic_write_bytes(path, render(selection, **options).encode())


def render(
    selection: Selection,
    *,
    title: str = "Which tokens selection keeps",
    marks: Mapping[str, str] | None = None,
    shares: Mapping[str, float] | None = None,
) -> str:
    """The page.

    Args:
        selection: what is shown.
        title: the heading.
        marks: what the marks of tokens mean; marked tokens get a wavy line.
        shares: rows of a table: what kind of token, and which share of it is kept.
    """
    shade = _Shades(selection)
    facts = {
        "student": selection.student,
        "reference": selection.reference or "none",
        "rule": f"the best {100 * selection.fraction:g}% by {selection.scorer.replace('_', ' ')}, {_among(selection.scope)}",
        "threshold": "one for each set" if selection.threshold is None else f"{selection.threshold:+.4g}",
        "kept": f"{selection.num_kept:,} of {selection.num_competing:,} tokens, {100 * selection.kept_share:.1f}%",
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    table = "".join(
        f'<tr><td>{escape(name)}</td><td><div class="bar" style="width:{200 * share:.0f}px"></div></td>'
        f"<td>{100 * share:.0f}%</td></tr>"
        for name, share in (shares or {}).items()
    )
    marked = "".join(f' <span class="t m">{escape(meaning)}</span>' for meaning in (marks or {}).values())
    body = _BODY.format(
        facts=rows,
        legend=shade.legend(),
        marked=marked,
        shares=f"<h2>Kept share by kind of token</h2><table>{table}</table>" if table else "",
        documents="".join(_document(document, shade, selection, marks or {}) for document in selection.documents),
    )
    return page(title, style=_STYLE, body=body)


class _Shades:
    """Which colour a token has: steps of one width on both sides of zero, or of the threshold where no excess is known."""

    def __init__(self, selection: Selection) -> None:
        tokens = [token for document in selection.documents for token in document.tokens if token.kept is not None]
        self._by_excess = any(token.excess is not None for token in tokens)
        self._middle = 0.0 if self._by_excess else selection.threshold or 0.0
        distances = [abs(value) for token in tokens if (value := self._value(token)) is not None and math.isfinite(value)]
        reach = float(np.quantile(distances, _STRONGEST_SHARE)) if distances else 0.0
        self._step = _round_up(reach / (_SHADES + 0.5)) if reach > 0.0 else 1.0

    def _value(self, token: ShownToken) -> float | None:
        if self._by_excess:
            return token.excess
        return None if token.score is None else token.score - self._middle

    def of(self, token: ShownToken) -> str:
        """The class of its colour."""
        value = self._value(token)
        if token.kept is None or value is None or math.isnan(value):
            return "c0"
        number = int(max(-_SHADES, min(_SHADES, np.rint(max(-1e9, min(1e9, value)) / self._step))))
        return f"c{number}" if number >= 0 else f"n{-number}"

    def legend(self) -> str:
        """The scale of colours with the value at the middle of each."""
        what = "excess loss: student minus reference" if self._by_excess else "score, from the threshold"
        cells = []
        for number in range(-_SHADES, _SHADES + 1):
            edge = {-_SHADES: "≤ ", _SHADES: "≥ "}.get(number, "")
            value = f"{number * self._step:+.3g}" if number else "0"
            cells.append(f'<span class="t {f"c{number}" if number >= 0 else f"n{-number}"}">{edge}{value}</span>')
        return f"{''.join(cells)} <small>{what}, nats</small>"


def _document(document: ShownDocument, shade: _Shades, selection: Selection, marks: Mapping[str, str]) -> str:
    share = document.kept_share
    note = "nothing to predict" if share is None else f"{100 * share:.0f}% kept"
    tokens = "".join(_token(token, shade, selection, marks) for token in document.tokens)
    return f"<section><h2>{escape(document.title)} <small>{note}</small></h2><pre>{tokens}</pre></section>"


def _token(token: ShownToken, shade: _Shades, selection: Selection, marks: Mapping[str, str]) -> str:
    state = {True: "k", False: "d", None: "u"}[token.kept]
    classes = f"t {state} {shade.of(token)}{' m' if token.mark in marks else ''}"
    about = escape(_about(token, selection, marks)).replace("\n", "&#10;")
    return f'<span class="{classes}" data-t="{about}">{visible(token.text)}</span>'


def _about(token: ShownToken, selection: Selection, marks: Mapping[str, str]) -> str:
    """What is said of a token, in two lines."""
    verdict = {True: "kept", False: "dropped", None: "never predicted: nothing precedes it in its document"}[token.kept]
    first = f"token {token.id}  {json.dumps(token.text, ensure_ascii=False)}  {verdict}"
    if token.mark in marks:
        first += f", {marks[token.mark]}"
    if token.kept is None:
        return first
    numbers = [("student", token.loss, ".3f"), ("reference", token.reference_loss, ".3f"), ("excess", token.excess, "+.3f")]
    if selection.scorer != "excess_loss":
        numbers.append(("score", token.score, "+.4g"))
    parts = [f"{name} {format(value, spec)}" for name, value, spec in numbers if value is not None]
    rank = "no rank: its score is not a number" if token.score is None else f"rank {token.rank:,}"
    if token.score is not None and selection.scope == "global_batch":
        rank += f" of {selection.num_competing:,}"
    return "\n".join([first, "   ".join([*parts, rank])])


def _among(scope: str) -> str:
    return {
        "sequence": "among the tokens of its window",
        "microbatch": "among those of its micro-batch",
        "global_batch": "among all tokens that compete",
    }[scope]


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(each * power for each in (1.0, 2.0, 5.0, 10.0) if each * power >= value * (1 - 1e-9))


_STYLE = """
:root { --bar: #1f2328; --n3: #998ec3; --n2: #bdb7da; --n1: #e2e0ef; --c1: #fee8cf; --c2: #fdc27a; --c3: #f1962d; }
@media (prefers-color-scheme: dark) { :root { --bar: #eceff3; --n3: #65559f; --n2: #483f73; --n1: #302d48; --c1: #46311a;
  --c2: #6f4712; --c3: #955406; } }
pre { line-height: 1.9; }
.legend { font: 13px/2 ui-monospace, monospace; margin: 0 0 .2rem; } .legend .t { padding: .1rem .5rem; }
.t { border-bottom: 2px solid transparent; border-radius: 2px; margin-right: 1px; }
.k { border-bottom-color: var(--bar); font-weight: 650; }
.u { color: var(--faint); outline: 1px dashed var(--faint); outline-offset: -1px; }
.m { text-decoration: underline wavy #d97706 1px; text-underline-offset: 2px; }
.n3 { background: var(--n3); } .n2 { background: var(--n2); } .n1 { background: var(--n1); }
.c1 { background: var(--c1); } .c2 { background: var(--c2); } .c3 { background: var(--c3); }
pre .t:hover { outline: 2px solid var(--ink); }
pre .t:hover::after { content: attr(data-t); position: fixed; left: 0; right: 0; bottom: 0; padding: .7rem 1.2rem;
  white-space: pre-wrap; font: 14px/1.6 ui-monospace, monospace; color: var(--ink); background: var(--panel);
  border-top: 1px solid var(--faint); }
.bar { background: var(--c3); height: .9rem; border-radius: 2px; } td { padding: 0 .8rem 0 0; }
@media print { .t { print-color-adjust: exact; } }
"""

_BODY = """<dl>{facts}</dl>
<p class="legend"><span class="t k">kept</span> <span class="t d">dropped</span> <span class="t u">never predicted</span>
{marked}</p><p class="legend">{legend}</p>
<p><small>Rest the pointer on a token, or tap it, for its numbers. Space that is a token by itself shows as · ↵ ⇥, a part of a
character as ⟨E2⟩.</small></p>
{shares}
{documents}"""
