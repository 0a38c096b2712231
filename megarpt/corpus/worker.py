"""A preprocessing worker: takes shard numbers from a pipe, writes each shard whole, says so, and leaves when told to."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from megarpt.corpus.atomic import cannot_write, fsync_directory
from megarpt.corpus.encoders import Encoder
from megarpt.corpus.indexed import HashingFile
from megarpt.corpus.inputs import InputFile
from megarpt.corpus.readers import ReadOptions, Segment, read_documents
from megarpt.corpus.tokenizers import Ids
from megarpt.errors import DataError, MegarptError

MALFORMED_KEPT = 1000  # records of malformed lines that are kept; all are counted
_FLUSH_VALUES = 1 << 20
_REPORT_S = 0.25
_PARENT_CHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class ShardJob:
    """What every worker of a job knows."""

    job_sha256: str
    folder: Path  # where shards are written
    files: Sequence[InputFile]
    shards: Sequence[Sequence[Segment]]
    options: ReadOptions
    dtype: str
    eod: int | None  # appended to every document that is not empty
    max_malformed: int
    parent: int


@dataclass(slots=True)
class ShardResult:
    """What a shard holds; written beside it last, so a shard with this file is whole."""

    job_sha256: str
    shard: int
    num_documents: int = 0
    num_tokens: int = 0
    text_bytes: int = 0
    bin_sha256: str = ""
    documents_by_file: dict[int, int] = field(default_factory=dict)
    num_malformed: int = 0
    malformed: list[tuple[int, int, str]] = field(default_factory=list)  # file, line, reason


Report = Callable[[int, int], None]  # bytes read and tokens of the shard so far


def shard_paths(folder: Path, shard: int) -> tuple[Path, Path, Path]:
    """The files of a shard: values, document lengths, and what commits them."""
    stem = folder / f"shard-{shard:06d}"
    return stem.with_suffix(".bin"), stem.with_suffix(".lengths"), stem.with_suffix(".json")


def read_shard_result(folder: Path, shard: int, job_sha256: str) -> ShardResult | None:
    """The result of a finished shard of this job; None when it is not finished."""
    values, lengths, commit = shard_paths(folder, shard)
    try:
        content = json.loads(commit.read_bytes())
        result = ShardResult(**content)
        sizes = values.stat().st_size, lengths.stat().st_size
    except (OSError, ValueError, TypeError):
        return None  # an unfinished shard is simply made again
    result.documents_by_file = {int(number): count for number, count in result.documents_by_file.items()}
    result.malformed = [(file, line, reason) for file, line, reason in result.malformed]
    if result.job_sha256 != job_sha256 or sizes[1] != 4 * result.num_documents:
        return None
    return result


def run_worker(connection: Connection, encoder: Encoder, job: ShardJob) -> None:
    """The life of a worker process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides when to stop
    try:
        while True:
            while not connection.poll(_PARENT_CHECK_S):
                _leave_without_parent(job)
            shard = connection.recv()
            if shard is None:
                return
            try:
                encode_shard(job, shard, encoder, _reporter(connection, job))
                connection.send(("done", shard))
            except MegarptError as error:
                connection.send(("error", type(error), str(error)))
                return
    except (EOFError, BrokenPipeError):
        return  # the parent is gone


def encode_shard(job: ShardJob, shard: int, encoder: Encoder, report: Report) -> ShardResult:
    """Read, encode and write one shard; commit it by its `.json`.

    Raises:
        DataError: an input cannot be read, has too many malformed lines, or the output cannot be written.
    """
    result = ShardResult(job.job_sha256, shard)
    paths = shard_paths(job.folder, shard)
    temporary = [path.with_name(f"{path.name}.tmp-{os.getpid()}") for path in paths]
    try:
        output = _ShardFiles(temporary[0], temporary[1], np.dtype(job.dtype), job.eod)
        try:
            _encode_segments(job, shard, encoder, output, result, report)
            output.flush()
            output.sync()
        finally:
            output.close()
        result.num_documents, result.num_tokens = output.num_documents, output.num_tokens
        result.bin_sha256 = output.hexdigest()
        with open(temporary[2], "wb") as file:
            file.write(json.dumps(asdict(result)).encode())
            file.flush()
            os.fsync(file.fileno())
        for source, target in zip(temporary, paths, strict=True):
            os.replace(source, target)
        fsync_directory(job.folder)
    except OSError as error:  # errors of the inputs are DataErrors already
        raise cannot_write(paths[0], error) from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return result


