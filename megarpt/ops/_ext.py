"""The compiled extension `megarpt._C`: whether it is there, and how tensors are handed to it. Its only importer.

It takes addresses and shapes (csrc/common/tensor.hpp), so whoever passes a tensor keeps it alive until the call returns, which
a local variable does: on a GPU the call only queues work on the current stream, where the allocator keeps the order.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megarpt.device.runtime import current_stream_address

_C: ModuleType | None = None
_REASON = ""
try:
    _C = importlib.import_module("megarpt._C")
except ImportError as error:
    _REASON = str(error)

logger = logging.getLogger(__name__)

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


def extension(device: torch.device) -> ModuleType | None:
    """`megarpt._C` when it can work on this device, else None. What it falls back to is said once, in the log."""
    usable = _C is not None and (device.type == "cpu" or (device.type == "cuda" and _C.has_cuda))
    if not usable:
        _say_once(device.type)
    return _C if usable else None


def describe() -> str:
    """For `megarpt doctor`: what is compiled, or why nothing is."""
    if _C is None:
        return f"absent, plain torch is used ({_REASON}); build it with `pip install -e .` and a C++ compiler"
    return f"CPU ({_C.instruction_set})" + (" and CUDA" if _C.has_cuda else "; built without CUDA: plain torch on GPUs")


@cache
def _say_once(device_type: str) -> None:
    logger.warning("compiled extension on %s: %s", device_type, describe())


def matrix(tensor: Tensor) -> Any:
    """[rows, cols] with entries of a row next to each other."""
    assert _C is not None and tensor.dim() == 2 and (tensor.stride(1) == 1 or tensor.shape[1] <= 1)
    rows, cols = tensor.shape
    return _C.Matrix(tensor.data_ptr(), rows, cols, tensor.stride(0), getattr(_C.DType, _DTYPES[tensor.dtype]))


def strided(tensor: Tensor) -> Any:
    """4 or 5 dims, the entries of the last one next to each other."""
    assert _C is not None and tensor.dim() in (4, 5) and (tensor.stride(-1) == 1 or tensor.shape[-1] <= 1)
    make = _C.Strided4 if tensor.dim() == 4 else _C.Strided5
    return make(tensor.data_ptr(), tensor.shape, tensor.stride(), getattr(_C.DType, _DTYPES[tensor.dtype]))


def vector(tensor: Tensor | None) -> Any:
    """[n], contiguous; None is passed on as `not given`."""
    assert _C is not None
    if tensor is None:
        return _C.Vector()
    assert tensor.dim() == 1 and (tensor.stride(0) == 1 or tensor.shape[0] <= 1)
    return _C.Vector(tensor.data_ptr(), tensor.shape[0], getattr(_C.DType, _DTYPES[tensor.dtype]))


def place(device: torch.device) -> Any:
    """Where work is queued: the CPU, or the device's current stream."""
    assert _C is not None
    return _C.Place(device.type == "cuda", current_stream_address(device))
