"""Runs the demo's stages: skips what is done, shows what runs, keeps every log, passes failures on.

A stage is a few commands and what they write. Its key is a hash of the commands, of the files they depend on and of the keys
of the stages it needs; `stages/<name>.json` remembers the key with which it was finished. A stage with a new key starts from
nothing; one that was interrupted under the same key is started again on top of what it left, because the commands resume.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

LOG_TAIL_LINES = 25
PATIENCE_S = 120.0
"""How long a command that was asked to stop may take to save its state."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command line."""

    argv: tuple[str, ...]  # as a user would type it
    log: str  # logs/<log>.log takes its output
    stdout: Path | None = None  # standard output goes here instead, as with `> file`

    def echo(self) -> str:
        """The command line, ready to be pasted into a shell."""
        return shlex.join(self.argv) + (f" > {self.stdout}" if self.stdout else "")


@dataclass(frozen=True, slots=True)
class Stage:
    """Commands that belong together, and what makes them necessary."""

    name: str
    title: str
    commands: tuple[Command, ...]
    outputs: tuple[Path, ...]  # files and folders; removed before the stage starts anew, checked after it
    needs: tuple[str, ...] = ()  # names of earlier stages
    files: tuple[Path, ...] = ()  # whose content matters
    side_by_side: bool = False  # the commands are independent of each other and share the cores


class StageFailed(Exception):
    """A command ended with an error."""

    def __init__(self, command: Command, code: int, log: Path, what: str = "") -> None:
        super().__init__(f"{command.echo()} {what or f'ended with exit code {code}'}")
        self.command, self.code, self.log = command, code, log


