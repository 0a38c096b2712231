"""Which window comes when: a keyed permutation and the blend of sources, both functions of the sample's number alone.

Nothing is stored and nothing is drawn from a generator, so the order cannot depend on the number of ranks, on the length of
the run or on where it was resumed.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.helpers_cpp import build_blending_indices

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

_ROUNDS = 24  # with 24 all orders of 2 to 6 elements are equally likely to the eye of a chi-square test; with 12 they are not
_ORDER_VERSION = b"megarpt-order-1"  # part of every key: a changed construction must never pass for the old one
_BLOCK = 4096  # samples located at once; amortizes numpy's cost per call over many steps


def round_keys(seed: int, source: int, epoch: int) -> UInt64Array:
    """The round keys of the permutation that source `source` of the blend follows in epoch `epoch`.

    Shapes: returns [rounds] uint64.
    """
    text = b"%s/%d/%d/%d" % (_ORDER_VERSION, seed, source, epoch)
    return np.frombuffer(hashlib.shake_256(text).digest(8 * _ROUNDS), dtype="<u8").astype(np.uint64)


def permute(index: npt.NDArray[np.integer], n: int, keys: UInt64Array) -> Int64Array:
    """Where each `index` in [0, n) goes under the keyed permutation of [0, n).

    A Feistel network over the smallest power of two that holds n, walked along its cycle until the result is below n. Fewer
    than half of the values lie outside, so a walk takes fewer than two steps on average.

    Shapes: index [m]; keys [rounds], or [rounds, m] for one key per element; returns [m] int64.
    Cost: O(m) time and memory, whatever n is.
    """
    bits = max(2, (n - 1).bit_length())
    result = index.astype(np.uint64)
    keys = np.broadcast_to(keys.reshape(_ROUNDS, -1), (_ROUNDS, result.size))
    pending = np.arange(result.size)
    while pending.size:
        walked = _feistel(result[pending], bits, keys[:, pending])
        result[pending] = walked
        pending = pending[walked >= n]
    return result.astype(np.int64)


def _feistel(value: UInt64Array, bits: int, keys: UInt64Array) -> UInt64Array:
    """A permutation of [0, 2**bits): each round changes one half by a hash of the other, so each round can be undone."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = value & low_mask, value >> low_bits
    for number in range(0, _ROUNDS, 2):
        low ^= _mix(high + keys[number]) & low_mask
        high ^= _mix(low + keys[number + 1]) & high_mask
    return (high << low_bits) | low


def _mix(x: UInt64Array) -> UInt64Array:
    """splitmix64's finalizer, in place: every input bit moves every output bit."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


class Blend:
    """Which source each sample comes from, and its running number within that source.

    megatron-core's helper takes the source that is furthest behind its weight, sample after sample, so a longer order begins
    with the shorter one and the order can grow on demand.

    Cost: 2 bytes a sample resident; 10 while it grows. One source costs nothing.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self._source = np.empty(0, dtype=np.int16)
        self._before = np.zeros(
            (1, len(weights)), dtype=np.int64
        )  # [blocks + 1, sources], samples of each source before a block

    def block(self, number: int) -> tuple[Int64Array, Int64Array]:
        """Source and index within the source of samples [number * 4096, (number + 1) * 4096)."""
        if len(self.weights) == 1:
            return np.zeros(_BLOCK, dtype=np.int64), np.arange(number * _BLOCK, (number + 1) * _BLOCK)
        if (number + 1) * _BLOCK > self._source.size:
            self._grow(number + 1)
        source = self._source[number * _BLOCK : (number + 1) * _BLOCK].astype(np.int64)
        index = np.empty(_BLOCK, dtype=np.int64)
        for which, before in enumerate(self._before[number]):
            here = np.flatnonzero(source == which)
            index[here] = before + np.arange(here.size)
        return source, index

    def _grow(self, blocks: int) -> None:
        blocks = max(blocks, 2 * (len(self._before) - 1), 16)
        source, index = np.empty(blocks * _BLOCK, dtype=np.int16), np.empty(blocks * _BLOCK, dtype=np.int64)
        build_blending_indices(source, index, self.weights, len(self.weights), source.size, False)
        by_block = source.reshape(blocks, _BLOCK)
        counts = np.stack([np.count_nonzero(by_block == which, axis=1) for which in range(len(self.weights))], axis=1)
        self._source = source
        self._before = np.concatenate([np.zeros((1, len(self.weights)), dtype=np.int64), np.cumsum(counts, axis=0)])


class SampleRefs(NamedTuple):
    """Where a run of samples is found; each [count] int64."""

    source: Int64Array
    window: Int64Array


class SampleOrder:
    """The order of a run: sample number -> source of the blend and window of its corpus.

    Within a source the windows of one epoch come in the order of its permutation, each exactly once; then the next epoch
    follows with another permutation. May be asked from several threads.
    """

    def __init__(self, num_windows: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._num_windows = list(num_windows)
        self._blend = Blend(weights)
        self._seed = seed
        self._cached: tuple[int, SampleRefs] | None = None
        self._lock = threading.Lock()  # the blend grows, and the cache changes, when a block is asked for

    def locate(self, first: int, count: int) -> SampleRefs:
        """Samples [first, first + count) of the run."""
        parts = []
        position = first
        while position < first + count:
            number, start = divmod(position, _BLOCK)
            stop = min(_BLOCK, start + first + count - position)
            with self._lock:
                refs = self._block(number)
            parts.append((refs.source[start:stop], refs.window[start:stop]))
            position += stop - start
        sources, windows = zip(*parts, strict=True)
        return SampleRefs(np.concatenate(sources), np.concatenate(windows))

    def _block(self, number: int) -> SampleRefs:
        if self._cached is not None and self._cached[0] == number:
            return self._cached[1]
        source, index = self._blend.block(number)
        window = np.empty_like(index)
        for which in np.unique(source).tolist():
            n = self._num_windows[which]
            here = np.flatnonzero(source == which)
            epoch, within = np.divmod(index[here], n)
            epochs, inverse = np.unique(epoch, return_inverse=True)
            keys = np.stack([round_keys(self._seed, which, e) for e in epochs.tolist()], axis=1)
            window[here] = permute(within, n, keys[:, inverse])
        refs = SampleRefs(source, window)
        self._cached = (number, refs)
        return refs
