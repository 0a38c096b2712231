"""Whether a job goes back into the queue, decided from what its last attempt left behind.

    requeue.py begin FOLDER --attempt 0 [--run-dir RUN] [--nodes LIST]
    requeue.py decide FOLDER --attempt 0 [--run-dir RUN] --exit-code CODE ...

`decide` prints `requeue`, or the exit code that the job ends with. Runs on the batch host with the system's Python (3.7 or
newer, standard library only): megarpt may be installed in a container only. FOLDER/attempts.jsonl holds every attempt and
the reason of every decision.
"""

import argparse
import json
import os
import sys
import time

OK, RESUMABLE, PREFLIGHT = 0, 75, 80
# Running again cannot help: unstable, configuration, damaged data (megarpt/errors.py).
FINAL = {76: "the training became unstable", 78: "the configuration is wrong", 79: "a corpus or checkpoint is damaged"}


def begin(folder, attempt, run_dir="", nodes=""):
    """Note that an attempt starts, and from where."""
    record = {"event": "begin", "attempt": attempt, "nodes": nodes, "step": newest_step(run_dir)}
    append(folder, dict(record, opened=times_opened(run_dir)))


def decide(folder, attempt, run_dir="", exit_code=0, exit_file="", exclude="", max_failures=3):
    """What follows from an attempt: ("requeue" or an exit code, why).

    A stop on a signal is followed by another attempt, a finished run and a mistake by none. Anything else may be the fault of
    a machine and is tried again, until `max_failures` attempts in a row have failed without a new checkpoint.
    """
    history = read(folder)
    opened_before = next((e["opened"] for e in reversed(history) if e["event"] == "begin" and e["attempt"] == attempt), None)
    code, why = verdict(run_dir, opened_before, exit_code, exit_file, exclude)
    end = {"event": "end", "attempt": attempt, "code": code, "step": newest_step(run_dir)}
    if code == OK or code in FINAL:
        action = code
    elif code == RESUMABLE:
        action = "requeue"
    else:
        failures = failures_in_a_row(history + [end])
        action = "requeue" if failures < max_failures else code
        why += "; {} of {} attempts in a row without a new checkpoint".format(failures, max_failures)
        if action != "requeue":
            why += ": this job is not started again; find the cause, then submit the same command"
    append(folder, dict(end, action=action, why=why, excluded=exclude))
    return action, why


def verdict(run_dir, opened_before, exit_code, exit_file, exclude):
    """The code an attempt stands for, and its meaning.

    exit.json of the run folder speaks for the attempt if the attempt opened the folder; what ends a process before that, or
    has no run folder, is in the exit file; a killed process says nothing and leaves the code of the step.
    """
    if exit_code == PREFLIGHT:
        return PREFLIGHT, "the preflight failed" + (" on " + exclude if exclude else "")
    record = load(os.path.join(run_dir, "exit.json")) if run_dir else None
    fresh = record is not None and record["restarts"] != opened_before
    if fresh and record["exit_code"] is not None:
        code = record["exit_code"]
        return code, "exit.json: {} at step {}: {}".format(record["status"], record["step"], record["message"])
    written = load(exit_file) if exit_file else None
    if written is not None:
        return written["exit_code"], "rank {}: {}".format(written["rank"], written["error"])
    if exit_code == OK and not run_dir:
        return OK, "finished"
    state = "was killed" if fresh else "ended before it opened the run folder" if run_dir else "ended without a word"
    return exit_code or 1, "the run {} (exit code {} of the step)".format(state, exit_code)


def failures_in_a_row(history):
    """Trailing attempts that failed and left no newer checkpoint than they found; one without an end lost its node."""
    attempts = {}
    for event in history:
        attempts.setdefault(event["attempt"], {})[event["event"]] = event
    count, newest_now = 0, newest(history)
    for attempt in sorted(attempts, reverse=True):
        found, end = attempts[attempt].get("begin"), attempts[attempt].get("end")
        if end is not None and end["code"] == RESUMABLE:
            break
        if found is not None and newest_now > found["step"]:
            break
        count += 1
    return count


def newest(history):
    """The newest checkpoint any event of the job has seen."""
    return max([event["step"] for event in history])


def newest_step(run_dir):
    """Step of the newest complete checkpoint; -1 when there is none."""
    if not run_dir:
        return -1
    try:
        with open(os.path.join(run_dir, "checkpoints", "latest")) as file:
            return int(file.read().strip().rpartition("_")[2])
    except (FileNotFoundError, ValueError):
        return -1


def times_opened(run_dir):
    """How often the run folder has been opened before; None when never."""
    record = load(os.path.join(run_dir, "exit.json")) if run_dir else None
    return None if record is None else record["restarts"]


def load(path):
    """A JSON file; None when it is not there or cannot be read, which says no more than its absence."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def read(folder):
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


def append(folder, event):
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


def main():
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
    sys.stderr.write("{}: {}\n".format("requeue" if action == "requeue" else "end with {}".format(action), why))
    sys.stdout.write("{}\n".format(action))


if __name__ == "__main__":
    main()
