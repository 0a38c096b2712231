"""The noise of web text, seeded: what crawled pages carry around and inside the prose one wants.

`inject` puts noise into a clean page and says where; `page` makes a page of nothing else. The kinds: navigation, cookie
banners, share and footer lines, links with tracking parameters, hexadecimal and base64 blobs, minified scripts, server logs,
price lists, keyword stuffing, HTML entities, mojibake, shuffled and repeated lines.
"""

from __future__ import annotations

import base64
import random
import re
import textwrap
from collections.abc import Callable

MIX_SHARES = {"clean": 0.45, "code": 0.25, "noise": 0.30}
"""Shares of the students' mix in bytes; the clean pages carry injected noise besides."""

_MENU = (
    "Home|About|Contact|Login|Register|Forums|Blog|News|Shop|Cart (0)|My Account|Careers|Press|Partners|Pricing|Docs|Support|"
    "FAQ|Sitemap|Downloads|Community|Events|Newsletter|Wishlist|Deals|Store Locator|Gift Cards|Help|EN|DE|FR|ES|Sign up|Search"
).split("|")
_CALLS = (
    "Share this|Tweet|Pin it|Like 0|Follow us|Print|Email a friend|Report abuse|Reply|Quote|Permalink|Click here|"
    "Subscribe now!|Read more »|Continue reading →|Show more|Load comments (0)|Advertisement|Sponsored|Back to top|Loading..."
).split("|")
_LEGAL = (
    "All rights reserved.|Privacy Policy|Terms of Use|Do Not Sell My Info|Cookie Settings|Powered by WordPress|Imprint|"
    "This site is protected by reCAPTCHA|Unauthorized reproduction prohibited|Trademarks belong to their owners"
).split("|")
_COOKIES = (
    "We use cookies to give you the best experience on our website. By clicking Accept All you agree to our use of cookies.",
    "This site uses cookies and similar technologies. Manage preferences | Reject | Accept all cookies",
    "We and our {n} partners store and access information on your device. Accept | More options",
    "Your choices regarding cookies on this site. Please enable JavaScript to continue using this application.",
    "Sign up for our newsletter and get {n}% off your first order! No thanks | Subscribe",
)
_KEYWORDS = (
    "cheap free online best buy discount coupon download hotel flights shoes insurance casino credit loan review top price "
    "sale deal 2019 2020 2021 near me how to watch streaming hd full mp3 crack keygen apk replica watches vitamins loans"
).split()
_SITES = "example.com example.org shop.example.net cdn.example.com news.example.org blog.example.net static.example.com".split()
_ENTITIES = (
    "&nbsp;",
    "&amp;",
    "&quot;",
    "&#8217;",
    "&#8220;",
    "&#8221;",
    "&lt;br /&gt;",
    "&raquo;",
    "<br/>",
    "&#160;",
    "</p><p>",
)
_JS = "function var return if else this null document window getElementById push length for typeof void prototype".split()
_MOJIBAKE = (("'", "’"), ('"', "“"), (" - ", " — "), ("...", "…"), (", ", " ‚ "), (". ", ".\u00a0"))

Block = Callable[[random.Random], str]


def menu(rng: random.Random) -> str:
    """A navigation bar, a breadcrumb or a row of share links."""
    separator = rng.choice((" | ", " · ", " > ", " » ", "  ", "\n", " / "))
    return separator.join(rng.sample(_MENU, rng.randint(4, 12)) + rng.sample(_CALLS, rng.randint(0, 3)))


def banner(rng: random.Random) -> str:
    """A cookie or newsletter banner."""
    return rng.choice(_COOKIES).format(n=rng.randint(2, 900))


def footer(rng: random.Random) -> str:
    """Copyright, legal links, counters."""
    year = rng.randint(1998, 2025)
    items = [f"Copyright © {year} {rng.choice(_SITES)}", *rng.sample(_LEGAL, rng.randint(2, 5))]
    items.append(f"Page generated in {rng.random():.4f} s. Visitors: {rng.randrange(10**7):,}")
    return rng.choice((" | ", " · ", "\n")).join(items)


def link(rng: random.Random) -> str:
    """A link with tracking parameters."""
    token = base64.urlsafe_b64encode(rng.randbytes(rng.randint(9, 30))).decode().rstrip("=")
    path = "-".join(rng.choices(_KEYWORDS, k=rng.randint(1, 4)))
    tracking = f"utm_source={rng.choice(('feed', 'mail', 'tw', 'fb'))}&utm_campaign={rng.randrange(10**5)}&gclid={token}"
    return f"https://{rng.choice(_SITES)}/{path}/{rng.randrange(10**6)}?{tracking}&sid={rng.randbytes(8).hex()}"


def links(rng: random.Random) -> str:
    """A list of related links."""
    return "Related:\n" + "\n".join(link(rng) for _ in range(rng.randint(1, 4)))


def hex_blob(rng: random.Random) -> str:
    """Hashes, or lines of a hex dump."""
    if rng.random() < 0.5:
        return "\n".join(
            f"{rng.choice(('sha1', 'md5', 'etag', 'id'))}: {rng.randbytes(16).hex()}" for _ in range(rng.randint(1, 4))
        )
    start = rng.randrange(0, 2**20, 16)
    return "\n".join(f"{start + 16 * row:08x}  {rng.randbytes(16).hex(' ')}" for row in range(rng.randint(2, 6)))


def base64_blob(rng: random.Random) -> str:
    """A data URI, or an encoded attachment."""
    payload = base64.b64encode(rng.randbytes(rng.randint(60, 260))).decode()
    if rng.random() < 0.5:
        return f'<img src="data:image/png;base64,{payload}"/>'
    return "\n".join(textwrap.wrap(payload, 76))


