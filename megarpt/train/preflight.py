"""Whether there is room for a checkpoint: on the disk, and in the hosts' memory for copies of the state. Asked beforehand."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_DISK_MARGIN_BYTES = 16 << 20  # metadata, common state and manifest
_MEMORY_MARGIN_BYTES = 256 << 20  # what else a host must be able to do
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes a number near 2**63 where there is no limit


@dataclass(frozen=True, slots=True)
class Room:
    """What one rank needs and what it sees; bytes."""

    disk: int
    memory: int  # to be taken from the host, beyond what the rank holds already
    host: str
    free_disk: int
    free_memory: int

    @classmethod
    def of(cls, directory: Path, *, disk: int, memory: int) -> Room:
        """Look around on this rank; `directory` exists."""
        return cls(disk, memory, socket.gethostname(), shutil.disk_usage(directory).free, available_memory())


def disk_shortage(everyone: Sequence[Room]) -> str | None:
    """How much is missing for the shares of all ranks in one folder, as seen by the first."""
    needed, free = sum(each.disk for each in everyone) + _DISK_MARGIN_BYTES, everyone[0].free_disk
    return f"the checkpoint needs {needed} bytes and {free} bytes are free" if free < needed else None


def memory_shortage(everyone: Sequence[Room]) -> str | None:
    """Which hosts cannot hold the copies of their ranks."""
    short = []
    for host in dict.fromkeys(each.host for each in everyone):
        ranks = [each for each in everyone if each.host == host]
        needed, free = sum(each.memory for each in ranks), min(each.free_memory for each in ranks)
        if needed and needed + _MEMORY_MARGIN_BYTES > free:
            short.append(f"{host}: {len(ranks)} ranks need {needed} bytes of memory and {free} bytes are free")
    return "; ".join(short) or None


def available_memory() -> int:
    """Memory this process can still take: what the machine has, and what its control groups allow."""
    return min([psutil.virtual_memory().available, *_cgroup_room(Path("/proc/self/cgroup"), _CGROUPS)])


def _cgroup_room(membership: Path, root: Path) -> list[int]:
    """Room below each memory limit of the control groups this process is in, versions 1 and 2; file cache counts as room."""
    rooms = []
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = top / path.lstrip("/")
        # Inside a container the path may be one of the host, which is not visible: then the top is the container's own group.
        for group in [each for each in (folder, *folder.parents) if each.is_relative_to(top)]:
            limit, usage = (_number(group / name) for name in names)
            if limit is not None and usage is not None and limit < _UNLIMITED:
                rooms.append(max(limit - usage + _file_cache(group / "memory.stat"), 0))
    return rooms


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _file_cache(path: Path) -> int:
    """Bytes of cached files that nothing has used lately, which the kernel drops first."""
    try:
        lines = dict(line.split(" ", 1) for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(lines.get("total_inactive_file", lines.get("inactive_file", "0")))
