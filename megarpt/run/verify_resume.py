"""`megarpt verify-resume`: whether a run of this configuration that is killed and resumed ends as the one that is not.

Three attempts train in processes of their own, as `megarpt pretrain` does: one straight to the end; one that is killed by
SIGKILL some steps after a checkpoint; one that resumes from that checkpoint. This process only watches, kills and compares.

Started once, it runs all ranks of the attempts on this machine. Started by a launcher (torchrun, or srun with its variables) it
is one of as many watchers as there are ranks, each with one rank to run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megarpt.config.load import config_from_dict, dump_resolved
from megarpt.config.schema import LanguageModelConfig, VerifyResumeOptions
from megarpt.corpus.atomic import atomic_write_bytes
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_NOT_REPRODUCED, EXIT_OK, ConfigError, MegarptError
from megarpt.log import terminal
from megarpt.train.checkpoint_files import MODEL, TRAINING, list_checkpoints, read_manifest, remove_checkpoint, step_name
from megarpt.train.comparison import Comparison, Line, compare_lines, compare_objects, compare_tensors
from megarpt.train.metrics_file import DISCARDED, read_metrics
from megarpt.train.progress import ProgressLine
from megarpt.train.sharded import first_error, from_rank_0, gathered, tensor_names

logger = logging.getLogger(__name__)

PROGRAM: tuple[str, ...] = ("-m", "megarpt")  # what the interpreter runs
_POLL_S = 0.05
_LOG_TAIL_BYTES = 4000
_ENDLESS = 50  # times the steps asked for: an attempt that is to be killed must not end before
_CUDA_ADVICE = (
    "On CUDA two runs are equal only with deterministic kernels: model.mcore.deterministic_mode=true, and in the environment "
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, CUBLAS_WORKSPACE_CONFIG=:4096:8 and NCCL_ALGO=Ring."
)


class AttemptFailedError(MegarptError):
    """Training itself failed, so there is nothing to compare; the exit code is the attempt's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(cfg: LanguageModelConfig, options: VerifyResumeOptions, runtime: Runtime) -> int:
    """Train three times, compare, and print what was compared.

    Raises:
        ConfigError: the options do not fit together, or the folder for the attempts cannot be made.
        AttemptFailedError: an attempt ended with an error.
    """
    if runtime.world_size > 1 and options.nproc_per_node > 1:
        raise ConfigError(
            f"--nproc-per-node: got {options.nproc_per_node}, but a launcher has started {runtime.world_size} ranks already; "
            "leave it out, or start the command once"
        )
    with _temporary_folder(Path(cfg.run.dir)) as folder:
        verification = Verification(cfg, options, runtime, folder)
        with verification.line:
            verification.straight()
            verification.interrupted()
            verification.resumed()
            results = from_rank_0(verification.compare() if runtime.rank == 0 else None)
        equal = all(result.difference is None for result in results)
        if runtime.rank == 0:
            Console(soft_wrap=True).print(verification.table(results))
            sys.stdout.write(verification.verdict(results) + "\n")
            if equal and not options.keep:
                shutil.rmtree(folder)
            else:
                sys.stdout.write(f"The runs are kept in {folder}\n")
    return EXIT_OK if equal else EXIT_NOT_REPRODUCED


