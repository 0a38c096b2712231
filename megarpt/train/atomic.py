"""Files that are whole or absent, whatever happens to the process."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from megarpt.errors import DataError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader, or a process killed at any moment, finds the old file or the new one.

    Raises:
        DataError: the file system refused (disk full, no permission); the old file is untouched.
    """
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = ""
        sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary:
            os.unlink(temporary)


def write_json_atomically(path: Path, content: Any) -> None:
    """`write_atomically` of indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> DataError:
    """The error for a file that could not be written."""
    return DataError(
        f"cannot write {path}: {error.strerror or error}; "
        "free space or fix the permissions, then run the same command again: what was already written is intact"
    )
