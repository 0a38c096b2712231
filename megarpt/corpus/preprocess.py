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
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

from megarpt import __version__
from megarpt.corpus.atomic import atomic_write_json, require_free_bytes, write_errors
from megarpt.corpus.console import ProgressLine, StopSignal
from megarpt.corpus.encoders import Backend, Encoder, choose_encoder
from megarpt.corpus.indexed import bin_path, idx_path, manifest_path, publish_ready, token_dtype
from megarpt.corpus.inputs import Format, InputFile, check_unchanged, find_inputs
from megarpt.corpus.joiner import JOINED, Joined, Joiner
from megarpt.corpus.manifest import CorpusManifest, InputRecord, MalformedRecord, TokenizerRecord, verify_corpus
from megarpt.corpus.pool import make_shards
from megarpt.corpus.readers import ReadOptions, Segment, cut, sample_texts
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.corpus.worker import ShardJob, ShardResult, too_many_malformed
from megarpt.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

JOB = "job.json"

_FORMAT = 1  # of the partial folder
_COMPRESSION = 4  # how much larger compressed text is taken to be, for cutting and for the estimate of space
_SPACE_MARGIN = 1.1
_LOCK_WAIT_S = 10.0


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
    part: tuple[int, int] = (0, 1)  # number and count of the shares that several jobs divide the inputs into


def preprocess(options: PreprocessOptions, stop: StopSignal) -> CorpusManifest:
    """Make the corpus, or go on making it.

    Raises:
        ConfigError: the command cannot be carried out as given.
        DataError: an input, the tokenizer or the output is at fault.
        Stopped: a signal came.
        MegarptError: a worker died.
    """
    files = share(find_inputs(options.inputs, format=options.format), *options.part)
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
    with locked_folder(folder):
        done = _finished(prefix, folder, job_sha256, restart=options.restart)
        if done is None:
            _open_folder(folder, description, restart=options.restart)
            _Job(options, files, tokenizer, folder, job_sha256).run(stop)
        manifest = verify_corpus(prefix)
        shutil.rmtree(folder)
    return manifest


