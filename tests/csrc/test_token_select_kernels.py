"""The CUDA kernels of the selection, their own source, run on the CPU below the Python that puts them together.

cuda_on_cpu/common/cuda.hpp says how. The order in which a block's threads run is part of every case: a barrier that is missing
gives wrong results in one of them.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarpt.ops import _ext, reference
from megarpt.ops.token_select import global_threshold, select_excess, select_top_fraction, selection_sums
from megarpt.ops.token_select_passes import CHUNK

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COMPILER = ["g++", "-std=c++17", "-O1", "-fPIC", "-fno-gnu-unique", "-DMEGARPT_CUDA", "-Wall", "-Wextra", "-Werror"]
ORDERS = ["ascending", "descending", "shuffled"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.int32]
PASSES = "score_excess count_digits count_order_digits choose_digit count_equals write_mask add_up".split()


class Vector(ctypes.Structure):
    _fields_ = [("data", ctypes.c_size_t), ("size", ctypes.c_int64), ("dtype", ctypes.c_int)]


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_size_t),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "stride")),
        ("dtype", ctypes.c_int),
    ]


class Scores(ctypes.Structure):
    _fields_ = [(name, Vector) for name in ("score", "valid")]


class Search(ctypes.Structure):
    _fields_ = [(name, Vector) for name in ("score", "order", "order_search")]


class Report(ctypes.Structure):
    _fields_ = [
        ("loss", Vector),
        ("negate", ctypes.c_bool),
        *((name, Vector) for name in ("reference", "previous")),
        ("partial", Matrix),
        ("sums", Vector),
    ]


def vector(tensor: Tensor | None) -> Vector:
    return Vector() if tensor is None else Vector(tensor.data_ptr(), tensor.shape[0], DTYPES.index(tensor.dtype))


def matrix(tensor: Tensor) -> Matrix:
    return Matrix(tensor.data_ptr(), *tensor.shape, tensor.stride(0), DTYPES.index(tensor.dtype))


def caller(function: Any) -> Callable[..., None]:
    function.restype = ctypes.c_char_p

    def call(*arguments: Any) -> None:
        *values, _place = arguments
        message = function(*(ctypes.byref(v) if isinstance(v, ctypes.Structure) else ctypes.c_int(v) for v in values))
        if message is not None:
            raise ValueError(message.decode())

    return call


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SimpleNamespace]:
    """Compiles the kernels with one piece of their source replaced, and gives what `megarpt._C` would be."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the CUDA kernels for the CPU")
    folder, csrc = tmp_path_factory.mktemp("token_select"), ROOT / "csrc"
    passes = csrc / "token_select"

    def compiled(source: Path, *flags: str) -> Path:
        target = folder / f"{len(list(folder.iterdir()))}.o"
        subprocess.run([*COMPILER, *flags, f"-I{csrc}", "-Wno-unknown-pragmas", "-c", source, "-o", target], check=True)
        return target

    sources = [passes / "cpu.cpp", passes / "cpu_baseline.cpp", HERE / "cuda_on_cpu" / "token_select.cpp"]
    common = [compiled(source) for source in sources]

    def of(old: str = "", new: str = "") -> SimpleNamespace:
        copy = folder / f"{len(list(folder.iterdir()))}"
        (copy / "token_select").mkdir(parents=True)
        texts = {name: (passes / name).read_text() for name in ("cuda_scores.cuh", "cuda.cu")}
        if not any(old in text for text in texts.values()):
            raise ValueError(f"{old!r} is not in the kernels")
        for name, text in texts.items():
            (copy / "token_select" / name).write_text(text.replace(old, new) if old else text)
        include = [f"-I{copy}", f"-I{HERE / 'cuda_on_cpu'}"]
        kernels = compiled(copy / "token_select" / "cuda.cu", "-x", "c++", *include)
        subprocess.run(["g++", "-shared", *common, kernels, "-o", copy / "kernels.so"], check=True)
        library = ctypes.CDLL(str(copy / "kernels.so"))
        functions = {name: caller(getattr(library, name)) for name in PASSES}
        return SimpleNamespace(token_select=SimpleNamespace(Scores=Scores, Search=Search, Report=Report, **functions))

    return of


