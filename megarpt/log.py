"""Logging of a process: the only place that configures handlers.

Modules say `logger = logging.getLogger(__name__)`. Rank 0 shows INFO, the others WARNING; `-v` shows DEBUG of this package
everywhere. Lines go to standard error, so that standard output stays for results.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from datetime import UTC, datetime
from typing import Literal, TextIO

from rich.console import Console
from rich.logging import RichHandler

LogFormat = Literal["auto", "plain", "json"]

_STREAM_HANDLER = "megarpt.stream"

_KNOWN_WARNINGS: tuple[tuple[str, str], ...] = (
    # megatron-core says at import that it uses torch instead of Transformer Engine and apex. That is what a machine without
    # them is supposed to do, and `megarpt doctor` shows it.
    (r"Transformer Engine and Apex are not installed", r"megatron\.core\..*"),
    (r"Apex is not installed\. Falling back to Torch Norm", r"megatron\.core\..*"),
    # Said of a default that megatron-core sets itself.
    (r"full scope is deprecated\. Use empty cuda_graph_scope", r"megatron\.core\..*"),
    # Asked by megatron-core of the shares of its distributed optimizer.
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", r"megatron\.core\.optimizer\..*"),
    # megatron-core calls what this torch has renamed.
    (r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed\..*"),
)


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; the traceback, when there is one, under `exception`."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "rank": self.rank,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def setup_logging(
    *,
    rank: int = 0,
    world_size: int = 1,
    verbose: bool = False,
    log_format: LogFormat = "auto",
    stream: TextIO | None = None,
) -> None:
    """Send the package's log lines to `stream` (standard error). Calling it again replaces what it set up before.

    Args:
        rank: rank 0 shows INFO, the others only warnings.
        world_size: with more than one rank every plain line names its rank.
        verbose: DEBUG on every rank.
        log_format: `auto` is rich on a terminal and plain otherwise.
        stream: where to, when not standard error.
    """
    stream = stream or sys.stderr
    handler: logging.Handler
    if log_format == "json":
        handler = logging.StreamHandler(stream)
        handler.setFormatter(JsonFormatter(rank))
    elif log_format == "auto" and stream.isatty():
        handler = RichHandler(console=Console(file=stream), show_path=False, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter("%(message)s" if world_size == 1 else f"[rank {rank}] %(message)s"))
    else:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_plain(rank, world_size))
    _replace(_STREAM_HANDLER, handler)
    logging.getLogger("megarpt").setLevel(logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)
    for message, module in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=Warning, module=module)


def terminal() -> Console | None:
    """The console log lines appear on when standard error is a terminal, so that a progress bar can share it; else None."""
    for handler in logging.getLogger().handlers:
        if handler.name == _STREAM_HANDLER and isinstance(handler, RichHandler):
            return handler.console
    return None


def _plain(rank: int, world_size: int) -> logging.Formatter:
    who = f" [rank {rank}]" if world_size > 1 else ""
    return logging.Formatter(f"%(asctime)s %(levelname)s{who} %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


def _replace(name: str, handler: logging.Handler) -> None:
    root = logging.getLogger()
    for old in [each for each in root.handlers if each.name == name]:
        root.removeHandler(old)
        old.close()
    handler.name = name
    root.addHandler(handler)