class Stopped(Exception):
    """The demo was asked to stop by a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass(slots=True)
class Pipeline:
    """The stages of one output folder."""

    out: Path
    stages: Sequence[Stage]
    console: Console
    after_stage: Callable[[Stage], None] = lambda stage: None  # called with every stage that was run and succeeded
    sharers: int = 1  # how many pipelines run on this machine, this one included: each takes its share of the cores
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> seconds its last run took
    _states: dict[str, str] = field(default_factory=dict)
    _started: dict[str, float] = field(default_factory=dict)
    _looked: float = 0.0  # when the logs were last read for a line of progress
    _shown: set[str] = field(default_factory=lambda: {""})  # lines of progress that were printed
    _spinner: Spinner = field(default_factory=lambda: Spinner("dots", style="yellow"))

    def run(self) -> None:
        """Bring every stage up to date.

        Raises:
            StageFailed: at the first command that fails.
            Stopped: on SIGINT, SIGTERM or SIGHUP, after the running commands have ended.
        """
        keys: dict[str, str] = {}
        with _stop_on_signals(), ExitStack() as stack:
            live = stack.enter_context(Live(self._table(), console=self.console, refresh_per_second=4)) if self._fancy else None
            for number, stage in enumerate(self.stages, 1):
                keys[stage.name] = key = stage_key(stage, keys)
                record = self._record(stage)
                if record.get("finished") == key and all(path.exists() for path in stage.outputs):
                    self.seconds[stage.name] = float(record["seconds"])
                    self._states[stage.name] = "kept"
                    self._say(f"[{number}/{len(self.stages)}] {stage.title}: already done")
                else:
                    self._say(f"[{number}/{len(self.stages)}] {stage.title}")
                    self._run_stage(stage, key, record, live)
                if live:
                    live.update(self._table())

    def remove_all(self) -> None:
        """Delete what the stages wrote, their logs and their records."""
        for stage in self.stages:
            remove(stage.outputs)
        remove((self.out / "stages", self.out / "logs"))

    @property
    def _fancy(self) -> bool:
        return self.console.is_terminal

    def _record(self, stage: Stage) -> dict[str, Any]:
        path = self.out / "stages" / f"{stage.name}.json"
        try:
            return dict(json.loads(path.read_text()))
        except (FileNotFoundError, ValueError):  # never run, or killed while the record was written
            return {}

    def _run_stage(self, stage: Stage, key: str, record: Mapping[str, Any], live: Live | None) -> None:
        if record.get("started") != key:
            remove(stage.outputs)
        spent = float(record.get("seconds", 0.0)) if record.get("started") == key else 0.0
        path = self.out / "stages" / f"{stage.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"started": key, "seconds": spent}))
        began = self._started[stage.name] = time.monotonic()
        self._states[stage.name] = "running"
        try:
            groups = [stage.commands] if stage.side_by_side else [(command,) for command in stage.commands]
            for commands in groups:
                self._run_commands(stage, commands, live)
            missing = [output for output in stage.outputs if not output.exists()]
            if missing:
                what = f"did not write {', '.join(map(str, missing))}"
                raise StageFailed(stage.commands[-1], 1, self._log(stage.commands[-1]), what)
        except BaseException:
            self._states[stage.name] = "failed"
            path.write_text(json.dumps({"started": key, "seconds": spent + time.monotonic() - began}))
            raise
        self.seconds[stage.name] = spent + time.monotonic() - began
        self._states[stage.name] = "done"
        path.write_text(json.dumps({"finished": key, "seconds": self.seconds[stage.name]}))
        self._say(f"    done in {self.seconds[stage.name]:.1f} s")
        self.after_stage(stage)

    def _run_commands(self, stage: Stage, commands: Sequence[Command], live: Live | None) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // (len(commands) * self.sharers))
        environment = {
            # Threads that wait for each other by spinning are twenty times slower when the cores are shared with other work.
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "160",
        }
        running: list[tuple[Command, subprocess.Popen[bytes]]] = []
        try:
            with ExitStack() as stack:
                for command in commands:
                    self._echo(command)
                    log = stack.enter_context(self._open(self._log(command)))
                    stdout = stack.enter_context(self._open(command.stdout)) if command.stdout else log
                    # A session of its own: a ctrl-c reaches the command once, from here, and it can save its state.
                    running.append((command, _start(command, stdout, log, environment)))
            while True:
                codes = [process.poll() for _, process in running]
                for (command, _), code in zip(running, codes, strict=True):
                    if code:
                        raise StageFailed(command, code if code > 0 else 128 - code, self._log(command))
                if all(code == 0 for code in codes):
                    return
                self._progress(stage, commands, live)
                time.sleep(0.1)
        finally:
            _end([process for _, process in running])

    def _progress(self, stage: Stage, commands: Sequence[Command], live: Live | None) -> None:
        now = time.monotonic()
        if live:
            live.update(self._table([last_line(self._log(command)) for command in commands]))
        elif now - self._looked > 15:
            self._looked = now
            lines = [line for line in (last_line(self._log(command)) for command in commands) if line not in self._shown]
            self._shown.update(lines)
            for line in lines:
                self._say(f"    {now - self._started[stage.name]:4.0f} s  {line}")

    def _log(self, command: Command) -> Path:
        return self.out / "logs" / f"{command.log}.log"

    def _open(self, path: Path) -> IO[bytes]:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")

    def _echo(self, command: Command) -> None:
        self.console.print(Text(f"$ {command.echo()}", style="dim cyan"), soft_wrap=True)

    def _say(self, text: str) -> None:
        if not self._fancy:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self, lines: Sequence[str] = ()) -> Group:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=2)
        table.add_column(ratio=1)
        table.add_column(justify="right", width=9)
        now = time.monotonic()
        for stage in self.stages:
            state = self._states.get(stage.name, "waiting")
            mark = {
                "waiting": Text("·", style="dim"),
                "kept": Text("✓", style="dim green"),
                "done": Text("✓", style="green"),
                "failed": Text("✗", style="bold red"),
                "running": self._spinner,
            }[state]
            elapsed = now - self._started[stage.name] if state == "running" else self.seconds.get(stage.name)
            style = {"waiting": "dim", "running": "bold", "kept": "dim"}.get(state, "")
            shown = "" if elapsed is None else f"{elapsed:.0f} s"
            table.add_row(mark, Text(stage.title, style=style), Text("kept" if state == "kept" else shown, style="dim"))
        total = sum(now - self._started[name] for name, state in self._states.items() if state == "running")
        total += sum(self.seconds.get(name, 0.0) for name, state in self._states.items() if state != "running")
        table.add_row("", Text("total", style="dim"), Text(f"{total // 60:.0f}:{total % 60:02.0f}", style="dim"))
        tail = [Text("  " + line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines if line]
        return Group(table, *tail)


def stage_key(stage: Stage, keys: Mapping[str, str]) -> str:
    """What a stage depends on, as one hash."""
    content = {
        "commands": [command.echo() for command in stage.commands],
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in stage.files],
        "needs": [keys[name] for name in stage.needs],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def remove(paths: Sequence[Path]) -> None:
    """Delete files and folders, those that exist."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def last_line(path: Path) -> str:
    """The last line of a log that is being written."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 4096))
            lines = stream.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def show_failure(console: Console, failure: StageFailed) -> None:
    """The end of the failed command's log."""
    lines = failure.log.read_text(errors="replace").replace("\r", "\n").splitlines() if failure.log.exists() else []
    console.print(f"\n[bold red]{escape(str(failure))}[/]", soft_wrap=True)
    for line in lines[-LOG_TAIL_LINES:]:
        console.print(Text("  " + line, style="dim"), soft_wrap=True)
    console.print(f"The whole log: {failure.log}. The same command continues from here.", highlight=False)


@contextmanager
def only_one(out: Path) -> Iterator[bool]:
    """Yields whether no other demo works in `out`; holds the folder's lock meanwhile."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "demo.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _start(command: Command, stdout: IO[bytes], log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    argv = list(command.argv)
    if argv[0] == "python":
        argv[0] = sys.executable
    elif argv[0] == "megarpt":
        argv[:1] = [sys.executable, "-m", "megarpt"]
    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, env=dict(environment), start_new_session=True
    )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to stop, wait for it, kill what does not."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + PATIENCE_S
    for process in alive:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Turns the usual signals into `Stopped`, once; a second one ends the program at once, as by default."""

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise Stopped(signum)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {signum: signal.signal(signum, stop) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
