"""Text files to an indexed corpus: shards encoded by worker processes, joined in order, whole or not there at all.

Everything unfinished lies in `<prefix>.partial/`:

    job.json           what is being made; a later run must agree with it
    shard-NNNNNN.*     finished shards that are not joined yet; the .json commits them
    joined.json        how much of the corpus is joined and what it was made of
    NAME.bin.tmp ...   the corpus so far

Inputs are cut into shards by their sizes alone, so the result does not depend on the number of workers, on who finished first
or on how often the job was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fcntl import LOCK_EX, LOCK_NB, flock
from multiprocessing import connection
from pathlib import Path
from typing import Any

from megarpt import __version__
from megarpt.corpus.atomic import atomic_write_json, require_free_bytes, write_errors
from megarpt.corpus.console import ProgressLine, StopSignal
from megarpt.corpus.encoders import Backend, Encoder, choose_encoder
from megarpt.corpus.indexed import CorpusWriter, bin_path, idx_path, manifest_path, publish_ready, token_dtype
from megarpt.corpus.inputs import Format, InputFile, check_unchanged, find_inputs
from megarpt.corpus.manifest import CorpusManifest, InputRecord, MalformedRecord, TokenizerRecord, verify_corpus
from megarpt.corpus.readers import ReadOptions, Segment, cut, sample_texts
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.corpus.worker import (
    MALFORMED_KEPT,
    ShardJob,
    ShardResult,
    read_shard_result,
    run_worker,
    shard_paths,
    too_many_malformed,
)
from megarpt.errors import ConfigError, DataError, MegarptError

logger = logging.getLogger(__name__)

_FORMAT = 1  # of the partial folder
_COPY_BYTES = 1 << 22
_JOIN_CHECKPOINT_S = 1.0
_COMPRESSION = 4  # how much larger compressed text is taken to be, for cutting and for the estimate of space
_SPACE_MARGIN = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessOptions:
    """The command line of `tools/preprocess_corpus.py`."""

    inputs: Sequence[str]
    output_prefix: str
    tokenizer: str
    append_eod: bool
    eod_token: str | None = None
    workers: int = 1
    format: Format | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    skip_malformed: int = 0
    shard_bytes: int = 16 << 20
    backend: Backend = "auto"
    restart: bool = False


@dataclass(slots=True)
class _Joined:
    """What the joined part of the corpus holds; saved as joined.json."""

    num_shards: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    text_bytes: int = 0
    bin_sha256: str = ""
    documents_by_file: list[int] = field(default_factory=list)
    num_malformed: int = 0
    malformed: list[tuple[int, int, str]] = field(default_factory=list)

    def add(self, shard: ShardResult) -> None:
        self.num_shards += 1
        self.text_bytes += shard.text_bytes
        for file, count in shard.documents_by_file.items():
            self.documents_by_file[file] += count
        self.num_malformed += shard.num_malformed
        self.malformed += shard.malformed[: MALFORMED_KEPT - len(self.malformed)]


def preprocess(options: PreprocessOptions, stop: StopSignal) -> CorpusManifest:
    """Make the corpus, or go on making it.

    Raises:
        ConfigError: the command cannot be carried out as given.
        DataError: an input, the tokenizer or the output is at fault.
        Stopped: a signal came.
        MegarptError: a worker died.
    """
    files = find_inputs(options.inputs, format=options.format)
    tokenizer = load_tokenizer(options.tokenizer, eod_token=options.eod_token)
    if options.append_eod and tokenizer.eod is None:
        raise ConfigError(
            f"--append-eod: tokenizer {options.tokenizer} has none of the usual end-of-document tokens; name one with "
            "--eod-token, or leave --append-eod out"
        )
    description = _describe(options, files, tokenizer)
    job_sha256 = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    prefix = Path(options.output_prefix)
    folder = Path(f"{prefix}.partial")
    with write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    with _locked(folder):
        done = _finished(prefix, folder, job_sha256, restart=options.restart)
        if done is None:
            _open_folder(folder, description, restart=options.restart)
            _Job(options, files, tokenizer, prefix, folder, job_sha256, stop).run()
        manifest = verify_corpus(prefix)
        shutil.rmtree(folder)
    return manifest


def _describe(options: PreprocessOptions, files: Sequence[InputFile], tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the bytes of the result."""
    return {
        "format": _FORMAT,
        "version": __version__,
        "tokenizer": tokenizer.sha256,
        "append-eod": tokenizer.eod if options.append_eod else None,
        **{name.replace("_", "-"): value for name, value in asdict(options.read).items()},
        "shard-bytes": options.shard_bytes,
        "inputs": [
            {"path": os.path.realpath(file.path), **{key: value for key, value in asdict(file).items() if key != "path"}}
            for file in files
        ],
    }


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    with write_errors(folder):
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: another process is making this corpus; wait for it, or stop it first") from error
        yield lock
    finally:
        os.close(lock)


