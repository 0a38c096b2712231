from collections import Counter

import numpy as np
import pytest

from megarpt.data.order import Blend, SampleOrder, permute, round_keys

AWKWARD_SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 31, 32, 33, 97, 127, 128, 129, 1000, 1021, 4095, 4096, 4097, 65537]


@pytest.mark.parametrize("n", AWKWARD_SIZES)
def test_permutation_is_a_bijection(n: int) -> None:
    image = permute(np.arange(n), n, round_keys(7, 1, 3))
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permutation_of_a_part_is_part_of_the_permutation() -> None:
    n, keys = 1021, round_keys(0, 0, 0)
    whole = permute(np.arange(n), n, keys)
    some = np.array([1020, 0, 511, 512, 7])
    assert np.array_equal(permute(some, n, keys), whole[some])


def test_huge_domains_need_no_memory() -> None:
    n = 2**41 + 12345
    image = permute(np.arange(n - 1000, n), n, round_keys(0, 0, 0))
    assert len(np.unique(image)) == 1000 and image.min() >= 0 and image.max() < n


@pytest.mark.parametrize("other", [(2, 0, 0), (1, 1, 0), (1, 0, 1), (10, 0, 0)])
def test_seed_source_and_epoch_each_change_the_order(other: tuple[int, int, int]) -> None:
    n = 1000
    first, second = permute(np.arange(n), n, round_keys(1, 0, 0)), permute(np.arange(n), n, round_keys(*other))
    # Two random permutations agree in one place on average.
    assert np.count_nonzero(first == second) <= 6


def test_keys_are_not_confused_by_concatenation() -> None:
    assert not np.array_equal(round_keys(1, 12, 3), round_keys(11, 2, 3))


def test_one_key_per_element_equals_one_call_per_key() -> None:
    n, epochs = 57, np.arange(40) % 4
    keys = np.stack([round_keys(5, 0, int(epoch)) for epoch in range(4)], axis=1)
    together = permute(np.arange(40), n, keys[:, epochs])
    apart = [permute(np.array([i]), n, round_keys(5, 0, int(epochs[i])))[0] for i in range(40)]
    assert together.tolist() == apart


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_order_of_a_few_windows_is_equally_likely(n: int) -> None:
    orders = int(np.prod(np.arange(1, n + 1)))
    trials = 100 * orders
    keys = np.stack([round_keys(seed, 0, 0) for seed in range(trials)], axis=1)
    columns = [permute(np.full(trials, i), n, keys) for i in range(n)]
    counts = Counter(zip(*(column.tolist() for column in columns), strict=True))
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values()) + 100 * (orders - len(counts))
    degrees = orders - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_elements_go_everywhere_and_neighbours_part() -> None:
    n, buckets, seeds = 1 << 14, 16, 8
    for n_here in (n, n - 3, n + 5):
        for seed in range(seeds):
            image = permute(np.arange(n_here), n_here, round_keys(seed, 0, 0))
            table = np.zeros((buckets, buckets))
            np.add.at(table, (np.arange(n_here) * buckets // n_here, image * buckets // n_here), 1)
            expected = n_here / buckets**2
            chi_square, degrees = ((table - expected) ** 2 / expected).sum(), (buckets - 1) ** 2
            assert chi_square < degrees + 5 * (2 * degrees) ** 0.5
            for lag in (1, 2, 128):
                correlation = np.corrcoef(image[:-lag], image[lag:])[0, 1]
                assert abs(correlation) < 5 / n_here**0.5
            steps = np.diff(image)
            assert np.mean(np.abs(steps) <= 16) < 0.01
            assert abs(np.mean(steps > 0) - 0.5) < 0.02


def test_the_order_never_changes() -> None:
    """Resumed runs of older versions depend on these values: a change here is a change of every run's data."""
    assert round_keys(1234, 0, 0)[:2].tolist() == [15747264653274464423, 4851771019233177435]
    assert permute(np.arange(10), 10, round_keys(1234, 0, 0)).tolist() == [0, 2, 3, 1, 5, 7, 6, 9, 8, 4]
    assert permute(np.arange(5), 10**9 + 7, round_keys(1234, 2, 5)).tolist() == [
        910285872,
        968538635,
        756853364,
        679003293,
        861467112,
    ]
    refs = SampleOrder([5, 3], [3.0, 1.0], seed=1234).locate(0, 12)
    assert refs.source.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert refs.window.tolist() == [3, 2, 1, 2, 4, 1, 0, 4, 2, 0, 0, 1]


def _naive_blend(weights: list[float], size: int) -> list[tuple[int, int]]:
    counts, result = [0] * len(weights), []
    for n in range(size):
        behind = [weight / sum(weights) * max(n, 1) - count for weight, count in zip(weights, counts, strict=True)]
        source = behind.index(max(behind))
        result.append((source, counts[source]))
        counts[source] += 1
    return result


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [6.0, 3.0, 1.0], [1.0, 1e-9], [0.5, 0.25, 0.25]])
def test_blend_takes_the_source_that_is_furthest_behind(weights: list[float]) -> None:
    blend = Blend(weights)
    blocks = [blend.block(number) for number in range(2)]
    got = [pair for source, index in blocks for pair in zip(source.tolist(), index.tolist(), strict=True)]
    assert got == _naive_blend(weights, len(got))


def test_blend_of_a_longer_run_begins_with_the_shorter_one() -> None:
    short, long = Blend([5.0, 2.0, 1.0]), Blend([5.0, 2.0, 1.0])
    long.block(300)  # grown at once, far beyond
    for number in (0, 3, 17, 40):  # grown little by little
        for one, other in zip(short.block(number), long.block(number), strict=True):
            assert np.array_equal(one, other)


def test_a_source_with_hardly_any_weight_gives_one_early_sample() -> None:
    refs = SampleOrder([10, 10], [1.0, 1e-12], seed=0).locate(0, 5000)
    assert np.flatnonzero(refs.source).tolist() == [1]  # after sample 0 the heavy source is ahead of its weight


def test_every_epoch_visits_every_window_once() -> None:
    sizes, weights = [7, 1, 100], [2.0, 1.0, 3.0]
    refs = SampleOrder(sizes, weights, seed=3).locate(0, 9000)
    for source, n in enumerate(sizes):
        windows = refs.window[refs.source == source]
        whole = windows[: len(windows) // n * n].reshape(-1, n)
        assert np.array_equal(np.sort(whole, axis=1), np.broadcast_to(np.arange(n), whole.shape))
        if n > 1:
            assert len({tuple(epoch) for epoch in whole.tolist()}) > 1


def test_samples_do_not_depend_on_how_they_are_asked_for() -> None:
    whole = SampleOrder([11, 5], [1.0, 2.0], seed=9).locate(0, 9000)
    order = SampleOrder([11, 5], [1.0, 2.0], seed=9)
    for first, count in ((8500, 500), (0, 1), (4090, 12), (1, 8999)):
        part = order.locate(first, count)
        assert np.array_equal(part.source, whole.source[first : first + count])
        assert np.array_equal(part.window, whole.window[first : first + count])