@pytest.fixture(scope="session")
def kernels(build: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    return build()


def install(kernels: SimpleNamespace | None, patch: pytest.MonkeyPatch) -> None:
    """Selections run on these kernels; None: in plain torch."""
    patch.setattr(_ext, "extension", lambda device: kernels)
    patch.setattr(_ext, "vector", vector)
    patch.setattr(_ext, "matrix", matrix)
    patch.setattr(_ext, "place", lambda device: None)


def cases(n: int) -> list[Tensor]:
    """Scores of a few values, of all bits, and of one value."""
    torch.manual_seed(n)
    few = torch.tensor([float("nan"), -float("inf"), -1.0, -0.0, 0.0, 1e-45, 2.0, float("inf")])
    any_bits = torch.randint(-(2**31), 2**31, (n,)).to(torch.int32).view(torch.float32)
    return [few[torch.randint(0, 8, (n,))], any_bits, torch.full((n,), 0.5)]


def check_against_a_sort(n: int) -> None:
    for score in cases(n):
        valid, order = torch.rand(n) < 0.9, torch.randperm(n) + 2**40
        for chosen_by in (order, None):
            mask, threshold, kept = select_top_fraction(score, valid, 0.55, order=chosen_by)
            assert torch.equal(mask, reference.top_fraction_mask(score, valid, 0.55, chosen_by))
            assert int(kept) == int(mask.sum())
            torch.testing.assert_close(threshold, global_threshold(score, valid, 0.55), rtol=0, atol=0, equal_nan=True)


def check_against_torch(kernels: SimpleNamespace, n: int, patch: pytest.MonkeyPatch) -> None:
    """Score, mask and threshold bit for bit, sums within their rounding, counts exactly."""
    for ref in cases(n):
        logprob, valid, order = -torch.randint(0, 9, (n,)) / 8, torch.rand(n) < 0.8, torch.randperm(n)
        logprob[~valid], previous = torch.nan, torch.tensor(-0.5)  # equal to some of the scores
        ref = torch.where(ref.abs() < 1e30, ref, torch.nan)
        results = []
        for which in (kernels, None):
            install(which, patch)
            chosen = select_excess(logprob, ref, valid, 0.4, order=order, previous_threshold=previous)
            again = selection_sums(-logprob, chosen.score, ref, valid, chosen.mask, previous)
            assert [float(x) for x in again] == [float(x) for x in chosen.sums]
            none_given = selection_sums(-logprob, None, None, valid, chosen.mask)
            results.append((*chosen[:4], torch.stack(chosen.sums), torch.stack(none_given)))
        for actual, expected in zip(*results, strict=True):
            rtol = 1e-13 if actual.dtype == torch.float64 else 0
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 255, 1025, CHUNK, 2 * CHUNK + 33])
def test_kernels_select_what_a_sort_does(kernels, n, order, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    install(kernels, monkeypatch)
    check_against_a_sort(n)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 300, CHUNK + 1])
def test_kernels_score_and_report_as_torch_does(kernels, n, order, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    check_against_torch(kernels, n, monkeypatch)


def test_threads_come_back_for_scores_beyond_what_a_grid_holds(build, monkeypatch):
    install(build("kMostBlocks = 132 * 8", "kMostBlocks = 3"), monkeypatch)
    check_against_a_sort(2 * CHUNK + 33)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    __syncthreads();\n    const V other", "    const V other"),  # of the scan
        ("    __syncthreads();\n    if (t < half)", "    if (t < half)"),  # of the tree
        ("  digits.start();\n  __syncthreads();", "  digits.start();"),  # between emptying bins and counting
        ("        last = here[k];\n        run = 0;", "        last = here[k];"),
        ("larger + own[bin] < wanted", "larger + own[bin] <= wanted"),
        ("position < num_equal_kept", "position <= num_equal_kept"),
        ("score >= previous", "score > previous"),
    ],
)
def test_a_broken_kernel_is_noticed(build, old, new, monkeypatch):
    broken = build(old, new)

    def check() -> None:
        for order in ORDERS:
            monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
            for n in (300, CHUNK + 1):
                install(broken, monkeypatch)
                check_against_a_sort(n)
                check_against_torch(broken, n, monkeypatch)

    with pytest.raises(AssertionError):
        check()
