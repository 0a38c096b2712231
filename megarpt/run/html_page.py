"""What the pages of this package share: one HTML file without scripts and without anything from outside.

Text of a corpus or a policy is data, never markup; the page's policy forbids scripts as well, should any of it get through.
"""

from __future__ import annotations

import html


def page(title: str, *, style: str, body: str) -> str:
    """A whole page.

    Args:
        title: of the page and its heading; escaped here.
        style: CSS beyond what pages share: colours `--ink --faint --paper --panel`, type, lists of facts, preformatted text.
        body: markup, in which all text is escaped already.
    """
    heading = escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title><style>{_STYLE}{style.strip()}\n</style></head><body>\n"
        f"<h1>{heading}</h1>\n{body}\n</body></html>\n"
    )


def escape(text: str) -> str:
    """Safe between tags and in attributes; invisible characters cannot reach the page."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text), quote=True)


def visible(text: str) -> str:
    """The text with what cannot be seen made visible; text of nothing but space gets signs for it."""
    is_blank = not text.strip(" ")
    out = []
    for letter in text:
        if letter == "\n":
            out.append("<i>↵</i>\n")
        elif letter == "\t":
            out.append("<i>⇥</i>\t")
        elif letter == " ":
            out.append("<i>·</i>" if is_blank else " ")
        elif letter.isprintable():
            out.append(escape(letter))
        else:  # control characters, also those that turn the direction of writing
            out.append(f"<i>⟨U+{ord(letter):04X}⟩</i>")
    return "".join(out) or "<i>∅</i>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #6b7280; --paper: #ffffff; --panel: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #eceff3; --faint: #9aa3af; --paper: #15171a; --panel: #24282e; } }
body { font: 15px/1.6 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto 7rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h2 { font-size: 1rem; margin: 2rem 0 .4rem; }
small { font-weight: normal; color: var(--faint); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; margin: 0; tab-size: 4; }
i { font-style: normal; font-weight: normal; opacity: .6; }
"""
