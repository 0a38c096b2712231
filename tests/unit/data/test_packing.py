import random

import pytest

from megarpt.data.packing import best_fit_decreasing


@pytest.mark.parametrize("seed", range(20))
def test_every_record_has_one_row_and_no_row_is_too_long(seed):
    generator = random.Random(seed)
    lengths = [generator.randint(1, 64) for _ in range(generator.randint(1, 80))]
    rows = best_fit_decreasing(lengths, 64)
    assert sorted(record for row in rows for record in row) == list(range(len(lengths)))
    assert all(sum(lengths[record] for record in row) <= 64 for row in rows)
    fewest = -(-sum(lengths) // 64)
    assert len(rows) <= 11 / 9 * max(fewest, sum(length > 32 for length in lengths)) + 1


def test_rows_are_filled_where_that_is_possible():
    assert best_fit_decreasing([3, 7, 5, 5, 10], 10) == [[4], [1, 0], [2, 3]]


def test_a_record_goes_where_it_leaves_the_least_room():
    rows = best_fit_decreasing([6, 8, 2, 4], 10)
    assert rows == [[1, 2], [0, 3]]


def test_nothing_needs_no_row():
    assert best_fit_decreasing([], 10) == []
