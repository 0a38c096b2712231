"""The machine under a process: which device, which collective back end, which memory.

`start()` is called once per process, before megatron-core is imported; everything else takes the `Runtime` it returns. No
other module of the package names `torch.cuda`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import HashStore

from megarpt.device import mcore_cpu, without_te
from megarpt.device.clock import CudaClock, HostClock
from megarpt.errors import ExtensionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where this process computes and who it is among its peers."""

    device: torch.device
    backend: Literal["nccl", "gloo"]
    rank: int
    world_size: int

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def device_name(self) -> str:
        """For people: the GPU's name, or the number of threads."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else f"cpu ({torch.get_num_threads()} threads)"

    def synchronize(self) -> None:
        """Wait until the device has finished what was queued."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def clock(self) -> CudaClock | HostClock:
        """A clock of the device, for times that must not make it wait."""
        return CudaClock() if self.is_cuda else HostClock()

    def peak_memory_bytes(self) -> int:
        """Largest memory held so far: allocator bytes on CUDA, resident set of the process on a CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def memory_bytes(self) -> int:
        """Memory held now: allocator bytes on CUDA, resident set on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.is_cuda else psutil.Process().memory_info().rss

    def pin(self, memory: torch.Tensor) -> None:
        """Lock host memory in place, so that the device copies into it at full speed and without being waited for."""
        if self.is_cuda and memory.nbytes:
            with torch.cuda.device(self.device):
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`, which must happen before the memory is given back."""
        if self.is_cuda and memory.nbytes:
            with torch.cuda.device(self.device):
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))

    def rng_state(self) -> dict[str, Any]:
        """State of torch's generators, for a bit-exact resume."""
        return {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state(self.device) if self.is_cuda else None}

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Restore what `rng_state` returned."""
        torch.set_rng_state(state["cpu"])
        if self.is_cuda and state["device"] is not None:
            torch.cuda.set_rng_state(state["device"], self.device)

    def flight_record(self) -> bytes:
        """The last collectives this rank has started, as JSON; which ranks have not joined one is seen by comparing."""
        dump = "_dump_nccl_trace_json" if self.is_cuda else "_dump_fr_trace_json"
        return bytes(getattr(_distributed_c10d, dump)())

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start(
    device: Literal["auto", "cpu", "cuda"] = "auto", *, timeout_minutes: float = 30.0, reuse_memory: bool = True
) -> Runtime:
    """Choose the device, prepare it, and join the process group torchrun describes (or make one of a single process).

    Args:
        device: `auto` takes CUDA when it is usable.
        timeout_minutes: of every collective.
        reuse_memory: on a CPU, have the C library keep freed memory, for the whole process and its other users too.

    Raises:
        ExtensionError: CUDA was asked for by name and cannot be used.
    """
    kind = _choose(device)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        torch_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(torch_device)
    else:
        torch_device = torch.device("cpu")
        mcore_cpu.install()
        if reuse_memory:
            _keep_freed_memory()
    without_te.install()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives remembered for `flight_record`
    backend: Literal["nccl", "gloo"] = "nccl" if kind == "cuda" else "gloo"
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout, device_id=torch_device if kind == "cuda" else None)
        else:
            store = HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return Runtime(torch_device, backend, dist.get_rank(), dist.get_world_size())


def _choose(device: str) -> str:
    if device == "cpu":
        return "cpu"
    usable = torch.cuda.is_available()
    if device == "cuda" and not usable:
        reason = "this torch build has no CUDA" if torch.version.cuda is None else "no usable GPU or driver was found"
        raise ExtensionError(
            f"run.device: got 'cuda', but {reason} (torch {torch.__version__}); "
            "use run.device=cpu or install a CUDA build of torch"
        )
    return "cuda" if usable else "cpu"


def _keep_freed_memory() -> None:
    """Tell glibc to reuse large buffers instead of returning them to the system: the first touch of fresh pages costs more
    than the arithmetic on them in a training step on a CPU."""
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        logger.info("not a glibc system: the allocator is left as it is")
        return
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)
    libc.mallopt(m_top_pad, 64 << 20)


def current_stream_address(device: torch.device) -> int:
    """The stream on which work for this device is queued, as CUDA knows it; 0 for the CPU.

    Raises:
        ExtensionError: kernels that are not torch's are started on the current device, and this is another one.
    """
    if device.type != "cuda":
        return 0
    if device.index != torch.cuda.current_device():
        raise ExtensionError(
            f"got tensors on {device}, expected them on the current device, cuda:{torch.cuda.current_device()}; "
            f"call torch.cuda.set_device({device.index}) first"
        )
    return torch.cuda.current_stream(device).cuda_stream
