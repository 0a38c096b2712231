"""Answers in completions: tables by hand, a slow reference, and texts that are meant to hurt."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarpt.rl.answers import after_thinking, choice_in_box, last_box, stated_choice, unescaped

HUGE = 10_000_000


@pytest.mark.parametrize(
    ("text", "after"),
    [
        (b"", None),
        (b"no close", None),
        (b"<think>a</think>", b""),
        (b"a</think> b ", b" b "),
        (b"a</think>b</think>\n c", b"\n c"),
        (b"a</think", None),
        (b"a</THINK>b", None),
        (b"\x00\xff</think>\xc3", b"\xc3"),
    ],
)
def test_after_thinking(text, after):
    assert after_thinking(text) == after


def test_after_thinking_with_another_close():
    assert after_thinking(b"a[/T]b</think>c", b"[/T]") == b"b</think>c"


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (rb"", None),
        (rb"nothing", None),
        (rb"\boxed", None),
        (rb"\boxed{", None),
        (rb"boxed{a}", None),
        (rb"\boxed {a}", None),
        (rb"\fbox{a}", None),
        (rb"{\boxed", None),
        (rb"}\boxed{", None),
        (rb"\boxed{}", b""),
        (rb"\boxed{ the}", b" the"),
        (b"\\boxed{\n\n}", b"\n\n"),
        (b"\\boxed{\t a \t}", b"\t a \t"),
        (rb"\boxed{a}\boxed{b}", b"b"),
        (rb"\boxed{a} \boxed{b", b"a"),
        (rb"\boxed{\frac{1}{2}} is it", rb"\frac{1}{2}"),
        (rb"x } \boxed{a} }", b"a"),
        (rb"{ { \boxed{a}", b"a"),
        (rb"{\boxed{a}}", b"a"),
        (rb"{\boxed{a} {\boxed{b}} {c}} {d}", b"b"),
        # The outer box, if it is complete; what a continuation of mathematics is.
        (rb"\boxed{a \boxed{b} c}", rb"a \boxed{b} c"),
        (rb"\boxed{{\boxed{b}}{\boxed{c}}}", rb"{\boxed{b}}{\boxed{c}}"),
        (rb"\boxed{\boxed{\boxed{x}}}", rb"\boxed{\boxed{x}}"),
        (rb"\boxed{\boxed{\boxed{x}}", rb"\boxed{x}"),
        (rb"\boxed{a} {\boxed{b \boxed{c}}} }", rb"b \boxed{c}"),
        (rb"\boxed{x \boxed{a}", b"a"),
        # A brace is a brace without `unescape`.
        (rb"\boxed{\{}", None),
        (rb"\boxed{\}}", b"\\"),
        (rb"\boxed{}}", b""),
        (rb"\boxed{\_}", rb"\_"),
        (rb"\\boxed{a}", b"a"),
        (b"\\boxed{\x00\xff\xe2\x82}", b"\x00\xff\xe2\x82"),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (rb"\boxed{\{}", b"{"),
        (rb"\boxed{\}}", b"}"),
        (rb"\boxed{\} else \{}", b"} else {"),
        (rb"\boxed{\_\%\$\#\&\ }", b"_%$#& "),
        (rb"\boxed{\\}", b"\\"),
        (rb"\boxed{\\{a}}", b"\\{a}"),
        (rb"\boxed{\\\{a}", b"\\{a"),
        (rb"\boxed{\\\}", None),
        (rb"\boxed{\\\}}", b"\\}"),
        (rb"\boxed{\alpha\n}", rb"\alpha\n"),
        (rb"\\boxed{a}", None),
        (rb"\\\boxed{a}", b"a"),
        (rb"\boxed{a\boxed{\{}}", rb"a\boxed{{}"),
        (rb"\} \{ \boxed{a} \}", b"a"),
        (rb"\boxed{a}\}", b"a"),
        (rb"\boxed{a\}", None),
        (rb"\boxed{}}", b""),
        (rb"\boxed{ the}", b" the"),
        (b"\\boxed{\\\n}", b"\\\n"),
    ],
)
def test_last_box_with_escapes(text, box):
    assert last_box(text, unescape=True) == box


def test_unescaped_reads_from_the_left():
    assert unescaped(rb"\\{ \\\{ \q \ ") == b"\\{ \\{ \\q  "
    assert unescaped(b"\\") == b"\\"


def slow_last_box(text: bytes, unescape: bool) -> bytes | None:
    """Every box with its end, by a stack of positions; then the last that lies in no other."""
    stack: list[tuple[bool, int]] = []
    boxes: list[tuple[int, int]] = []
    i = 0
    while i < len(text):
        if unescape and text[i : i + 1] == b"\\" and not text.startswith(b"\\boxed{", i):
            i += 2
            continue
        if text.startswith(b"\\boxed{", i):
            stack.append((True, i + 7))
            i += 7
            continue
        if text[i : i + 1] == b"{":
            stack.append((False, i + 1))
        elif text[i : i + 1] == b"}" and stack:
            is_box, begin = stack.pop()
            if is_box:
                boxes.append((begin, i))
        i += 1
    outer = [box for box in boxes if not any(begin < box[0] and box[1] < end for begin, end in boxes)]
    if not outer:
        return None
    begin, end = max(outer)
    return unescaped(text[begin:end]) if unescape else text[begin:end]


@given(
    st.lists(
        st.sampled_from([b"\\boxed{", b"{", b"}", b"}", b"\\", b"\\{", b"\\}", b"a", b" ", b"boxed{", b"\n"]), max_size=24
    ),
    st.booleans(),
)
def test_last_box_is_what_a_stack_finds(pieces, unescape):
    text = b"".join(pieces)
    assert last_box(text, unescape=unescape) == slow_last_box(text, unescape)


@given(st.binary(max_size=60))
def test_any_bytes_are_read(text):
    for unescape in (False, True):
        last_box(text, unescape=unescape)
        last_box(b"\\boxed{" + text + b"}", unescape=unescape)
    choice_in_box(text)
    stated_choice(b"answer is " + text)


@given(st.binary(max_size=40).filter(lambda content: b"{" not in content and b"}" not in content))
def test_a_box_gives_back_its_content(content):
    assert last_box(b"x</think> \\boxed{" + content + b"} y") == content
    escaped = b"".join(b"\\" + bytes([each]) if each in b"{}_%$#&\\ " else bytes([each]) for each in content)
    assert last_box(b"\\boxed{" + escaped + b"}", unescape=True) == content


@pytest.mark.parametrize("unescape", [False, True])
@pytest.mark.parametrize(
    ("text", "box"),
    [
        (b"{" * HUGE, None),
        (b"}" * HUGE, None),
        (b"\\boxed{" * (HUGE // 7), None),
        (b"\\boxed{" + b"}" * (HUGE // 10), b""),
        (b"\\boxed{}" * (HUGE // 8), b""),
        (b"\\boxed{a} " + b"\\" * HUGE, b"a"),
        (b"\\boxed{a} " + b"{" * HUGE, b"a"),
        (b"\\boxed{" + b"{}" * 100_000 + b"}", b"{}" * 100_000),
        (b"\\boxed{" + b"{" * 100_000 + b"}" * 100_000, None),
    ],
    ids=["open", "close", "boxes", "closed", "empty", "backslashes", "left open", "pairs", "deep"],
)
def test_last_box_of_huge_texts_takes_no_memory(text, box, unescape):
    tracemalloc.start()
    try:
        assert last_box(text, unescape=unescape) == box
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(box or b"") + 100_000


@pytest.mark.parametrize(
    ("content", "letter"),
    [
        (b"C", "C"),
        (b" c ", "C"),
        (b"(c)", "C"),
        (b"(C)", "C"),
        (b"[J].", "J"),
        (rb"\text{B}", "B"),
        (rb"\textbf{(D)}", "D"),
        (rb"\mathrm{A}", "A"),
        (b"C. 42", "C"),
        (b"(C) 3 apples", "C"),
        (b"C: C", "C"),
        (b"", None),
        (b"K", None),
        (b"42", None),
        (b"Cat", None),
        (b"a dog", None),
        (b"A, B", None),
        (b"AB", None),
        (b"A or C", None),
        (rb"\text{A} \text{B}", None),
        (b"\x00\xff", None),
        (b"\xc3", None),
        (b"C\x00", "C"),
        (b" " * HUGE, None),
        (b"(" * HUGE, None),
    ],
)
def test_choice_in_box(content, letter):
    assert choice_in_box(content) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (b"The answer is (C).", "C"),
        (b"the answer is C", "C"),
        (b"Answer: B", "B"),
        (b"**Answer:** (D)", "D"),
        (b"The correct answer is: **E**", "E"),
        (b"answer is option F", "F"),
        (b"The answer choice is J.", "J"),
        (rb"the answer is $\text{G}$", "G"),
        (b"The answer is A. No, the answer is B.", "B"),
        (b"The answer is (C), I think", "C"),
        (b"The answer is A or B", None),
        (b"The answer is (A) or (B)", None),
        (b"answers are A, B", None),
        (b"answer: A/B", None),
        (b"The answer is B. Then the answer is (A) and (C)", None),
        (b"The answer is Cat", None),
        (b"The answer is c", None),
        (b"The answer is 42", None),
        (b"C", None),
        (b"", None),
        (b"canswer is C", None),
        (b"answer is " * 100_000, None),
        (b"answer" + b" " * HUGE, None),
        (b"answer is " + b"(" * HUGE, None),
    ],
)
def test_stated_choice(text, letter):
    assert stated_choice(text) == letter
