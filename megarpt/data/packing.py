"""Which variable-length records share a row of fixed length."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of record numbers, none longer than `capacity`. The longest records are placed first, each where it leaves
    the least room. The same lengths give the same rows.

    Args:
        lengths: of the records, each from 1 to `capacity`.
        capacity: of a row.

    Cost: O(n log n) comparisons and, where many rows have the same room left, list insertions.
    Source: best-fit decreasing, D. S. Johnson (1973): at most 11/9 of the fewest possible rows and 6/9 of one.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), ascending
    for record in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[record]
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(record)
        bisect.insort(room, (left - length, row))
    return rows
