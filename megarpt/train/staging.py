"""Host memory in which a save keeps what the parameters were while training goes on."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megarpt.device.runtime import Runtime
from megarpt.train.background import in_background

_ALIGNMENT = 64
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes a number near 2**63 where there is no limit


class HostBuffer:
    """Memory that is taken once and filled again by every save.

    Cost: the first touch of a page costs up to twenty times a copy into it, so `reserve` touches them on another thread.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._memory: Tensor | None = None  # [bytes] uint8
        self._used = 0
        self._ready: Future[None] | None = None

    @property
    def num_bytes(self) -> int:
        return 0 if self._memory is None else self._memory.nbytes

    def reserve(self, num_bytes: int) -> None:
        """Have at least `num_bytes`; returns before all of it is touched. What was in the buffer is gone if it had to grow."""
        if num_bytes <= self.num_bytes:
            return
        self.wait()
        if self._memory is not None:
            self._runtime.unpin(self._memory)
        # Pages of its own and not malloc's, so that a smaller buffer goes back to the system.
        memory = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
        self._memory = memory
        self._ready = in_background("touch host memory", lambda: self._runtime.pin(memory.zero_()))

    def wait(self) -> None:
        """Until the memory is touched, and pinned where there is CUDA."""
        if self._ready is not None:
            self._ready.result()
            self._ready = None

    def clear(self) -> None:
        """Forget the tensors and be ready for others; the memory stays."""
        self.wait()
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy that lasts until the next `clear`. From CUDA it is only under way: synchronize before reading it."""
        if tensor.nbytes == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        assert self._memory is not None
        # A storage of its own for every tensor: writers copy tensors that are parts of a larger storage.
        raw = torch.frombuffer(self._memory.numpy(), dtype=torch.uint8, count=tensor.nbytes, offset=self._used)
        self._used += room_for([tensor.nbytes])
        return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


def room_for(sizes: Iterable[int]) -> int:
    """Bytes of a buffer that holds tensors of these sizes."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def available_host_bytes() -> int:
    """Memory this process can still take: what the machine has, and what its control groups allow."""
    return min([psutil.virtual_memory().available, *_cgroup_room(Path("/proc/self/cgroup"), _CGROUPS)])


def _cgroup_room(membership: Path, root: Path) -> list[int]:
    """Room below each memory limit of the control groups this process is in, versions 1 and 2; file cache counts as room."""
    rooms = []
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = (
            ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("", "memory.max", "memory.current")
        )
        top = root / names[0]
        folder = top / path.lstrip("/")
        # Inside a container the path may be one of the host, which is not visible: then the top is the container's own group.
        for group in [each for each in (folder, *folder.parents) if each.is_relative_to(top)]:
            limit, usage = (_number(group / name) for name in names[1:])
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
