"""One thread that draws completions for many who ask for them.

The engine is only touched by the thread inside `run`. Others hand it work and are told, in that thread, what comes of it. A
change of the weights waits until what runs has ended, and what is asked for meanwhile waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from megarpt.errors import MegarptError, RolloutError
from megarpt.rl.rollout import Sampling
from megarpt.rl.structs import Completion


class SteppedEngine(Protocol):
    """An engine that is told when to go on; see `EmbeddedEngine`."""

    policy_version: int

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        ...

    def add(self, key: str, prompt: Sequence[int], sampling: Sampling, *, prompt_id: str, sample: int) -> None:
        """Queue a completion."""
        ...

    def step(self) -> list[tuple[str, Completion]]:
        """Go on; what has ended with that."""
        ...

    def cancel(self, key: str) -> None:
        """Stop drawing a completion."""
        ...

    def publish(self, version: int) -> None:
        """Call the weights `version`."""
        ...


@runtime_checkable
class ShowsProgress(Protocol):
    """An engine that can be asked for completions that have not ended."""

    def drawn_so_far(self, key: str) -> tuple[Sequence[int], Sequence[float]]:
        """Tokens and log-probabilities of a completion that runs; none of one that waits."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A completion that is asked for."""

    prompt: tuple[int, ...]
    sampling: Sampling
    prompt_id: str
    sample: int


class Progress(NamedTuple):
    """Tokens of a completion since the last report."""

    tokens: Sequence[int]
    logprobs: Sequence[float]


Event = Progress | Completion | RolloutError
Report = Callable[[int, Event], None]  # number of the order, what happened; a completion or an error is the last


class BusyError(RolloutError):
    """More completions are asked for than may wait."""


class _Ticket:
    """Orders that were handed in together."""

    def __init__(self, number: int, orders: Sequence[Order], report: Report, wants_progress: bool) -> None:
        self.number, self.orders, self.report, self.wants_progress = number, orders, report, wants_progress
        self.open = set(range(len(orders)))
        self.seen = [0] * len(orders)  # tokens reported

    def key(self, index: int) -> str:
        return f"{self.number}/{index}"


