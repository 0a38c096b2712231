"""Host memory in which a save keeps what the parameters were while training goes on."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from concurrent.futures import Future

import torch
from torch import Tensor

from megarpt.device.runtime import Runtime
from megarpt.train.background import in_background

_ALIGNMENT = 64


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
