"""The page of rollouts: safe whatever a policy writes, by itself, and what it shows is what was logged."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import ConfigError, DataError
from megarpt.rl.advantages import as_rewards, group_mean
from megarpt.rl.rollout_log import RolloutLog
from megarpt.rl.structs import Completion, Prompt, Reward, RolloutGroup, StopReason
from megarpt.run.rollout_page import CURVES, RolloutView, read_view, render, write_page

TAGS = set(
    "html head meta title style body h1 h2 h3 h4 dl dt dd div small b figure figcaption svg polygon polyline circle text table "
    "tr td th input nav label main section article span pre mark i p details summary".split()
)
VOID = {"meta", "input"}


class Elements(HTMLParser):
    """Elements with their attributes and the text within, in order; fails where tags do not pair."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(page)
        assert not self._open, [self.found[i][0] for i in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.found[i][2].append(data)

    def of(self, tag: str, name: str = "") -> list[tuple[set[str], str]]:
        """(classes, text) of the elements with this tag and class."""
        classed = [(each, set((attrs.get("class") or "").split()), "".join(text)) for each, attrs, text in self.found]
        return [(classes, text) for each, classes, text in classed if each == tag and (not name or name in classes)]


def completion(text: bytes, stop: StopReason = StopReason.STOP) -> Completion:
    return Completion(tokens=tuple(text), logprobs=(-1.0,) * len(text), text=text, stop=stop, policy_version=2)


def write(folder: Path, step: int, *rows: tuple[bytes, float | None], prompt: str = "2 + 2 =", **options: Any) -> None:
    """One prompt with completions (text, reward); those that begin with "cut" are truncated."""
    log = RolloutLog(folder, load_tokenizer("bytes"), interval_steps=1, resume_step=step, **options)
    made = [completion(text, StopReason.LENGTH if text.startswith(b"cut") else StopReason.STOP) for text, _ in rows]
    group = RolloutGroup(Prompt(id=f"p{step}", tokens=tuple(prompt.encode()), answer={"continuation": b"4"}), made)
    rewards = [reward for _, reward in rows]
    log.write(step, [group], [[Reward(r, {"format": 1.0}) for r in rewards]], [group_mean(as_rewards(rewards))])


def show(folder: Path, **options: Any) -> Elements:
    return Elements(render(read_view(folder), **options))


def test_thought_is_dimmed_and_the_box_is_marked(tmp_path: Path) -> None:
    text = b"<think>\\boxed{5}? no</think>It is \\boxed{{4}} <ok>"
    write(tmp_path, 1, (text, 1.0), (b"no thought \\boxed{3}", 0.0), (b"<think>a</think>", 0.0))
    page = show(tmp_path)
    assert [text for _, text in page.of("span", "thought")] == ["<think>\\boxed{5}? no</think>", "<think>a</think>"]
    assert [text for _, text in page.of("mark")] == ["\\boxed{{4}}", "\\boxed{3}"]
    shown = [text for _, text in page.of("pre")]
    assert shown == ["2 + 2 =", text.decode(), "no thought \\boxed{3}", "<think>a</think>"]
    other = show(tmp_path, think_close=b"thought")
    assert [text for _, text in other.of("span", "thought")] == ["no thought"]


def test_best_and_worst_stand_side_by_side(tmp_path: Path) -> None:
    write(tmp_path, 1, (b"half", 0.5), (b"good", 1.0), (b"bad", 0.0), (b"good too", 1.0), (b"odd", None))
    page = show(tmp_path)
    ((_, pair),) = page.of("div", "pair")
    assert re.search(r"best: right sample 1, reward 1, .*good.*worst: wrong sample 2, reward 0, .*bad", pair)
    ((_, more),) = page.of("details")
    assert more.startswith("3 more") and "partly right sample 0" in more and "not judged sample 4" in more
    assert [text for _, text in page.of("span", "dot")] == ["0.5", "1", "0", "1", "?"]
    assert "left out of the loss" in more and "left out of the loss" not in pair


def test_a_group_of_equal_rewards_has_no_best(tmp_path: Path) -> None:
    write(tmp_path, 1, (b"a", 0.0), (b"b", 0.0), (b"c", None))
    page = show(tmp_path)
    assert [text.split(" ")[0] for _, text in page.of("h4")] == ["wrong", "wrong", "not"]
    write(tmp_path / "one", 1, (b"alone", None))
    assert len(show(tmp_path / "one").of("div", "done")) == 1


def test_filters_know_what_a_completion_is(tmp_path: Path) -> None:
    write(tmp_path, 1, (b"a", 1.0), (b"b", 0.0), (b"cut", 0.0), (b"d", None), (b"e", -0.5))
    page = render(read_view(tmp_path))
    elements = Elements(page)
    kinds = [classes - {"done"} for classes, _ in elements.of("div", "done")]
    assert sorted(map(sorted, kinds)) == [["cut", "wrong"], ["right"], ["unknown"], ["wrong"], ["wrong"]]
    ((classes, _),) = elements.of("article")
    assert classes == {"group", "has-cut", "has-right", "has-unknown", "has-wrong"}
    names = {attrs["id"] for tag, attrs, _ in elements.found if tag == "input"}
    assert names == {"range-0", "show-all", "show-right", "show-wrong", "show-unknown", "show-cut"}
    assert {attrs["for"] for tag, attrs, _ in elements.found if tag == "label"} == names
    for name in ("right", "wrong", "unknown", "cut"):
        assert f"#show-{name}:checked ~ main .done:not(.{name}) {{ display: none; }}" in page
        assert f"#show-{name}:checked ~ main .group:not(.has-{name}) {{ display: none; }}" in page
    assert [attrs["id"] for tag, attrs, _ in elements.found if tag == "input" and "checked" in attrs] == ["range-0", "show-all"]


def test_ranges_share_the_steps_and_count_everything(tmp_path: Path) -> None:
    for step in range(1, 8):
        write(tmp_path, step, (b"aaaa", float(step > 4)), (b"bb", 0.0), (b"cutt", None), (b"cutt", 0.0), max_completions=2)
    view = read_view(tmp_path, num_ranges=3, groups_per_range=1)
    assert [(each.first, each.last, each.num_prompts, len(each.groups)) for each in view.ranges] == [
        (1, 2, 2, 1),
        (3, 4, 2, 1),
        (5, 7, 3, 1),
    ]
    assert [len(each.rewards) for each in view.ranges] == [8, 8, 12]
    page = Elements(render(view))
    rows = [text for _, text in page.of("tr")]
    assert rows[1].startswith("steps 1 to 2280.0000%75%25%") and rows[3].startswith("steps 5 to 73120.33325%50%25%")
    assert [attrs["id"] for tag, attrs, _ in page.found if tag == "section"] == ["part-0", "part-1", "part-2"]
    assert len(read_view(tmp_path, num_ranges=100).ranges) == 7
    some = read_view(tmp_path, num_ranges=1, first=3, last=5, groups_per_range=99).ranges[0]
    assert (some.first, some.last, [group.step for group in some.groups]) == (3, 5, [3, 4, 5])


def test_curves_are_of_the_metrics(tmp_path: Path) -> None:
    write(tmp_path, 1, (b"a", 1.0))
    lines = [{"kind": "train", "step": step, "rl/reward_mean": step / 1000} for step in range(1, 501)]
    lines += [{"kind": "train", "step": 501, "rl/reward_mean": "nan", "rl/format_rate": 0.5}, {"kind": "valid", "step": 501}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = show(tmp_path)
    assert [text for _, text in page.of("figcaption")] == ["reward 0.5", "in the asked-for format 0.5"]
    assert "reward: from 0.001 at step 1 to 0.5 at step 500" in page.of("svg")[0][1]
    lines = [attrs["points"] or "" for tag, attrs, _ in page.found if tag == "polyline"]
    points = [tuple(map(float, point.split(","))) for point in lines[0].split()]
    assert len(points) == 150 and all(0.0 <= x <= 300.0 and 0.0 <= y <= 96.0 for x, y in points)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(points))  # it rises: y goes down
    assert lines[1] == "150.0,48.0"  # one point
    assert [text for _, text in show_without_metrics(tmp_path).of("figcaption")] == []
    assert set(CURVES.values()) >= {"rl/reward_mean", "rl/format_rate", "rl/length_mean_tokens"}


def show_without_metrics(folder: Path) -> Elements:
    (folder / "metrics.jsonl").unlink()
    return show(folder)


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        '" onmouseover="x',
        "</pre></div><img src=x onerror=alert(1)>",
        "</think><script>alert(1)</script>\\boxed{<b>}",
        "&lt;script&gt;",
        "\u202e\x00\x1b[2J",
        "\\boxed{" * 20 + "</style><svg onload=x>",
        "'{title}{0}",
    ],
)
def test_what_a_policy_writes_is_text(tmp_path: Path, text: str) -> None:
    log = RolloutLog(tmp_path / text.replace("/", "-").replace("\0", "")[:60], load_tokenizer("bytes"), interval_steps=1)
    prompt = Prompt(id=text, tokens=tuple(text.encode()), answer={text: text})
    rewards = [Reward(1.0, {text: 1.0}), Reward(0.0)]
    made = [completion(text.encode()), completion(text.encode() + b"\xff\x00")]
    log.write(1, [RolloutGroup(prompt, made)], [rewards], [group_mean(as_rewards([1.0, 0.0]))])
    page = render(read_view(log.folder.parent))
    elements = Elements(page)
    assert {tag for tag, _, _ in elements.found} <= TAGS
    assert not any(name.startswith("on") for _, attrs, _ in elements.found for name in attrs)
    assert all(letter.isprintable() or letter == "\n" for letter in page)
    if text.isprintable():
        assert [shown for _, shown in elements.of("pre")][:2] == [text, text]
        assert text in elements.of("h3")[0][1] and text in elements.of("dl")[1][1] and f"{text} 1" in elements.of("p")[0][1]
    assert "\\xff\\x00" in html.unescape(page)


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    write(tmp_path, 1, (b"http://example.org/a.js", 1.0))
    page = render(read_view(tmp_path))
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"<script|<link|<img|<iframe|\bsrc=|\bhref=|url\(|@import", page)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rollouts: got no sample of rollouts, expected files such as"):
        read_view(tmp_path)
    write(tmp_path, 3, (b"a", 1.0))
    with pytest.raises(ConfigError, match="no sample of rollouts from step 4, expected"):
        read_view(tmp_path, first=4)
    with pytest.raises(ConfigError, match="no sample of rollouts from step 0 to 2, expected"):
        read_view(tmp_path, last=2)
    with pytest.raises(DataError, match="cannot write"):
        write_page(tmp_path / "missing" / "page.html", read_view(tmp_path))
    (tmp_path / "rollouts" / "step_00000009.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="step_00000009"):
        read_view(tmp_path)


def test_an_empty_sample_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_00000001.jsonl").write_text("")  # a rank without prompts
    assert "0 of 0 sampled prompts" in "".join(text for _, text in show(tmp_path).of("h2"))
    write_page(tmp_path / "page.html", RolloutView("r", {}, ()))
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
