"""Running a function on several gloo ranks, quickly.

A fork server imports torch and megatron-core once; every rank is forked from it, so a world of two starts in a fraction of a
second instead of the seconds of an import. Functions must be importable: defined at the top of a test module.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

_PRELOAD = "megarpt.testing.preload"


def spawn(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run `function(*arguments)` on `world_size` ranks of one gloo world and return their results, by rank.

    Raises:
        RuntimeError: a rank failed or did not end in time; carries the traceback of the first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, world_size, str(Path(folder) / "store"), sender, function, arguments), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait_for([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout=timeout_s)
        if not ready:
            waiting = sorted(set(range(len(pipes))) - set(results))
            raise RuntimeError(f"ranks {waiting} of {len(pipes)} did not end within {timeout_s} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                error, results[rank] = pipes[rank].recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(pipes)} died without a word") from None
            if error is not None:
                raise RuntimeError(f"rank {rank} of {len(pipes)} failed:\n{error}")
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, world_size: int, store: str, sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)})
    try:
        dist.init_process_group("gloo", store=FileStore(store, world_size), rank=rank, world_size=world_size)
        sender.send((None, function(*arguments)))
    except BaseException:  # noqa: BLE001  whatever it was, the parent raises it with the traceback
        sender.send((traceback.format_exc(), None))
        raise SystemExit(1) from None
