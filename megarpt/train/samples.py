"""Show which tokens of a text were kept.

Three looks of one thing: Markdown for TensorBoard, ANSI colours for a terminal, HTML for a page. Text from a corpus is
data, never markup: everything that a format would interpret is escaped, and control characters cannot reach the terminal.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Literal

from megarpt.errors import ShapeError

SampleFormat = Literal["markdown", "ansi", "html"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER_TOKENS = 8  # a UTF-8 character has at most 4 bytes; beyond this the bytes are not text
_ANSI_KEPT = "\x1b[1;32m"
_ANSI_KEPT_STRONG = "\x1b[1;30;42m"
_ANSI_DROPPED = "\x1b[2m"
_ANSI_RESET = "\x1b[0m"
_MARKDOWN_SPECIAL = {ord(c): f"&#{ord(c)};" for c in "\\`*_{}[]()#+-.!|~:"}


def token_pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """The part of the decoded text that each token contributes; joined, they are the decoded text.

    A token is decoded after its predecessors, because sentencepiece drops a leading space from the first token of a text. A
    token that ends inside a UTF-8 character contributes the empty string and the token that completes it the character.

    Cost: two decodes of a few tokens for each token.
    """
    pieces: list[str] = []
    before, done = 0, 0  # ids[before:done] is context whose text has been given out
    for i in range(len(ids)):
        context = decode(ids[before:done])
        text = decode(ids[before : i + 1])
        is_incomplete = text.endswith(_REPLACEMENT) and i - done < _LONGEST_CHARACTER_TOKENS and i + 1 < len(ids)
        if is_incomplete or len(text) <= len(context):
            pieces.append("")
            continue
        pieces.append(text[len(context) :])
        before, done = done, i + 1
    return pieces


def mark_kept(
    tokens: Sequence[str], weight: Sequence[float], score: Sequence[float] | None = None, fmt: SampleFormat = "markdown"
) -> str:
    """One string in which the tokens with a positive weight stand out.

    Markdown makes kept tokens strong. ANSI prints kept tokens green and dropped ones dim; with `score`, the better half of the
    kept tokens has a green ground. HTML uses `<mark>` and `<span>`, with the score of each token in its title.

    Raises:
        ShapeError: the three sequences differ in length.
    """
    if len(weight) != len(tokens) or (score is not None and len(score) != len(tokens)):
        raise ShapeError(
            f"mark_kept: got {len(tokens)} tokens, {len(weight)} weights and "
            f"{'no' if score is None else len(score)} scores; expected one of each for every token"
        )
    kept = [w > 0 for w in weight]
    if fmt == "html":
        return _html(tokens, kept, score)
    if fmt == "ansi":
        return _ansi(tokens, kept, score)
    return _markdown(tokens, kept)


def _markdown(tokens: Sequence[str], kept: Sequence[bool]) -> str:
    # <strong> instead of **: asterisks next to spaces or punctuation are not always read as emphasis.
    out: list[str] = []
    for text, is_kept in _runs(tokens, kept):
        escaped = html.escape(_printable(text, ""), quote=False).translate(_MARKDOWN_SPECIAL)
        lines = escaped.replace("\t", " ").split("\n")
        out.append("<br>".join(f"<strong>{line}</strong>" if is_kept and line.strip() else line for line in lines))
    return "".join(out)


def _ansi(tokens: Sequence[str], kept: Sequence[bool], score: Sequence[float] | None) -> str:
    middle = float("inf")
    if score is not None and any(kept):
        scores = sorted(s for s, k in zip(score, kept, strict=True) if k)
        middle = scores[len(scores) // 2]
    out: list[str] = []
    for i, (token, is_kept) in enumerate(zip(tokens, kept, strict=True)):
        style = _ANSI_DROPPED
        if is_kept:
            style = _ANSI_KEPT_STRONG if score is not None and score[i] >= middle else _ANSI_KEPT
        # The style ends with each line: a pager or a wrapped line would otherwise carry it on.
        lines = _printable(token, _REPLACEMENT).split("\n")
        out.append("\n".join(f"{style}{line}{_ANSI_RESET}" if line else "" for line in lines))
    return "".join(out)


def _html(tokens: Sequence[str], kept: Sequence[bool], score: Sequence[float] | None) -> str:
    out: list[str] = []
    for i, (token, is_kept) in enumerate(zip(tokens, kept, strict=True)):
        name = "mark" if is_kept else "span"
        title = "" if score is None else f' title="score {score[i]:.3f}"'
        text = html.escape(_printable(token, _REPLACEMENT)).replace("\n", "<br>")
        out.append(f"<{name}{title}>{text}</{name}>")
    return '<p style="white-space: pre-wrap">' + "".join(out) + "</p>"


def _runs(tokens: Sequence[str], kept: Sequence[bool]) -> list[tuple[str, bool]]:
    runs: list[tuple[str, bool]] = []
    for token, is_kept in zip(tokens, kept, strict=True):
        if runs and runs[-1][1] == is_kept:
            runs[-1] = (runs[-1][0] + token, is_kept)
        else:
            runs.append((token, is_kept))
    return runs


def _printable(text: str, substitute: str) -> str:
    return "".join(c if c in "\n\t" or c.isprintable() else substitute for c in text)