def _encode_segments(
    job: ShardJob, shard: int, encoder: Encoder, output: _ShardFiles, result: ShardResult, report: Report
) -> None:
    read_bytes = 0
    for segment in job.shards[shard]:
        file = job.files[segment.file]

        def on_malformed(line: int, reason: str, segment: Segment = segment, file: InputFile = file) -> None:
            result.num_malformed += 1
            if len(result.malformed) < MALFORMED_KEPT:
                result.malformed.append((segment.file, line, reason))
            if result.num_malformed > job.max_malformed:
                raise too_many_malformed(file, line, reason, job.max_malformed)

        before = output.num_documents
        for block in read_documents(file, segment, job.options, on_malformed):
            output.append(encoder.encode(block.texts))
            result.text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in block.texts)
            read_bytes += block.read_bytes
            report(read_bytes, output.num_tokens)
            encoder.trim_memory()
        result.documents_by_file[segment.file] = result.documents_by_file.get(segment.file, 0) + output.num_documents - before


def too_many_malformed(file: InputFile, line: int, reason: str, allowed: int) -> DataError:
    """The error that ends a job at a malformed line."""
    if allowed == 0:
        return DataError(f"{file.path}:{line}: malformed: {reason}; repair it, or pass --skip-malformed N to skip up to N")
    return DataError(
        f"{file.path}:{line}: malformed: {reason}; this is more than the {allowed} that --skip-malformed allows: repair the "
        "file, or raise the number"
    )


class _ShardFiles:
    """The values and lengths of a shard, gathered into large writes."""

    def __init__(self, values: Path, lengths: Path, dtype: np.dtype[Any], eod: int | None) -> None:
        self._dtype = dtype
        self._eod = None if eod is None else np.array([eod], dtype=np.uint32)
        self._values, self._lengths = HashingFile(values), HashingFile(lengths)
        self._waiting: list[Ids] = []
        self._waiting_lengths: list[int] = []
        self._waiting_values = 0
        self.num_documents = self.num_tokens = 0

    def append(self, documents: Any) -> None:
        for ids in documents:
            length = len(ids)
            if length:
                self._waiting.append(ids)
                if self._eod is not None:
                    self._waiting.append(self._eod)
                    length += 1
            self._waiting_lengths.append(length)
            self._waiting_values += length
            if self._waiting_values >= _FLUSH_VALUES:
                self.flush()
        self.num_documents = self._lengths.size // 4 + len(self._waiting_lengths)
        self.num_tokens = self._values.size // self._dtype.itemsize + self._waiting_values

    def flush(self) -> None:
        if self._waiting:
            values = np.concatenate(self._waiting, dtype=self._dtype, casting="unsafe")  # ids are below the vocabulary size
            self._values.write(values.data.cast("B"))
        self._lengths.write(np.array(self._waiting_lengths, dtype=np.int32).tobytes())
        self._waiting, self._waiting_lengths, self._waiting_values = [], [], 0

    def sync(self) -> None:
        self._values.sync()
        self._lengths.sync()

    def hexdigest(self) -> str:
        return self._values.hexdigest()

    def close(self) -> None:
        self._values.close()
        self._lengths.close()


def _reporter(connection: Connection, job: ShardJob) -> Report:
    last = time.monotonic()

    def report(read_bytes: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_S:
            last = now
            _leave_without_parent(job)
            connection.send(("progress", read_bytes, tokens))

    return report


def _leave_without_parent(job: ShardJob) -> None:
    """A worker whose parent was killed must not write into the folder of the run that takes its place."""
    if os.getppid() != job.parent:
        os._exit(1)
