"""`metrics.jsonl`: appended line by line, cut back on resume, read again.

JSON has no NaN, so a non-finite number is written as the string "nan", "inf" or "-inf"; `read_metrics` turns it back.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from megarpt.corpus.atomic import cannot_write, fsync_directory
from megarpt.errors import DataError

logger = logging.getLogger(__name__)

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
DISCARDED = "metrics.discarded.jsonl"


class MetricsFile:
    """The open file. A line is handed to the operating system whole before `append` returns: a killed process loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            fsync_directory(path.parent)
        except OSError as error:
            raise cannot_write(path, error) from error

    def append(self, fields: Mapping[str, str | int | float]) -> None:
        """Write one line.

        Raises:
            DataError: the disk is full or the file system failed; the file still ends with a whole line.
        """
        strict = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        line = json.dumps(strict, allow_nan=False).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            if written != len(line):
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def sync(self) -> None:
        """Make the lines survive a power failure."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        os.close(self._file)


def read_metrics(
    path: Path, kind: str | None = None, *, on_damage: Callable[[str], None] | None = None
) -> Iterator[dict[str, str | int | float]]:
    """The lines of a metrics file, of one kind or all; a partial last line is left out.

    Args:
        path: the file.
        kind: of the lines wanted.
        on_damage: takes the message about a damaged line, which is then passed over.

    Raises:
        DataError: a line other than a partial last one is not a metrics line, and there is no `on_damage`.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            line = _parse(raw)
            if line is None:
                message = f"{path}, line {number}: got {raw[:80]!r}, expected a metrics line; remove it to read the rest"
                if on_damage is None:
                    raise DataError(message)
                on_damage(message)
                continue
            if kind is None or line["kind"] == kind:
                yield {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in line.items()}


def rewind_metrics(path: Path, step: int) -> set[str]:
    """Cut off the lines beyond `step`, and a partial last line; return the kinds of the lines that `step` itself has.

    The lines are moved to `metrics.discarded.jsonl` first. Cutting is one `ftruncate`, so a process killed here leaves the file
    as it was or as it is wanted, and doing it again changes nothing. Reads backwards: the cost is that of the lines cut.

    Raises:
        DataError: the file cannot be read or written.
    """
    try:
        if not path.exists() or path.stat().st_size == 0:
            return set()
        with path.open("r+b") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                keep = _end_of_step(content, step)
                kinds = _kinds_at(content, keep, step)
                discarded = content[keep:]
            if discarded:
                _keep_discarded(path.with_name(DISCARDED), discarded)
                file.truncate(keep)
                os.fsync(file.fileno())
                logger.info("moved %d bytes of metrics beyond step %d to %s", len(discarded), max(step, 0), DISCARDED)
    except OSError as error:
        raise cannot_write(path, error) from error
    return kinds


def _keep_discarded(path: Path, lines: bytes) -> None:
    with path.open("ab") as file:
        file.write(lines if lines.endswith(b"\n") else lines + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _end_of_step(content: mmap.mmap, step: int) -> int:
    """Offset behind the last whole line whose step is at most `step`."""
    for start, end in _lines_backwards(content, len(content)):
        line = _parse(content[start:end])
        if line is not None and int(line["step"]) <= step:
            return end
    return 0


def _kinds_at(content: mmap.mmap, end: int, step: int) -> set[str]:
    kinds: set[str] = set()
    for start, stop in _lines_backwards(content, end):
        line = _parse(content[start:stop])
        if line is None or line["step"] != step:
            break
        kinds.add(str(line["kind"]))
    return kinds


def _lines_backwards(content: mmap.mmap, end: int) -> Iterator[tuple[int, int]]:
    while end > 0:
        start = content.rfind(b"\n", 0, end - 1) + 1
        yield start, end
        end = start


def _parse(raw: bytes) -> dict[str, str | int | float] | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line else None
