"""Judging in processes that can be killed.

A judge is a function of hostile input: it may not come back, take all memory or end its process, and neither signals nor
threads stop it then. So it runs in a process of its own, a fresh interpreter: a fork would copy a trainer's threads and CUDA
context, and multiprocessing's `spawn` would run the trainer's main module once more in every worker.

A worker must not outlive its trainer either, however that ends: it holds one end of a pipe nobody writes to, and the kernel
sends it SIGIO, which is fatal, when the trainer's end is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import math
import os
import pickle
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megarpt.errors import ConfigError, ExtensionError, MegarptError

logger = logging.getLogger(__name__)

GIB = 1 << 30

_LENGTH = struct.Struct("!Q")  # before every message
_READ_BYTES = 1 << 16
_MAX_RESULT_BYTES = 1 << 24
_MAX_TEXT = 2000  # characters of an error
_MAX_FAILED_STARTS = 3  # in a row
_BURY_S = 10.0
_MAIN = "import sys; sys.path[:] = sys.argv[3:]; from megarpt.rl.judging import work; work(int(sys.argv[1]), int(sys.argv[2]))"


@dataclass(frozen=True, slots=True)
class NotJudged:
    """What an item gets that has no result. `why` is for people."""

    why: str


class TimedOut(NotJudged):
    """It took longer than the limit; its worker was killed."""

    __slots__ = ()


class Died(NotJudged):
    """Its worker ended while it was at it."""

    __slots__ = ()


class Failed(NotJudged):
    """The function raised, or came close to the limit of memory: its results cannot be trusted then."""

    __slots__ = ()


class TooLarge(NotJudged):
    """The item was not sent."""

    __slots__ = ()


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    lifeline: int  # the writing end
    deadline: float
    ready: bool = False
    item: int | None = None
    outgoing: memoryview = field(default_factory=lambda: memoryview(b""))
    incoming: bytearray = field(default_factory=bytearray)


class Judges:
    """Workers that apply one function to items, each within a limit of time and memory.

    Workers start with the first items and stay for the next ones; one that was killed or died is replaced. May be used on any
    thread; calls from several threads take turns. Use it as a context manager or call `close`.
    """

    def __init__(
        self,
        function: Callable[[Any], Any] | str,
        *,
        workers: int = 2,
        limit_s: float = 5.0,
        memory_bytes: int = 2 * GIB,
        max_item_bytes: int = 1 << 20,
        start_limit_s: float = 120.0,
    ) -> None:
        """
        Args:
            function: takes an item and returns a result, both of which can be pickled. Workers import it by its module and
                name, so it is defined at the top of a module that is not the main one. What importing that module does is
                not part of the limits of an item. Given as `module:name` it is not imported here.
            workers: processes at most.
            limit_s: seconds of wall-clock time for an item.
            memory_bytes: address space a worker may take beyond what it has after loading the function. An item that drives
                it past half of this counts as failed, even if it returns: libraries turn a MemoryError into a wrong result.
            max_item_bytes: a larger item, pickled, is not sent.
            start_limit_s: seconds a worker may take to start and load the function.

        Raises:
            ConfigError: a number is out of range, or the function cannot be imported by name.
        """
        for what, value, least in (
            ("workers", workers, 1),
            ("memory_bytes", memory_bytes, 1 << 24),
            ("max_item_bytes", max_item_bytes, 1),
        ):
            if value < least:
                raise ConfigError(f"judging: {what} is {value:,}, expected at least {least:,}")
        for what, seconds in (("limit_s", limit_s), ("start_limit_s", start_limit_s)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise ConfigError(f"judging: {what} is {seconds}, expected a finite number of seconds above 0")
        if isinstance(function, str):
            module, _, name = function.partition(":")
        else:
            module, name = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", "")
        if module in ("", "__main__") or not name or "<" in name:
            raise ConfigError(
                f"judging: workers cannot import {function!r}; expected a function at the top of a module that is not the "
                "main one: move it to a file of its own"
            )
        self.counts: Counter[str] = Counter()  # of items: "judged" and, by kind, those that were not
        self._function = (module, name)
        self._workers = workers
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes
        self._max_item_bytes = max_item_bytes
        self._start_limit_s = start_limit_s
        self._pool: list[_Worker] = []
        self._failed_starts = 0
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers. It waits for a `judge` on another thread; closing again, or in a forked process, does nothing."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._closed = True
            self._end(self._pool)

    def judge(self, items: Iterable[Any]) -> list[Any]:
        """Results in the order of the items; a `NotJudged` for each item that has none.

        Takes at most about `limit_s` for every item and worker, besides starting workers.

        Raises:
            MegarptError: it is closed, or belongs to the process this one was forked from.
            ExtensionError: workers cannot load the function, or do not start.
        """
        if os.getpid() != self._owner:
            raise MegarptError("judging: these judges belong to the process that made them; make others after a fork")
        with self._lock:
            if self._closed:
                raise MegarptError("judging: the judges are closed; keep them open until the last judge() has returned")
            items = list(items)
            results: list[Any] = [None] * len(items)
            waiting = deque(range(len(items)))
            try:
                self._run(items, waiting, results)
            except BaseException:
                self._end(self._pool)  # what their items would be worth, nobody asks any more
                raise
        return results

    def _run(self, items: Sequence[Any], waiting: deque[int], results: list[Any]) -> None:
        self._receive([worker for worker in self._pool if worker.item is None], 0.0, results)  # those that died meanwhile
        while True:
            self._hand_out(items, waiting, results)
            busy = [worker for worker in self._pool if worker.item is not None or not worker.ready]
            if not waiting and all(worker.item is None for worker in busy):
                return
            nearest = min(worker.deadline for worker in busy)
            self._receive(busy, max(0.0, nearest - time.monotonic()), results)
            self._end_overdue(busy, results)

    def _hand_out(self, items: Sequence[Any], waiting: deque[int], results: list[Any]) -> None:
        """Give every free worker an item, and start workers for the items that are left."""
        for worker in self._pool:
            while waiting and worker.ready and worker.item is None:
                index = waiting.popleft()
                message = pickle.dumps(items[index], protocol=pickle.HIGHEST_PROTOCOL)
                if len(message) > self._max_item_bytes:
                    text = f"the item has {len(message):,} bytes, more than the {self._max_item_bytes:,} allowed"
                    self._give(results, index, TooLarge(text))
                    continue
                worker.item = index
                worker.outgoing = memoryview(_LENGTH.pack(len(message)) + message)
                worker.deadline = time.monotonic() + self._limit_s
        starting = sum(not worker.ready for worker in self._pool)
        for _ in range(min(self._workers - len(self._pool), len(waiting) - starting)):
            self._pool.append(self._start())

    def _start(self) -> _Worker:
        channel, theirs = socket.socketpair()
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(theirs.fileno()), str(reading), *sys.path],
                pass_fds=(theirs.fileno(), reading),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # standard error stays open until it is ready, for what goes wrong before
                start_new_session=True,  # what it starts dies with it, and Ctrl-C is for the trainer
            )
        except BaseException:
            channel.close()
            os.close(writing)
            raise
        finally:
            theirs.close()
            os.close(reading)
        channel.setblocking(False)
        setup = pickle.dumps((*self._function, self._memory_bytes))
        channel.send(_LENGTH.pack(len(setup)) + setup)  # fits the empty buffer
        return _Worker(process, channel, writing, time.monotonic() + self._start_limit_s)

    def _receive(self, workers: Sequence[_Worker], wait_s: float, results: list[Any]) -> None:
        """Send and read what can be, waiting for the first of it."""
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
                selector.register(worker.channel, events, worker)
            ready = selector.select(wait_s) if workers else []
        for key, _ in ready:
            worker = key.data
            try:
                if worker.outgoing:
                    with contextlib.suppress(BlockingIOError):
                        worker.outgoing = worker.outgoing[worker.channel.send(worker.outgoing) :]
                with contextlib.suppress(BlockingIOError):
                    piece = worker.channel.recv(_READ_BYTES)
                    if not piece:
                        raise EOFError
                    worker.incoming += piece
            except (EOFError, OSError):
                self._bury(worker, results)
                continue
            self._take(worker, results)

    def _take(self, worker: _Worker, results: list[Any]) -> None:
        """Act on a message that is complete; a worker sends one for each it gets."""
        if len(worker.incoming) < _LENGTH.size:
            return
        (length,) = _LENGTH.unpack_from(worker.incoming)
        if len(worker.incoming) < _LENGTH.size + length:
            return
        kind, content, is_last = pickle.loads(memoryview(worker.incoming)[_LENGTH.size :])
        worker.incoming = bytearray()
        if kind == "unusable":
            raise ExtensionError(f"judging: a worker cannot load {'.'.join(self._function)}: {content}")
        if kind == "ready":
            worker.ready = True
            self._failed_starts = 0
            return
        index, worker.item = worker.item, None
        assert index is not None
        self._give(results, index, Failed(content) if kind == "failed" else content)
        if is_last:
            self._end([worker])

    def _bury(self, worker: _Worker, results: list[Any]) -> None:
        """Of a worker that ended by itself."""
        self._end([worker])
        code = worker.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        if not worker.ready:
            self._start_failed(f"a worker {how}")
        if worker.item is not None:
            self._give(results, worker.item, Died(f"the worker {how}"))

    def _end_overdue(self, busy: Sequence[_Worker], results: list[Any]) -> None:
        now = time.monotonic()
        for worker in busy:
            if worker not in self._pool or now < worker.deadline or (worker.ready and worker.item is None):
                continue
            self._end([worker])
            if not worker.ready:
                self._start_failed(f"a worker was not ready after {self._start_limit_s:g} s")
            if worker.item is not None:
                self._give(results, worker.item, TimedOut(f"no result after {self._limit_s:g} s"))

    def _start_failed(self, how: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise ExtensionError(
                f"judging: {self._failed_starts} workers in a row did not start: {how} while it loaded "
                f"{'.'.join(self._function)}. Standard error says more; importing that module in a Python of its own shows it"
            )

    def _give(self, results: list[Any], index: int, result: Any) -> None:
        results[index] = result
        kind = type(result).__name__ if isinstance(result, NotJudged) else "judged"
        self.counts[kind] += 1
        if kind != "judged" and self.counts[kind] == 1:
            logger.warning("judging: %s: %s; this is said once, and counted after", kind, result.why)

    def _end(self, workers: Sequence[_Worker]) -> None:
        """Kill them with all they started, and close what belongs to them."""
        workers = list(workers)
        for worker in workers:
            if worker.process.returncode is None:  # not waited for, so that the number is still its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.process.pid, signal.SIGKILL)
        for worker in workers:
            try:
                worker.process.wait(_BURY_S)
            except subprocess.TimeoutExpired:
                logger.warning("judging: process %d does not end although it was killed", worker.process.pid)
            worker.channel.close()
            with contextlib.suppress(OSError):
                os.close(worker.lifeline)
            self._pool.remove(worker)


def work(channel_fd: int, lifeline_fd: int) -> None:
    """What a worker does: load the function, then answer every item until nobody asks."""
    _live_no_longer_than(lifeline_fd)
    channel = socket.socket(fileno=channel_fd)
    channel.set_inheritable(False)
    setup = _read(channel)
    if setup is None:
        return
    module, name, memory_bytes = pickle.loads(setup)
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except BaseException as error:  # noqa: BLE001  the trainer raises it
        _write(channel, ("unusable", _text(error), True))
        return
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    before, peak_before = _address_space()
    _limit(resource.RLIMIT_AS, before + memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    _write(channel, ("ready", None, False))
    while (message := _read(channel)) is not None:
        try:
            kind, content = "result", function(pickle.loads(message))
        except BaseException as error:  # noqa: BLE001  the item gets it
            kind, content = "failed", _text(error)
            is_last = isinstance(error, MemoryError)
        else:
            now, peak = _address_space()
            is_last = now - before > memory_bytes // 4  # so that what it keeps is never held against an item
            if peak > max(peak_before, before + memory_bytes // 2):
                kind, content, is_last = "failed", f"it came close to the limit of {memory_bytes:,} bytes of memory", True
        del message
        _write(channel, (kind, content, is_last))


def _live_no_longer_than(lifeline_fd: int) -> None:
    os.set_inheritable(lifeline_fd, False)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # masks are inherited
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _address_space() -> tuple[int, int]:
    """Bytes now, and at most since the process began."""
    sizes = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(sizes[name].split()[0]) << 10 for name in ("VmSize", "VmPeak"))
    return now, peak


def _text(error: BaseException) -> str:
    """It may be long, and its own text may fail to be made."""
    try:
        return f"{type(error).__name__}: {error}"[:_MAX_TEXT]
    except Exception:  # noqa: BLE001
        return type(error).__name__


def _read(channel: socket.socket) -> bytes | None:
    """One message; None when the trainer is gone."""
    head = _read_exactly(channel, _LENGTH.size)
    return None if head is None else _read_exactly(channel, _LENGTH.unpack(head)[0])


def _read_exactly(channel: socket.socket, count: int) -> bytes | None:
    content = bytearray()
    while len(content) < count:
        piece = channel.recv(min(count - len(content), _READ_BYTES))
        if not piece:
            return None
        content += piece
    return bytes(content)


def _write(channel: socket.socket, message: tuple[str, Any, bool]) -> None:
    kind, _, is_last = message
    try:
        packed = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001  the item gets it
        packed = pickle.dumps(("failed", f"the result cannot be pickled: {_text(error)}", is_last))
    if len(packed) > _MAX_RESULT_BYTES:
        packed = pickle.dumps(("failed", f"a {kind} of {len(packed):,} bytes, more than {_MAX_RESULT_BYTES:,}", is_last))
    channel.sendall(_LENGTH.pack(len(packed)) + packed)
