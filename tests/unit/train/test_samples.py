"""Marking kept tokens: whatever is in the text, it stays text."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.plugin_util import markdown_to_safe_html

from megarpt.errors import ShapeError
from megarpt.train.samples import mark_kept, token_pieces


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def plain(fragment: str) -> str:
    return re.sub(r"<[^>]*>", "", fragment)


def test_markdown_makes_runs_of_kept_tokens_strong() -> None:
    assert mark_kept(["The", " c", "at", " sat"], [0, 1, 1, 0]) == "The<strong> cat</strong> sat"


def test_markdown_shows_markup_of_the_text_as_text() -> None:
    rendered = markdown_to_safe_html(mark_kept(["<b>", "*x*", " `y` ", "[a](b)", "# z", "\n- q"], [1, 0, 1, 0, 1, 0]))
    assert "<strong>&lt;b&gt;</strong>" in rendered
    for tag in ("<b>", "<em>", "<code>", "<a ", "<h1>", "<li>"):
        assert tag not in rendered
    assert html.unescape(plain(rendered)) == "<b>*x* `y` [a](b)# z- q"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(alphabet="ab *_`<>&#[]()\\!-~|1.", min_size=1, max_size=5), st.booleans()), min_size=1, max_size=12
    )
)
def test_tensorboard_renders_every_character_it_was_given(tokens: list[tuple[str, bool]]) -> None:
    shown = markdown_to_safe_html(mark_kept([t for t, _ in tokens], [float(k) for _, k in tokens]))
    squeeze = lambda text: "".join(text.split())  # noqa: E731
    assert squeeze(html.unescape(plain(shown))) == squeeze("".join(t for t, _ in tokens))


def test_newlines_stay_newlines() -> None:
    assert mark_kept(["a\nb", "\n\n"], [1, 1]) == "<strong>a</strong><br><strong>b</strong><br><br>"
    assert mark_kept(["a\nb"], [1], fmt="html").count("<br>") == 1
    assert mark_kept(["a\nb"], [0], fmt="ansi").count("\n") == 1


def test_ansi_colours_kept_tokens_and_keeps_control_characters_out() -> None:
    shown = mark_kept(["kept", "drop\x1b[2J\x07"], [1, 0], fmt="ansi")
    assert shown.startswith("\x1b[1;32mkept\x1b[0m\x1b[2mdrop")
    assert "\x1b[2J" not in shown and "\x07" not in shown


def test_ansi_gives_the_better_half_of_the_kept_tokens_a_ground() -> None:
    shown = mark_kept(["a", "b", "c"], [1, 1, 0], [0.5, 2.0, 9.0], fmt="ansi")
    assert "\x1b[1;32ma" in shown and "\x1b[1;30;42mb" in shown and "\x1b[2mc" in shown


def test_html_escapes_and_carries_scores() -> None:
    shown = mark_kept(["<x>", "y"], [1, 0], [1.25, -3.0], fmt="html")
    assert '<mark title="score 1.250">&lt;x&gt;</mark><span title="score -3.000">y</span>' in shown


@pytest.mark.parametrize(("weight", "score"), [([1.0], None), ([1.0, 0.0], [0.5])])
def test_lengths_must_agree(weight: list[float], score: list[float] | None) -> None:
    with pytest.raises(ShapeError, match="got 2 tokens"):
        mark_kept(["a", "b"], weight, score)


@pytest.mark.parametrize("text", ["plain", "Füße und 日本語 🙂!", "🙂", ""])
def test_pieces_of_multibyte_text_join_to_the_text(text: str) -> None:
    ids = list(text.encode())
    pieces = token_pieces(decode, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    assert token_pieces(decode, list("aü".encode())) == ["a", "", "ü"]


def test_bytes_that_are_no_text_do_not_hold_up_the_rest() -> None:
    pieces = token_pieces(decode, [0xFF] * 40 + list(b"end"))
    assert "".join(pieces).endswith("end")
    assert max(len(p) for p in pieces) <= 9


def test_pieces_keep_the_space_that_a_leading_token_loses() -> None:
    words = ["the", "cat", "sat"]
    assert token_pieces(lambda ids: " ".join(words[i] for i in ids), [0, 1, 2]) == ["the", " cat", " sat"]
