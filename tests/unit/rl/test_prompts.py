"""Prompt files and their order: what records become, what is refused, and what a resume goes on with."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest

from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import CheckpointError, ConfigError, DataError
from megarpt.rl.prompts import PromptStream, fingerprint, load_prompts, next_token_record
from megarpt.rl.structs import Completion, Prompt, RolloutGroup, StopReason
from megarpt.rl.verifiers import NextToken

BYTES = load_tokenizer("bytes")


@pytest.fixture
def load(tmp_path):
    """Writes records to a file and loads it."""

    def go(*records, template="plain", max_prompt_tokens=1000, tokenizer=BYTES):
        path = tmp_path / "prompts.jsonl"
        lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in records]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return load_prompts(path, tokenizer, template=template, max_prompt_tokens=max_prompt_tokens)

    return go


def record(**changes):
    fields = {
        "document": 3,
        "position": 10,
        "context": list(b"the quick "),
        "continuation": b"br\xc3\xb6wn fox",
        "boundaries": (3, 6, 10),
        "entropy": 1.25,
        "band": "medium",
        "tokenizer_sha256": BYTES.sha256,
    }
    return next_token_record(**fields) | changes


# ---------------------------------------------------------------------------------------------------------- next token


def test_a_next_token_record(load):
    (prompt,) = load(record(), template="{context}?")
    assert prompt.id == "3-10" and prompt.tokens == tuple(b"the quick ?")
    assert prompt.answer == {
        "continuation": b"br\xc3\xb6wn fox",
        "boundaries": (3, 6, 10),
        "document": 3,
        "position": 10,
        "entropy": 1.25,
        "band": "medium",
    }


def test_the_verifier_reads_it(load):
    (prompt,) = load(record())
    texts = [b"</think>\\boxed{br\xc3}", b"</think>\\boxed{br\xc3\xb6}"]
    completions = [
        Completion(tokens=(1,), logprobs=(0.0,), text=text, stop=StopReason.STOP, policy_version=0) for text in texts
    ]
    ((half, whole),) = NextToken()([RolloutGroup(prompt, completions)])
    assert (half.value, whole.value) == (1.0, 0.0)


@pytest.mark.parametrize(("limit", "text"), [(13, b"the quick <think>"), (12, b"quick <think>"), (8, b" <think>")])
def test_a_long_context_loses_tokens_on_its_left(load, limit, text):
    (prompt,) = load(record(), template="minimal", max_prompt_tokens=limit)
    assert prompt.tokens == tuple(text[-limit:]) and prompt.tokens[-7:] == tuple(b"<think>")


def test_a_context_may_begin_in_the_middle_of_a_character(load):
    (prompt,) = load(record(context=list("é".encode())), max_prompt_tokens=1)
    assert prompt.tokens == (0xA9,)


def test_no_room_for_a_context(load):
    with pytest.raises(ConfigError, match="max_prompt_tokens: got 7, expected more than 7"):
        load(record(), template="minimal", max_prompt_tokens=7)


def test_what_may_be_missing(load):
    short = {"context": [97], "continuation": "Yg==", "boundaries": [1]}
    (prompt,) = load(short)
    assert prompt.id == "line-1" and prompt.answer == {"continuation": b"b", "boundaries": (1,)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": [257]}, r"context: got \[257\], expected ids from 0 to 256"),
        ({"context": [-1]}, "context"),
        ({"context": "the"}, "context: got 'the'"),
        ({"context": [True]}, "context"),
        ({"continuation": "the quick"}, "continuation: got 'the quick', expected bytes in base64"),
        ({"continuation": 3}, "continuation"),
        ({"boundaries": []}, r"boundaries: got \[\]"),
        ({"boundaries": [0, 3]}, "boundaries"),
        ({"boundaries": [3, 3]}, "boundaries"),
        ({"boundaries": [3, 99]}, "got 99 as the last, expected at most the 10 bytes"),
        ({"boundaries": None}, "boundaries: got None"),
        ({"tokenizer": "0123456789ab"}, "made with tokenizer '0123456789ab', expected the policy's"),
        ({"id": ""}, "id: got ''"),
        ({"id": None}, "id: got None"),
        ({"id": True}, "id: got True"),
    ],
)
def test_records_that_are_refused(load, changes, message):
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: .*" + message):
        load(record(), record(id="other") | changes)


# ------------------------------------------------------------------------------------------------ questions and answers


@pytest.mark.parametrize(
    ("given", "question", "answer"),
    [
        ({"question": "q", "answer": "a 7*6=<<7*6=42>>42\n#### 42"}, "q", "42"),
        ({"question": "q", "answer": "#### 1,080"}, "q", "1,080"),
        ({"body": "Nine.", "question": "How many?", "answer": "9 (apples)"}, "Nine. How many?", "9"),
        ({"body": "Nine", "question": "When?", "answer": "5:45"}, "Nine. When?", "5:45"),
        ({"body": "So?", "question": "When?", "answer": "Rug B"}, "So? When?", "Rug B"),
        ({"Body": "Two", "Question": "Sum?", "Answer": 145.0}, "Two. Sum?", "145"),
        ({"question": "q", "answer": 2.5}, "q", "2.5"),
        ({"question": "q", "answer": -3}, "q", "-3"),
        ({"question": "q", "answer": "f(x) (x > 0)"}, "q", "f(x) (x > 0)"),
        ({"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}."}, "p", "\\frac{1}{2}"),
        ({"problem": "p", "solution": "long", "answer": "1"}, "p", "1"),
    ],
)
def test_questions_as_they_are_published(load, given, question, answer):
    (prompt,) = load(given)
    assert bytes(prompt.tokens).decode() == question
    assert prompt.answer == {"solution": answer, "text": answer}


@pytest.mark.parametrize("given", ["B", 1])
def test_choices(load, given):
    (prompt,) = load({"question": "Which?", "choices": ["red", 2], "answer": given}, template="{question}\n>")
    assert bytes(prompt.tokens) == b"Which?\nA. red\nB. 2\n>"
    assert prompt.answer == {"choice": "B"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"answer": "1"}, r"got the keys \['answer'\], expected `continuation` of a next-token record, or one of question"),
        ({"question": "q"}, "one of answer, Answer, solution"),
        ({"question": " ", "answer": "1"}, "question: got ' ', expected a text"),
        ({"question": ["q"], "answer": "1"}, "question: got"),
        ({"question": "\ud800", "answer": "1"}, "half of a surrogate pair at character 0"),
        ({"question": "q", "answer": "so ####  "}, "expected something after ####"),
        ({"question": "q", "answer": "\\boxed{}"}, "or in the box"),
        ({"question": "q", "answer": None}, "answer: got None"),
        ({"question": "q", "answer": True}, "answer: got True"),
        ({"question": "q", "choices": ["a"], "answer": "A"}, "choices: got .* expected a list of 2 to 10"),
        ({"question": "q", "choices": "ab", "answer": "A"}, "choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "answer: got 'C', expected a letter from A to B"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer: got 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": "AB"}, "answer: got 'AB'"),
        (b"{", "this is no JSON"),
        (b"\xff{}", "this is no JSON"),
        (b"[1]", r"got \[1\], expected an object"),
    ],
)
def test_questions_that_are_refused(load, given, message):
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: .*" + message):
        load({"question": "q", "answer": "1"}, given)


def test_questions_that_are_too_long_are_left_out_and_counted(load, caplog):
    caplog.set_level(logging.INFO)
    long, short = {"question": "q" * 11, "answer": "1"}, {"question": "q" * 10, "answer": "1"}
    assert [each.id for each in load(long, short, long, max_prompt_tokens=10)] == ["line-2"]
    assert "left out 2 of 3 questions, which need more than 10 tokens" in caplog.text
    with pytest.raises(DataError, match="all 2 questions need more than 10 tokens"):
        load(long, long, max_prompt_tokens=10)


def test_ids(load):
    one = {"question": "q", "answer": "1"}
    assert [each.id for each in load(one | {"id": 7}, one | {"ID": "chal-1"}, b"", one)] == ["7", "chal-1", "line-4"]
    with pytest.raises(DataError, match=r"prompts\.jsonl:3: the id '7' is that of line 1 too"):
        load(one | {"id": 7}, one, one | {"id": "7"})


def test_a_template_of_the_other_kind(load):
    with pytest.raises(ConfigError, match=r"got one with {question}, expected one with {context}, which is what .*:1 is"):
        load(record(), template="question")
    with pytest.raises(ConfigError, match=r"got one with {context}, expected one with {question}"):
        load({"question": "q", "answer": "1"}, template="v0")


def test_files_without_prompts(load, tmp_path):
    with pytest.raises(DataError, match="it has no record"):
        load(b"", b"  ")
    with pytest.raises(DataError, match=r"cannot read prompts .*none\.jsonl: No such file"):
        load_prompts(tmp_path / "none.jsonl", BYTES, template="plain", max_prompt_tokens=9)


# --------------------------------------------------------------------------------------------------------------- order


def prompts(count):
    return [Prompt(id=str(number), tokens=(number,), answer={"text": b"x"}) for number in range(count)]


def ids(stream, n):
    return [each.id for each in stream.next(n)]


def test_every_epoch_has_every_prompt_once_in_another_order():
    stream = PromptStream(prompts(20), seed=1)
    epochs = [ids(stream, 20) for _ in range(3)]
    assert all(sorted(epoch, key=int) == [str(number) for number in range(20)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != ids(PromptStream(prompts(20), seed=2), 20)


def test_the_order_does_not_depend_on_how_many_are_asked_for():
    """As long as no call reaches into the next epoch."""
    whole = [name for _ in range(4) for name in ids(PromptStream(prompts(7), seed=1), 7)]
    stream = PromptStream(prompts(7), seed=1)
    assert [name for n in (1, 6, 0) for name in ids(stream, n)] == whole[:7]


def test_no_call_holds_a_prompt_twice():
    stream = PromptStream(prompts(7), seed=1)
    calls = [ids(stream, 5) for _ in range(7 * 20)]
    assert all(len(set(call)) == 5 for call in calls)
    flat = [name for call in calls for name in call]
    for epoch in range(100):
        assert len(set(flat[7 * epoch : 7 * epoch + 7])) == 7


def test_more_than_there_are():
    stream = PromptStream(prompts(7), seed=1)
    assert Counter(ids(stream, 28)) == Counter({str(number): 4 for number in range(7)})
    assert ids(stream, 0) == []


@pytest.mark.parametrize("calls", [[], [3], [7], [5, 5], [4, 4, 4], [20]])
def test_resume(calls):
    first = PromptStream(prompts(7), seed=1)
    for n in calls:
        first.next(n)
    state = json.loads(json.dumps(first.state_dict()))
    second = PromptStream(prompts(7), seed=1)
    second.load_state_dict(state)
    assert [ids(second, 5) for _ in range(9)] == [ids(first, 5) for _ in range(9)]
    assert second.state_dict() == first.state_dict()


def test_a_resume_with_something_else_is_refused():
    state = PromptStream(prompts(7), seed=1).state_dict()
    others = prompts(7)
    others[3] = Prompt(id="3", tokens=(3,), answer={"text": b"y"})
    for stream, name in ((PromptStream(others, seed=1), "fingerprint"), (PromptStream(prompts(7), seed=2), "seed")):
        with pytest.raises(CheckpointError, match=f"the checkpoint has {name}"):
            stream.load_state_dict(state)
    for changes in ({"epoch": -1}, {"position": 8}, {"position": None}, {"epoch": 1.0}, {"put_off": [7]}, {"put_off": [1, 1]}):
        with pytest.raises(CheckpointError, match="it is damaged"):
            PromptStream(prompts(7), seed=1).load_state_dict(state | changes)


def test_the_fingerprint_is_of_all_that_a_prompt_holds():
    base = Prompt(id="a", tokens=(1, 2), answer={"text": "x", "choice": "A"})
    same = Prompt(id="a", tokens=(1, 2), answer={"choice": "A", "text": "x"})
    others = [
        Prompt(id="b", tokens=(1, 2), answer=base.answer),
        Prompt(id="a", tokens=(1,), answer=base.answer),
        Prompt(id="a", tokens=(1, 2), answer={"text": "x"}),
    ]
    assert fingerprint([base]) == fingerprint([same])
    assert len({fingerprint(each) for each in ([base], *([other] for other in others), [base, base])}) == 5


def test_a_stream_of_nothing():
    with pytest.raises(DataError, match="got none"):
        PromptStream([], seed=1)
