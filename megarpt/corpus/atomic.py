"""Files that are whole or absent, and errors of the file system said in full."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarpt.errors import DataError

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write_bytes(path: Path | str, content: bytes) -> None:
    """Replace `path` by `content`: a reader, or a process killed at any moment, finds the old file or the new one.

    Raises:
        DataError: the file system refused; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # always the same, so that what a killed process leaves is used up
    with write_errors(path, needed=len(content)):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(path.parent)


def atomic_write_json(path: Path | str, content: Any) -> None:
    """`atomic_write_bytes` of indented JSON."""
    atomic_write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def fsync_directory(path: Path | str) -> None:
    """Make new names and renames in a directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path | str) -> int:
    """Free space of the file system that holds `path`, or would hold it."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_free_bytes(path: Path | str, needed: int) -> None:
    """Refuse a job that cannot end well.

    Raises:
        DataError: the file system of `path` has less than `needed` bytes left.
    """
    free = free_bytes(path)
    if free < needed:
        raise DataError(
            f"not enough space for {path}: got {free:,} bytes free, expected at least {needed:,}; free space or choose another "
            "place for the output"
        )


@contextlib.contextmanager
def write_errors(path: Path | str, *, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError of the body, which writes `path`, into a DataError that says what was missing.

    Raises:
        DataError: the body met an OSError.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, needed=needed) from error


def cannot_write(path: Path | str, error: OSError, *, needed: int | None = None) -> DataError:
    """The error for a file that could not be written."""
    what = f"cannot write {path}: {error.strerror or error}"
    if error.errno not in _OUT_OF_SPACE:
        return DataError(f"{what}; check that the folder exists and may be written, then run the same command again")
    need = f"about {needed:,} bytes needed, " if needed else ""
    return DataError(
        f"{what} ({need}{free_bytes(path):,} free on its file system; a quota or a limit on file size may be lower); free "
        "space, then run the same command again: what was finished is kept"
    )
