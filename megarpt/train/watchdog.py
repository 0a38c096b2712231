"""A thread that ends a job which stands still, and says where every rank stands.

    faults/attempt_<n>/rank_<r>.stacks.txt        what every thread of rank r was doing
    faults/attempt_<n>/rank_<r>.collectives.json  the last collectives it started (torch's flight recorder)
    faults/attempt_<n>/rank_<r>.hang.json         one line about it
    faults/attempt_<n>/hang                       the sign for all ranks to write theirs

The main thread may be inside a collective whose peer never comes: no exception reaches it and no signal handler runs. This
thread still does, and leaves the process by `os._exit`.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megarpt.corpus.atomic import atomic_write_bytes, atomic_write_json
from megarpt.errors import EXIT_HANG, DataError
from megarpt.train.failures import Failure, Peers
from megarpt.train.rundir import RunDir

logger = logging.getLogger(__name__)


class Watchdog:
    """Looks after this rank and its peers; a context around everything that may hang."""

    def __init__(
        self,
        run: RunDir,
        peers: Peers,
        *,
        hang_timeout_s: float,
        flight_record: Callable[[], bytes] = bytes,
        poll_s: float = 2.0,
        grace_s: float = 15.0,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        """Nothing is watched before the context is entered.

        Args:
            run: gets the verdict, on the writer rank.
            peers: whose failure ends this rank too.
            hang_timeout_s: the longest time between two beats; 0 waits for ever.
            flight_record: the last collectives of this rank; empty when nothing records them.
            poll_s: how often to look.
            grace_s: how long this rank may take to end by itself after a peer has failed, and how long to wait for the stacks
                of the others.
            end: how to leave the process.
        """
        self._run, self._peers, self._flight_record = run, peers, flight_record
        self._hang_timeout_s, self._poll_s, self._grace_s, self._end = hang_timeout_s, poll_s, grace_s, end
        self._beat = (time.monotonic(), "start")
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="megarpt-watchdog", daemon=True)
        self._failed_at: float | None = None
        self._sign = peers.folder / "hang"

    def beat(self, phase: str) -> None:
        """This rank makes progress; `phase` names what it begins now. Cost: well below a microsecond."""
        self._beat = (time.monotonic(), phase)

    def __enter__(self) -> Self:
        self.beat("start")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leaving.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._leaving.wait(self._poll_s):
            failure = self._peers.failure()
            if failure is not None and failure.rank != self._peers.rank:
                self._follow(failure)
            if self._hang_timeout_s > 0.0:
                # Should native code hold the interpreter for ever, this thread stops too; faulthandler's needs no interpreter.
                limit = self._hang_timeout_s + 2.0 * self._grace_s
                faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__ or sys.stderr)
                if time.monotonic() - self._beat[0] > self._hang_timeout_s or self._sign.exists():
                    self._end_hung()

    def _follow(self, failure: Failure) -> None:
        """End with a peer that failed, once the main thread has had its time to do so by itself."""
        now = time.monotonic()
        self._failed_at = self._failed_at or now
        if now - self._failed_at > self._grace_s:
            message = self._peers.consequence(failure)
            logger.error("%s", message)
            self._leave("failed", message, failure.exit_code)

    def _end_hung(self) -> None:
        self._dump()
        deadline = time.monotonic() + self._grace_s
        while len(self._reports()) < self._peers.world_size and time.monotonic() < deadline:
            time.sleep(self._poll_s / 10.0)
        reports = self._reports()
        message = self._describe(reports)
        if self._peers.rank == min(reports, default=self._peers.rank):
            logger.error("%s", message)
        self._leave("hung", message, EXIT_HANG)

    def _dump(self) -> None:
        """Write down where this rank stands."""
        folder, rank = self._peers.folder, self._peers.rank
        since, phase = self._beat
        report = {
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": phase,
            "seconds": round(time.monotonic() - since, 1),
            "where": where_is(sys._current_frames()[threading.main_thread().ident or 0]),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._sign.touch()
            with (folder / f"rank_{rank}.stacks.txt").open("w", encoding="utf-8") as file:
                file.write(f"{json.dumps(report)}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            collectives = self._flight_record()
            if collectives:
                atomic_write_bytes(folder / f"rank_{rank}.collectives.json", collectives)
            atomic_write_json(folder / f"rank_{rank}.hang.json", report)
        except (OSError, DataError) as error:
            logger.error("rank %d hangs %s, and its stacks cannot be written: %s", rank, report["where"], error)

    def _reports(self) -> dict[int, dict[str, Any]]:
        """What the ranks that found themselves hanging, or were told so, have written."""
        reports = {}
        for path in self._peers.folder.glob("rank_*.hang.json"):
            try:
                report = json.loads(path.read_bytes())
            except (OSError, ValueError):
                continue
            reports[int(report["rank"])] = report
        return reports

    def _describe(self, reports: dict[int, dict[str, Any]]) -> str:
        """Who stands where; ranks that stand together are named together, the fewest first."""
        places: dict[str, list[int]] = {}
        for rank, report in sorted(reports.items()):
            places.setdefault(f"in {report['phase']}, {report['where']}", []).append(rank)
        silent = sorted(set(range(self._peers.world_size)) - set(reports))
        lines = [f"  {rank_list(ranks)} {place}" for place, ranks in sorted(places.items(), key=lambda item: len(item[1]))]
        if silent:
            lines.insert(0, f"  {rank_list(silent)} did not answer: the process is gone or native code holds its interpreter")
        return "\n".join(
            [
                f"no progress for {self._hang_timeout_s:g} s (faults.hang_timeout_minutes):",
                *lines,
                f"all stacks are in {self._peers.folder}, the checkpoints are intact: run the same command again",
            ]
        )

    def _leave(self, status: Any, message: str, exit_code: int) -> None:
        try:
            self._run.finish(status, message, exit_code=exit_code)
        except DataError as error:
            logger.error("exit.json cannot be written: %s", error)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._leaving.set()
        self._end(exit_code)


def where_is(frame: Any) -> str:
    """The innermost call of a thread, and the innermost one of this package that led there."""
    calls = traceback.extract_stack(frame)
    inner = calls[-1]
    own = next((call for call in reversed(calls) if "/megarpt/" in call.filename), inner)
    parts = [f"{_short(call.filename)}:{call.lineno} {call.name}" for call in (inner, own)]
    return " < ".join(dict.fromkeys(parts))


def rank_list(ranks: list[int]) -> str:
    """ "rank 3" or "ranks 0-2, 7"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _short(filename: str) -> str:
    return "/".join(Path(filename).parts[-2:])
