"""A page of the rollouts of a run: curves, and sampled prompts with their completions, by ranges of steps.

It works without scripts: ranges and filters are radio buttons, which CSS reads. What a policy wrote is data, never markup.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarpt.corpus.atomic import atomic_write_bytes
from megarpt.errors import ConfigError
from megarpt.rl.answers import THINK_CLOSE, last_box
from megarpt.rl.rollout_log import FOLDER, LoggedCompletion, LoggedGroup, logged_steps, read_rollouts
from megarpt.run.html_page import escape, page, visible
from megarpt.train.metrics_file import read_metrics

Points = Sequence[tuple[float, float]]

CURVES = {
    "reward": "rl/reward_mean",
    "in the asked-for format": "rl/format_rate",
    "tokens of a completion": "rl/length_mean_tokens",
    "cut off": "rl/truncated_share",
    "groups that teach nothing": "rl/dead_groups",
    "entropy, nats": "policy/entropy_nats",
}
STATES = {"right": "right", "partly": "partly right", "wrong": "wrong", "unknown": "not judged"}
_FILTERS = {**STATES, "cut": "cut off"}
_EQUAL_WITHIN = 1e-6  # rewards no further apart are equal
_WIDTH, _HEIGHT = 300, 96  # of a curve
_CURVE_POINTS = 150


@dataclass(slots=True)
class StepRange:
    """Neighbouring samples of the run."""

    first: int
    last: int
    groups: list[LoggedGroup] = field(default_factory=list)  # those that are shown, by step
    num_prompts: int = 0  # of all, shown or not, as are the rest
    rewards: list[float | None] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens, of the completions that were kept
    num_truncated: int = 0  # of these


@dataclass(frozen=True, slots=True)
class RolloutView:
    """What a page shows."""

    run: str
    curves: Mapping[str, Points]  # by title; (step, value)
    ranges: tuple[StepRange, ...]


def read_view(
    run_folder: Path, *, num_ranges: int = 5, groups_per_range: int = 8, first: int = 0, last: int | None = None
) -> RolloutView:
    """Samples and curves of a run folder, whatever state the run is in.

    Args:
        run_folder: of a run with rollouts.
        num_ranges: into how many ranges its steps are split, each with as many samples as the others.
        groups_per_range: prompts that are shown of each, spread over it.
        first: leave out what was before this step.
        last: leave out what was after this step.

    Raises:
        ConfigError: there are no rollouts in it.
        DataError: a file is damaged.
    """
    samples = [each for each in logged_steps(run_folder / FOLDER) if first <= each[0] and (last is None or each[0] <= last)]
    if not samples:
        within = f" from step {first}{'' if last is None else f' to {last}'}" if first or last is not None else ""
        raise ConfigError(
            f"{run_folder / FOLDER}: got no sample of rollouts{within}, expected files such as step_00000010.jsonl; name the "
            "run folder of `megarpt rl`, whose log of rollouts is switched on"
        )
    count = min(num_ranges, len(samples))
    chunks = [samples[i * len(samples) // count : (i + 1) * len(samples) // count] for i in range(count)]
    metrics = run_folder / "metrics.jsonl"
    curves = _read_curves(metrics, first, last) if metrics.exists() else {}
    return RolloutView(str(run_folder), curves, tuple(_read_range(chunk, groups_per_range) for chunk in chunks))


def write_page(path: str | Path, view: RolloutView, **options: Any) -> None:
    """`render` into a file.

    Raises:
        DataError: the file cannot be written.
    """
    atomic_write_bytes(path, render(view, **options).encode())


def render(view: RolloutView, *, think_close: bytes = THINK_CLOSE, right_reward: float = 1.0) -> str:
    """The page.

    Args:
        view: what is shown.
        think_close: ends the thinking, which is shown dimmed.
        right_reward: the reward of a completion that is right in everything; 0 and less is that of a wrong one.
    """
    shown = _Shown(think_close.decode("utf-8", errors="backslashreplace"), right_reward)
    states = {shown.state(reward) for each in view.ranges for reward in each.rewards}
    filters = ["all", *(name for name in _FILTERS if name in states or name == "cut")]
    names = [f"steps {each.first:,} to {each.last:,}" for each in view.ranges]
    inputs = "".join(
        f'<input type="radio" name="{group}" id="{group}-{key}"{" checked" if i == 0 else ""}>'
        for group, keys in (("range", list(range(len(names)))), ("show", filters))
        for i, key in enumerate(keys)
    )
    tabs = "".join(f'<label for="range-{i}">{name}</label>' for i, name in enumerate(names))
    picks = "".join(f'<label for="show-{name}">{_FILTERS.get(name, name)}</label>' for name in filters)
    curves = "".join(_curve(title, points) for title, points in view.curves.items())
    body = (
        f"<dl><dt>run</dt><dd>{escape(view.run)}</dd></dl>"
        f'<div class="curves">{curves or "<small>no line of metrics yet</small>"}</div>'
        f"{_table(view.ranges, names, shown)}"
        f'{inputs}<nav aria-label="steps">{tabs}</nav><nav aria-label="completions">{picks}</nav><main>'
        + "".join(_range(number, each, shown) for number, each in enumerate(view.ranges))
        + "</main>"
    )
    return page("Rollouts", style=_STYLE + _switches(len(names), filters), body=body)


def _read_range(samples: Sequence[tuple[int, Path]], groups_per_range: int) -> StepRange:
    found = StepRange(samples[0][0], samples[-1][0])
    for i, (_, path) in enumerate(samples):
        wanted = (i + 1) * groups_per_range // len(samples) - i * groups_per_range // len(samples)
        for number, group in enumerate(read_rollouts(path)):
            if number < wanted:
                found.groups.append(group)
            found.num_prompts += 1
            found.rewards += group.rewards
            found.lengths += [each.num_tokens for each in group.completions]
            found.num_truncated += sum(each.is_truncated for each in group.completions)
    return found


def _read_curves(path: Path, first: int, last: int | None) -> dict[str, Points]:
    curves: dict[str, list[tuple[float, float]]] = {title: [] for title in CURVES}
    for line in read_metrics(path, "train"):
        step = float(line["step"])
        if step < first or (last is not None and step > last):
            continue
        for title, tag in CURVES.items():
            value = line.get(tag)
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves[title].append((step, float(value)))
    return {title: points for title, points in curves.items() if points}


@dataclass(frozen=True, slots=True)
class _Shown:
    """How completions are read."""

    think_close: str
    right_reward: float

    def state(self, reward: float | None) -> str:
        """A key of `STATES`."""
        if reward is None or math.isnan(reward):
            return "unknown"
        if reward >= self.right_reward - _EQUAL_WITHIN:
            return "right"
        return "partly" if reward > _EQUAL_WITHIN else "wrong"

    def text(self, text: str) -> str:
        """Markup: the thought dimmed, the last box behind it marked."""
        found = text.rfind(self.think_close)
        cut = 0 if found < 0 else found + len(self.think_close)
        thought, answer = text[:cut], text[cut:]
        dimmed = f'<span class="thought">{visible(thought)}</span>' if thought else ""
        return dimmed + "".join(_with_box(answer)) if answer or not thought else dimmed


def _with_box(answer: str) -> Iterator[str]:
    content = last_box(answer.encode("utf-8", errors="backslashreplace"))
    box = None if content is None else f"\\boxed{{{content.decode('utf-8', errors='backslashreplace')}}}"
    begin = -1 if box is None else answer.rfind(box)
    if box is None or begin < 0:
        yield visible(answer)
        return
    before, after = answer[:begin], answer[begin + len(box) :]
    yield visible(before) if before else ""
    yield f"<mark>{visible(box)}</mark>"
    yield visible(after) if after else ""


def _table(ranges: Sequence[StepRange], names: Sequence[str], shown: _Shown) -> str:
    """The sampled completions of each range, counted."""
    states = [name for name in STATES if any(shown.state(r) == name for each in ranges for r in each.rewards)]
    heads = ["", "prompts", "completions", "mean reward", *(STATES[name] for name in states), "cut off", "mean tokens"]
    rows = []
    for name, each in zip(names, ranges, strict=True):
        count = Counter(shown.state(reward) for reward in each.rewards)
        known = [reward for reward in each.rewards if reward is not None and math.isfinite(reward)]
        cells = [
            name,
            f"{each.num_prompts:,}",
            f"{len(each.rewards):,}",
            f"{statistics.fmean(known):.3f}" if known else "-",
            *(_share(count[state], len(each.rewards)) for state in states),
            _share(each.num_truncated, len(each.lengths)),
            f"{statistics.fmean(each.lengths):.0f}" if each.lengths else "-",
        ]
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    return (
        f"<h2>Sampled rollouts <small>all completions of the sampled prompts; the last two of those that were kept</small></h2>"
        f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    )


def _range(number: int, found: StepRange, shown: _Shown) -> str:
    groups = "".join(_group(group, shown) for group in found.groups)
    note = f"{len(found.groups):,} of {found.num_prompts:,} sampled prompts"
    return (
        f'<section id="part-{number}"><h2>steps {found.first:,} to {found.last:,} <small>{note}</small></h2>{groups}</section>'
    )


def _group(group: LoggedGroup, shown: _Shown) -> str:
    pair, others = _sides(group.completions)
    has = {shown.state(each.reward) for each in group.completions} | {"cut" for each in group.completions if each.is_truncated}
    rewards = "".join(
        f'<span class="dot {shown.state(reward)}">{"?" if reward is None else f"{reward:.3g}"}</span>'
        for reward in group.rewards
    )
    answer = "".join(f"<dt>{escape(name)}</dt><dd>{visible(value)}</dd>" for name, value in group.answer.items())
    about = f"prompt {group.prompt_id}, {group.num_prompt_tokens:,} tokens"
    about += f", {group.prompt_left_out_bytes:,} bytes left out" if group.prompt_left_out_bytes else ""
    more = ""
    if others:
        cards = "".join(_completion(each, "", shown) for each in others)
        more = f"<details><summary>{len(others)} more</summary>{cards}</details>"
    return (
        f'<article class="group {" ".join(f"has-{name}" for name in sorted(has))}">'
        f"<h3>step {group.step:,} <small>{escape(about)}</small></h3>"
        f'<div class="prompt"><pre>{visible(group.prompt)}</pre></div>'
        f'<dl>{answer}<dt>rewards</dt><dd>{rewards}</dd></dl><div class="pair">'
        + "".join(_completion(each, role, shown) for role, each in pair)
        + f"</div>{more}</article>"
    )


def _sides(completions: Sequence[LoggedCompletion]) -> tuple[list[tuple[str, LoggedCompletion]], list[LoggedCompletion]]:
    """(the two that stand side by side, with what they are; the others)."""
    known = [each for each in completions if each.reward is not None and not math.isnan(each.reward)]
    rewards = [each.reward for each in known if each.reward is not None]
    if known and max(rewards) - min(rewards) > _EQUAL_WITHIN:
        pair = [("best", known[rewards.index(max(rewards))]), ("worst", known[rewards.index(min(rewards))])]
    else:
        pair = [("", each) for each in completions[:2]]
    taken = {each.sample for _, each in pair}
    return pair, [each for each in completions if each.sample not in taken]


def _completion(each: LoggedCompletion, role: str, shown: _Shown) -> str:
    state = shown.state(each.reward)
    said = [f"{each.num_tokens:,} tokens", f"advantage {each.advantage:+.3g}"]
    said = ([f"reward {each.reward:.4g}"] if each.reward is not None else []) + said
    said += ["cut off"] if each.is_truncated else []
    said += [] if each.trains else ["left out of the loss"]
    said += [f"{each.left_out_bytes:,} bytes left out here"] if each.left_out_bytes else []
    said += [f"weights {each.policy_version}"]
    parts = ", ".join(f"{name} {value:g}" for name, value in each.parts.items())
    head = f"{role}: {STATES[state]}" if role else STATES[state]
    about = f"sample {each.sample}, {', '.join(said)}"
    return (
        f'<div class="done {state}{" cut" if each.is_truncated else ""}"><h4>{head} <small>{escape(about)}</small></h4>'
        f"{f'<p><small>{escape(parts)}</small></p>' if parts else ''}<pre>{shown.text(each.text)}</pre></div>"
    )


def _curve(title: str, points: Points) -> str:
    """A picture of a metric over steps: the mean of neighbouring points, and the band between their smallest and largest."""
    count = min(len(points), _CURVE_POINTS)
    bins = [points[i * len(points) // count : (i + 1) * len(points) // count] for i in range(count)]
    low, high = min(value for _, value in points), max(value for _, value in points)
    (first, _), (last, newest) = points[0], points[-1]

    def place(step: float, value: float) -> str:
        x = (step - first) / (last - first) if last > first else 0.5
        y = (value - low) / (high - low) if high > low else 0.5
        return f"{x * _WIDTH:.1f},{(1.0 - y) * _HEIGHT:.1f}"

    middle = [statistics.fmean(step for step, _ in each) for each in bins]
    mean = [place(x, statistics.fmean(value for _, value in each)) for x, each in zip(middle, bins, strict=True)]
    upper = [place(x, max(value for _, value in each)) for x, each in zip(middle, bins, strict=True)]
    lower = [place(x, min(value for _, value in each)) for x, each in zip(middle, bins, strict=True)]
    said = f"{title}: from {points[0][1]:.4g} at step {first:,.0f} to {newest:.4g} at step {last:,.0f}"
    dot = mean[-1].split(",")
    return (
        f'<figure><figcaption>{escape(title)} <b>{newest:.4g}</b></figcaption><svg viewBox="-2 -6 {_WIDTH + 4} {_HEIGHT + 26}" '
        f'role="img" aria-label="{escape(said)}"><title>{escape(said)}</title>'
        f'<polygon points="{" ".join([*upper, *reversed(lower)])}"/><polyline points="{" ".join(mean)}"/>'
        f'<circle cx="{dot[0]}" cy="{dot[1]}" r="2.5"/>'
        f'<text x="0" y="{_HEIGHT + 16}">{first:,.0f}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 16}" text-anchor="end">{last:,.0f}</text>'
        f'<text x="0" y="6">{high:.3g}</text><text x="0" y="{_HEIGHT - 2}">{low:.3g}</text></svg></figure>'
    )


def _share(count: int, total: int) -> str:
    return f"{100.0 * count / total:.0f}%" if total else "-"


def _switches(num_ranges: int, filters: Sequence[str]) -> str:
    """What the radio buttons do."""
    rules = ["main > section { display: none; }"]
    for i in range(num_ranges):
        rules.append(f"#range-{i}:checked ~ main > #part-{i} {{ display: block; }}")
    for name in filters:
        if name != "all":
            rules.append(f"#show-{name}:checked ~ main .group:not(.has-{name}) {{ display: none; }}")
            rules.append(f"#show-{name}:checked ~ main .done:not(.{name}) {{ display: none; }}")
    for key in [*(f"range-{i}" for i in range(num_ranges)), *(f"show-{name}" for name in filters)]:
        rules.append(f'#{key}:checked ~ nav label[for="{key}"] {{ background: var(--ink); color: var(--paper); }}')
        rules.append(
            f'#{key}:focus-visible ~ nav label[for="{key}"] {{ outline: 2px solid var(--right); outline-offset: 2px; }}'
        )
    return "\n".join(rules)


_STYLE = """
:root { --right: #1b7f5c; --wrong: #b3541e; --partly: #8a6d1d; --box: #fdc27a; --line: #3b5fc0; }
@media (prefers-color-scheme: dark) { :root { --right: #5fc9a1; --wrong: #f0935a; --partly: #d9bc66; --box: #6f4712;
  --line: #8fa8ee; } }
h3 { font-size: .95rem; margin: 0 0 .4rem; } h4 { font-size: .85rem; margin: 0; } .done p { margin: 0; line-height: 1.3; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; color: var(--faint); } figcaption b { color: var(--ink); }
svg { width: 100%; } svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
polyline { fill: none; stroke: var(--line); stroke-width: 1.6; } polygon { fill: var(--line); opacity: .18; }
circle { fill: var(--line); }
table { border-collapse: collapse; font-size: .85rem; } td, th { padding: .15rem .9rem .15rem 0; text-align: right; }
td:first-child { text-align: left; } th { font-weight: normal; color: var(--faint); }
input { position: absolute; opacity: 0; } nav { margin: 1rem 0 -.4rem; display: flex; flex-wrap: wrap; gap: .4rem; }
label { padding: .1rem .7rem; border: 1px solid var(--faint); border-radius: 1rem; font-size: .85rem; cursor: pointer; }
.group { border-top: 1px solid var(--faint); padding: .9rem 0; margin: .5rem 0; }
.prompt { max-height: 12rem; overflow: auto; display: flex; flex-direction: column-reverse; background: var(--panel);
  padding: .4rem .7rem; margin: 0 0 .5rem; }
.group dl { font-size: .85rem; margin: 0 0 .5rem; } .group dd { font-family: ui-monospace, monospace; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; align-items: start; }
.done { border-left: 4px solid var(--faint); padding: 0 0 0 .7rem; margin: 0 0 .8rem; min-width: 0; }
.done pre { max-height: 24rem; overflow: auto; }
.dot { display: inline-block; border-bottom: 3px solid var(--faint); padding: 0 .3rem; margin: 0 .2rem 0 0; }
.right { border-color: var(--right); } .wrong { border-color: var(--wrong); } .partly { border-color: var(--partly); }
.done.unknown { border-left-style: dashed; }
.thought { color: var(--faint); } mark { background: var(--box); color: inherit; font-weight: 650; border-radius: 2px; }
summary { cursor: pointer; font-size: .85rem; color: var(--faint); margin: 0 0 .5rem; }
"""
