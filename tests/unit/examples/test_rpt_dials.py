"""The example's corpus: documents are right, parts do not share problems, examples of the format are in the format."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.rl.prompts import load_prompts, next_token_record
from megarpt.rl.structs import Completion, Prompt, RolloutGroup, StopReason
from megarpt.rl.verifiers import NextToken

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "rpt"))

dials = importlib.import_module("dials")

COUNTS = {"pretrain": 3000, "rpt": 600, "heldout": 300, "format": 400, "replay": 100}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dials")
    dials.build(out, 1, COUNTS, share_complete=0.1, stop_chance=0.65)
    return out


def read(out: Path, part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def problem_of(text: str) -> str:
    return text.split("=")[0].split(":")[0].rstrip(".")


def test_a_problem_followed_by_hand() -> None:
    problem = dials.Problem(3, "+*-")
    assert problem.text == "3a+b*c-"
    assert problem.positions() == [6, 8, 1]
    assert problem.document(worked=False) == "3a+b*c-=1\n"
    assert problem.document(worked=True) == "3a+b*c-:a6b8c1=1\n"
    assert problem.document(worked=True, dots=3) == "3a+b*c-...:a6b8c1=1\n"
    assert problem.scratch(2) == "a6b8"


@pytest.mark.parametrize("pair", ["+*", "+-"])
def test_the_order_of_moves_matters(pair: str) -> None:
    ends = {moves: [dials.Problem(start, moves).positions()[-1] for start in range(10)] for moves in (pair, pair[::-1])}
    assert ends[pair] != ends[pair[::-1]]


@pytest.mark.parametrize("move", "+*-")
def test_every_move_leads_everywhere(move: str) -> None:
    assert sorted(dials.MOVES[move](x) for x in range(10)) == list(range(10))


def test_the_parts_have_as_many_records_as_they_should(built: Path) -> None:
    assert {part: len(read(built, part)) for part in dials.PARTS} == COUNTS


def test_longer_problems_belong_to_one_part(built: Path) -> None:
    problems = {part: {problem_of(each["text"]) for each in read(built, part)} for part in ("pretrain", "rpt", "heldout")}
    problems["pretrain"] |= {problem_of(each["prompt"]) for each in read(built, "format")}
    problems["pretrain"] |= {problem_of(each["prompt"] + each["completion"]) for each in read(built, "replay")}
    longer = {part: {each for each in found if len(each) > 1 + 2 * dials.FEW_MOVES} for part, found in problems.items()}
    assert all(longer.values())
    assert not longer["pretrain"] & longer["rpt"]
    assert not longer["heldout"] & (longer["pretrain"] | longer["rpt"])


def test_no_problem_comes_twice_where_prompts_are_mined(built: Path) -> None:
    for part in ("rpt", "heldout"):
        problems = [problem_of(each["text"]) for each in read(built, part)]
        assert len(set(problems)) == len(problems)


def test_more_documents_than_there_are_problems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dials, "LETTERS", "ab")
    assert len(list(dials.different_documents(random.Random(0), 10 * 3 + 10 * 9, "rpt"))) == 120
    with pytest.raises(ValueError, match="121 documents are wanted, and hardly more than 120 differ"):
        list(dials.different_documents(random.Random(0), 121, "rpt"))


def test_a_corpus_follows_from_its_seed(built: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 1), ("other", 2)):
        dials.build(tmp_path / name, seed, COUNTS, share_complete=0.1, stop_chance=0.65)
    for part in dials.PARTS:
        content = (built / f"{part}.jsonl").read_bytes()
        assert content == (tmp_path / "same" / f"{part}.jsonl").read_bytes()
        assert content != (tmp_path / "other" / f"{part}.jsonl").read_bytes()


def test_examples_of_the_format_answer_rightly_after_thoughts_that_mostly_stop_early(built: Path) -> None:
    complete, verifier = 0, NextToken()
    for example in read(built, "format"):
        text = problem_of(example["prompt"])
        problem = dials.Problem(int(text[0]), text[2::2])
        assert example["prompt"] == f"{problem.text}={dials.OPEN}"
        moves, end = example["completion"].split(dials.CLOSE)[0].split("=")
        assert problem.scratch().startswith(moves) and end == str(problem.positions()[-1])
        complete += moves == problem.scratch()
        answer = {"continuation": f"{problem.positions()[-1]}\n".encode(), "boundaries": (1, 2)}
        completion = example["completion"].encode()
        said = Completion(tokens=(0,), logprobs=(0.0,), text=completion, stop=StopReason.STOP, policy_version=0)
        [[reward]] = verifier([RolloutGroup(Prompt(id="0", tokens=(), answer=answer), [said])])
        assert reward.value == 1.0
    assert 0.05 < complete / COUNTS["format"] < 0.3


def test_the_format_is_shown_after_the_prompts_of_reinforcement(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    record = next_token_record(
        document=0,
        position=8,
        context=list(b"3a+b*c-="),
        continuation=b"1\n",
        boundaries=(1, 2),
        entropy=2.0,
        band="hard",
        tokenizer_sha256=tokenizer.sha256,
    )
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record) + "\n")
    [prompt] = load_prompts(tmp_path / "prompts.jsonl", tokenizer, template="minimal", max_prompt_tokens=48)
    examples = dials.format_examples(random.Random(0), 3000, share_complete=0.1, stop_chance=0.65)
    assert bytes(prompt.tokens).decode() in {each["prompt"] for each in examples}


def test_replay_is_whole_documents(built: Path) -> None:
    for each in read(built, "replay"):
        assert len(each["prompt"]) == 1 and each["completion"].endswith("\n")
