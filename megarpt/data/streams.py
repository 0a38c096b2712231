"""Per-token numbers stored beside a corpus: reference losses and the like.

A sidecar is a corpus of fp32 values with the documents of the corpus it belongs to: value i speaks of token i as a label.

Dims: s sequence length.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megarpt.corpus.manifest import CorpusManifest, SidecarManifest, verify_files
from megarpt.errors import DataError

_ITEMSIZE = 4


class SidecarStream:
    """One stream of one corpus, memory-mapped.

    Raises:
        DataError: the sidecar is damaged, or was made for another corpus, tokenizer, sequence length or treatment of documents.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        *,
        corpus: CorpusManifest,
        corpus_lengths: npt.NDArray[np.int32],
        seq_length: int,
        separate_documents: bool,
    ) -> None:
        self.name = name
        self.prefix = prefix
        self.manifest = SidecarManifest.load(prefix)
        if self.manifest.stream != name:
            raise DataError(
                f"{prefix}.json: got a sidecar of stream {self.manifest.stream!r}, expected {name!r}; correct the path under "
                "`streams`"
            )
        try:
            self.manifest.check_belongs(corpus, seq_length=seq_length, separate_documents=separate_documents)
        except DataError as error:
            raise DataError(f"{prefix}.json: {error}") from error
        verify_files(prefix, self.manifest)
        self._indexed = IndexedDataset(prefix)
        lengths, dtype = self._indexed.sequence_lengths, np.dtype(self._indexed.index.dtype)
        if dtype != np.float32:
            raise DataError(
                f"{prefix}.idx: got values of type {dtype}, expected float32 for the per-token stream {name!r}; "
                "make it again with `megarpt score`"
            )
        if len(lengths) != len(corpus_lengths):
            raise self._mismatch(f"{len(lengths)} sequences", f"{len(corpus_lengths)}, as in the corpus")
        different = np.flatnonzero(lengths != corpus_lengths)
        if different.size:
            at = int(different[0])
            raise self._mismatch(f"length {int(lengths[at])} for sequence {at}", f"{int(corpus_lengths[at])}, as in the corpus")

    def _mismatch(self, got: str, expected: str) -> DataError:
        return DataError(
            f"{self.prefix}.idx: stream {self.name!r} does not fit its corpus: got {got}, expected {expected}; "
            "make it again with `megarpt score`"
        )

    def read_into(self, first: int, count: int, loss_mask: npt.NDArray[np.bool_], out: npt.NDArray[np.float32]) -> None:
        """Fill `out` with the values of the labels at corpus positions [first, first + count).

        Positions that do not train have no value in the file (NaN); they are given 0, so that no arithmetic on a whole row
        can be poisoned by them.

        Shapes: loss_mask [s], out [s], count <= s.

        Raises:
            DataError: a position that trains has no finite value.
        """
        out[:count] = self._indexed.bin_reader.read(dtype=np.float32, count=count, offset=first * _ITEMSIZE)
        out[count:] = 0.0
        np.copyto(out, 0.0, where=~loss_mask)
        if not np.isfinite(out).all():
            bad = int(np.flatnonzero(~np.isfinite(out))[0])
            raise DataError(
                f"{self.prefix}.bin: stream {self.name!r} has the value {float(out[bad])} at position {first + bad}, expected "
                "a finite number for every token that trains; the scoring was not finished or its model was broken: make it "
                "again with `megarpt score`"
            )
