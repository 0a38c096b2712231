"""One rank fails, all end within a bounded time, and everyone says which rank it was.

    faults/attempt_<n>/failure.json    the first failure of an attempt: rank, host, process, error, traceback
    faults/attempt_<n>/rank_<r>.lock   locked by rank r while it runs; a process that was killed leaves its file unlocked

When a rank fails its peers only see broken connections, or wait for ever. So the rank that fails writes down why, and the
others look there before they speak. Each rank also looks after the next one: whoever ends without a word is reported by a
neighbour. All of it goes through the run folder, which every rank shares.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch.distributed as dist

from megarpt.errors import MegarptError, PeerFailedError, StopRequested
from megarpt.train.rundir import verdict_of
from megarpt.train.sharded import gathered

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WAIT_S = 10.0  # for the word of the rank that failed: file systems over a network show it late
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an attempt ended."""

    rank: int
    host: str
    pid: int
    time: str
    error: str  # type and message
    traceback: str  # empty when the process ended without a word
    exit_code: int

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid}) {'failed' if self.traceback else 'is gone'}: {self.error}"


class Peers:
    """What the ranks of one attempt know of each other's end; a context around everything that may fail.

    Leaving it through an exception writes `failure.json`, unless the exception follows from another rank's failure: then a
    `PeerFailedError` that names the other takes its place.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        """Make the folder and lock this rank's file. Collectives: one barrier, so that nobody is missed who has yet to come."""
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self._lock: int | None = None
        if world_size > 1:
            folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            dist.barrier()

    @property
    def path(self) -> Path:
        return self.folder / "failure.json"

    def failure(self) -> Failure | None:
        """The first failure of this attempt, once there is one; a neighbour that ended without a word counts."""
        found = self._read()
        if found is None and self.world_size > 1:
            gone = self._gone_neighbour()
            # A rank writes its failure down before it lets go of its lock.
            found = self._read() or (gone and self._report(gone))
        return found

    def consequence(self, failure: Failure) -> str:
        """What to say when this rank ends because of another's failure."""
        return f"rank {self.rank} ended because {failure} (more in {self.path})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None or isinstance(error, StopRequested):
                self._leave()
                return
            cause = self._cause(error)
            if cause is None:
                if self.world_size > 1:
                    error.add_note(f"on rank {self.rank} of {self.world_size} (host {socket.gethostname()}, pid {os.getpid()})")
                self._report(self._own(error))
            else:
                raise PeerFailedError(self.consequence(cause), cause.exit_code) from error
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def _leave(self) -> None:
        """A good end leaves nothing behind."""
        self._lock_path(self.rank).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the last one to leave finds the folders empty
            self.folder.rmdir()
            self.folder.parent.rmdir()

    def _cause(self, error: BaseException) -> Failure | None:
        """The failure of another rank that `error` follows from."""
        if self.world_size == 1 or not is_broken_connection(error):
            return None
        deadline = time.monotonic() + _WAIT_S
        while (found := self.failure()) is None and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return found if found is not None and found.rank != self.rank else None

    def _own(self, error: BaseException) -> Failure:
        text = "".join(traceback.format_exception(error))
        return self._describe(f"{type(error).__name__}: {error}", text, verdict_of(error)[1])

    def _describe(self, error: str, text: str, exit_code: int, *, rank: int | None = None, where: str = "") -> Failure:
        host, _, pid = (where or f"{socket.gethostname()} {os.getpid()}").partition(" ")
        return Failure(
            rank=self.rank if rank is None else rank,
            host=host,
            pid=int(pid) if pid.isdecimal() else 0,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            error=error,
            traceback=text,
            exit_code=exit_code,
        )

    def _report(self, failure: Failure) -> Failure:
        """Write the failure down, unless another was first; the one that counts. Never in the way of the failure itself."""
        own = self.folder / f".failure.{self.rank}.{threading.get_ident()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps({"summary": str(failure), **asdict(failure)}, indent=2) + "\n", encoding="utf-8")
            try:
                os.link(own, self.path)  # the name appears with the whole content, and only for the first
            except FileExistsError:
                return self._read() or failure
            finally:
                own.unlink()
        except OSError as error:
            logger.error("the failure of rank %d cannot be written to %s: %s", failure.rank, self.path, error)
        return failure

    def _read(self) -> Failure | None:
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        content.pop("summary")
        return Failure(**content)

    def _lock_path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.lock"

    def _take_lock(self) -> None:
        # A POSIX record lock, as in `rundir`: it ends with this very process, and works over NFS.
        path = self._lock_path(self.rank)
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): a rank that is killed will not be named", path, error.strerror)
            path.unlink(missing_ok=True)
        os.write(self._lock, f"{socket.gethostname()} {os.getpid()}".encode())

    def _gone_neighbour(self) -> Failure | None:
        """The next rank, when its process has ended without removing its lock file, as a normal end does."""
        rank = (self.rank + 1) % self.world_size
        try:
            file = os.open(self._lock_path(rank), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            where = os.pread(file, 4096, 0).decode(errors="replace")
        except OSError:
            return None
        finally:
            os.close(file)
        if not self._lock_path(rank).exists():
            return None
        reason = "killed (out of memory, or with its node) or crashed in native code"
        return self._describe(reason, "", 1, rank=rank, where=where)


def is_broken_connection(error: BaseException) -> bool:
    """Whether an exception says that a peer could not be reached; whose fault that is remains open."""
    return any(isinstance(each, dist.DistError) or "/gloo/" in str(each) for each in _chain(error))


def together(action: Callable[[], T]) -> T:
    """The result of an action of this rank; when it raises a `MegarptError` on any rank, every rank raises the first.

    Collectives: one gather of objects, none in a world of one.
    """
    try:
        result = action()
    except MegarptError as error:
        gathered(error)
        raise
    first = next((each for each in gathered(None) if each is not None), None)
    if first is not None:
        raise first
    return result


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