class EngineLoop:
    """Work for an engine, from many threads.

    Args:
        engine: used by the thread of `run` only, from now on.
        max_waiting: completions that may be asked for and not yet ended.
    """

    def __init__(self, engine: SteppedEngine, *, max_waiting: int) -> None:
        self._engine, self._max_waiting = engine, max_waiting
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._count, self._number = 0, 0  # completions not yet ended, tickets so far; under the lock
        self._is_closed = False  # under the lock
        self._tickets: dict[int, _Ticket] = {}
        self._held: deque[_Ticket] = deque()  # while a change waits
        self._changes: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._is_stopping = False

    @property
    def policy_version(self) -> int:
        """Of the weights that are in use."""
        return self._engine.policy_version

    @property
    def is_open(self) -> bool:
        """Whether work is taken."""
        return not self._is_closed

    def submit(self, orders: Sequence[Order], report: Report, *, wants_progress: bool = False) -> int:
        """Ask for completions; the number of the ticket, for `cancel`.

        Args:
            orders: what to draw.
            report: called in the engine's thread; must not wait.
            wants_progress: report tokens as they are drawn, where the engine can.

        Raises:
            BusyError: too many wait already.
            RolloutError: the loop has ended.
        """
        with self._lock:
            self._require_open()
            if self._count + len(orders) > self._max_waiting:
                raise BusyError(
                    f"{self._count} completions wait or run and {len(orders)} more were asked for, expected at most "
                    f"{self._max_waiting} together; ask again later"
                )
            self._count += len(orders)
            self._number += 1
            ticket = _Ticket(self._number, orders, report, wants_progress and isinstance(self._engine, ShowsProgress))
            self._commands.put(lambda: self._take(ticket))
        return ticket.number

    def cancel(self, number: int, index: int | None = None) -> None:
        """Stop drawing a ticket's completions, or one of them; nothing more is reported of it. What has ended is left alone."""
        self._commands.put(lambda: self._cancel(number, index))

    def change(self, action: Callable[[], None]) -> Future[None]:
        """Do something to the engine when it draws nothing; what `action` raises is the future's.

        Raises:
            RolloutError: the loop has ended.
        """
        done: Future[None] = Future()
        with self._lock:
            self._require_open()
            self._commands.put(lambda: self._changes.append((action, done)))
        return done

    def stop(self) -> None:
        """Have `run` return; what has not ended gets an error. May be called from a signal handler."""
        self._commands.put(self._stop)

    def run(self) -> None:
        """Draw until `stop`. What the engine raises ends it, after everyone was told."""
        try:
            while not self._is_stopping:
                self._read_commands()
                if self._changes and self._engine.is_idle:
                    self._make_change()
                elif not self._engine.is_idle:
                    self._advance()
        finally:
            self._close()

    def _require_open(self) -> None:
        if self._is_closed:
            raise RolloutError("the server is ending and draws no more completions")

    def _stop(self) -> None:
        self._is_stopping = True

    def _read_commands(self) -> None:
        """All that have come in; where there is nothing else to do, wait for one."""
        if self._engine.is_idle and not self._changes:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _take(self, ticket: _Ticket) -> None:
        self._tickets[ticket.number] = ticket
        if self._changes or self._is_stopping:
            self._held.append(ticket)
        else:
            self._admit(ticket)

    def _admit(self, ticket: _Ticket) -> None:
        for index in sorted(ticket.open):
            order = ticket.orders[index]
            try:
                self._engine.add(
                    ticket.key(index), order.prompt, order.sampling, prompt_id=order.prompt_id, sample=order.sample
                )
            except RolloutError as error:
                self._end(ticket, index, error)

    def _cancel(self, number: int, index: int | None) -> None:
        ticket = self._tickets.get(number)
        if ticket is None:
            return
        for each in sorted(ticket.open if index is None else ticket.open & {index}):
            if ticket not in self._held:
                self._engine.cancel(ticket.key(each))
            self._forget(ticket, each)

    def _make_change(self) -> None:
        action, done = self._changes[0]
        try:
            action()
        except MegarptError as error:  # anything else ends the loop: the weights may be half changed
            done.set_exception(error)
        else:
            done.set_result(None)
        self._changes.popleft()
        while self._held and not self._changes:
            self._admit(self._held.popleft())

    def _advance(self) -> None:
        finished = self._engine.step()
        for key, completion in finished:
            number, index = map(int, key.split("/"))
            self._end(self._tickets[number], index, completion)
        for ticket in list(self._tickets.values()):
            if ticket.wants_progress and ticket not in self._held:
                self._report_progress(ticket)

    def _report_progress(self, ticket: _Ticket) -> None:
        engine = self._engine
        assert isinstance(engine, ShowsProgress), "asked when the ticket was made"
        for index in sorted(ticket.open):
            tokens, logprobs = engine.drawn_so_far(ticket.key(index))
            start = ticket.seen[index]
            if len(tokens) > start:
                ticket.seen[index] = len(tokens)
                ticket.report(index, Progress(tuple(tokens[start:]), tuple(logprobs[start:])))

    def _end(self, ticket: _Ticket, index: int, event: Completion | RolloutError) -> None:
        self._forget(ticket, index)
        ticket.report(index, event)

    def _forget(self, ticket: _Ticket, index: int) -> None:
        ticket.open.discard(index)
        if not ticket.open:
            self._tickets.pop(ticket.number, None)
        with self._lock:
            self._count -= 1

    def _close(self) -> None:
        with self._lock:
            self._is_closed = self._is_stopping = True
        while not self._commands.empty():
            self._commands.get()()
        error = RolloutError("the server ended before this completion did; ask again when it is back")
        for ticket in list(self._tickets.values()):
            for index in sorted(ticket.open):
                self._end(ticket, index, error)
        for _, done in self._changes:
            done.set_exception(error)
