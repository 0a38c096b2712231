"""Every .cu file compiles for the GPUs we name, without a warning and without spilled registers, and links into the extension.

No GPU takes part: tests/csrc/test_cuda_kernels.py says what the kernels compute, tests/gpu that they do so on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
ARCHS = ("80", "90")
THREADS_ON_MULTIPROCESSOR = 1024  # that the registers must suffice for: half of what sm_80 and sm_90 hold
REGISTERS = 65536  # of a multiprocessor


def load_setup():
    spec = importlib.util.spec_from_file_location("megarpt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cu"))


class Use(NamedTuple):
    kernel: str
    arch: str
    registers: int
    spilled_bytes: int


def resources(report: str) -> Iterator[Use]:
    """From what `ptxas -v` says of each kernel."""
    for entry in report.split("Compiling entry function ")[1:]:
        kernel, arch = re.match(r"'(\w+)' for 'sm_(\w+)'", entry).groups()
        stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups())
        yield Use(kernel, arch, int(re.search(r"Used (\d+) registers", entry).group(1)), stores + loads)


def compile_with_nvcc(source: Path, target: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    nvcc = SETUP.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc on PATH or in CUDA_HOME/bin")
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Werror", "-Xptxas", "-v", "-Xptxas", "-Werror"]
    command = [nvcc, "-c", source, "-o", target, *SETUP.cuda_flags(), *strict, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_there_are_sources_and_setup_compiles_each_of_them(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert SOURCES and SETUP.cuda_sources() == SOURCES


@pytest.mark.parametrize("source", SOURCES)
def test_sources_compile_without_warnings_and_kernels_fit_their_registers(source, tmp_path, monkeypatch):
    monkeypatch.delenv("MEGARPT_CUDA_ARCHS", raising=False)
    result = compile_with_nvcc(ROOT / source, tmp_path / "kernels.o")
    assert result.returncode == 0, result.stderr
    used = list(resources(result.stderr))
    assert {use.arch for use in used} == set(ARCHS)
    assert [use for use in used if use.spilled_bytes] == []
    single = [use for use in used if "kernelId" not in use.kernel]  # Itanium mangling: a kernel whose first type is double
    assert single and [use for use in single if use.registers > REGISTERS // THREADS_ON_MULTIPROCESSOR] == []


def test_a_warning_and_a_spill_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGARPT_CUDA_ARCHS", ARCHS[0])
    careless = tmp_path / "careless.cu"
    careless.write_text("__global__ void kernel(int* out) { int unused; out[0] = 1; }\n")
    result = compile_with_nvcc(careless, tmp_path / "careless.o")
    assert result.returncode != 0 and "unused" in result.stderr
    greedy = tmp_path / "greedy.cu"
    greedy.write_text(
        "__global__ void kernel(float* x) {\n"
        "  float kept[64];\n"
        "#pragma unroll\n"
        "  for (int j = 0; j < 64; ++j) kept[j] = x[j * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int j = 0; j < 64; ++j) x[j * 1024 + threadIdx.x] = kept[j] * kept[63 - j];\n"
        "}\n"
    )
    result = compile_with_nvcc(greedy, tmp_path / "greedy.o", "-maxrregcount", "32")
    assert result.returncode == 0, result.stderr
    assert all(use.spilled_bytes for use in resources(result.stderr))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_extension_with_cuda_links_and_imports(tmp_path):
    if SETUP.find_nvcc() is None:
        pytest.skip("needs nvcc on PATH or in CUDA_HOME/bin")
    environment = {**os.environ, "MEGARPT_BUILD": "cuda", "MEGARPT_CUDA_ARCHS": ARCHS[0]}
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    command = [sys.executable, "setup.py", "build_ext", *folders]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (library,) = (tmp_path / "lib").rglob("_C*.so")
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_C', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.has_cuda)\n"
    )
    imported = subprocess.run([sys.executable, "-c", program, library], cwd=tmp_path, capture_output=True, text=True)
    assert imported.stdout == "True\n", imported.stderr
