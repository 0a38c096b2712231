"""Files of records, JSON Lines, read whole: prompts, questions, answers. Corpora are read by `readers.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarpt.errors import DataError

_SHOWN = 80  # characters of a value in a message


def read_records(path: Path, *, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record), from 1; empty lines are passed over.

    Args:
        path: of the file.
        what: is in it, for messages.

    Raises:
        DataError: the file cannot be read, or a line is no object.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # no UTF-8 is one too
                    raise DataError(f"{path}:{number}: this is no JSON ({error}); expected an object on every line") from error
                if not isinstance(record, dict):
                    raise DataError(f"{path}:{number}: got {shorten(record)}, expected an object with the keys of {what}")
                yield number, record
    except OSError as error:
        raise DataError(f"cannot read {what} {path}: {error.strerror or error}; expected a file of JSON Lines") from error


def shorten(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
