"""What a run folder tells about its run, read from its files alone: nothing here loads torch or asks the process.

A folder of a running, killed or finished run is read alike; what is damaged or missing is said under `problems`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
import struct
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from megarpt.errors import CheckpointError, ConfigError
from megarpt.train.checkpoint_files import list_checkpoints, list_damaged, read_manifest
from megarpt.train.metrics_file import DISCARDED, read_metrics
from megarpt.train.phases import PHASES

Line = Mapping[str, str | int | float]

_RECORDS = ("config.yaml", "exit.json", "metrics.jsonl")
_RECENT = 20  # training lines that "now" is the mean of
_DAMAGE_SHOWN = 3  # messages for each file
_SELECTION = ("kept_fraction", "threshold", "all_loss_nats", "kept_loss_nats", "dropped_loss_nats", "excess_nats")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One process that trained here. Times are seconds since 1970."""

    status: str  # as in exit.json; "killed" when it could not say anything, "running" when it is at work
    exit_code: int | None
    started: float
    ended: float  # of a killed attempt: its last metrics line
    step: int
    host: str
    message: str


@dataclass(frozen=True, slots=True)
class Goodput:
    """Where the time went between the start of the first attempt and the end of the last. Units: seconds."""

    wall_s: float
    useful_s: float  # steps that are part of the run
    redone_s: float  # steps that were done again because they lay behind the checkpoint a resume went back to
    evaluation_s: float
    save_s: float
    between_s: float  # from the last sign of an attempt to the start of the next
    other_s: float  # loading, reading data for the first time, and all that no line accounts for

    @property
    def share(self) -> float:
        """Useful over wall time."""
        return self.useful_s / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that is there; its files were not read."""

    name: str
    step: int
    num_bytes: int | None  # None when the manifest is damaged


@dataclass(slots=True)
class RunReport:
    """The findings; sections are empty where the run recorded nothing."""

    folder: str
    is_alive: bool = False
    total_steps: int | None = None
    last_line_unix_s: float | None = None
    attempts: list[Attempt] = field(default_factory=list)
    goodput: Goodput | None = None
    progress: dict[str, int] = field(default_factory=dict)  # of the last line
    curve: list[tuple[int, int, float]] = field(default_factory=list)  # (step, tokens seen, training loss)
    valid: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)  # corpus -> the same of held-out loss
    speed: dict[str, float] = field(default_factory=dict)  # medians over the training lines, by tag
    speed_curve: list[tuple[int, float]] = field(default_factory=list)  # (step, tokens per second)
    step_parts: dict[str, float] = field(default_factory=dict)  # part -> mean seconds of a step
    stragglers: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, float] = field(default_factory=dict)  # means over the last lines
    totals: dict[str, float] = field(default_factory=dict)  # counters of things that went wrong, by tag
    num_dumps: int = 0
    checkpoints: list[Checkpoint] = field(default_factory=list)  # newest first
    set_aside: list[str] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """Of the newest attempt."""
        return self.attempts[-1].status if self.attempts else "unknown"


def read_run(folder: Path, *, now: float | None = None) -> RunReport:
    """Everything the folder tells.

    Raises:
        ConfigError: there is no run in it.
    """
    if not any((folder / name).exists() for name in _RECORDS):
        what = "does not exist" if not folder.exists() else "is not a folder" if not folder.is_dir() else "holds no run"
        raise ConfigError(f"{folder} {what}; expected a run folder, with {', '.join(_RECORDS[:-1])} or {_RECORDS[-1]} in it")
    report = RunReport(str(folder), is_alive=_is_locked(folder / "run.lock"))
    kept, redone = (_lines(folder / name, report.problems) for name in ("metrics.jsonl", DISCARDED))
    train = [line for line in kept if line["kind"] == "train"]
    report.total_steps = _total_steps(folder / "config.yaml", report.problems)
    report.attempts = _attempts(folder / "exit.json", kept + redone, report, time.time() if now is None else now)
    if kept:
        counters = (("step", "step"), ("tokens_seen", "tokens/seen"), ("tokens_trained", "tokens/trained"))
        report.progress = {name: int(_value(kept[-1], tag)) for name, tag in counters}
        report.last_line_unix_s = max(_value(line, "time/unix_s") for line in kept)
    report.curve = _curve(train, "train/loss_nats")
    corpora = {tag.split("/")[1] for line in kept for tag in line if tag.startswith("valid/")}
    report.valid = {name: _curve(kept, f"valid/{name}/loss_nats") for name in sorted(corpora)}
    _add_speed(report, train)
    _add_stragglers(report, train, folder / "environment.json")
    report.selection = {
        name: statistics.fmean(values) for name in _SELECTION if (values := _numbers(train[-_RECENT:], f"select/{name}"))
    }
    last = train[-1] if train else {}
    report.totals = {tag: _value(last, tag) for tag in last if tag.startswith("optim/") and tag.endswith("_total")}
    report.num_dumps = len(list((folder / "dumps").glob("*.json")))
    report.traces = sorted(path.name for path in (folder / "profile").glob("*.json.gz") if not path.name.startswith("."))
    _add_checkpoints(report, folder / "checkpoints")
    if report.attempts:
        report.goodput = _goodput(report.attempts, kept, redone)
    return report


def _lines(path: Path, problems: list[str]) -> list[Line]:
    if not path.exists():
        return []
    damage: list[str] = []
    lines: list[Line] = []
    try:
        lines = list(read_metrics(path, on_damage=damage.append))
    except OSError as error:
        damage.append(f"{path} cannot be read: {error.strerror}")
    problems += damage[:_DAMAGE_SHOWN]
    if len(damage) > _DAMAGE_SHOWN:
        problems.append(f"{path}: {len(damage) - _DAMAGE_SHOWN} more damaged lines")
    return lines


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        problems.append(f"{path} is missing")
    except (OSError, ValueError) as error:
        problems.append(f"{path} is damaged: {error}")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{path} is damaged: got {type(content).__name__}, expected an object")
    return {}


def _value(line: Line, tag: str, default: float = 0.0) -> float:
    value = line.get(tag)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else default


def _numbers(lines: Iterable[Line], tag: str) -> list[float]:
    values = [_value(line, tag, math.nan) for line in lines]
    return [value for value in values if not math.isnan(value)]


def _curve(lines: Iterable[Line], tag: str) -> list[tuple[int, int, float]]:
    return [
        (int(_value(line, "step")), int(_value(line, "tokens/seen")), _value(line, tag, math.nan))
        for line in lines
        if tag in line
    ]


def _total_steps(path: Path, problems: list[str]) -> int | None:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        step_tokens = config["batch"]["global_batch_size"] * config["data"]["seq_length"]
        return -(-int(config["train"]["train_tokens"]) // int(step_tokens))
    except FileNotFoundError:
        problems.append(f"{path} is missing")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        problems.append(f"{path} is damaged: {error!r}")
    return None


def _is_locked(path: Path) -> bool:
    """Whether a process trains in the folder. Asks for the lock without taking it, so that a run may start meanwhile."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
        (answer, *_) = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
        return answer != fcntl.F_UNLCK
    except OSError:
        return False
    finally:
        os.close(file)


