"""The sample of rollouts: whole, bounded, legible, and the same for a run that was killed and resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import ConfigError, DataError
from megarpt.rl.advantages import as_rewards, group_mean
from megarpt.rl.rollout_log import RolloutLog, logged_steps, read_rollouts, shown_text
from megarpt.rl.structs import Completion, Prompt, Reward, RolloutGroup, StopReason

BYTES = load_tokenizer("bytes")


def completion(text: bytes, **changed: Any) -> Completion:
    values = {"tokens": tuple(text), "logprobs": (-1.0,) * len(text), "stop": StopReason.STOP, "policy_version": 3}
    return Completion(text=text, **values | changed)


def group(prompt: bytes, *texts: bytes, **answer: Any) -> RolloutGroup:
    tokens = (*prompt, BYTES.eod or 0)
    return RolloutGroup(Prompt(id=prompt.decode()[:8], tokens=tokens, answer=answer), [completion(text) for text in texts])


def write(log: RolloutLog, step: int, groups: Sequence[RolloutGroup], values: Sequence[Sequence[float | None]]) -> None:
    rewards = [[Reward(value, {"format": 1.0}) for value in row] for row in values]
    log.write(step, groups, rewards, [group_mean(as_rewards(row)) for row in values])


def read(log: RolloutLog, step: int) -> list[Any]:
    (path,) = [path for number, path in logged_steps(log.folder) if number == step]
    return list(read_rollouts(path))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, BYTES, interval_steps=1)
    made = group(b"2+2=", "<think>é</think>\\boxed{4}".encode(), b"\xff\x00no", continuation=b"4\n\xc3", boundaries=(1, 2))
    log.write(
        7,
        [made, group(b"next", b"late")],
        [[Reward(1.0, {"matched_tokens": 1.0, "odd": math.inf}), Reward(None)], [Reward(0.0)]],
        [group_mean(as_rewards([1.0, None])), group_mean(as_rewards([0.0]))],
    )
    first, second = read(log, 7)
    assert (first.step, first.prompt_id, first.num_prompt_tokens, first.rewards) == (7, "2+2=", 5, (1.0, None))
    assert first.prompt == "2+2=" + BYTES.token_text(BYTES.eod or 0)
    assert first.answer == {"continuation": "4\n\\xc3", "boundaries": "(1, 2)"}
    right, unknown = first.completions
    assert right.text == "<think>é</think>\\boxed{4}" and right.reward == 1.0 and right.stop == "stop"
    assert right.parts == {"matched_tokens": 1.0, "odd": math.inf} and right.policy_version == 3 and right.trains
    assert unknown.text == "\\xff\\x00no" and unknown.reward is None and not unknown.trains and unknown.num_tokens == 4
    assert second.completions[0].sample == 0
    json.loads((log.folder / "step_00000007.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)  # strict


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("é\n\t日".encode(), "é\n\t日"),
        (b"a\xff\xc3", "a\\xff\\xc3"),
        (b"\x00\x1b[2J\x7f", "\\x00\\x1b[2J\\x7f"),
        ("\u202eabc\u2028".encode(), "\\u202eabc\\u2028"),
        ("\U000e0001".encode(), "\\U000e0001"),
        (b"<script>", "<script>"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),  # half a surrogate pair is no UTF-8
    ],
)
def test_what_is_no_text_is_shown(content: bytes, shown: str) -> None:
    assert shown_text(content) == shown


def test_a_sample_is_bounded(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, BYTES, interval_steps=1, num_prompts=2, max_completions=3, max_bytes=10)
    texts = [b"x" * 1000 + b"%05d" % i for i in range(8)]
    values = [0.0, 0.0, None, 1.0, 0.0, -1.0, 1.0, 0.0]
    write(log, 1, [group(b"p" * 99, *texts)] * 5, [values] * 5)
    groups = read(log, 1)
    assert len(groups) == 2 and groups[0].rewards == tuple(values)
    assert [each.sample for each in groups[0].completions] == [0, 3, 5]  # the first best and worst, and what comes first
    assert groups[0].completions[1].text == "xxxxx\n[... 995 bytes left out ...]\n00003"
    assert groups[0].completions[1].left_out_bytes == 995 and groups[0].prompt_left_out_bytes > 80
    assert log.folder.joinpath("step_00000001.jsonl").stat().st_size < 4000


def test_a_group_that_was_not_judged_is_shown_too(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, BYTES, interval_steps=1, max_completions=2)
    write(log, 1, [group(b"p", b"a", b"b", b"c")], [[None] * 3])
    assert [each.sample for each in read(log, 1)[0].completions] == [0, 1]


def run(folder: Path, first: int, last: int, resume_step: int | None) -> None:
    log = RolloutLog(folder, BYTES, interval_steps=4, resume_step=resume_step)
    for step in range(first, last + 1, 2):  # two optimizer steps an iteration
        if log.is_due(step - 2, step):
            write(log, step, [group(b"p", b"%d" % step, b"b")], [[1.0, 0.0]])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "rollouts").iterdir()}


@pytest.mark.parametrize(("killed_after", "resumed_at"), [(12, 10), (12, 12), (14, 6), (8, 0)])
def test_a_killed_and_resumed_run_has_the_same_samples(tmp_path: Path, killed_after: int, resumed_at: int) -> None:
    run(tmp_path / "straight", 2, 20, None)
    run(tmp_path / "killed", 2, killed_after, None)
    (tmp_path / "killed" / "rollouts" / ".step_00000016.jsonl.tmp").write_bytes(b"{")  # it died while it wrote
    run(tmp_path / "killed", resumed_at + 2, 20, resumed_at)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    assert sorted(contents(tmp_path / "straight")) == [f"step_{step:08d}.jsonl" for step in (2, 4, 8, 12, 16, 20)]


def test_a_fresh_start_and_going_back_delete_what_lies_beyond(tmp_path: Path) -> None:
    run(tmp_path, 2, 20, None)
    (tmp_path / "rollouts" / "step_notes.jsonl").write_text("mine")
    log = RolloutLog(tmp_path, BYTES, interval_steps=4, resume_step=8)
    assert [step for step, _ in logged_steps(log.folder)] == [2, 4, 8]
    log.rewind(4)
    assert [step for step, _ in logged_steps(log.folder)] == [2, 4]
    RolloutLog(tmp_path, BYTES, interval_steps=4)
    assert list(contents(tmp_path)) == ["step_notes.jsonl"]


@pytest.mark.parametrize(("interval", "due"), [(1, [1, 2, 3, 4, 5, 6]), (3, [1, 3, 6]), (0, []), (100, [1])])
def test_when_a_sample_is_due(tmp_path: Path, interval: int, due: list[int]) -> None:
    log = RolloutLog(tmp_path, BYTES, interval_steps=interval)
    assert [step for step in range(1, 7) if log.is_due(step - 1, step)] == due
    assert log.is_due(2, 7) == (interval in (1, 3))  # an iteration of five steps that jumps over 3 and 6


def test_only_one_rank_writes(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, BYTES, interval_steps=1, is_writer=False)
    write(log, 1, [group(b"p", b"a")], [[1.0]])
    log.rewind(0)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: b"{",
        lambda line: b"[]",
        lambda line: b'{"step": 1}',
        lambda line: b'{"step": 1, "completions": [{"reward": 1}]}',
        lambda line: b"\xff",
        lambda line: line.replace(b'"sample": 0', b'"sample": "<script>"'),
        lambda line: line.replace(b'"reward": 1.0', b'"reward": "high"'),
        lambda line: line.replace(b'"step": 1', b'"steps": 1'),
    ],
)
def test_a_damaged_sample_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    log = RolloutLog(tmp_path, BYTES, interval_steps=1)
    write(log, 1, [group(b"p", b"a")], [[1.0]])
    path = log.folder / "step_00000001.jsonl"
    line = path.read_bytes()
    path.write_bytes(line + damage(line.strip()) + b"\n")
    with pytest.raises(DataError, match=r"step_00000001\.jsonl, line 2: got .* expected a group of rollouts"):
        list(read_rollouts(path))
    with pytest.raises(DataError, match="cannot read"):
        list(read_rollouts(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize(
    ("name", "value"), [("interval_steps", -1), ("num_prompts", 0), ("max_completions", 1), ("max_bytes", 1)]
)
def test_bounds_are_checked(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"rollout log: {name} is {value}"):
        RolloutLog(tmp_path, BYTES, **{"interval_steps": 1, name: value})


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, BYTES, interval_steps=1)
    (tmp_path / "rollouts").write_text("a file is in the way")
    with pytest.raises(DataError, match=r"cannot write .*rollouts"):
        write(log, 1, [group(b"p", b"a")], [[1.0]])
