"""Worker processes that make shards, and what happens when one of them does not come back."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from megarpt.corpus.encoders import Encoder
from megarpt.corpus.worker import ShardJob, ShardResult, read_shard_result, run_worker
from megarpt.errors import DataError, MegarptError

logger = logging.getLogger(__name__)

_WAIT_S = 0.25


@dataclass(slots=True)
class _Worker:
    number: int
    process: Any
    pipe: connection.Connection
    shard: int | None = None
    read_bytes: int = 0
    tokens: int = 0


def make_shards(
    job: ShardJob,
    encoder: Encoder,
    todo: Sequence[int],
    *,
    workers: int,
    on_done: Callable[[int, ShardResult], None],
    on_tick: Callable[[int, int], None],
) -> None:
    """Have worker processes make the shards `todo`, handed out in order.

    Args:
        job: what all workers know.
        encoder: what they encode with.
        todo: numbers of shards.
        workers: how many processes at most.
        on_done: called here with each finished shard, in the order they finish.
        on_tick: called here some times a second with the bytes read and tokens written of shards in the making.

    Raises:
        MegarptError: a worker died, or raised; also whatever the callbacks raise. All workers are gone then.
    """
    pool: list[_Worker] = []
    try:
        for number in range(min(workers, len(todo))):
            pool.append(_start(number, job, encoder))
        waiting = iter(todo)
        for worker in pool:
            _give(worker, waiting, job)
        while any(worker.shard is not None for worker in pool):
            for worker, message in _messages(pool, job):
                _take(worker, message, waiting, job, on_done)
            busy = [worker for worker in pool if worker.shard is not None]
            on_tick(sum(worker.read_bytes for worker in busy), sum(worker.tokens for worker in busy))
    finally:
        for worker in pool:
            if worker.shard is not None:
                worker.process.kill()
        for worker in pool:
            worker.process.join()
            worker.pipe.close()
        for leftover in job.folder.glob("*.tmp-*"):  # of workers that were killed
            leftover.unlink()


def _start(number: int, job: ShardJob, encoder: Encoder) -> _Worker:
    """fork shares the open tokenizer with all workers; it is not used beside threads, pyarrow's among them."""
    forks = threading.active_count() == 1 and all(file.format != "parquet" for file in job.files)
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_worker, args=(there, encoder, job), daemon=True, name=f"worker {number}")
    process.start()
    there.close()
    return _Worker(number, process, here)


def _give(worker: _Worker, waiting: Iterator[int], job: ShardJob) -> None:
    """The next shard, or word that there is none."""
    worker.shard = next(waiting, None)
    worker.read_bytes = worker.tokens = 0
    try:
        worker.pipe.send(worker.shard)
    except BrokenPipeError:
        raise _death(worker, job) from None


def _messages(pool: Sequence[_Worker], job: ShardJob) -> Iterator[tuple[_Worker, Any]]:
    """What workers say within a moment; notices those that died without a word."""
    busy = [worker for worker in pool if worker.shard is not None]
    ready = connection.wait([worker.pipe for worker in busy], timeout=_WAIT_S)
    for worker in busy:
        if worker.pipe in ready:
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                raise _death(worker, job) from None
            yield worker, message
        elif not worker.process.is_alive() and not worker.pipe.poll():
            raise _death(worker, job)


def _take(
    worker: _Worker, message: Any, waiting: Iterator[int], job: ShardJob, on_done: Callable[[int, ShardResult], None]
) -> None:
    kind, *content = message
    if kind == "error":
        error_type, text = content
        raise error_type(text)
    if kind == "progress":
        worker.read_bytes, worker.tokens = content
        return
    (shard,) = content
    result = read_shard_result(job.folder, shard, job.job_sha256)
    if result is None:
        raise DataError(f"{job.folder}: shard {shard} is gone after it was written; is something cleaning up there?")
    _give(worker, waiting, job)  # before the result is used, so that nobody waits for that
    on_done(shard, result)


def _death(worker: _Worker, job: ShardJob) -> MegarptError:
    worker.process.join(timeout=5)
    code = worker.process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
    doing = ""
    if worker.shard is not None:
        first = job.shards[worker.shard][0]
        doing = f" while it worked on shard {worker.shard} ({job.files[first.file].path}, {first.start:,} to {first.end:,})"
    memory = "; the system may have run out of memory: use fewer --workers" if code == -signal.SIGKILL else ""
    return MegarptError(
        f"worker {worker.number} (process {worker.process.pid}) {how}{doing}{memory}. Run the same command again: it goes on "
        "at the last finished shard"
    )
