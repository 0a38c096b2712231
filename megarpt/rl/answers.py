r"""Where the answer is in a completion.

All of it works on bytes, because a completion may end in the middle of a character and a reward compares bytes, and in time
linear in the text, because a policy that learns writes anything.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

THINK_CLOSE = b"</think>"
LETTERS = "ABCDEFGHIJ"

_BOX = b"\\boxed{"
_BRACE = re.compile(rb"[{}]")
_ESCAPE_OR_BRACE = re.compile(rb"\\.|[{}]", re.DOTALL)
_CLOSING = re.compile(rb"(?<!\\)(\\*)\}")  # the look behind makes it try a run of backslashes once only
_ESCAPE = re.compile(rb"\\([{}_%$#&\\ ])")

# A letter that is no part of a word.
_LETTER = re.compile(rb"(?<![A-Za-z0-9_\\])([A-J])(?![A-Za-z0-9_])")
_MACRO = re.compile(rb"\\(?:text|textbf|textrm|mathrm|mathbf|bf|rm)(?![A-Za-z])")
_ONE_LETTER = re.compile(rb"\s{0,8}[({\[]{0,3}\s{0,8}([A-Ja-j])\s{0,8}[)}\]]{0,3}\s{0,8}[.:]?\s{0,8}")
# Every repetition has an end, so that a text of blanks costs no more than another.
_OPENING = rb"[\s*$({\[\\]{0,8}(?:(?:text|textbf|mathrm|mathbf|boxed)\{[\s*(]{0,4})?"
_STATEMENT = re.compile(
    rb"(?i:\banswers?(?:\s{1,8}(?:choice|option))?\s{0,8}(?:\bis\b|\bare\b|:)\s{0,8}:?\s{0,8}(?:(?:choice|option)\s{1,8})?)"
    + _OPENING
    + rb"([A-J])(?![A-Za-z0-9_'])"
)
_SECOND_LETTER = re.compile(
    rb"[\s*$)}\]]{0,8}(?:,|/|&|(?i:\b(?:or|and)\b))\s{0,8}(?i:(?:or|and|option|choice)\s{1,8}){0,2}"
    + _OPENING
    + rb"(?:[B-HJ]|[AI](?!\s{1,8}[a-z]))(?![A-Za-z0-9_'])"  # `C, I think` names one letter
)


def after_thinking(text: bytes, close: bytes = THINK_CLOSE) -> bytes | None:
    """What follows the last `close`, exactly as it is; None when there is none."""
    found = text.rfind(close)
    return None if found < 0 else text[found + len(close) :]


def last_box(text: bytes, *, unescape: bool = False) -> bytes | None:
    r"""Content of the last complete `\boxed{...}`, blanks included; None when no box is complete.

    A box ends where as many braces have closed as were opened since it began. One that never ends is passed over. Of a box
    within a complete box only the outer one counts, since its content may rightly speak of boxes; braces that belong to no box
    change nothing: `{\boxed{a}}` holds `a`. Linear time, and memory for the answer only, whatever the text is.

    Args:
        text: a completion, or the part of it that may hold the answer.
        unescape: read the text as LaTeX does: `\{ \} \_ \% \$ \# \& \\` and `\` before a blank mean the character alone, and
            such braces neither open nor close. Without it every byte means itself, so that content whose braces do not pair,
            such as the token `}`, cannot be said.
    """
    begin = _begin_of_last_box(text, unescape)
    if begin is None:
        return None
    depth = 1
    for where, opens in _braces(text, begin, unescape):
        depth += 1 if opens else -1
        if depth == 0:
            content = text[begin:where]
            return unescaped(content) if unescape else content
    raise AssertionError("a box without an end was chosen")


def unescaped(text: bytes) -> bytes:
    r"""The text with `\{ \} \_ \% \$ \# \& \\` and `\` before a blank replaced by the character; other macros stay."""
    return _ESCAPE.sub(rb"\1", text)


def choice_in_box(content: bytes) -> str | None:
    r"""The letter A to J that the content of a box chooses: `C`, `c`, `(C)`, `\text{(C)}`, `C. 42`.

    None when there is none, and when there are different ones: an answer of two letters is no choice. A small letter counts
    only where nothing else is in the box.
    """
    plain = _MACRO.sub(b"", content)
    if alone := _ONE_LETTER.fullmatch(plain):
        return alone[1].decode().upper()
    letters = {found[1] for found in _LETTER.finditer(plain)}
    return letters.pop().decode() if len(letters) == 1 else None


def stated_choice(text: bytes) -> str | None:
    """The letter of the last statement such as `answer is (C)` or `Answer: C`; None when there is none, or it names two."""
    last = deque(_STATEMENT.finditer(text), maxlen=1)
    if not last or _SECOND_LETTER.match(text, last[0].end()):
        return None
    return last[0][1].decode()


def _begin_of_last_box(text: bytes, unescape: bool) -> int | None:
    """Where the content of the chosen box begins.

    Read from the right, an opening brace has its partner iff some closing one is still without. `open_ends` counts those; a
    brace that brings the count below its lowest since the candidate is one around the candidate.
    """
    chosen = None
    open_ends = lowest = 0
    where_open, where_close = text.rfind(b"{"), text.rfind(b"}")
    while where_open >= 0:
        if open_ends == 0:  # what opens here never closes
            if chosen is not None or where_close < 0:
                break
            if where_open > where_close:
                where_open = text.rfind(b"{", 0, where_close)
                continue
        if where_close > where_open:
            open_ends += _closing(text, where_open + 1, where_close + 1, unescape)
            where_close = text.rfind(b"}", 0, where_open)
            continue
        if not (unescape and _is_escaped(text, where_open)):
            open_ends -= 1
            if (chosen is None or open_ends < lowest) and _is_box(text, where_open, unescape):
                chosen = where_open + 1
                lowest = open_ends
            lowest = min(lowest, open_ends)
        where_open = text.rfind(b"{", 0, where_open)
    return chosen


def _is_box(text: bytes, brace: int, unescape: bool) -> bool:
    begin = brace + 1 - len(_BOX)
    return text.startswith(_BOX, max(begin, 0), brace + 1) and not (unescape and _is_escaped(text, begin))


def _is_escaped(text: bytes, where: int) -> bool:
    """Whether an odd number of backslashes stands before it."""
    first = where
    while first > 0 and text[first - 1] == 0x5C:
        first -= 1
    return (where - first) % 2 == 1


def _braces(text: bytes, begin: int, unescape: bool) -> Iterator[tuple[int, bool]]:
    """Braces from `begin` on: where, and whether one opens."""
    for found in (_ESCAPE_OR_BRACE if unescape else _BRACE).finditer(text, begin):
        if found.end() - found.start() == 1:
            yield found.start(), found[0] == b"{"


def _closing(text: bytes, begin: int, end: int, unescape: bool) -> int:
    """How many braces close between two places of which the first is no backslash's successor."""
    if not unescape:
        return text.count(b"}", begin, end)
    return sum(len(found[1]) % 2 == 0 for found in _CLOSING.finditer(text, begin, end))
