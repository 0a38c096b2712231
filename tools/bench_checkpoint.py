"""How long training stands still for a checkpoint: megarpt in the background and synchronous, torch and megatron-core.

    python tools/bench_checkpoint.py --sizes 88 300 600 --rounds 3 --output bench_checkpoint.json

All save the same training state (fp32 weights and two moments) in one process, in turn. The stall is the time until the saving
call has returned and parameters may change; the limit is one copy of the state into host memory that was used before. CPU
seconds are those of the training thread: they hold on a machine that others use too. Steps are timed alone and while a
checkpoint is written behind them.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from megarpt.device import runtime

MACHINE = runtime.start("cpu")  # before anything that imports megatron-core

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # noqa: E402

from megarpt.config.schema import ObjectiveConfig, PretrainConfig  # noqa: E402
from megarpt.model.build import build_model, unwrap  # noqa: E402
from megarpt.model.parameters import total_parameters  # noqa: E402
from megarpt.objectives.build import build_objective  # noqa: E402
from megarpt.parallel.layout import ParallelLayout, ProcessGroups  # noqa: E402
from megarpt.structs import Progress  # noqa: E402
from megarpt.testing.batches import random_batch  # noqa: E402
from megarpt.testing.configs import tiny_config  # noqa: E402
from megarpt.train.checkpoint import CheckpointManager  # noqa: E402
from megarpt.train.optimizer import build_optimizer  # noqa: E402
from megarpt.train.optimizer_state import sharded_optimizer  # noqa: E402
from megarpt.train.state import TrainState  # noqa: E402
from megarpt.train.step import TrainStep  # noqa: E402
from megarpt.train.weights import sharded_weights  # noqa: E402

SEQUENCE, BATCH, VOCAB = 256, 2, 8192


@dataclass
class Training:
    """Something that trains and can be saved."""

    cfg: PretrainConfig
    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    step: Callable[[], float]  # seconds of one step
    num_bytes: int


def build(groups: ProcessGroups, megabytes: float) -> Training:
    """A model whose weights and moments have about this size."""
    hidden = 256 if megabytes < 200 else 512
    layers = max(1, round((megabytes * 1e6 / 12 - 2 * VOCAB * hidden) / (11 * hidden**2)))
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": 3 * hidden, "num_attention_heads": 8}
    cfg = tiny_config(
        **{
            "model.mcore": {**shape, "num_query_groups": 4},
            "data.seq_length": SEQUENCE,
            "train.train_tokens": 1 << 40,
            "checkpoint": {"keep_last": 1},
        }
    )
    torch.manual_seed(1)
    chunks = build_model(cfg, ParallelLayout(), groups, MACHINE, vocab_size=VOCAB)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, chunks, groups)
    objective = build_objective(ObjectiveConfig(), 1)
    train_step = TrainStep(chunks, objective, optimizer, scheduler, groups)
    batch = random_batch(BATCH, SEQUENCE, VOCAB, seed=1)

    def step() -> float:
        start = time.perf_counter()
        train_step([batch], Progress())
        return time.perf_counter() - start

    return Training(cfg, list(chunks), optimizer, scheduler, step, 12 * total_parameters(chunks, groups).total)


@dataclass
class Measured:
    """One save; seconds."""

    stall: float
    stall_cpu: float  # of the training thread
    total: float
    steps: list[float]  # made while it was written


class Megarpt:
    """Manifest, hashes and fsync included."""

    def __init__(self, training: Training, groups: ProcessGroups, folder: Path, *, in_background: bool) -> None:
        options = training.cfg.checkpoint.model_copy(update={"async_save": in_background})
        cfg = training.cfg.model_copy(update={"checkpoint": options})
        self._training, self._state = training, TrainState()
        self._manager = CheckpointManager(folder, cfg, tokenizer_sha256="", runtime=MACHINE, groups=groups)
        self._manager.load_latest(training.model, training.optimizer, training.scheduler)

    def save(self) -> Measured:
        """Save, and train until the checkpoint is complete."""
        t = self._training
        self._state = replace(self._state, progress=Progress(step=self._state.progress.step + 1))
        cpu, steps = time.thread_time(), []
        self._manager.save(self._state, t.model, t.optimizer, t.scheduler)
        saved = self._manager.poll()
        stall_cpu = time.thread_time() - cpu
        while not saved:
            steps.append(t.step())
            cpu = time.thread_time()
            saved = self._manager.poll()
            stall_cpu += time.thread_time() - cpu
        return Measured(saved[0].stall_s, stall_cpu, saved[0].seconds, steps)


class TorchAsync:
    """`torch.distributed.checkpoint.async_save`, as it comes: no hashes, no manifest."""

    def __init__(self, training: Training, folder: Path) -> None:
        self._training, self._folder, self._saves = training, folder, 0

    def save(self) -> Measured:
        """Save, and train until the files are there."""
        t, self._saves = self._training, self._saves + 1
        inner = t.optimizer.chained_optimizers[0].optimizer
        start, cpu = time.perf_counter(), time.thread_time()
        content = {"model": unwrap(t.model[0]).state_dict(), "optimizer": inner.state_dict()}
        target = self._folder / str(self._saves)
        future: Any = async_save(content, storage_writer=FileSystemWriter(target))
        measured = _train_until(start, cpu, t, future.done)
        future.result()
        shutil.rmtree(target)
        return measured


class McoreFork:
    """megatron-core's `async_save` with a forked writer (`persistent=False`): no hashes, no manifest."""

    def __init__(self, training: Training, folder: Path) -> None:
        self._training, self._folder, self._saves = training, folder, 0
        self._queue = AsyncCallsQueue(persistent=False)
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1)

    def save(self) -> Measured:
        """Save, and train until the files are there."""
        t, self._saves = self._training, self._saves + 1
        target = self._folder / str(self._saves)
        target.mkdir(parents=True)
        start, cpu = time.perf_counter(), time.thread_time()
        weights = sharded_weights(t.model)
        optimizer = sharded_optimizer(t.optimizer, weights)
        request = dist_checkpointing.save(
            {**weights, "optimizer": optimizer}, str(target), self._strategy, async_sharded_save=True
        )
        self._queue.schedule_async_request(request)
        measured = _train_until(start, cpu, t, lambda: bool(self._queue.maybe_finalize_async_calls()))
        shutil.rmtree(target)
        return measured