def _attempts(path: Path, lines: Sequence[Line], report: RunReport, now: float) -> list[Attempt]:
    """From exit.json. An attempt that was killed lasted until its last metrics line, as far as anybody knows."""
    record = _json(path, report.problems)
    last_seen: dict[int, float] = {}
    last_step: dict[int, int] = {}
    for line in lines:
        number = int(_value(line, "sys/restarts"))
        last_seen[number] = max(last_seen.get(number, 0.0), _value(line, "time/unix_s"))
        last_step[number] = max(last_step.get(number, 0), int(_value(line, "step")))
    attempts = []
    try:
        records = [*record.get("attempts", []), record] if record else []
        for index, each in enumerate(records):
            number, started, status, step = (
                int(each["restarts"]),
                _seconds(each["started"]),
                str(each["status"]),
                int(each["step"]),
            )
            if status == "running":  # it has not said how it ended
                is_alive = report.is_alive and index == len(records) - 1
                status = "running" if is_alive else "killed"
                ended = now if is_alive else max(started, last_seen.get(number, started))
                step = max(step, last_step.get(number, 0))
            else:
                ended = _seconds(each["ended"])
            attempts.append(Attempt(status, each["exit_code"], started, ended, step, str(each["host"]), str(each["message"])))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        report.problems.append(f"{path} is damaged: {error!r}")
    return attempts


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def _add_speed(report: RunReport, train: Sequence[Line]) -> None:
    # Medians: the first steps of every attempt are slow, and a report of a short run should not show them.
    tags = (
        "perf/tokens_per_s",
        "perf/tokens_per_s_per_device",
        "perf/tflops_per_device",
        "perf/mfu",
        "time/step_s",
        "mem/peak_bytes",
    )
    report.speed = {tag: statistics.median(values) for tag in tags if (values := _numbers(train, tag))}
    report.speed_curve = [(int(line["step"]), v) for line in train for v in _numbers([line], "perf/tokens_per_s")]
    report.step_parts = {part: statistics.fmean(values) for part in PHASES if (values := _numbers(train, f"time/{part}_s"))}


