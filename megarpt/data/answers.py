"""Files of prompts with answers, packed into rows; only the answers are learned.

A file is JSON Lines. A record is one of two kinds, told apart by their keys; other keys are ignored:

    {"prompt": "12+30=", "completion": "42"}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

Prompt and completion are taken as they are, and the tokenizer's end of a document follows. `chat.py` says what stands around
messages. Whole records share a row, apart from each other as documents are; none is cut.

Dims: r records, n tokens of one, s row length.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megarpt.corpus.manifest import CorpusManifest, SidecarManifest
from megarpt.corpus.records import read_records, shorten
from megarpt.data.chat import Answered, AnswerFormat
from megarpt.data.packing import best_fit_decreasing
from megarpt.data.streams import SidecarStream
from megarpt.data.windows import PADDING_ID
from megarpt.errors import DataError

logger = logging.getLogger(__name__)


class AnswerDataset:
    """The rows of one file, a `SampleDataset`.

    A record of n tokens takes n - 1 places of a row, since its last token is the input of nothing. Row j is the same in every
    epoch and run; `TokenBatches` puts rows in order.

    Cost: 5 bytes a token, on every rank.

    Raises:
        DataError: the file cannot be read, a record is wrong or does not fit into a row, or none is left.
    """

    separate_documents = True
    streams: Mapping[str, SidecarStream] = {}

    def __init__(self, path: str, form: AnswerFormat, *, seq_length: int, leave_out_long: bool = False) -> None:
        """
        Args:
            path: of the file.
            form: how records become token ids.
            seq_length: of a row.
            leave_out_long: a record that does not fit into a row is no error.
        """
        self.prefix, self.seq_length = path, seq_length
        records, self.num_left_out = _read(Path(path), form, seq_length, leave_out_long)
        lengths = [len(each.tokens) - 1 for each in records]
        self._rows = best_fit_decreasing(lengths, seq_length)
        self._tokens = np.concatenate([each.tokens for each in records])
        self._is_answer = np.concatenate([each.is_answer for each in records])
        self._starts = np.cumsum([0, *(len(each.tokens) for each in records)])  # [r + 1]
        self.num_records = len(records)
        self.num_tokens = sum(lengths)
        self.num_answer_tokens = int(self._is_answer.sum())
        self.bytes_per_token: float | None = sum(each.answer_bytes for each in records) / self.num_answer_tokens
        self.content_sha256 = self.documents_sha256 = self._hash()

    @property
    def num_windows(self) -> int:
        """Rows."""
        return len(self._rows)

    def __str__(self) -> str:
        return (
            f"answers {self.prefix}: {self.num_records} records of {self.num_tokens} tokens, {self.num_answer_tokens} of them "
            f"learned, in {self.num_windows} rows of {self.seq_length}"
        )

    def fingerprint(self) -> dict[str, Any]:
        """What the rows hold, as a hash; the path is no part of it."""
        return {"answers_sha256": self.content_sha256, "streams": {}}

    def manifests(self) -> Mapping[str, CorpusManifest | SidecarManifest]:
        """None: the file was read whole."""
        return {}

    def read_into(
        self,
        window: int,
        tokens: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        loss_mask: npt.NDArray[np.bool_],
        streams: Mapping[str, npt.NDArray[np.float32]],
    ) -> npt.NDArray[np.int64]:
        """Fill one row of a batch and return where records, and the padding after them, begin in it, besides its start.

        Shapes: tokens, labels, loss_mask [s]; returns [segments - 1], in (0, s). There are no streams.
        """
        if not 0 <= window < self.num_windows:
            raise IndexError(f"{self.prefix}: row {window}, expected 0 to {self.num_windows - 1}")
        at, ends = 0, []
        for record in self._rows[window]:
            first, last = self._starts[record], self._starts[record + 1] - 1
            end = at + int(last - first)
            tokens[at:end], labels[at:end] = self._tokens[first:last], self._tokens[first + 1 : last + 1]
            loss_mask[at:end] = self._is_answer[first + 1 : last + 1]
            ends.append(end)
            at = end
        tokens[at:], labels[at:], loss_mask[at:] = PADDING_ID, PADDING_ID, False
        return np.array([end for end in ends if end < self.seq_length], np.int64)

    def _hash(self) -> str:
        """Of the records and of the rows that they lie in."""
        digest = hashlib.sha256()
        rows = np.array([value for row in self._rows for value in (len(row), *row)], "<i8")
        for values in (self._tokens.astype("<i4"), self._is_answer, self._starts.astype("<i8"), rows):
            digest.update(values.tobytes())
        return digest.hexdigest()


def _read(path: Path, form: AnswerFormat, seq_length: int, leave_out_long: bool) -> tuple[list[Answered], int]:
    """The records of a file, and how many more were too long."""
    records: list[Answered] = []
    num_too_long = 0
    for number, record in read_records(path, what="prompts with answers"):
        where = f"{path}:{number}"
        answered = _record(record, form, where)
        if len(answered.tokens) - 1 <= seq_length:
            records.append(answered)
        elif leave_out_long:
            num_too_long += 1
        else:
            raise DataError(
                f"{where}: the record has {len(answered.tokens)} tokens, expected at most {seq_length + 1}: data.seq_length "
                "and the last token, which is only a label. Raise data.seq_length, shorten it, or set data.too_long=leave_out"
            )
    if not records:
        why = f"all {num_too_long} need more than {seq_length} tokens (data.seq_length)" if num_too_long else "it has none"
        raise DataError(f"{path}: no record is left, since {why}; expected at least one prompt with its answer")
    if num_too_long:
        total = num_too_long + len(records)
        logger.warning("%s: left out %d of %d records, which need more than %d tokens", path, num_too_long, total, seq_length)
    return records, num_too_long


def _record(record: Mapping[str, Any], form: AnswerFormat, where: str) -> Answered:
    kinds = [make for key, make in (("messages", form.conversation), ("completion", form.pair)) if key in record]
    if len(kinds) != 1:
        raise DataError(f"{where}: got the keys {shorten(sorted(record))}, expected either prompt and completion, or messages")
    return kinds[0](record, where=where)
