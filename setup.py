"""Packaging: the metadata is in pyproject.toml, the compiled extension `megarpt._C` is declared here.

The extension has no torch header in it, so building it needs a C++17 compiler and pybind11 and nothing else, takes seconds, and
never downloads. Without it megarpt works, with plain torch in its place; `megarpt doctor` tells which one is in use.

Environment:
    MEGARPT_BUILD       auto (default): what this machine can build, CUDA included when it has nvcc and a GPU; a failure is
                        reported and leaves out what failed. cpu, cuda: exactly that, or an error. none: nothing is compiled.
    MEGARPT_CUDA_ARCHS  compute capabilities, default "80;90".
    MEGARPT_SANITIZE    1: address and undefined-behaviour sanitizers, for `make sanitize`.
    CUDA_HOME           where nvcc is, when it is not on PATH.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
MODES = ("auto", "cpu", "cuda", "none")
SIMD = {  # a source's ending -> flags beyond the common ones
    "_avx2": ["-mavx2", "-mfma"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
WARNINGS = ["-Wall", "-Wextra"]
# no errno and no floating-point traps: what vector code cannot have; results are the same
COMMON = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
CUDA = ["-std=c++17", "-O3", "-DMEGARPT_CUDA", f"-I{CSRC}", "-Xcompiler", ",".join(["-fPIC", "-fvisibility=hidden", *WARNINGS])]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def cuda_sources() -> list[str]:
    return [str(path) for path in sorted(CSRC.rglob("*.cu"))]


def cuda_flags() -> list[str]:
    """For nvcc; tests/csrc/test_cuda_sources.py compiles with the same."""
    archs = os.environ.get("MEGARPT_CUDA_ARCHS", "80;90").split(";")
    return CUDA + [item for arch in archs for item in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]


def build_mode() -> str:
    mode = os.environ.get("MEGARPT_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"MEGARPT_BUILD: got {mode!r}, expected one of {', '.join(MODES)}")
    return mode


def cpp_sources() -> list[str]:
    sources = sorted(CSRC.rglob("*.cpp"))
    return [str(path) for path in sources if is_x86() or not path.stem.endswith(tuple(SIMD))]


class BuildExtension(build_ext):
    """Compiles every source with the flags of its instruction set, and .cu files with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        mode = build_mode()
        has_gpu = find_nvcc() is not None and Path("/dev/nvidiactl").exists()
        attempts = {"auto": [True, False] if has_gpu else [False], "cuda": [True], "cpu": [False]}[mode]
        for with_cuda in attempts:
            try:
                return self.build_one(ext, with_cuda)
            except Exception as error:  # whatever a compiler or linker says
                if mode != "auto":
                    raise
                what = "with CUDA " if with_cuda else ""
                self.warn(f"megarpt._C could not be built {what}({error}); MEGARPT_BUILD=cpu or cuda makes this an error")

    def build_one(self, ext: Extension, with_cuda: bool) -> None:
        import pybind11  # a build requirement; commands that build nothing do without

        include = [str(CSRC), pybind11.get_include()]
        macros = [("MEGARPT_X86", None)] if is_x86() else []
        macros += [("MEGARPT_CUDA", None)] if with_cuda else []
        flags = COMMON + WARNINGS + (SANITIZE if os.environ.get("MEGARPT_SANITIZE") == "1" else [])
        objects = []
        for source in cpp_sources():
            simd = next((flags for ending, flags in SIMD.items() if Path(source).stem.endswith(ending)), [])
            objects += self.compiler.compile(
                [source], output_dir=self.build_temp, macros=macros, include_dirs=include, extra_postargs=flags + simd
            )
        target = self.get_ext_fullpath(ext.name)
        if with_cuda:
            nvcc = find_nvcc()
            if nvcc is None:
                raise RuntimeError("nvcc is neither on PATH nor in CUDA_HOME/bin")
            objects += [self.compile_cuda(nvcc, source) for source in cuda_sources()]
            self.mkpath(str(Path(target).parent))
            self.spawn([nvcc, "-shared", "-cudart", "static", "-Xcompiler", "-fopenmp", *objects, "-o", target])
            return
        link = ["-fopenmp"] + (SANITIZE[:1] if os.environ.get("MEGARPT_SANITIZE") == "1" else [])
        self.compiler.link_shared_object(objects, target, extra_postargs=link, target_lang="c++")

    def compile_cuda(self, nvcc: str, source: str) -> str:
        target = Path(self.build_temp, source).with_suffix(".cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([nvcc, "-c", source, "-o", str(target), *cuda_flags()])
        return str(target)


if __name__ == "__main__":
    extensions = [] if build_mode() == "none" else [Extension("megarpt._C", cpp_sources())]
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