def _finished(prefix: Path, folder: Path, job_sha256: str, *, restart: bool) -> CorpusManifest | None:
    """The corpus, when this very job has made it already (or was killed while naming its files)."""
    if not restart and publish_ready(prefix, folder):
        logger.info("%s: finishing what an interrupted run left to do", prefix)
    if restart:
        return None
    if manifest_path(prefix).exists():
        manifest = CorpusManifest.load(prefix)
        if manifest.job_sha256 == job_sha256:
            logger.info("%s: this corpus is there already, made by the same command; nothing to do", prefix)
            return manifest
        raise ConfigError(
            f"{prefix}: a corpus of this name is there, made from other inputs or with other options; choose another "
            "--output-prefix, or pass --restart to replace it"
        )
    for path in (bin_path(prefix), idx_path(prefix)):
        if path.exists():
            raise ConfigError(
                f"{path}: a file of this name is there without a manifest, so this tool did not finish it; move it away, "
                "choose another --output-prefix, or pass --restart to replace it"
            )
    return None


def _open_folder(folder: Path, description: dict[str, Any], *, restart: bool) -> None:
    """Begin a job in its folder, or find out that the one begun there is the same; one that finished nothing is in no way."""
    path = folder / "job.json"
    begun: dict[str, Any] | None = None
    if path.exists() and not restart and any(folder.glob("shard-*.json")) | (folder / "joined.json").exists():
        try:
            begun = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: cannot be read ({error}); pass --restart to begin again") from error
        if begun != description:
            raise ConfigError(
                f"{folder}: holds an unfinished job with other arguments: {'; '.join(_differences(begun, description))}. Run "
                "the command it was begun with to go on, or pass --restart to begin again"
            )
    with write_errors(folder):
        for leftover in folder.glob("*.tmp-*" if begun else "*"):
            if leftover.name != "lock":
                leftover.unlink()
    if begun is None:
        atomic_write_json(path, description)


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(begun.keys() | now.keys()):
        old, new = begun.get(key), now.get(key)
        if old == new:
            continue
        if key != "inputs":
            yield f"{key}: begun with {old}, now {new}"
            continue
        old, new = old or [], new or []
        if len(old) != len(new):
            yield f"inputs: begun with {len(old)} files, now {len(new)}"
        for before, after in zip(old, new, strict=False):
            changed = [f"{name} was {before.get(name)}, is {after[name]}" for name in after if before.get(name) != after[name]]
            if changed:
                yield f"input {after['path']}: {', '.join(changed)}"