class Verification:
    """The three attempts in one folder. Every method is called by all watchers together."""

    def __init__(self, cfg: LanguageModelConfig, options: VerifyResumeOptions, runtime: Runtime, folder: Path) -> None:
        self.folder, self.steps, self.middle = folder, options.steps, options.steps // 2
        self.killed_in: int | None = None  # the step under way when the signal was sent
        self._before_the_kill: list[Line] = []
        self._kill_from = from_rank_0(random.randrange(self.middle + 1, self.steps))
        self._cfg, self._runtime = cfg, runtime
        self._num_local_ranks = options.nproc_per_node if runtime.world_size == 1 else 1
        world_size = runtime.world_size * self._num_local_ranks
        self._world_size = world_size
        self.line = ProgressLine(
            "verify-resume",
            self.steps + self._kill_from + self.steps - self.middle,
            unit="step",
            console=terminal(),
            is_writer=runtime.rank == 0,
        )
        self._done = 0  # steps of the attempts that have ended

    def straight(self) -> None:
        """Train to the end without a stop and without a save on the way."""
        self._attempt("straight", self._config("straight", self.steps, save_every=0))

    def interrupted(self) -> None:
        """Train beyond the checkpoint in the middle and die there, in a step that nobody chose."""
        cfg = self._config("resumed", self.steps * _ENDLESS, save_every=self.middle)
        self._attempt("interrupted", cfg, kill_from=self._kill_from)
        if self._runtime.rank == 0:
            self._before_the_kill = list(read_metrics(self._metrics("resumed")))
            self.killed_in = max(int(line["step"]) for line in self._before_the_kill) + 1
            for checkpoint in list_checkpoints(self.folder / "resumed" / "checkpoints"):
                if read_manifest(checkpoint).step > self.middle:  # a fast run saves again before the signal arrives
                    remove_checkpoint(checkpoint)

    def resumed(self) -> None:
        """Give the same command again."""
        self._attempt("resumed", self._config("resumed", self.steps, save_every=self.middle), first=self.middle)

    def compare(self) -> list[Comparison]:
        """What the straight and the resumed attempt left behind; on one rank."""
        one, other = (self.folder / name / "checkpoints" / step_name(self.steps) for name in ("straight", "resumed"))
        for checkpoint in (one, other):
            read_manifest(checkpoint)  # a run whose parameters are not finite saves nothing
        straight = list(read_metrics(self._metrics("straight")))
        control = [line for line in self._before_the_kill if int(line["step"]) < self.steps]
        total, compared = sum(len(tensor_names(one / part)) for part in (MODEL, TRAINING)), 0

        def advance() -> None:
            nonlocal compared
            compared += 1
            self.line.update(self._done, {"now": f"comparing tensor {compared} of {total}"})

        return [
            compare_lines("metrics lines before the kill", straight[: len(control)], control),
            self._start_of_the_resume(),
            compare_lines("metrics lines", straight, list(read_metrics(self._metrics("resumed")))),
            compare_tensors("parameters", one / MODEL, other / MODEL, advance),
            compare_tensors("optimizer state", one / TRAINING, other / TRAINING, advance),
            compare_objects("random states, schedule, data position, counters", one, other),
        ]

    def _start_of_the_resume(self) -> Comparison:
        """A resume that begins again from nothing ends equal too: where it began shows in the lines it threw away."""
        discarded = self._metrics("resumed").with_name(DISCARDED)
        steps = [int(line["step"]) for line in read_metrics(discarded)] if discarded.exists() else []
        expected = f"expected those from step {self.middle + 1} on"
        difference = None
        if not steps:
            difference = f"the resume threw away no steps, {expected}"
        elif min(steps) != self.middle + 1:
            difference = f"the resume threw away the steps from {min(steps)} on, {expected}"
        return Comparison("steps thrown away by the resume", len(set(steps)), None, difference)

    def table(self, results: list[Comparison]) -> Table:
        """What was compared."""
        table = Table(title=f"{self._cfg.run.dir}: {self.steps} steps straight, and with a kill and a resume")
        for column in ("compared", "items", "MB", ""):
            table.add_column(column, justify="right" if column in ("items", "MB") else "left")
        for each in results:
            size = "" if each.num_bytes is None else f"{each.num_bytes / 1e6:.1f}"
            table.add_row(each.what, f"{each.count:,}", size, "equal" if each.difference is None else "DIFFERENT")
        return table

    def verdict(self, results: list[Comparison]) -> str:
        """One paragraph."""
        what = (
            f"{self._world_size} rank{'s' if self._world_size > 1 else ''}, killed in step {self.killed_in}, resumed from step "
            f"{self.middle}, ended at step {self.steps}"
        )
        different = [each for each in results if each.difference is not None]
        if not different:
            return f"Equal to the last bit: {what}."
        lines = [f"NOT EQUAL: {what}. First differences, straight and resumed:"]
        lines += [f"  {each.what}: {each.difference}" for each in different]
        if different[0] is results[0]:
            lines.append("The attempts differ before any resume: the steps themselves are not repeatable here.")
            environment = json.loads((self.folder / "straight" / "environment.json").read_bytes())
            lines += [_CUDA_ADVICE] if environment["backend"] == "nccl" else []
        else:
            lines.append("Up to the kill the attempts were equal, so it is the resume that changes the run.")
        return "\n".join(lines)

    def _config(self, name: str, steps: int, *, save_every: int) -> LanguageModelConfig:
        """The user's configuration for `steps` steps in a folder of ours, with the user's own learning rates."""
        cfg = self._cfg
        tree: dict[str, Any] = cfg.model_dump()
        often = max(1, self.middle // 2)
        step_tokens = cfg.batch.global_batch_size * cfg.data.seq_length
        tree["run"]["dir"] = str(self.folder / name)
        tree["train"]["train_tokens"] = steps * step_tokens
        tree["optimizer"]["lr_decay_tokens"] = cfg.optimizer.lr_decay_tokens or cfg.train.train_tokens
        if cfg.optimizer.lr_decay_style == "constant":  # takes no end, and its warm-up may be longer than these few steps
            tree["optimizer"] |= {"lr_decay_style": "linear", "min_lr": cfg.optimizer.lr}
        if cfg.data.valid:
            limit = cfg.evaluation.max_tokens
            tree["evaluation"] |= {"interval_steps": often, "max_tokens": min(limit or step_tokens, step_tokens)}
        tree["checkpoint"] |= {"interval_steps": save_every, "keep_every_steps": save_every, "resume": True}
        histograms = cfg.logging.histogram_interval_steps
        tree["logging"] |= {
            "interval_steps": 1,
            "tensorboard": False,
            "wandb_project": None,
            "histogram_interval_steps": min(histograms, often),
        }
        resized = config_from_dict(tree, world_size=self._world_size)
        assert isinstance(resized, LanguageModelConfig)
        return resized

    def _attempt(self, name: str, cfg: LanguageModelConfig, *, first: int = 0, kill_from: int | None = None) -> None:
        """Train in processes of their own until they end, or until step `kill_from` and the checkpoint before it are there."""
        path = self.folder / f"{name}.yaml"
        if self._runtime.rank == 0:
            logger.info("%s: from step %d%s", name, first, f", to be killed after step {kill_from}" if kill_from else "")
            atomic_write_bytes(path, dump_resolved(cfg).encode())
        checkpoint = self.folder / "resumed" / "checkpoints" / step_name(self.middle)
        stop = self.folder / f"{name}.stop"  # how one watcher tells the others, on the file system that the ranks share
        failure: tuple[float, str, int] | None = None
        is_killed = False
        with _processes(cfg.command, path, self._environments(from_rank_0(_free_port()))) as ranks:
            while not stop.exists() and any(process.poll() is None for process in ranks.values()):
                time.sleep(_POLL_S)
                failure = self._failure(ranks, path)
                if failure is not None:
                    stop.touch()
                    break
                step, seconds = self._progress(Path(cfg.run.dir))
                self.line.update(self._done + max(0, step - first), {"now": name})
                if kill_from is not None and self._runtime.rank == 0 and step >= kill_from and checkpoint.exists():
                    time.sleep(random.random() * min(seconds, 10.0))
                    is_killed = True
                    stop.touch()
            failure = failure or self._failure(ranks, path)
        self._done += (kill_from or self.steps) - first
        failures = [each for each in gathered(failure) if each is not None]
        if from_rank_0(is_killed):
            return  # ranks whose peers were killed complain rightly
        if failures:
            _, message, code = min(failures)  # the others may only have missed the first that failed
            raise AttemptFailedError(message, code)
        if kill_from is not None:
            raise AttemptFailedError(f"the {name} attempt ended before it could be killed: use more --steps", 1)

    def _failure(self, ranks: Mapping[int, subprocess.Popen[bytes]], config: Path) -> tuple[float, str, int] | None:
        """Time, message and exit code of a rank that ended badly."""
        for rank, process in ranks.items():
            code = process.poll()
            if code:
                log = _log_path(config, rank)
                tail = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
                message = f"the {config.stem} attempt ended with exit code {code} on rank {rank}; {log} ends with\n{tail}"
                return time.time(), message, max(code, 1)
        return None

    def _progress(self, run: Path) -> tuple[int, float]:
        """The last step on file and its seconds."""
        path = run / "metrics.jsonl"
        lines = list(read_metrics(path, "train")) if self._runtime.rank == 0 and path.exists() else []
        return (int(lines[-1]["step"]), float(lines[-1]["time/step_s"])) if lines else (0, 0.0)

    def _metrics(self, name: str) -> Path:
        return self.folder / name / "metrics.jsonl"

    def _environments(self, port: int) -> list[Mapping[str, str]]:
        """For each rank that is run from here. The attempt has a store of its own, not the launcher's."""
        common = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_USE_AGENT_STORE"}
        common["MASTER_PORT"] = str(port)
        if self._runtime.world_size > 1:
            return [common]
        count = self._num_local_ranks
        if count > 1:
            common.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the cores
        common |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@contextmanager
def _temporary_folder(run_dir: Path) -> Iterator[Path]:
    """A new folder beside the run's, the same on every rank; left behind only where its contents explain the outcome.

    Raises:
        ConfigError: it cannot be made.
    """
    folder, problem = "", None
    if dist.get_rank() == 0:
        try:
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(prefix=f"{run_dir.name}.verify-resume-", dir=run_dir.parent)
        except OSError as error:
            problem = f"run.dir: cannot make a folder beside {run_dir}: {error.strerror}; choose another"
    text = first_error(problem)
    if text is not None:
        raise ConfigError(text)
    path = Path(from_rank_0(folder))
    try:
        yield path
    except AttemptFailedError:
        raise
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


@contextmanager
def _processes(
    command: str, config: Path, environments: Sequence[Mapping[str, str]]
) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Rank -> process that trains; whatever happens, none of them outlives the block. SIGTERM ends it like ctrl-c."""
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        for environment in environments:
            rank = int(environment["RANK"])
            with _log_path(config, rank).open("wb") as log:
                ranks[rank] = subprocess.Popen(
                    [sys.executable, *PROGRAM, command, str(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    process_group=0,  # so that what training forks dies with it
                )
        yield ranks
    finally:
        for process in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in ranks.values():
            process.wait()
        signal.signal(signal.SIGTERM, previous)


def _log_path(config: Path, rank: int) -> Path:
    return config.with_suffix(f".rank{rank}.log")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
