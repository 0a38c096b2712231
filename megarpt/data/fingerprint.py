"""What a run has read, as one value that two runs share exactly when they have read the same text in the same order.

The fingerprint is a chain of hashes with one link per sample, so it depends neither on the layout, the batch sizes and the
restarts nor on the streams that are read along: ordinary and selective training on the same data show the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from megarpt.data.order import SampleOrder, SampleRefs
from megarpt.errors import DataError

_CHECKED = 4096  # samples on either side of a checkpoint's position whose order a resume computes again
_REF_BYTES = 16


class OrderFingerprint:
    """The chain over the samples that were handed out, and a check that the order is still the one it was.

    Args:
        order: of the run.
        windows: what decides which text a window holds, as plain values; where the chain begins.

    Cost: 0.4 microseconds a sample; no file is read.
    """

    def __init__(self, order: SampleOrder, windows: Mapping[str, Any]) -> None:
        self._order = order
        self._digest = hashlib.sha256(json.dumps(windows, sort_keys=True).encode()).digest()

    @property
    def value(self) -> str:
        """64 hexadecimal digits."""
        return self._digest.hex()

    def advance(self, first: int, count: int) -> None:
        """Take up samples [first, first + count), which are read now."""
        digest, references = self._digest, _packed(self._order.locate(first, count))
        for start in range(0, len(references), _REF_BYTES):
            digest = hashlib.sha256(digest + references[start : start + _REF_BYTES]).digest()
        self._digest = digest

    def state_dict(self, position: int) -> dict[str, Any]:
        """The chain, and a hash of the order around `position`, the next sample to be read."""
        first = max(0, position - _CHECKED)
        count = position + _CHECKED - first
        return {"value": self.value, "first": first, "count": count, "sha256": self._hash_of(first, count)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the chain of `state_dict`.

        Raises:
            DataError: around the position of the checkpoint this program would read the samples in another order.
        """
        first, count = int(state["first"]), int(state["count"])
        got = self._hash_of(first, count)
        if got != state["sha256"]:
            raise DataError(
                f"data order: samples {first} to {first + count - 1} have the hash {got}, expected {state['sha256']} as in the "
                "checkpoint; seed, corpora and weights are the same, so the program that orders them is another one, and going "
                "on would repeat some text and skip other text. Continue with the versions in the checkpoint's manifest.json, "
                "or begin a new run with model.init_from"
            )
        self._digest = bytes.fromhex(state["value"])

    def _hash_of(self, first: int, count: int) -> str:
        return hashlib.sha256(_packed(self._order.locate(first, count))).hexdigest()


def _packed(refs: SampleRefs) -> bytes:
    """Source and window of every sample, 8 bytes each, little-endian."""
    return np.stack([refs.source, refs.window], axis=1).astype("<i8").tobytes()