def script(rng: random.Random) -> str:
    """Minified JavaScript or CSS."""
    if rng.random() < 0.4:
        rules = (
            f".{rng.choice('abcdefgh')}{rng.randrange(999)}{{margin:{rng.randrange(40)}px;color:#{rng.randbytes(3).hex()}}}"
            for _ in range(rng.randint(3, 9))
        )
        return "<style>" + "".join(rules) + "</style>"
    names = [rng.choice("abcdefghijkmnopqrstuvwxyz") + rng.choice("abcdeimnot$_0123") for _ in range(6)]
    parts = (
        f"{rng.choice(_JS)} {rng.choice(names)}={rng.choice(names)}.{rng.choice(_JS)}({rng.randrange(999)},{rng.choice(names)})"
        for _ in range(rng.randint(4, 12))
    )
    return "<script>(function(){" + ";".join(parts) + "})();</script>"


def server_log(rng: random.Random) -> str:
    """Access-log lines."""
    return "\n".join(
        f"{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)} - - "
        f"[{rng.randint(1, 28):02d}/{rng.choice(('Jan', 'Mar', 'Jun', 'Oct'))}/20{rng.randint(10, 25)}:{rng.randrange(24):02d}:"
        f'{rng.randrange(60):02d}:{rng.randrange(60):02d}] "GET /{rng.choice(_KEYWORDS)}/{rng.randrange(9999)}" '
        f"{rng.choice((200, 301, 404, 500))} {rng.randrange(99999)}"
        for _ in range(rng.randint(2, 6))
    )


def prices(rng: random.Random) -> str:
    """A product list."""
    return "\n".join(
        f"{' '.join(rng.choices(_KEYWORDS, k=3)).title()} ${rng.randrange(1, 900)}.{rng.randrange(100):02d} Add to cart "
        f"({rng.randrange(500)} reviews) SKU {rng.randrange(10**8):08d}"
        for _ in range(rng.randint(2, 6))
    )


def keywords(rng: random.Random) -> str:
    """Keyword stuffing."""
    return "Tags: " + rng.choice((", ", " ", " - ")).join(rng.choices(_KEYWORDS, k=rng.randint(10, 40)))


BLOCKS: tuple[Block, ...] = (
    menu, banner, footer, links, hex_blob, base64_blob, script, server_log, prices, keywords,
)  # fmt: skip


def mojibake(text: str) -> str:
    """Typographic punctuation, encoded as UTF-8 and wrongly decoded as Windows-1252."""
    for plain, typographic in _MOJIBAKE:
        text = text.replace(plain, typographic)
    return text.encode("utf-8").decode("cp1252", errors="replace")


def shuffled_lines(text: str, rng: random.Random) -> str:
    """The text in short lines, out of order, some of them repeated."""
    lines = textwrap.wrap(text, rng.randint(18, 44)) or [text]
    lines += rng.choices(lines, k=len(lines) // 3)
    rng.shuffle(lines)
    return "\n".join(lines)


def repeated_lines(text: str, rng: random.Random) -> str:
    """One line of the text again and again, as broken templates do."""
    line = rng.choice(textwrap.wrap(text, 60) or [text])
    return "\n".join([f"{line} {rng.choice(_CALLS)}" for _ in range(rng.randint(3, 8))])


def page(rng: random.Random, clean_text: str) -> str:
    """A page of noise of 1 to 4 thousand characters; some of it is `clean_text` made unreadable."""
    wanted = rng.randint(1000, 4000)
    blocks = [menu(rng)]
    while sum(map(len, blocks)) < wanted:
        choice = rng.random()
        if choice < 0.15:
            excerpt = clean_text[: rng.randint(200, 800)]
            blocks.append(shuffled_lines(excerpt, rng) if rng.random() < 0.7 else repeated_lines(excerpt, rng))
        else:
            blocks.append(rng.choice(BLOCKS)(rng))
    return "\n\n".join([*blocks, footer(rng)])


def inject(text: str, rng: random.Random) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Puts noise between and into the paragraphs of a clean page.

    Returns:
        The noisy text, and the character ranges of it that are noise.
    """
    pieces: list[tuple[str, bool]] = []  # (text, whether it is noise)
    if rng.random() < 0.7:
        pieces.append((menu(rng) + "\n\n", True))
    for paragraph in text.split("\n\n"):
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph):
            pieces += _noisy_sentence(sentence, rng)
            if rng.random() < 0.06:
                pieces.append((rng.choice((link, hex_blob, banner))(rng).replace("\n", " ") + " ", True))
        pieces.append(("\n\n", False))
        if rng.random() < 0.22:
            pieces.append((rng.choice(BLOCKS)(rng) + "\n\n", True))
    if rng.random() < 0.7:
        pieces.append((footer(rng), True))
    spans = []
    position = 0
    for piece, is_noise in pieces:
        if is_noise:
            spans.append((position, position + len(piece)))
        position += len(piece)
    return "".join(piece for piece, _ in pieces), tuple(spans)


def _noisy_sentence(sentence: str, rng: random.Random) -> list[tuple[str, bool]]:
    """A sentence, perhaps with an entity or a broken character between two of its words."""
    if rng.random() > 0.25 or " " not in sentence:
        return [(sentence + " ", False)]
    words = sentence.split(" ")
    cut = rng.randint(1, len(words) - 1)
    junk = rng.choice(_ENTITIES) if rng.random() < 0.6 else mojibake(rng.choice(("’", "“", "” — ", "…", "é", "\u00a0")))
    return [(" ".join(words[:cut]) + " ", False), (junk + " ", True), (" ".join(words[cut:]) + " ", False)]
