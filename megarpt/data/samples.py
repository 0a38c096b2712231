"""What batches and evaluations ask of a source of text, whatever it was made from.

Dims: s sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megarpt.corpus.manifest import CorpusManifest, SidecarManifest
from megarpt.data.streams import SidecarStream


class SampleDataset(Protocol):
    """A fixed row of samples of equal length, each the same whenever it is read. `WindowDataset` says what each member is."""

    @property
    def prefix(self) -> str: ...  # where it was read from
    @property
    def seq_length(self) -> int: ...
    @property
    def separate_documents(self) -> bool: ...
    @property
    def num_windows(self) -> int: ...  # samples
    @property
    def bytes_per_token(self) -> float | None: ...  # bytes of text to a label that trains; None when unknown
    @property
    def content_sha256(self) -> str: ...  # of the text
    @property
    def documents_sha256(self) -> str: ...  # of where documents begin
    @property
    def streams(self) -> Mapping[str, SidecarStream]: ...
    def fingerprint(self) -> dict[str, Any]: ...
    def manifests(self) -> Mapping[str, CorpusManifest | SidecarManifest]: ...

    def read_into(
        self,
        window: int,
        tokens: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        loss_mask: npt.NDArray[np.bool_],
        streams: Mapping[str, npt.NDArray[np.float32]],
    ) -> npt.NDArray[np.int64]: ...
