"""What completions are worth: tables by hand, hostile text, and judges that do not come back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarpt.errors import ConfigError, DataError
from megarpt.rl.judging import Died, Failed, TimedOut, TooLarge
from megarpt.rl.structs import Completion, Prompt, Reward, RolloutGroup, StopReason
from megarpt.rl.verifiers import Exact, Format, Math, MultipleChoice, NextToken, WeightedSum

ROOT = Path(__file__).parents[3]
HUGE = 10_000_000


def completion(text, stop=StopReason.STOP):
    return Completion(tokens=(1,), logprobs=(0.0,), text=text, stop=stop, policy_version=0)


def group(answer, *texts):
    return RolloutGroup(Prompt(id="p", tokens=(1,), answer=answer), [completion(text) for text in texts])


def reward(verifier, answer, text, stop=StopReason.STOP):
    ((result,),) = verifier([RolloutGroup(Prompt(id="p", tokens=(1,), answer=answer), [completion(text, stop)])])
    return result


def boxed(content):
    return b"<think>why not \\boxed{no}</think>So \\boxed{" + content + b"}."


def following(*tokens, rest=b" brown fox"):
    ends = [sum(map(len, tokens[: n + 1])) for n in range(len(tokens))]
    return {"continuation": b"".join(tokens) + rest, "boundaries": tuple(ends)}


QUICK = following(b" the", b" quick", b"est")

# ---------------------------------------------------------------------------------------------------------- next token


@pytest.mark.parametrize(
    ("said", "value", "matched"),
    [
        (b" the", 1.0, 1),
        (b" the quick", 1.0, 2),
        (b" the quickest", 1.0, 3),
        (b"the", 0.0, 0),
        (b" th", 0.0, 0),
        (b" the qu", 0.0, 0),
        (b" the quicker", 0.0, 0),
        (b"", 0.0, 0),
        (b" the quickest brown", 0.0, 0),  # right, and no boundary is known there
        (b" the quickest brown fox jumps", 0.0, 0),  # past what was kept
        (b" THE", 0.0, 0),
        (b" the ", 0.0, 0),
        (b"\xa0the", 0.0, 0),
        (b" the\x00", 0.0, 0),
    ],
)
def test_next_token_as_the_method_has_it(said, value, matched):
    result = reward(NextToken(), QUICK, boxed(said))
    assert result.value == value and result.parts["matched_tokens"] == matched
    assert result.parts["format"] == float(said != b"")


@pytest.mark.parametrize(
    ("tokens", "said", "value"),
    [
        ((b"\xe2", b"\x82\xac"), b"\xe2", 1.0),  # the first byte of a euro sign is a token
        ((b"\xe2", b"\x82\xac"), b"\xe2\x82", 0.0),
        ((b"\xe2", b"\x82\xac"), b"\xe2\x82\xac", 1.0),
        ((b"\xe2", b"\x82\xac"), b"\xef\xbf\xbd", 0.0),  # U+FFFD, what decoding would have made of it
        ((b"\x00", b"\x00\x00"), b"\x00\x00\x00", 1.0),
        ((b"\n", b"\n"), b"\n", 1.0),
        ((b"\n", b"\n"), b"\n\n", 1.0),
        ((b"\r\n",), b"\n", 0.0),
        ((b" ",), b" ", 1.0),
        ((b"{}",), b"{}", 1.0),
        ((b"\\",), b"\\", 1.0),
        ((b" \\boxed{", b"3", b"}"), b" \\boxed{3}", 1.0),
        ((b"</", b"think>"), b"</", 1.0),
    ],
)
def test_next_token_compares_bytes(tokens, said, value):
    assert reward(NextToken(), following(*tokens), boxed(said)).value == value


@pytest.mark.parametrize(
    ("text", "stop", "value", "has_format"),
    [
        (b"<think></think>\\boxed{ the}", StopReason.STOP, 1.0, 1.0),
        (b"<think></think>\\boxed{ the}", StopReason.LENGTH, 0.0, 0.0),
        (b"<think>\\boxed{ the}", StopReason.STOP, 0.0, 0.0),
        (b"\\boxed{ the}", StopReason.STOP, 0.0, 0.0),
        (b"<think>\\boxed{ the}</think> it is the", StopReason.STOP, 0.0, 0.0),
        (b"</think>\\boxed{ the} or \\boxed{ a}", StopReason.STOP, 0.0, 1.0),
        (b"</think>\\boxed{ a} or \\boxed{ the}", StopReason.STOP, 1.0, 1.0),
        (b"</think>\\boxed{ the} or \\boxed{ a", StopReason.STOP, 1.0, 1.0),
        (b"</think>\\boxed{ the} no wait</think>", StopReason.STOP, 0.0, 0.0),
        (b"</think>a</think>\\boxed{ the}", StopReason.STOP, 1.0, 1.0),
        (b"</think>\\boxed{ the", StopReason.STOP, 0.0, 0.0),
        (b"</think>\\boxed{}", StopReason.STOP, 0.0, 0.0),
        (b"</think>", StopReason.STOP, 0.0, 0.0),
        (b"", StopReason.STOP, 0.0, 0.0),
    ],
)
def test_next_token_wants_thought_and_a_box(text, stop, value, has_format):
    result = reward(NextToken(), QUICK, text, stop)
    assert (result.value, result.parts["format"]) == (value, has_format)


def test_next_token_of_a_policy_that_does_not_think():
    verifier = NextToken(require_thinking=False)
    assert reward(verifier, QUICK, b"\\boxed{ the}").value == 1.0
    assert reward(verifier, QUICK, b"\\boxed{ the}</think>").value == 0.0
    assert reward(NextToken(think_close=b"[/T]"), QUICK, b"[/T]\\boxed{ the}").value == 1.0


def test_first_token_only():
    values = [reward(NextToken(first_token_only=True), QUICK, boxed(said)).value for said in (b" the", b" the quick", b" th")]
    assert values == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("tokens", "said", "unescape", "value", "near"),
    [
        ((b" the",), b"the", False, 0.0, "near_space"),
        ((b" the",), b"  the\n", False, 0.0, "near_space"),
        ((b" the", b" quick"), b"the quick ", False, 0.0, "near_space"),
        ((b" the",), b" a", False, 0.0, None),
        ((b"\n",), b" ", False, 0.0, None),
        ((b"_x",), rb"\_x", False, 0.0, "near_escape"),
        ((b" _x",), rb"\_x", False, 0.0, "near_escape"),
        ((b"_x",), rb"\_x", True, 1.0, None),
        ((rb"\_x",), rb"\_x", True, 0.0, "near_escape"),
        ((rb"\_x",), rb"\_x", False, 1.0, None),
        ((b"{",), rb"\{", False, 0.0, "near_escape"),  # no box without escapes
        ((b"{",), rb"\{", True, 1.0, None),
        ((b"}",), rb"\}", True, 1.0, None),
        ((b"}",), rb"}", True, 0.0, None),
        ((b"50%",), rb"50\%", True, 1.0, None),
        ((b" a",), rb"\ a", True, 1.0, None),
        ((b" the",), rb" the", True, 1.0, None),
    ],
)
def test_next_token_near_misses(tokens, said, unescape, value, near):
    result = reward(NextToken(unescape=unescape), following(*tokens), boxed(said))
    assert result.value == value
    assert [part for part in ("near_space", "near_escape") if result.parts[part]] == ([near] if near else [])


def test_next_token_says_when_the_continuation_is_too_short():
    answer = following(b" the", rest=b"")
    assert reward(NextToken(), answer, boxed(b" the quick")).parts["past_end"] == 1.0
    assert reward(NextToken(), answer, boxed(b" the")).parts["past_end"] == 0.0
    assert reward(NextToken(), answer, boxed(b" a quick")).parts["past_end"] == 0.0


@given(st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=5), st.binary(max_size=6), st.data())
def test_next_token_is_the_equation(tokens, rest, data):
    answer = following(*tokens, rest=rest)
    continuation = answer["continuation"]
    said = data.draw(st.one_of(st.binary(max_size=8), st.integers(0, len(continuation)).map(lambda end: continuation[:end])))
    if b"{" in said or b"}" in said or b"</think>" in said:
        return
    expected = said == continuation[: len(said)] and len(said) in answer["boundaries"]
    result = reward(NextToken(), answer, boxed(said))
    assert result.value == float(expected)
    assert b"".join(tokens[: int(result.parts["matched_tokens"])]) == (said if expected else b"")


@pytest.mark.parametrize(
    "text",
    [
        b"{" * HUGE,
        b"</think>" + b"\\boxed{" * (HUGE // 7),
        b"</think>" * (HUGE // 8),
        b"</think>\\boxed{" + b"a" * HUGE + b"}",
        b"</think>\\boxed{" + b" " * HUGE + b"}",
        b"</think>\\boxed{a}" + b"\\" * HUGE,
        b"\x00" * HUGE + b"</think>\xe2\x82",
    ],
    ids=["braces", "boxes", "thoughts", "long", "blank", "backslashes", "zeros"],
)
def test_hostile_text_is_wrong_and_no_more(text):
    for verifier, answer in (
        (NextToken(), QUICK),
        (NextToken(unescape=True), QUICK),
        (MultipleChoice(), {"choice": "B"}),
        (Exact(), {"text": "no"}),
        (Format("<think>.*</think>.*", max_bytes=2 * HUGE), {}),
    ):
        assert reward(verifier, answer, text).value == 0.0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, r"needs answer\['continuation'\] as bytes, got the keys \[\]"),
        ({"continuation": " the", "boundaries": (4,)}, "got str ' the'"),
        ({"continuation": b" the"}, r"needs answer\['boundaries'\] as tuple or list, got the keys \['continuation'\]"),
        ({"continuation": b" the", "boundaries": ()}, "expected rising lengths"),
        ({"continuation": b" the", "boundaries": (0, 4)}, "expected rising lengths"),
        ({"continuation": b" the", "boundaries": (4, 4)}, "expected rising lengths"),
        ({"continuation": b" the", "boundaries": (3, 2)}, "expected rising lengths"),
        ({"continuation": b" the", "boundaries": (5,)}, "at most the 4 bytes"),
        ({"continuation": b" the", "boundaries": (4.0,)}, "expected rising lengths"),
    ],
)
def test_next_token_refuses_answers_it_cannot_use(answer, message):
    with pytest.raises(DataError, match=message):
        reward(NextToken(), answer, boxed(b" the"))


# ------------------------------------------------------------------------------------------- multiple choice and exact


@pytest.mark.parametrize(
    ("text", "value", "has_format"),
    [
        (b"</think>\\boxed{C}", 1.0, 1.0),
        (b"</think>\\boxed{\\text{(C)}}", 1.0, 1.0),
        (b"</think>\\boxed{c}", 1.0, 1.0),
        (b"</think>\\boxed{B}", 0.0, 1.0),
        (b"</think>\\boxed{B}\\boxed{C}", 1.0, 1.0),
        (b"</think>\\boxed{B, C}", 0.0, 0.0),
        (b"</think>the answer is (C) \\boxed{B, C}", 0.0, 0.0),  # the box decides
        (b"</think>\\boxed{}", 0.0, 0.0),
        (b"</think>The answer is (C).", 1.0, 1.0),
        (b"</think>The answer is (C) or (B).", 0.0, 0.0),
        (b"the answer is (C)</think>", 0.0, 0.0),
        (b"The answer is (C).", 0.0, 0.0),
        (b"</think>C", 0.0, 0.0),
    ],
)
def test_multiple_choice(text, value, has_format):
    assert reward(MultipleChoice(), {"choice": "C"}, text) == Reward(value, {"format": has_format})


def test_multiple_choice_options():
    assert reward(MultipleChoice(require_box=True), {"choice": "C"}, b"</think>The answer is (C)").value == 0.0
    assert reward(MultipleChoice(require_thinking=False), {"choice": "C"}, b"The answer is (C)").value == 1.0
    assert reward(MultipleChoice(), {"choice": "C"}, boxed(b"C"), StopReason.LENGTH).value == 0.0


@pytest.mark.parametrize("answer", [{}, {"choice": 2}, {"choice": "K"}, {"choice": ""}, {"choice": "AB"}, {"choice": "a"}])
def test_multiple_choice_refuses_answers_it_cannot_use(answer):
    with pytest.raises(DataError, match=r"answer\['choice'\]"):
        reward(MultipleChoice(), answer, boxed(b"A"))


@pytest.mark.parametrize(
    ("options", "answer", "said", "value"),
    [
        ({}, "a b", b" a \n b ", 1.0),
        ({}, " a  b", b"a b", 1.0),
        ({}, "a b", b"ab", 0.0),
        ({}, "é", "é".encode(), 1.0),
        ({}, b"\xff\x00", b"\xff\x00", 1.0),
        ({}, "a", b"", 0.0),
        ({}, "a", b"A", 0.0),
        ({"any_blanks": False}, " a", b" a", 1.0),
        ({"any_blanks": False}, " a", b"a", 0.0),
        ({"unescape": True}, "{_", rb"\{\_", 1.0),
        ({}, "\\_", rb"\_", 1.0),
    ],
)
def test_exact(options, answer, said, value):
    assert reward(Exact(**options), {"text": answer}, boxed(said)) == Reward(value, {"format": float(said != b"")})


def test_exact_wants_thought_a_box_and_an_end():
    for text, stop in [(b"\\boxed{a}", StopReason.STOP), (b"</think>a", StopReason.STOP), (boxed(b"a"), StopReason.LENGTH)]:
        assert reward(Exact(), {"text": "a"}, text, stop) == Reward(0.0, {"format": 0.0})


@pytest.mark.parametrize("answer", [{}, {"text": 1}, {"text": ""}, {"text": " "}])
def test_exact_refuses_answers_it_cannot_use(answer):
    with pytest.raises(DataError, match=r"answer\['text'\]"):
        reward(Exact(), answer, boxed(b"a"))


# -------------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("pattern", "text", "value"),
    [
        ("(?s)<think>.*</think>.+", b"<think>a\nb</think>c", 1.0),
        ("(?s)<think>.*</think>.+", b" <think>a</think>c", 0.0),
        ("<think>.*</think>.+", b"<think>a\nb</think>c", 0.0),
        ("a", b"ab", 0.0),
        ("é.", "éx".encode(), 1.0),
        ("a.", b"a\xe2", 1.0),
        ("a.", b"a\x00", 1.0),
        ("", b"", 1.0),
    ],
)
def test_format(pattern, text, value):
    assert reward(Format(pattern), {}, text) == Reward(value, {"timed_out": 0.0, "too_large": 0.0})


def test_a_text_too_large_to_match_has_no_value():
    verifier = Format("a*", max_bytes=10)
    assert reward(verifier, {}, b"a" * 10).value == 1.0
    assert reward(verifier, {}, b"a" * 11) == Reward(None, {"timed_out": 0.0, "too_large": 1.0})


def test_backtracking_without_end_has_no_value(caplog):
    verifier = Format("(a|aa)+b", limit_s=0.2)
    hostile = completion(b"a" * 5000 + b"c")
    began = time.monotonic()
    (rewards,) = verifier([RolloutGroup(Prompt(id="p", tokens=()), [hostile, hostile, completion(b"aab")])])
    assert time.monotonic() - began < 20 * verifier.limit_s
    late = Reward(None, {"timed_out": 1.0, "too_large": 0.0})
    assert rewards == [late, late, Reward(1.0, {"timed_out": 0.0, "too_large": 0.0})]
    assert len(caplog.records) == 1 and "said once" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("(", {}, "no regular expression"),
        ("a", {"limit_s": 0.0}, "limit_s is 0"),
        ("a", {"limit_s": float("nan")}, "limit_s is nan"),
        ("a", {"name": ""}, "name is empty"),
        ("a", {"max_bytes": 0}, "max_bytes is 0"),
    ],
)
def test_format_refuses_what_is_no_pattern(pattern, options, message):
    with pytest.raises(ConfigError, match=message):
        Format(pattern, **options)


# --------------------------------------------------------------------------------------------------------- mathematics


@pytest.fixture(scope="module")
def mathematics():
    with Math(limit_s=20.0) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("solution", "said", "value"),
    [
        (r"\frac{1}{2}", rb"0.5", 1.0),
        ("1/2", rb"\frac12", 1.0),
        (r"$\frac{1}{2}$", rb"\dfrac{2}{4}", 1.0),
        (r"so it is \boxed{\frac{1}{2}}.", rb"\frac{1}{2}", 1.0),
        ("2", b"3", 0.0),
        ("x^2+2x+1", b"(x+1)^2", 1.0),
        (r"\{1,2\}", rb"\{2,1\}", 1.0),
        ("3", b"x=3", 1.0),
        ("10000", b"10{,}000", 1.0),
        ("2", b"\\text{two}", 0.0),
        ("2", b"\x00", 0.0),
        ("2", b"\xe2\x82", 0.0),
        ("2", b"   ", 0.0),
        ("2", b"", 0.0),
        ("2", b"2" * 20_000, 0.0),
    ],
)
def test_math(mathematics, solution, said, value):
    assert reward(mathematics, {"solution": solution}, boxed(said)).value == value


@pytest.mark.parametrize(
    ("text", "stop", "value", "has_format"),
    [
        (b"</think>\\boxed{2}", StopReason.STOP, 1.0, 1.0),
        (b"</think>\\boxed{2}", StopReason.LENGTH, 0.0, 0.0),
        (b"\\boxed{2}", StopReason.STOP, 0.0, 0.0),
        (b"2</think>", StopReason.STOP, 0.0, 0.0),
        (b"</think>The answer is $2$.", StopReason.STOP, 1.0, 0.0),
        (b"</think>" + b"{" * HUGE + b" The answer is $2$.", StopReason.STOP, 1.0, 0.0),
        (b"</think>\\boxed{" + b"{" * (HUGE // 10) + b"}" * (HUGE // 10), StopReason.STOP, 0.0, 0.0),
        (b"</think>\\boxed{" + b"1" * HUGE + b"}", StopReason.STOP, 0.0, 1.0),
    ],
    ids=["right", "cut off", "no thought", "no answer", "no box", "long", "deep", "long box"],
)
def test_math_reads_the_last_word(text, stop, value, has_format):
    """Without a process: what is asked of the judges is what counts."""
    asked = []

    def judge(items):
        asked.extend(items)
        return ["right" if said == "\\boxed{2}" or said.endswith("is $2$.") else "wrong" for _, said in items]

    verifier = Math()
    verifier.judges.judge = judge
    result = reward(verifier, {"solution": "2"}, text, stop)
    assert (result.value, result.parts["format"]) == (value, has_format)
    assert all(len(said) <= verifier.max_answer_bytes + 8 for _, said in asked)


def test_math_that_requires_a_box():
    verifier = Math(require_box=True)
    assert reward(verifier, {"solution": "2"}, b"</think>The answer is $2$.").value == 0.0
    assert verifier.judges.counts == {}  # nothing was asked


def test_math_judges_the_same_answer_once_and_keeps_the_order(mathematics):
    before = mathematics.judges.counts["judged"]
    one = group({"solution": "1"}, boxed(b"1"), boxed(b"2"), boxed(b"1"), b"nothing", boxed(b"2"))
    two = group({"solution": "2"}, boxed(b"1"), boxed(b"2"))
    rewards = mathematics([one, group({"solution": "3"}), two])
    assert [[each.value for each in row] for row in rewards] == [[1.0, 0.0, 1.0, 0.0, 0.0], [], [0.0, 1.0]]
    assert mathematics.judges.counts["judged"] - before == 4


def test_math_without_a_value_is_not_wrong():
    kinds = [TimedOut("x"), Died("x"), Failed("x"), TooLarge("x"), "no solution", "no answer", "wrong", "right"]
    verifier = Math()
    verifier.judges.judge = lambda items: kinds
    (rewards,) = verifier([group({"solution": "1"}, *(boxed(b"%d" % number) for number in range(len(kinds))))])
    assert [each.value for each in rewards] == [None] * 5 + [0.0, 0.0, 1.0]
    marks = [[part for part, value in each.parts.items() if value and part != "format"] for each in rewards]
    assert marks == [["timed_out"], ["crashed"], ["failed"], ["crashed"], ["no_solution"], ["no_answer"], [], []]
    assert len({tuple(each.parts) for each in rewards}) == 1  # so that means can be taken


def test_math_ends_what_takes_too_long():
    """Towers of powers, and braces on which the parser takes minutes."""
    before = psutil.Process().children()
    with Math(limit_s=2.0, memory_bytes=1 << 29) as verifier:
        deep = b"{" * 4000 + b"1" + b"}" * 4000
        texts = [boxed(deep), boxed(b"2"), boxed(b"9^{9^{9^{9^{9}}}}"), boxed(b"(10^{10^{10}})!")]
        (rewards,) = verifier([group({"solution": "2"}, *texts)])
        assert rewards[0].value is None and rewards[0].parts["timed_out"] == 1.0
        assert rewards[1].value == 1.0
        assert all(each.value in (None, 0.0) for each in rewards[2:])
        assert verifier.judges.counts["TimedOut"] >= 1
    assert set(psutil.Process().children()) <= set(before)


def test_math_works_off_the_main_thread(mathematics):
    """Where the signals of math-verify do not work."""
    found = []
    thread = threading.Thread(target=lambda: found.append(reward(mathematics, {"solution": "2"}, boxed(b"4/2"))))
    thread.start()
    thread.join(60)
    assert found[0].value == 1.0


def test_a_solution_that_cannot_be_read_makes_nothing_wrong(mathematics, caplog):
    for _ in range(2):
        result = reward(mathematics, {"solution": "$ $"}, boxed(b"1"))
        assert result.value is None and result.parts["no_solution"] == 1.0
    assert len(caplog.records) == 1 and "prompt p" in caplog.text


@pytest.mark.parametrize("answer", [{}, {"solution": 2}, {"solution": ""}, {"solution": " \n"}, {"solution": "1" * 100_000}])
def test_math_refuses_answers_it_cannot_use(answer):
    with pytest.raises(DataError, match=r"answer\['solution'\]"):
        reward(Math(), answer, boxed(b"1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_answer_bytes": 0}, "max_answer_bytes is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"limit_s": -1.0}, "limit_s is -1"),
        ({"think_close": b""}, "think_close is empty"),
        ({"name": ""}, "name is empty"),
    ],
)
def test_math_refuses_bad_values(options, message):
    with pytest.raises(ConfigError, match=message):
        Math(**options)


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for make in (Math, lambda: Format("a")):
        with pytest.raises(ConfigError, match=r"pip install 'megarpt\[rl\]'"):
            make()


# ----------------------------------------------------------------------------------------------------------------- sum


def constant(name, *values, close=None):
    class Constant:
        def __call__(self, groups):
            return [[Reward(value, {"part": 2.0}) for value in values] for _ in groups]

    verifier = Constant()
    verifier.name = name
    if close:
        verifier.close = close
    return verifier


def test_sum_adds_and_keeps_the_parts():
    total = WeightedSum([(constant("a", 1.0, 0.5), 2.0), (constant("b", 0.0, 1.0), -1.0)])
    assert total([group({}, b"", b"")]) == [
        [
            Reward(2.0, {"a": 1.0, "a/part": 2.0, "b": 0.0, "b/part": 2.0}),
            Reward(0.0, {"a": 0.5, "a/part": 2.0, "b": 1.0, "b/part": 2.0}),
        ]
    ]


def test_sum_has_no_value_where_a_verifier_that_counts_has_none():
    total = WeightedSum([(constant("a", None, 1.0, None), 1.0), (constant("b", 1.0, None, None), 0.0)])
    ((first, second, third),) = total([group({}, b"", b"", b"")])
    assert (first.value, second.value, third.value) == (None, 1.0, None)
    assert first.parts == {"a/part": 2.0, "b": 1.0, "b/part": 2.0}
    assert second.parts == {"a": 1.0, "a/part": 2.0, "b/part": 2.0}


def test_sum_of_what_there_is():
    total = WeightedSum([(NextToken(), 1.0), (Format("(?s).*</think>.*"), 0.1)])
    answer = QUICK
    values = [reward(total, answer, text).value for text in (boxed(b" the"), boxed(b"x"), b"\\boxed{ the}")]
    assert values == [pytest.approx(1.1), pytest.approx(0.1), 0.0]


def test_sum_closes_its_verifiers_also_after_an_error():
    closed = []

    def fail():
        closed.append("bad")
        raise OSError

    parts = [
        (constant("a", 1.0, close=lambda: closed.append("a")), 1.0),
        (constant("bad", 1.0, close=fail), 1.0),
        (constant("c", 1.0), 1.0),
    ]
    with pytest.raises(OSError), WeightedSum(parts):
        pass
    assert sorted(closed) == ["a", "bad"]


@pytest.mark.parametrize(
    ("weighted", "message"),
    [
        ([], "one or more different"),
        ([(constant("a"), 1.0), (constant("a"), 1.0)], "one or more different"),
        ([(constant(""), 1.0)], "one or more different"),
        ([(constant("a"), float("nan"))], "expected finite"),
        ([(constant("a"), float("inf"))], "expected finite"),
        ([(constant("a"), 0.0)], "not all of them zero"),
    ],
)
def test_sum_refuses_bad_weights(weighted, message):
    with pytest.raises(ConfigError, match=message):
        WeightedSum(weighted)


def test_sum_sees_a_verifier_that_leaves_one_out():
    with pytest.raises(ConfigError, match="a gave rewards for 1 completions in 1 groups, expected one for each of 2"):
        WeightedSum([(constant("a", 1.0), 1.0)])([group({}, b"", b"")])


# ------------------------------------------------------------------------------------------------------------- all of it


@given(st.binary(max_size=200))
def test_any_text_gets_a_value(text):
    for verifier, answer in (
        (NextToken(), QUICK),
        (NextToken(unescape=True, require_thinking=False), QUICK),
        (MultipleChoice(require_thinking=False), {"choice": "A"}),
        (Exact(require_thinking=False), {"text": "a"}),
        (Format("(?s)a.*"), {}),
    ):
        for candidate in (text, b"</think>\\boxed{" + text + b"}"):
            assert reward(verifier, answer, candidate).value in (0.0, 1.0)


def test_no_groups_and_empty_groups():
    for verifier, answer in (
        (NextToken(), QUICK),
        (MultipleChoice(), {"choice": "A"}),
        (Exact(), {"text": "a"}),
        (Format("a"), {}),
    ):
        assert verifier([]) == []
        assert verifier([group(answer), group(answer)]) == [[], []]


def test_verifiers_load_neither_torch_nor_sympy():
    code = """
        import sys
        import megarpt.rl.verifiers
        megarpt.rl.verifiers.Math()
        sys.exit(str({"torch", "sympy", "math_verify"} & set(sys.modules) or "") or None)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment, timeout=60)


def test_rewards_do_not_depend_on_the_batch(mathematics):
    groups = [group({"solution": str(n)}, boxed(b"1"), boxed(b"x"), b"") for n in range(3)]
    assert mathematics(groups) == [mathematics([each])[0] for each in groups]
