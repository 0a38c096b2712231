"""A corpus as a row of fixed windows.

Window j of a corpus of N tokens reads tokens [j*s, j*s + s) and predicts tokens [j*s + 1, j*s + s + 1): every token but the
first is predicted exactly once, in a context that depends on nothing but the corpus and s. The last window is padded.

Dims: s sequence length.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megarpt.corpus.manifest import CorpusManifest, SidecarManifest, verify_corpus
from megarpt.data.streams import SidecarStream
from megarpt.errors import DataError

PADDING_ID = 0  # any id the embedding has; padded labels never train and padded inputs follow every token that does
_CHECK_BLOCK = 1 << 22  # index entries compared at a time, so that opening a corpus takes no memory


class Window(NamedTuple):
    """One window by itself."""

    tokens: npt.NDArray[np.int64]  # [s]
    labels: npt.NDArray[np.int64]  # [s], labels[i] follows tokens[i]
    loss_mask: npt.NDArray[np.bool_]  # [s], False for padding and for labels that begin a document
    position_ids: npt.NDArray[np.int64]  # [s], restarting with every segment
    segment_lengths: npt.NDArray[np.int64]  # [segments], adding up to s
    streams: dict[str, npt.NDArray[np.float32]]  # name -> [s], aligned with labels, 0 where loss_mask is False


class WindowDataset:
    """The windows of one corpus, memory-mapped; reading one is a single contiguous read.

    Cost: no memory that grows with the corpus when every document is one sequence, as `preprocess_corpus.py` writes it.

    Raises:
        DataError: the files are damaged or incomplete, or hold too little text to predict anything.
    """

    def __init__(self, prefix: str, *, seq_length: int, separate_documents: bool, vocab_size: int) -> None:
        self.prefix = prefix
        self.seq_length = seq_length
        self.separate_documents = separate_documents
        self.vocab_size = vocab_size
        self.manifest = verify_corpus(prefix)
        self.num_tokens = self.manifest.num_tokens
        if self.num_tokens < 2:  # looked at before the files are mapped: an empty one cannot be
            raise DataError(
                f"{prefix}: got {self.num_tokens} tokens, expected at least 2, one to read and one to predict; "
                "tokenize more text with tools/preprocess_corpus.py"
            )
        self.indexed = IndexedDataset(prefix)
        self.dtype = np.dtype(self.indexed.index.dtype)
        if self.dtype.kind not in "iu":
            raise DataError(
                f"{prefix}.idx: got tokens of type {self.dtype}, expected integers; tokenize the text again with "
                "tools/preprocess_corpus.py"
            )
        self._starts = _document_starts(self.indexed)  # [documents] int64, byte offsets in the .bin
        self._id_can_be_invalid = self.dtype.kind == "i" or np.iinfo(self.dtype).max >= vocab_size
        self._streams: dict[str, SidecarStream] = {}

    @property
    def num_windows(self) -> int:
        return -(-(self.num_tokens - 1) // self.seq_length)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text to a token, over the whole corpus; None when its manifest does not know."""
        return self.manifest.text_bytes / self.num_tokens if self.manifest.text_bytes else None

    @property
    def content_sha256(self) -> str:
        """Of the tokens."""
        return self.manifest.bin_sha256

    @property
    def documents_sha256(self) -> str:
        """Of where documents begin."""
        return self.manifest.idx_sha256

    @property
    def streams(self) -> Mapping[str, SidecarStream]:
        """The per-token sidecars read along with the tokens."""
        return self._streams

    def add_stream(self, name: str, prefix: str) -> None:
        """Read the sidecar at `prefix` along with the tokens.

        Raises:
            DataError: the sidecar is damaged or was made for something else.
        """
        stream = SidecarStream(
            name,
            prefix,
            corpus=self.manifest,
            corpus_lengths=self.indexed.sequence_lengths,
            seq_length=self.seq_length,
            separate_documents=self.separate_documents,
        )
        self._streams[name] = stream

    def fingerprint(self) -> dict[str, Any]:
        """What the windows hold, as hashes; paths are no part of it."""
        return {
            "corpus_sha256": self.manifest.bin_sha256,
            "streams": {name: stream.manifest.bin_sha256 for name, stream in self._streams.items()},
        }

    def manifests(self) -> dict[str, CorpusManifest | SidecarManifest]:
        """Of the files on disk: prefix -> manifest."""
        return {self.prefix: self.manifest, **{each.prefix: each.manifest for each in self._streams.values()}}

    def __str__(self) -> str:
        return f"corpus {self.prefix}: {self.num_tokens} tokens in {self.num_windows} windows of {self.seq_length}"

    def __len__(self) -> int:
        return self.num_windows

    def read_into(
        self,
        window: int,
        tokens: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        loss_mask: npt.NDArray[np.bool_],
        streams: Mapping[str, npt.NDArray[np.float32]],
    ) -> npt.NDArray[np.int64]:
        """Fill one row of a batch and return where documents begin in it, besides its start (repeated for empty documents).

        Shapes: tokens, labels, loss_mask and every stream [s]; returns [documents beginning inside], in (0, s).

        Raises:
            DataError: a token id the model has no row for, or a stream without a value where one is needed.
        """
        if not 0 <= window < self.num_windows:
            raise IndexError(f"{self.prefix}: window {window}, expected 0 to {self.num_windows - 1}")
        first = window * self.seq_length
        count = min(self.seq_length, self.num_tokens - 1 - first)
        itemsize = self.dtype.itemsize
        read = self.indexed.bin_reader.read(dtype=self.dtype, count=count + 1, offset=first * itemsize)
        if self._id_can_be_invalid and (read.max() >= self.vocab_size or read.min() < 0):
            self._refuse_ids(read, first)
        tokens[:count], labels[:count] = read[:-1], read[1:]
        tokens[count:], labels[count:] = PADDING_ID, PADDING_ID
        loss_mask[:count], loss_mask[count:] = True, False
        starts = self._starts[:0]
        if self.separate_documents:
            # Not np.searchsorted: the column lies unaligned in the file, and it would copy all of it each time.
            low = bisect_right(self._starts, first * itemsize)
            high = bisect_right(self._starts, (first + count) * itemsize, low)
            starts = self._starts[low:high] // itemsize - first
            loss_mask[starts - 1] = False  # predicting the first token of a document from the end of another
            starts = starts[: np.searchsorted(starts, count)]  # padding stays in the last segment
        for name, out in streams.items():
            self._streams[name].read_into(first + 1, count, loss_mask, out)
        return starts

    def __getitem__(self, window: int) -> Window:
        s = self.seq_length
        tokens, labels, loss_mask = np.empty(s, np.int64), np.empty(s, np.int64), np.empty(s, np.bool_)
        streams = {name: np.empty(s, np.float32) for name in self._streams}
        starts = np.unique(np.append(0, self.read_into(window, tokens, labels, loss_mask, streams)))
        lengths = np.diff(starts, append=s)
        return Window(tokens, labels, loss_mask, np.arange(s) - np.repeat(starts, lengths), lengths, streams)

    def _refuse_ids(self, read: npt.NDArray[np.integer], first: int) -> None:
        bad = int(np.flatnonzero((read < 0) | (read >= self.vocab_size))[0])
        raise DataError(
            f"{self.prefix}.bin: got token id {int(read[bad])} at position {first + bad}, expected 0 to {self.vocab_size - 1}; "
            "the corpus was tokenized with a larger vocabulary than the model's, or the file is damaged "
            f"(check it with tools/inspect_corpus.py {self.prefix})"
        )


def _document_starts(indexed: IndexedDataset) -> npt.NDArray[np.int64]:
    """Ascending byte offsets at which documents begin, in no fixed number for empty documents.

    When no document has more than one sequence this is the index's own memory-mapped column.
    """
    pointers, documents = indexed.index.sequence_pointers, indexed.document_indices
    if all(
        np.diff(documents[begin : begin + _CHECK_BLOCK + 1]).max(initial=0) <= 1
        for begin in range(0, len(documents), _CHECK_BLOCK)
    ):
        return pointers
    end = indexed.index.sequence_lengths.sum(dtype=np.int64) * np.dtype(indexed.index.dtype).itemsize
    return np.append(pointers, end)[documents[:-1]]