def _add_stragglers(report: RunReport, train: Sequence[Line], environment: Path) -> None:
    compared = [line for line in train if _numbers([line], "time/slowest_rank") and _numbers([line], "time/rank_spread")]
    if not compared:
        return
    table = _json(environment, report.problems).get("hosts")  # of the newest attempt
    lists = table.items() if isinstance(table, dict) else ()
    hosts = {rank: host for host, ranks in lists if isinstance(ranks, list) for rank in ranks if isinstance(rank, int)}

    def named(rank: int) -> dict[str, Any]:
        return {"rank": rank, "host": hosts.get(rank)}

    spreads = _numbers(compared, "time/rank_spread")
    ((most_often, times),) = Counter(int(_value(line, "time/slowest_rank")) for line in compared).most_common(1)
    last = compared[-1]
    report.stragglers = {
        "comparisons": len(compared),
        "median_spread": statistics.median(spreads),
        "largest_spread": max(spreads),
        "most_often": {**named(most_often), "times": times},
        "last": {**named(int(_value(last, "time/slowest_rank"))), "spread": spreads[-1], "step": int(_value(last, "step"))},
    }


def _add_checkpoints(report: RunReport, folder: Path) -> None:
    for path in list_checkpoints(folder):
        num_bytes = None
        try:
            num_bytes = read_manifest(path).num_bytes
        except CheckpointError as error:
            report.problems.append(str(error))
        report.checkpoints.append(Checkpoint(path.name, int(path.name.removeprefix("step_")), num_bytes))
    report.set_aside = [path.name for path in list_damaged(folder)]


def _goodput(attempts: Sequence[Attempt], kept: Sequence[Line], redone: Sequence[Line]) -> Goodput:
    wall = max(attempt.ended for attempt in attempts) - attempts[0].started
    between = sum(max(0.0, b.started - a.ended) for a, b in pairwise(attempts))
    both = [*kept, *redone]
    useful, again = _stepping_seconds(kept), _stepping_seconds(redone)
    evaluation = sum(_value(line, tag) for line in both for tag in line if tag.startswith("time/valid/"))
    save = sum(_numbers(both, "time/save_stall_s"))
    other = max(0.0, wall - useful - again - evaluation - save - between)
    return Goodput(wall, useful, again, evaluation, save, between, other)


def _stepping_seconds(lines: Sequence[Line]) -> float:
    """Seconds of the steps that the training lines stand for: a line has the mean of the steps since the one before it."""
    train = [line for line in lines if line["kind"] == "train"]
    steps = [int(_value(line, "step")) for line in train]
    gaps = [b - a for a, b in pairwise(steps) if b > a]
    usual = round(statistics.median(gaps)) if gaps else 1
    total, previous = 0.0, None
    for line, step in zip(train, steps, strict=True):
        # Discarded lines of several attempts stand behind one another; at which step one of them began is not written down.
        gap = step - previous if previous is not None and step > previous else min(step, usual)
        total += gap * _value(line, "time/step_s")
        previous = step
    return total
