"""megatron-core on a machine without CUDA.

megatron-core 0.16 names `torch.cuda` in about 340 places. `install()` puts a finder in front of the import system that, only
for `megatron.core` modules, rewrites each syntax tree as it is imported: `torch.cuda` becomes the stand-in below, CUDA device
strings become "cpu", `.cuda()` and `.pin_memory()` become nothing. torch itself is not touched and line numbers stay true, so
tracebacks still point into megatron-core. Compiled, what was rewritten is kept beside Python's own bytecode.

Where CUDA is used nothing here runs. A test pins the library's version and the number of rewrites, so
that an upgrade cannot pass unseen.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megarpt.errors import ExtensionError

_STAND_IN = "_megarpt_cpu_cuda"
_OWN_SOURCE = Path(__file__).read_bytes()
# CUDA graphs, FSDP and NVSHMEM have no meaning on a CPU; their modules are only imported, never run.
_LEFT_ALONE = ("megatron.core.distributed.fsdp", "megatron.core.resharding", "megatron.core.nccl_allocator")


class _Stream:
    """A stream that runs everything at once, in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, _stream: Any) -> None: ...
    def wait_event(self, _event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Event:
    """An event that has always already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, _stream: Any = None) -> None: ...
    def wait(self, _stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Nvtx:
    range_push = staticmethod(lambda *_: None)
    range_pop = staticmethod(lambda *_: None)
    range = staticmethod(lambda *_, **__: contextlib.nullcontext())


class CpuCuda:
    """What `torch.cuda` is to megatron-core on a CPU. A name that is missing here raises AttributeError at its use."""

    Stream = ExternalStream = _Stream
    Event = _Event
    nvtx = _Nvtx
    FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor
    ByteTensor, IntTensor, LongTensor, DoubleTensor = torch.ByteTensor, torch.IntTensor, torch.LongTensor, torch.DoubleTensor
    OutOfMemoryError = torch.cuda.OutOfMemoryError
    CUDAGraph = MemPool = type("Unavailable", (), {})

    _stream = _Stream()

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 0

    @classmethod
    def current_stream(cls, *_: Any) -> _Stream:
        return cls._stream

    default_stream = current_stream

    @staticmethod
    def set_stream(_stream: Any) -> None: ...

    @staticmethod
    def set_device(_device: Any) -> None: ...

    @staticmethod
    def synchronize(*_: Any) -> None: ...

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def stream(_stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def memory_stats(*_: Any) -> dict[str, int]:
        return {}

    @staticmethod
    def memory_allocated(*_: Any) -> int:
        return 0

    memory_reserved = memory_allocated

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return False


class _Rewriter(ast.NodeTransformer):
    """Counts and rewrites every use of CUDA in one module."""

    def __init__(self) -> None:
        self.rewrites = 0

    def _count(self, node: ast.AST) -> Any:
        self.rewrites += 1
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return self._count(ast.copy_location(ast.Name(_STAND_IN, node.ctx), node))
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute):
            if node.func.attr in ("cuda", "pin_memory"):
                return self._count(node.func.value)
            if node.func.attr == "to" and node.args and _is_cuda_name(node.args[0]):
                node.args[0] = self._count(ast.copy_location(ast.Constant("cpu"), node.args[0]))
        for keyword in node.keywords:
            if keyword.arg in ("device", "device_type") and _is_cuda_name(keyword.value):
                keyword.value = self._count(ast.copy_location(ast.Constant("cpu"), keyword.value))
            elif keyword.arg == "pin_memory" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True:
                keyword.value = self._count(ast.copy_location(ast.Constant(False), keyword.value))
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            return self._count(ast.copy_location(ast.Constant(node.value.replace("torch.cuda.", "torch.")), node))
        return node


def _is_cuda_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == "cuda"


def rewrite(source: str, filename: str) -> tuple[ast.Module, int]:
    """The syntax tree of `source` with CUDA replaced, and how many places were replaced."""
    rewriter = _Rewriter()
    tree = rewriter.visit(ast.parse(source, filename))
    if rewriter.rewrites:
        after = 0  # the import goes behind the module docstring and `from __future__` lines
        for position, statement in enumerate(tree.body):
            is_docstring = position == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if is_docstring or (isinstance(statement, ast.ImportFrom) and statement.module == "__future__"):
                after = position + 1
        stand_in = ast.ImportFrom(__name__, [ast.alias("CpuCuda", _STAND_IN)], 0)
        tree.body.insert(after, ast.copy_location(stand_in, tree.body[min(after, len(tree.body) - 1)]))
    return ast.fix_missing_locations(tree), rewriter.rewrites


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # type: ignore[override]
        tree, _ = rewrite(importlib.util.decode_source(data), path)
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname: str) -> Any:
        # SourceFileLoader.get_code would read and write the ordinary bytecode cache, where the rewritten code must never land.
        # It has a file of its own there, named by all that it is made from.
        path = self.get_filename(fullname)
        source = self.get_data(path)
        digest = hashlib.sha256(b"%d" % sys.flags.optimize + _OWN_SOURCE + source).hexdigest()[:16]
        cache = importlib.util.cache_from_source(path, optimization=f"megarpt{digest}")
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):  # not there, or not whole
            return marshal.loads(self.get_data(cache))
        code = self.source_to_code(source, path)
        if not sys.dont_write_bytecode:
            self.set_data(cache, marshal.dumps(code))  # atomic; nothing where the folder cannot be written to
        return code

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        after_import = _AFTER_IMPORT.get(module.__name__)
        if after_import is not None:
            after_import(module)


def _use_cpu_generator(module: ModuleType) -> None:
    """megatron-core keeps one RNG state per parallel region; on a CPU that is the state of torch's default generator."""

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    module._get_cuda_rng_state = get_state  # type: ignore[attr-defined]
    module._set_cuda_rng_state = set_state  # type: ignore[attr-defined]


def _leave_uncompiled(module: ModuleType) -> None:
    """megatron-core hands some functions to torch.compile as they are defined; importing the compiler takes as long as all the
    rest of it, and a run on a CPU calls none of them."""
    module.disable_jit_fuser()


_AFTER_IMPORT = {"megatron.core.tensor_parallel.random": _use_cpu_generator, "megatron.core.jit": _leave_uncompiled}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not fullname.startswith("megatron.core.") or fullname.startswith(_LEFT_ALONE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader) and spec.origin:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def is_installed() -> bool:
    """Whether megatron-core imports go through the CPU layer."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install() -> None:
    """Route `megatron.core` imports through the CPU layer. Call before the first of them.

    Raises:
        ExtensionError: megatron-core was imported before.
    """
    if is_installed():
        return
    early = [name for name in sys.modules if name.startswith("megatron.core.")]
    if early:
        raise ExtensionError(
            f"the CPU layer for megatron-core must be installed before it is imported, got {len(early)} modules imported "
            f"already (first: {early[0]}); call megarpt.device.runtime.start() first"
        )
    sys.meta_path.insert(0, _Finder())


def install_without_cuda() -> None:
    """`install()` where CUDA cannot be used, nothing elsewhere."""
    if not torch.cuda.is_available():
        install()


def count_rewrites(root: str) -> Iterator[tuple[str, int]]:
    """(module file, rewrites) for every source file below `root`, for the test that pins them."""
    for file in sorted(Path(root).rglob("*.py")):
        _, rewrites = rewrite(file.read_text(), str(file))
        if rewrites:
            yield str(file.relative_to(root)), rewrites
