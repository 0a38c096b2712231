"""Evaluation of prompts: numbers by hand, and the same numbers however the prompts are divided."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import ConfigError, DataError, RolloutError, ShapeError
from megarpt.parallel.layout import ParallelLayout
from megarpt.rl.evaluation import PLAIN, EvaluatedPrompts, PlainNextToken, evaluate_prompts, stop_tokens
from megarpt.rl.rollout import Sampling
from megarpt.rl.structs import Completion, Prompt, Reward, RolloutGroup, StopReason
from megarpt.rl.verifiers import Exact, Format, NextToken, WeightedSum
from megarpt.testing.distributed import spawn

SAMPLING = Sampling(max_new_tokens=8)
RIGHT, WRONG, NO_BOX, CUT = b"hm</think>\\boxed{7}", b"hm</think>\\boxed{8}", b"hm</think>7", b"hm"


@dataclass
class Scripted:
    """An engine that knows what is said to each prompt."""

    said: dict[str, list[bytes]]
    policy_version: int = 0
    calls: list[tuple[str, ...]] = field(default_factory=list)

    def publish(self, version: int) -> None:
        self.policy_version = version

    def generate(self, prompts, *, group_size, sampling):
        self.calls.append(tuple(prompt.id for prompt in prompts))
        if any(prompt.id not in self.said for prompt in prompts):
            raise RolloutError("no room")
        return [RolloutGroup(each, [completion(text) for text in self.said[each.id][:group_size]]) for each in prompts]


def completion(text: bytes) -> Completion:
    return Completion(
        tokens=tuple(text),
        logprobs=(-1.0,) * len(text),
        text=text,
        stop=StopReason.LENGTH if text == CUT else StopReason.STOP,
        policy_version=0,
    )


class Undecided:
    """Right, wrong, and of some completions it cannot tell."""

    name = "undecided"

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, groups):
        self.num_calls += 1
        return [[Reward(None if each.text == NO_BOX else float(each.text == RIGHT)) for each in said] for _, said in groups]


def prompts_of(said, bands=None):
    return [Prompt(id=name, tokens=(1,), answer={"text": "7", **({"band": bands[name]} if bands else {})}) for name in said]


SAID = {
    "a": [RIGHT, WRONG, RIGHT, CUT],
    "b": [WRONG, WRONG, NO_BOX, CUT],
    "c": [RIGHT, RIGHT, RIGHT, RIGHT],
    "d": [CUT, CUT, CUT, RIGHT],
}
BANDS = {"a": "hard", "b": "easy", "c": "easy", "d": "elsewhere"}


@pytest.fixture
def evaluate(one_rank):
    def go(said=SAID, verifier=None, group_size=4, bands=BANDS, **options):
        prompts = prompts_of(said, bands)
        return evaluate_prompts(
            Scripted(said), verifier or Exact(), prompts, group_size=group_size, sampling=SAMPLING, groups=one_rank, **options
        )

    return go


def test_numbers_by_hand(evaluate):
    found = evaluate()
    assert [[each.value for each in rewards] for rewards in found.rewards] == [[1, 0, 1, 0], [0] * 4, [1] * 4, [0, 0, 0, 1]]
    lengths = {text: len(text) for text in (RIGHT, WRONG, NO_BOX, CUT)}
    mean_length = sum(lengths[text] for said in SAID.values() for text in said) / 16
    assert found.bands == ["easy", "hard", "elsewhere"]
    summary = found.summary()
    overall = {name: value for name, value in summary.items() if not name.startswith("band/")}
    assert overall == pytest.approx(
        {
            "reward_mean": 7 / 16,
            "accuracy": 7 / 16,
            "format_rate": 10 / 16,
            "length_mean_tokens": mean_length,
            "truncated_share": 5 / 16,
            "unknown_share": 0.0,
            "prompts": 4.0,
            "pass_at_4": 3 / 4,
        }
    )
    assert summary["band/easy/accuracy"] == 4 / 8 and summary["band/easy/pass_at_4"] == 1 / 2
    assert summary["band/hard/accuracy"] == 2 / 4 and summary["band/elsewhere/truncated_share"] == 3 / 4
    assert found.pass_at(2).tolist() == pytest.approx([5 / 6, 0.0, 1.0, 1 / 2])
    assert found.of_band("unheard of").summary() == {"prompts": 0.0}
    tags = found.scalars("gsm8k")
    assert tags.pop("time/valid/gsm8k_s") > 0.0
    assert tags == {f"valid/gsm8k/{name}": value for name, value in summary.items()}


def test_what_is_not_known_is_counted_apart(evaluate):
    found = evaluate(verifier=Undecided())
    tally = found.tally()
    assert (tally.num_completions, tally.num_judged, tally.num_unknown, tally.num_right) == (16, 15, 1, 7)
    assert tally.accuracy == tally.reward_mean == 7 / 15 and tally.format_rate is None
    assert len(found.pass_at(3)) == 4 and len(found.pass_at(4)) == 3  # of `b` only three were judged
    assert "format_rate" not in found.summary()
    nothing = evaluate(said={"x": [NO_BOX] * 2}, verifier=Undecided(), group_size=2, bands=None)
    assert nothing.summary() == {"unknown_share": 1.0, "truncated_share": 0.0, "length_mean_tokens": 11.0, "prompts": 1.0}


def test_of_a_sum_the_first_verifier_that_is_no_format_decides(evaluate):
    format_first = WeightedSum([(Format(r"(?s).*boxed.*", name="shape"), 0.5), (Exact(), 0.5)])
    found = evaluate(verifier=format_first)
    assert found.decided_by == "exact" and found.tally().num_right == 7
    assert found.tally().reward_mean == pytest.approx((7 * 1.0 + 3 * 0.5) / 16)  # ten have a box
    only_format = WeightedSum([(Format(r"(?s).*boxed.*"), 0.5)])
    assert evaluate(verifier=only_format).tally().num_right == 10


def test_greedy_decoding_has_no_pass_at_k(evaluate):
    found = evaluate(group_size=1)
    assert found.tally().accuracy == 2 / 4 and not any("pass_at" in name for name in found.summary())


def test_prompts_go_to_the_engine_in_parts_and_come_back_in_order(one_rank, monkeypatch):
    monkeypatch.setattr("megarpt.rl.evaluation._COMPLETIONS_PER_CALL", 6)
    said = {str(i): [RIGHT if i % 3 else WRONG] * 2 for i in range(8)}
    engine, done = Scripted(said), []
    found = evaluate_prompts(
        engine, Exact(), prompts_of(said), group_size=2, sampling=SAMPLING, groups=one_rank, on_prompts=done.append
    )
    assert [len(call) for call in engine.calls] == [3, 3, 2] and done == [3, 6, 8]
    assert [prompt.id for prompt in found.prompts] == list(said)
    assert [rewards[0].value for rewards in found.rewards] == [float(bool(i % 3)) for i in range(8)]


def test_nothing_to_evaluate_is_refused(evaluate, one_rank):
    with pytest.raises(DataError, match="got no prompts"):
        evaluate(said={})
    with pytest.raises(ShapeError, match="group size of 0"):
        evaluate(group_size=0)


# ------------------------------------------------------------------------------------------------------------- plain mode


@pytest.mark.parametrize(
    ("said", "matched", "first"),
    [(b" the", 1, 1), (b" the quick", 2, 0), (b" th", 0, 0), (b" a", 0, 0), (b"", 0, 0), (b" the quickest!", 0, 0)],
)
def test_plain_prediction_is_judged_by_the_rule_of_boxes(said, matched, first):
    prompt = Prompt(id="p", tokens=(1,), answer={"continuation": b" the quickest", "boundaries": (4, 10, 13)})
    for stop in StopReason:
        drawn = Completion(tokens=(5,), logprobs=(0.0,), text=said, stop=stop, policy_version=0)
        ((reward,),) = PlainNextToken()([RolloutGroup(prompt, [drawn])])
        assert reward == (float(matched > 0), {"matched_tokens": float(matched), "first_token": float(first)})
    boxed = Completion(
        tokens=(5,), logprobs=(0.0,), text=b"</think>\\boxed{" + said + b"}", stop=StopReason.STOP, policy_version=0
    )
    ((in_box,),) = NextToken()([RolloutGroup(prompt, [boxed])])
    assert in_box.value == float(matched > 0) and in_box.parts["matched_tokens"] == matched


def test_plain_prediction_needs_the_answers_of_next_tokens():
    with pytest.raises(DataError, match="continuation"):
        PlainNextToken()([RolloutGroup(Prompt(id="p", tokens=(1,)), [completion(b"x")])])


def test_plain_prediction_takes_the_likeliest_token():
    assert (PLAIN.max_new_tokens, PLAIN.temperature) == (1, 0.0)


# ------------------------------------------------------------------------------------------------------------------ ranks


def many() -> dict[str, list[bytes]]:
    texts = [RIGHT, WRONG, NO_BOX, CUT]
    return {str(i): [texts[(i * 7 + j * j) % 4] for j in range(3)] for i in range(11)}


def evaluate_on_a_rank(dp: int, tp: int) -> tuple[EvaluatedPrompts, dict[str, float], list[tuple[str, ...]], int]:
    said = many()
    engine, verifier = Scripted(said), Undecided()
    bands = {name: "easy" if int(name) < 5 else "hard" for name in said}
    found = evaluate_prompts(
        engine,
        verifier,
        prompts_of(said, bands),
        group_size=3,
        sampling=SAMPLING,
        groups=ParallelLayout(dp=dp, tp=tp).initialize(seed=1),
    )
    return found, found.summary(), engine.calls, verifier.num_calls


def test_two_ranks_are_one_process(one_rank):
    said = many()
    alone, summary, (every,), _ = evaluate_on_a_rank(1, 1)
    assert every == tuple(said)
    results = spawn(2, evaluate_on_a_rank, 2, 1)
    assert [found for found, *_ in results] == [alone, alone]
    assert [each for _, each, *_ in results] == [summary, summary]
    assert [calls for *_, calls, _ in results] == [[every[0::2]], [every[1::2]]]


def test_of_ranks_with_one_model_one_judges(one_rank):
    alone, *_ = evaluate_on_a_rank(1, 1)
    results = spawn(2, evaluate_on_a_rank, 1, 2)
    assert [found for found, *_ in results] == [alone, alone]
    assert [num_calls for *_, num_calls in results] == [1, 0]
    assert results[0][2] == results[1][2]  # both draw


def fail_on_one_rank() -> str:
    groups = ParallelLayout(dp=2).initialize(seed=1)
    said = many()
    prompts = prompts_of(said)
    del said["3"]  # a prompt of rank 1
    try:
        evaluate_prompts(Scripted(said), Undecided(), prompts, group_size=3, sampling=SAMPLING, groups=groups)
    except RolloutError as error:
        return str(error)
    return "nothing was raised"


def test_a_failure_of_one_rank_ends_all():
    assert spawn(2, fail_on_one_rank) == ["no room", "no room"]


# ------------------------------------------------------------------------------------------------------------ stop tokens


def test_stop_tokens_are_found_by_text_and_by_name():
    tokenizer = load_tokenizer("bytes")
    assert stop_tokens(tokenizer, [], where="--stop") == (256,)
    assert stop_tokens(tokenizer, ["\n", "<|eod|>"], where="--stop") == (256, 10)
    with pytest.raises(ConfigError, match=r"--stop: got 'ab', expected the text of a single token of bytes"):
        stop_tokens(tokenizer, ["ab"], where="--stop")