def plan_shards(files: Sequence[InputFile], options: ReadOptions, shard_bytes: int) -> list[list[Segment]]:
    """Segments in order, gathered until they are worth a shard; some thousand shards at most."""
    weights = [file.size * (_COMPRESSION if file.compression else 1) for file in files]
    shard_bytes = max(shard_bytes, sum(weights) // 4096)
    segments = cut(files, options, segment_bytes=shard_bytes)
    pieces = [0] * len(files)
    for segment in segments:
        pieces[segment.file] += 1
    shards: list[list[Segment]] = []
    size = 0
    for segment in segments:
        weight = weights[segment.file] // pieces[segment.file]
        if not shards or size + weight > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(segment)
        size += weight
    return shards


@dataclass(slots=True)
class _Worker:
    number: int
    process: Any
    pipe: connection.Connection
    shard: int | None = None
    read_bytes: int = 0
    documents: int = 0
    tokens: int = 0


class _Job:
    """One run of a job."""

    def __init__(
        self,
        options: PreprocessOptions,
        files: Sequence[InputFile],
        tokenizer: Tokenizer,
        prefix: Path,
        folder: Path,
        job_sha256: str,
        stop: StopSignal,
    ) -> None:
        self.options, self.files, self.tokenizer, self.prefix, self.folder = options, files, tokenizer, prefix, folder
        self.job_sha256, self.stop = job_sha256, stop
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.shards = plan_shards(files, options.read, options.shard_bytes)
        self.began, self.cpu_began = time.monotonic(), _cpu_seconds()
        self.joined, self.writer = self._open_joined()
        self.saved_at = time.monotonic()
        self.joined_files: list[int] = []  # shards whose files can go once the joined part is saved
        self.results: dict[int, ShardResult] = {}  # finished, not joined
        self.malformed = self.joined.num_malformed

    def run(self) -> None:
        """To the published corpus.

        Raises:
            DataError, ConfigError, Stopped, MegarptError: as `preprocess` says.
        """
        self._find_finished_shards()
        todo = [shard for shard in range(self.joined.num_shards, len(self.shards)) if shard not in self.results]
        if len(todo) < len(self.shards):
            logger.info("%s: going on with %d of %d shards to do", self.prefix, len(todo), len(self.shards))
        try:
            if todo:
                encoder = self._prepare_encoder()
                self._encode(encoder, todo)
            self._join()
            self._publish()
        finally:
            self.writer.close()

    # Preparation

    def _open_joined(self) -> tuple[_Joined, CorpusWriter]:
        path = self.folder / "joined.json"
        joined = _Joined(documents_by_file=[0] * len(self.files))
        if path.exists():
            try:
                joined = _Joined(**json.loads(path.read_bytes()))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}: cannot be read ({error}); pass --restart to begin again") from error
        resume = (joined.num_tokens, joined.num_documents)
        writer = CorpusWriter(self.prefix, self.dtype, folder=self.folder, resume=resume)
        if joined.num_shards and writer.hexdigest() != joined.bin_sha256:
            raise DataError(f"{self.folder}: the joined part was changed since it was written; pass --restart to begin again")
        return joined, writer

    def _find_finished_shards(self) -> None:
        for shard in range(self.joined.num_shards, len(self.shards)):
            result = read_shard_result(self.folder, shard, self.job_sha256)
            if result is not None and _hash_of(shard_paths(self.folder, shard)[0]) == result.bin_sha256:
                self._take(shard, result)

    def _prepare_encoder(self) -> Encoder:
        samples = sample_texts(self.files, self.options.read)
        encoder = choose_encoder(self.tokenizer, samples, backend=self.options.backend)
        text_bytes = sum(len(text.encode()) for text in samples)
        if text_bytes:
            tokens = sum(len(ids) for ids in encoder.encode(samples))
            weights = sum(file.size * (_COMPRESSION if file.compression else 1) for file in self.files)
            needed = int(weights * tokens / text_bytes * self.dtype.itemsize * _SPACE_MARGIN)
            require_free_bytes(self.prefix, needed - self.writer.num_values * self.dtype.itemsize)
        return encoder

    # Workers

    def _encode(self, encoder: Encoder, todo: list[int]) -> None:
        """Have workers make the shards and join them as they come.

        fork shares the open tokenizer with all workers; it is not used beside threads, pyarrow's among them.
        """
        forks = threading.active_count() == 1 and all(file.format != "parquet" for file in self.files)
        context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        job = ShardJob(
            self.job_sha256,
            self.folder,
            self.files,
            self.shards,
            self.options.read,
            self.dtype.name,
            self.tokenizer.eod if self.options.append_eod else None,
            self.options.skip_malformed,
            os.getpid(),
        )
        waiting = iter(todo)
        workers: list[_Worker] = []
        try:
            for number in range(min(self.options.workers, len(todo))):
                here, there = context.Pipe()
                process = context.Process(target=run_worker, args=(there, encoder, job), daemon=True, name=f"worker {number}")
                process.start()
                there.close()
                workers.append(_Worker(number, process, here))
            with ProgressLine("tokenizing", self._total_bytes()) as progress:
                progress.start_at(self._done_bytes())
                for worker in workers:
                    self._give(worker, waiting)
                while any(worker.shard is not None for worker in workers):
                    self.stop.check()
                    self._listen(workers, waiting)
                    self._join()
                    self._show(progress, workers)
        finally:
            for worker in workers:
                if worker.shard is not None:
                    worker.process.kill()
            for worker in workers:
                worker.process.join()
                worker.pipe.close()
            for leftover in self.folder.glob("*.tmp-*"):  # of workers that were killed
                leftover.unlink()

    def _give(self, worker: _Worker, waiting: Iterator[int]) -> None:
        """The next shard, or word that there is none."""
        worker.shard = next(waiting, None)
        worker.read_bytes = worker.documents = worker.tokens = 0
        try:
            worker.pipe.send(worker.shard)
        except BrokenPipeError:
            raise self._death(worker) from None

    def _listen(self, workers: Sequence[_Worker], waiting: Iterator[int]) -> None:
        """Take what workers say; notice those that died without a word."""
        busy = {worker.pipe: worker for worker in workers if worker.shard is not None}
        for ready in connection.wait(list(busy), timeout=0.25):
            worker = busy[ready]  # type: ignore[index]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                raise self._death(worker) from None
            if message[0] == "error":
                raise message[1](message[2])
            if message[0] == "progress":
                worker.read_bytes, worker.documents, worker.tokens = message[1:]
                continue
            result = read_shard_result(self.folder, message[1], self.job_sha256)
            if result is None:
                raise DataError(
                    f"{self.folder}: shard {message[1]} is gone after it was written; is something cleaning up there?"
                )
            self._take(message[1], result)
            self._give(worker, waiting)
        for worker in busy.values():
            if worker.shard is not None and not worker.process.is_alive() and not worker.pipe.poll():
                raise self._death(worker)

    def _death(self, worker: _Worker) -> MegarptError:
        worker.process.join(timeout=5)
        code = worker.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        doing = ""
        if worker.shard is not None:
            first = self.shards[worker.shard][0]
            doing = (
                f" while it worked on shard {worker.shard} ({self.files[first.file].path}, {first.start:,} to {first.end:,})"
            )
        memory = "; the system may have run out of memory: use fewer --workers" if code == -signal.SIGKILL else ""
        return MegarptError(
            f"worker {worker.number} (process {worker.process.pid}) {how}{doing}{memory}. Run the same command again: it goes "
            "on at the last finished shard"
        )

    def _take(self, shard: int, result: ShardResult) -> None:
        """Count a finished shard.

        Raises:
            DataError: all shards together have too many malformed lines.
        """
        self.results[shard] = result
        self.malformed += result.num_malformed
        for file, line, reason in result.malformed[:10]:
            logger.warning("skipped %s:%d: malformed: %s", self.files[file].path, line, reason)
        if self.malformed > self.options.skip_malformed:
            file, line, reason = result.malformed[-1]
            raise too_many_malformed(self.files[file], line, reason, self.options.skip_malformed)

    # Joining

    def _join(self) -> None:
        """Append the finished shards that come next, and forget their files once that is durable."""
        while self.joined.num_shards in self.results:
            self.stop.check()
            shard = self.joined.num_shards
            result = self.results.pop(shard)
            values, lengths, _commit = shard_paths(self.folder, shard)
            with open(values, "rb", buffering=0) as file:
                while block := file.read(_COPY_BYTES):
                    self.writer.append_raw(block, b"")
            self.writer.append_raw(b"", lengths.read_bytes())
            self.joined.add(result)
            self.joined_files.append(shard)
            expected = (self.joined.num_tokens + result.num_tokens, self.joined.num_documents + result.num_documents)
            if (self.writer.num_values, self.writer.num_documents) != expected:
                raise DataError(f"{values}: holds other values than its result says; pass --restart to begin again")
            self.joined.num_tokens, self.joined.num_documents = expected
            if time.monotonic() - self.saved_at > _JOIN_CHECKPOINT_S:
                self._save_joined()

    def _save_joined(self) -> None:
        self.writer.flush()
        self.joined.bin_sha256 = self.writer.hexdigest()
        atomic_write_json(self.folder / "joined.json", asdict(self.joined))
        for shard in self.joined_files:
            for path in shard_paths(self.folder, shard):
                path.unlink(missing_ok=True)
        self.joined_files = []
        self.saved_at = time.monotonic()

    def _publish(self) -> None:
        check_unchanged(self.files)
        joined = self.joined
        if joined.num_tokens == 0:
            names = ", ".join(file.path for file in self.files[:5])
            raise DataError(
                f"{self.prefix}: got {joined.num_documents} documents and no token from {names}"
                f"{' and others' if len(self.files) > 5 else ''}, expected text; are the files empty, or is --text-key "
                f"{self.options.read.text_key!r} the wrong field?"
            )
        without = [file.path for file, count in zip(self.files, joined.documents_by_file, strict=True) if not count]
        if without:
            more = f" and {len(without) - 5} others" if len(without) > 5 else ""
            logger.warning("no documents in %s%s", ", ".join(without[:5]), more)
        totals = self.writer.finish()
        manifest = CorpusManifest(
            num_documents=totals.num_documents,
            num_tokens=totals.num_values,
            dtype=self.dtype.name,
            bin_sha256=totals.bin_sha256,
            idx_sha256=totals.idx_sha256,
            text_bytes=joined.text_bytes,
            append_eod=self.options.append_eod,
            tokenizer=TokenizerRecord.of(self.tokenizer),
            inputs=[
                InputRecord(name=file.name, size_bytes=file.size, fingerprint=file.fingerprint, num_documents=count)
                for file, count in zip(self.files, joined.documents_by_file, strict=True)
            ],
            num_malformed=joined.num_malformed,
            malformed=[
                MalformedRecord(file=self.files[file].name, line=line, reason=reason) for file, line, reason in joined.malformed
            ],
            job_sha256=self.job_sha256,
        )
        self.writer.publish(manifest)
        cpu = _cpu_seconds() - self.cpu_began
        logger.info(
            "%s: %s documents, %s tokens, %s bytes of text, %d malformed lines skipped; %.1f s, %.1f CPU seconds, %.2f million "
            "tokens per CPU second",
            self.prefix,
            f"{totals.num_documents:,}",
            f"{totals.num_values:,}",
            f"{joined.text_bytes:,}",
            joined.num_malformed,
            time.monotonic() - self.began,
            cpu,
            totals.num_values / cpu / 1e6,
        )

    # Progress

    def _total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def _done_bytes(self) -> int:
        """Bytes of finished shards, by their share of all shards."""
        return self._total_bytes() * (self.joined.num_shards + len(self.results)) // len(self.shards)

    def _show(self, progress: ProgressLine, workers: Sequence[_Worker]) -> None:
        tokens = self.joined.num_tokens + sum(result.num_tokens for result in self.results.values())
        tokens += sum(worker.tokens for worker in workers if worker.shard is not None)
        running = sum(worker.read_bytes for worker in workers if worker.shard is not None)
        progress.update(self._done_bytes() + running, f"{tokens / 1e6:.1f} M tokens")


def _cpu_seconds() -> float:
    """Of this process and the children that ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()
