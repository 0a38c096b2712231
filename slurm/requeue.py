"""Whether a job goes back into the queue, decided from what its last attempt left behind.

    requeue.py begin FOLDER --attempt 0 [--run-dir RUN] [--nodes LIST]
    requeue.py decide FOLDER --attempt 0 [--run-dir RUN] --exit-code CODE ...

`decide` prints `requeue`, or the exit code that the job ends with. Runs on the batch host with the system's Python (3.7 or
newer, standard library only): megarpt may be installed in a container only. FOLDER/attempts.jsonl holds every attempt and
the reason of every decision.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, Dict

OK, RESUMABLE, PREFLIGHT = 0, 75, 80
# Running again cannot help: unstable, configuration, damaged data (megarpt/errors.py).
FINAL = {76: "the training became unstable", 78: "the configuration is wrong", 79: "a corpus or checkpoint is damaged"}


Event = Dict[str, Any]


def begin(folder: str, attempt: int, run_dir: str = "", nodes: str = "") -> None:
    """Note that an attempt starts, and from where."""
    record = {"event": "begin", "attempt": attempt, "nodes": nodes, "step": newest_step(run_dir)}
    append(folder, dict(record, opened=times_opened(run_dir)))


def decide(
    folder: str,
    attempt: int,
    run_dir: str = "",
    exit_code: int = 0,
    exit_file: str = "",
    exclude: str = "",
    max_failures: int = 3,
) -> tuple[int | str, str]:
    """What follows from an attempt: ("requeue" or an exit code, why).

    A stop on a signal is followed by another attempt, a finished run and a mistake by none. Anything else may be the fault of
    a machine and is tried again, until `max_failures` attempts in a row have failed without a new checkpoint.
    """
    history = read(folder)
    opened_before = next((e["opened"] for e in reversed(history) if e["event"] == "begin" and e["attempt"] == attempt), None)
    code, why = verdict(run_dir, opened_before, exit_code, exit_file, exclude)
    end = {"event": "end", "attempt": attempt, "code": code, "step": newest_step(run_dir)}
    if code == OK or code in FINAL:
        action: int | str = code
    elif code == RESUMABLE:
        action = "requeue"
    else:
        failures = failures_in_a_row(history + [end])
        action = "requeue" if failures < max_failures else code
        why += f"; {failures} of {max_failures} attempts in a row without a new checkpoint"
        if action != "requeue":
            why += ": this job is not started again; find the cause, then submit the same command"
    append(folder, dict(end, action=action, why=why, excluded=exclude))
    return action, why


def verdict(run_dir: str, opened_before: int | None, exit_code: int, exit_file: str, exclude: str) -> tuple[int, str]:
    """The code an attempt stands for, and its meaning.

    exit.json of the run folder speaks for the attempt if the attempt opened the folder; what ends a process before that, or
    has no run folder, is in the exit file; a killed process says nothing and leaves the code of the step.
    """
    if exit_code == PREFLIGHT:
        return PREFLIGHT, "the preflight failed" + (" on " + exclude if exclude else "")
    record = load(os.path.join(run_dir, "exit.json")) if run_dir else None
    if record is not None and record["restarts"] == opened_before:
        record = None  # an earlier attempt's
    if record is not None and record["exit_code"] is not None:
        code = record["exit_code"]
        return code, "exit.json: {} at step {}: {}".format(record["status"], record["step"], record["message"])
    written = load(exit_file) if exit_file else None
    if written is not None:
        return written["exit_code"], "rank {}: {}".format(written["rank"], written["error"])
    if exit_code == OK and not run_dir:
        return OK, "finished"
    state = "was killed" if record else "ended before it opened the run folder" if run_dir else "ended without a word"
    return exit_code or 1, f"the run {state} (exit code {exit_code} of the step)"


def failures_in_a_row(history: list[Event]) -> int:
    """Trailing attempts that failed and left no checkpoint newer than any before; one without an end lost its node."""
    count, newest, end = 0, max([event["step"] for event in history]), None
    for index in reversed(range(len(history))):
        if history[index]["event"] == "end":
            end = history[index]
            continue
        if end is not None and end["code"] == RESUMABLE:
            break
        if newest > max([event["step"] for event in history[: index + 1]]):
            break
        count, end = count + 1, None
    return count


def newest_step(run_dir: str) -> int:
    """Step of the newest complete checkpoint; -1 when there is none."""
    if not run_dir:
        return -1
    try:
        with open(os.path.join(run_dir, "checkpoints", "latest")) as file:
            return int(file.read().strip().rpartition("_")[2])
    except (FileNotFoundError, ValueError):
        return -1


def times_opened(run_dir: str) -> int | None:
    """How often the run folder has been opened before; None when never."""
    record = load(os.path.join(run_dir, "exit.json")) if run_dir else None
    return None if record is None else record["restarts"]


def load(path: str) -> dict[str, Any] | None:
    """A JSON file; None when it is not there or cannot be read, which says no more than its absence."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def read(folder: str) -> list[Event]:
    """All events so far; a line that a dying machine left half-written is passed over."""
    events = []
    try:
        with open(os.path.join(folder, "attempts.jsonl"), encoding="utf-8") as file:
            for line in file:
                try:
                    events.append(json.loads(line))
                except ValueError:
                    continue
    except FileNotFoundError:
        return []
    return events


def append(folder: str, event: Event) -> None:
    """Add one event, whole on its own line whatever stood before it."""
    event["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    path = os.path.join(folder, "attempts.jsonl")
    with open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(event).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["begin", "decide"])
    parser.add_argument("folder")
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--run-dir", default="", help="the run folder, of a run that has one")
    parser.add_argument("--nodes", default="", help="begin: where it runs")
    parser.add_argument("--exit-code", type=int, default=0, help="decide: of the step")
    parser.add_argument("--exit-file", default="", help="decide: what a process wrote to MEGARPT_EXIT_FILE")
    parser.add_argument("--exclude", default="", help="decide: nodes that the preflight named")
    parser.add_argument("--max-failures", type=int, default=3)
    args = parser.parse_args()
    if args.verb == "begin":
        begin(args.folder, args.attempt, args.run_dir, args.nodes)
        return
    action, why = decide(
        args.folder, args.attempt, args.run_dir, args.exit_code, args.exit_file, args.exclude, args.max_failures
    )
    sys.stderr.write("{}: {}\n".format("requeue" if action == "requeue" else f"end with {action}", why))
    sys.stdout.write(f"{action}\n")


if __name__ == "__main__":
    main()