def share(files: Sequence[InputFile], number: int, count: int) -> Sequence[InputFile]:
    """The files of job `number` out of `count`: neighbours in the order of the whole, so that the shares can be joined.

    Raises:
        ConfigError: there are fewer files than jobs.
    """
    if count > len(files):
        raise ConfigError(
            f"--part {number}/{count}: got {len(files)} input files, expected at least one for each of {count} parts"
        )
    return files[number * len(files) // count : (number + 1) * len(files) // count]


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
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the folder for this process and its workers; the lock goes with them, however they end.

    Workers of a killed run hold it until they notice, within a block of text.

    Raises:
        ConfigError: somebody else holds it.
    """
    with write_errors(folder):
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                flock(lock, LOCK_EX | LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{folder}: another process is making this corpus; wait for it, or stop it first"
                    ) from error
            time.sleep(0.1)
        yield
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
    path = folder / JOB
    begun: dict[str, Any] | None = None
    if path.exists() and not restart and any(folder.glob("shard-*.json")) | (folder / JOINED).exists():
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


class _Job:
    """One run of a job."""

    def __init__(
        self, options: PreprocessOptions, files: Sequence[InputFile], tokenizer: Tokenizer, folder: Path, job_sha256: str
    ) -> None:
        self.options, self.files, self.tokenizer, self.folder, self.job_sha256 = options, files, tokenizer, folder, job_sha256
        self.prefix = Path(options.output_prefix)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.shards = plan_shards(files, options.read, options.shard_bytes)
        self.began, self.cpu_began = time.monotonic(), _cpu_seconds()
        self.joiner = Joiner(self.prefix, folder, self.dtype, num_files=len(files))
        self.num_malformed = self.joiner.joined.num_malformed

    def run(self, stop: StopSignal) -> None:
        """To the published corpus.

        Raises:
            DataError, ConfigError, Stopped, MegarptError: as `preprocess` says.
        """
        try:
            for shard, result in self.joiner.find_finished(len(self.shards), self.job_sha256).items():
                self._take(shard, result)
            first = self.joiner.joined.num_shards
            todo = [shard for shard in range(first, len(self.shards)) if shard not in self.joiner.pending]
            if len(todo) < len(self.shards):
                logger.info("%s: going on with %d of %d shards to do", self.prefix, len(todo), len(self.shards))
            if todo:
                self._make(todo, self._prepare_encoder(), stop)
            self.joiner.join()
            stop.check()
            self._publish()
        finally:
            self.joiner.close()

    def _prepare_encoder(self) -> Encoder:
        """Choose it on samples of the inputs, which also tell how much space the result takes."""
        samples = sample_texts(self.files, self.options.read)
        encoder = choose_encoder(self.tokenizer, samples, backend=self.options.backend)
        text_bytes = sum(len(text.encode()) for text in samples)
        if text_bytes:
            tokens = sum(len(ids) for ids in encoder.encode(samples))
            total = sum(file.size * (_COMPRESSION if file.compression else 1) for file in self.files)
            needed = int(total * tokens / text_bytes * self.dtype.itemsize * _SPACE_MARGIN)
            require_free_bytes(self.prefix, needed - self.joiner.num_tokens * self.dtype.itemsize)
        return encoder

    def _make(self, todo: Sequence[int], encoder: Encoder, stop: StopSignal) -> None:
        """Have the shards made, and join them as they come."""
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
        total = sum(file.size for file in self.files)
        progress: ProgressLine | None = None  # begun after the workers: a bar has a thread, and threads forbid to fork

        def finished_bytes() -> int:
            return total * self.joiner.num_finished // len(self.shards)

        def on_tick(read_bytes: int, tokens: int) -> None:
            nonlocal progress
            stop.check()
            self.joiner.join()
            if progress is None:
                progress = ProgressLine("tokenizing", total)
                progress.start_at(finished_bytes())
            progress.update(finished_bytes() + read_bytes, f"{(self.joiner.num_tokens + tokens) / 1e6:.1f} M tokens")

        try:
            make_shards(job, encoder, todo, workers=self.options.workers, on_done=self._take, on_tick=on_tick)
        finally:
            if progress is not None:
                progress.close()

    def _take(self, shard: int, result: ShardResult) -> None:
        """Count a finished shard.

        Raises:
            DataError: all shards together have too many malformed lines.
        """
        self.joiner.pending[shard] = result
        self.num_malformed += result.num_malformed
        for file, line, reason in result.malformed[:10]:
            logger.warning("skipped %s:%d: malformed: %s", self.files[file].path, line, reason)
        if self.num_malformed > self.options.skip_malformed:
            file, line, reason = result.malformed[-1]
            raise too_many_malformed(self.files[file], line, reason, self.options.skip_malformed)

    def _publish(self) -> None:
        """Check what was joined, write index and manifest, give the files their names."""
        check_unchanged(self.files)
        joined = self.joiner.joined
        self._check_documents(joined)
        totals = self.joiner.writer.finish()
        inputs = [
            InputRecord(name=file.name, size_bytes=file.size, fingerprint=file.fingerprint, num_documents=count)
            for file, count in zip(self.files, joined.documents_by_file, strict=True)
        ]
        malformed = [
            MalformedRecord(file=self.files[file].name, line=line, reason=reason) for file, line, reason in joined.malformed
        ]
        manifest = CorpusManifest(
            num_documents=totals.num_documents,
            num_tokens=totals.num_values,
            dtype=self.dtype.name,
            bin_sha256=totals.bin_sha256,
            idx_sha256=totals.idx_sha256,
            text_bytes=joined.text_bytes,
            append_eod=self.options.append_eod,
            tokenizer=TokenizerRecord.of(self.tokenizer),
            inputs=inputs,
            num_malformed=joined.num_malformed,
            malformed=malformed,
            job_sha256=self.job_sha256,
        )
        self.joiner.writer.publish(manifest)
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

    def _check_documents(self, joined: Joined) -> None:
        if joined.num_tokens == 0:
            raise DataError(
                f"{self.prefix}: got {joined.num_documents} documents and no token from {_names(self.files)}, expected text; "
                f"are these files empty, or is --text-key {self.options.read.text_key!r} the wrong field?"
            )
        without = [file for file, count in zip(self.files, joined.documents_by_file, strict=True) if not count]
        if without:
            logger.warning("no documents in %s", _names(without))


def _names(files: Sequence[InputFile]) -> str:
    more = f" and {len(files) - 5} others" if len(files) > 5 else ""
    return ", ".join(file.path for file in files[:5]) + more


def _cpu_seconds() -> float:
    """Of this process and the children that ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
