"""The CUDA kernels of csrc/linear_logprob, compiled for the CPU (cuda_on_cpu/common/cuda.hpp says how), called by ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COMPILER = ["g++", "-std=c++17", "-O1", "-fPIC", "-fno-gnu-unique", "-DMEGARPT_CUDA", "-Wall", "-Wextra", "-Werror"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]  # DType of csrc/common/tensor.hpp


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "stride")),
        ("dtype", ctypes.c_int),
    ]


class Vector(ctypes.Structure):
    _fields_ = [("data", ctypes.c_size_t), ("size", ctypes.c_int64), ("dtype", ctypes.c_int)]


def matrix(tensor: Tensor) -> Matrix:
    assert tensor.shape[1] <= 1 or tensor.stride(1) == 1
    return Matrix(tensor.data_ptr(), *tensor.shape, tensor.stride(0), DTYPES.index(tensor.dtype))


def vector(tensor: Tensor | None) -> Vector:
    if tensor is None:
        return Vector(0, 0, 0)
    assert tensor.is_contiguous()
    return Vector(tensor.data_ptr(), tensor.shape[0], DTYPES.index(tensor.dtype))


class Kernels:
    """The two passes; `cuda` chooses between the kernels and the CPU's implementation of the same library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        message = function(*arguments)
        if message is not None:
            raise ValueError(message.decode())

    def add_tile(self, cuda: bool, logits: Tensor, labels: Tensor, first: int, inverse_temperature: float, state: Any) -> None:
        rows = (Vector * 5)(*map(vector, state))
        tile, of = matrix(logits), vector(labels)
        self._call(
            "call_add_tile",
            *(ctypes.c_bool(cuda), ctypes.byref(tile), ctypes.byref(of), ctypes.c_int64(first)),
            *(ctypes.c_double(inverse_temperature), ctypes.byref(rows)),
        )

    def write_gradient(
        self,
        cuda: bool,
        source: Tensor,
        rows: Tensor | None,
        first: int,
        inverse_temperature: float,
        gradient: Any,
        out: Tensor,
    ) -> None:
        of_rows = (Vector * 8)(*map(vector, gradient))
        tile, chosen, to = matrix(source), vector(rows), matrix(out)
        self._call(
            "call_write_gradient",
            *(ctypes.c_bool(cuda), ctypes.byref(tile), ctypes.byref(chosen), ctypes.c_int64(first)),
            *(ctypes.c_double(inverse_temperature), ctypes.byref(of_rows), ctypes.byref(to)),
        )


@pytest.fixture(scope="session")
def build_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Kernels]:
    """Compiles the kernels with one piece of their source replaced; the empty piece is replaced by nothing."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the CUDA kernels for the CPU")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")

    def compiled(source: Path, include: list[Path], *flags: str) -> Path:
        target = folder / f"{len(list(folder.iterdir()))}.o"
        paths = [f"-I{path}" for path in include]
        subprocess.run([*COMPILER, *flags, *paths, "-c", source, "-o", target], check=True)
        return target

    csrc, passes = ROOT / "csrc", ROOT / "csrc" / "linear_logprob"
    common = [
        compiled(passes / "cpu.cpp", [csrc]),
        compiled(passes / "cpu_baseline.cpp", [csrc], "-fopenmp-simd", "-Wno-unknown-pragmas"),
        compiled(HERE / "cuda_on_cpu" / "library.cpp", [csrc]),
    ]

    def build(old: str = "", new: str = "") -> Kernels:
        copy = folder / f"{len(list(folder.iterdir()))}"
        (copy / "linear_logprob").mkdir(parents=True)
        text = (passes / "cuda_rows.cuh").read_text()
        if old:
            assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in cuda_rows.cuh"
            text = text.replace(old, new)
        (copy / "linear_logprob" / "cuda_rows.cuh").write_text(text)
        (copy / "linear_logprob" / "cuda.cu").write_text((passes / "cuda.cu").read_text())
        include = [copy, HERE / "cuda_on_cpu", csrc]
        kernels = compiled(copy / "linear_logprob" / "cuda.cu", include, "-x", "c++", "-Wno-unknown-pragmas")
        library = copy / "kernels.so"
        subprocess.run(["g++", "-shared", *common, kernels, "-o", library], check=True)
        return Kernels(library)

    return build


@pytest.fixture(scope="session")
def kernels(build_kernels: Callable[..., Kernels]) -> Kernels:
    """The kernels as they are."""
    return build_kernels()