def _train_until(start: float, cpu: float, training: Training, is_done: Callable[[], bool]) -> Measured:
    stall, stall_cpu, steps = time.perf_counter() - start, time.thread_time() - cpu, []
    while not is_done():
        steps.append(training.step())
    return Measured(stall, stall_cpu, time.perf_counter() - start, steps)


def copy_seconds(num_bytes: int) -> float:
    """The limit: one copy into memory that was touched before."""
    source = torch.ones(num_bytes // 4)
    target = source.clone()
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        target.copy_(source)
        best = min(best, time.thread_time() - start)
    return best


def measure(groups: ProcessGroups, megabytes: float, rounds: int, peers: list[str], folder: Path) -> list[dict[str, Any]]:
    """One row for each way to save."""
    training = build(groups, megabytes)
    for _ in range(2):
        training.step()
    savers: dict[str, Any] = {
        "megarpt, synchronous": Megarpt(training, groups, folder / "sync", in_background=False),
        "megarpt": Megarpt(training, groups, folder / "async", in_background=True),
    }
    if "torch" in peers:
        savers["torch DCP async_save"] = TorchAsync(training, folder / "torch")
    if "mcore" in peers:
        savers["megatron-core async_save, fork"] = McoreFork(training, folder / "mcore")
    alone = statistics.median(training.step() for _ in range(10))
    runs: dict[str, list[Measured]] = {name: [] for name in savers}
    for _ in range(rounds):
        for name, saver in savers.items():
            gc.collect()
            runs[name].append(saver.save())
    limit = copy_seconds(training.num_bytes)
    synchronous = statistics.median(m.stall for m in runs["megarpt, synchronous"])
    rows = []
    for name, measured in runs.items():
        stall, stall_cpu = (statistics.median(getattr(m, name) for m in measured) for name in ("stall", "stall_cpu"))
        steps = [step for m in measured for step in m.steps]
        rows.append(
            {
                "MB": round(training.num_bytes / 1e6),
                "how": name,
                "first stall s": measured[0].stall,
                "stall s": stall,
                "of synchronous": stall / synchronous,
                "stall CPU s": stall_cpu,
                "times the limit, CPU": stall_cpu / limit,
                "until complete s": statistics.median(m.total for m in measured),
                "step while writing": statistics.median(steps) / alone if steps else None,
            }
        )
    rows.append({"MB": round(training.num_bytes / 1e6), "how": "limit: copy into used memory", "stall CPU s": limit})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[88, 300, 600], metavar="MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", nargs="*", default=["torch", "mcore"], choices=["torch", "mcore"])
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    groups = ParallelLayout().initialize(seed=1)
    rows: list[dict[str, Any]] = []
    for megabytes in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows += measure(groups, megabytes, args.rounds, args.peers, Path(folder))
    table = Table(title="checkpoints: seconds that training stands still")
    for key in rows[0]:
        table.add_column(key, justify="left" if key == "how" else "right")
    for row in rows:
        values = (row.get(key) for key in rows[0])
        table.add_row(*("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    Console(width=190).print(table)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    MACHINE.close()


if __name__ == "__main__":
    main()
