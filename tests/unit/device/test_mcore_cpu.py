"""The CPU layer rewrites exactly the megatron-core it was written for, and nothing else."""

import ast
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from megarpt.device import mcore_cpu


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, timeout=120)


def test_rewrites_are_those_of_the_supported_release() -> None:
    """An upgrade of megatron-core changes this number: read what is new before changing it here."""
    spec = find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    counts = dict(mcore_cpu.count_rewrites(str(Path(spec.origin).parent)))
    assert (version("megatron-core"), sum(counts.values()), len(counts)) == ("0.16.1", 551, 102)
    assert counts["tensor_parallel/layers.py"] == 14


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.zeros(3, device='cuda')", "torch.zeros(3, device='cpu')"),
        ("torch.zeros(3, device=torch.cuda.current_device())", "torch.zeros(3, device=_megarpt_cpu_cuda.current_device())"),
        ("x.cuda(non_blocking=True)", "x"),
        ("x.to('cuda')", "x.to('cpu')"),
        ("torch.empty(3, pin_memory=True)", "torch.empty(3, pin_memory=False)"),
        ("x.pin_memory()", "x"),
        ("p.type() == 'torch.cuda.FloatTensor'", "p.type() == 'torch.FloatTensor'"),
        ("print('cuda')", "print('cuda')"),
        ("config.cuda_graph_impl", "config.cuda_graph_impl"),
    ],
)
def test_rewrite(source: str, expected: str) -> None:
    tree, _ = mcore_cpu.rewrite(source, "x.py")
    assert ast.unparse(tree).splitlines()[-1] == expected


def test_the_import_goes_behind_docstring_and_future() -> None:
    tree, count = mcore_cpu.rewrite('"""Doc."""\nfrom __future__ import annotations\ntorch.cuda.synchronize()', "x.py")
    assert count == 1
    assert [type(node).__name__ for node in tree.body] == ["Expr", "ImportFrom", "ImportFrom", "Expr"]
    assert tree.body[3].lineno == 3  # tracebacks still point at the library's own lines


def test_rewritten_code_is_kept_until_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file, made = tmp_path / "m.py", []
    monkeypatch.setattr(mcore_cpu, "rewrite", lambda *x, rewrite=mcore_cpu.rewrite: (made.append(x), rewrite(*x))[1])

    def run() -> bool:
        """Whether the code runs that the source says."""
        namespace: dict[str, object] = {"torch": None}
        exec(mcore_cpu._Loader("m", str(file)).get_code("m"), namespace)
        return namespace["available"] is False

    for source in ("available = torch.cuda.is_available()", "available = bool(torch.cuda.device_count())"):
        file.write_text(source)
        made.clear()
        assert run() and run() and len(made) == 1
    newest = max((tmp_path / "__pycache__").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:20])  # as by a full disk
    assert run() and run() and len(made) == 2
    with monkeypatch.context() as patch:
        optimized = SimpleNamespace(flags=SimpleNamespace(optimize=1), dont_write_bytecode=False)
        patch.setattr(mcore_cpu, "sys", optimized)  # python -O leaves out assertions
        assert run() and len(made) == 3
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    newest.unlink()
    assert run() and not newest.exists()


def test_commands_start_without_torchs_compiler() -> None:
    """Its import takes longer than all the rest."""
    modules = ", ".join(f"megarpt.run.{name}" for name in ("pretrain", "rl", "evaluate", "generate", "score"))
    done = run_python(
        f"from megarpt.device import runtime\nruntime.start('cpu')\nimport sys, {modules}\n"
        "assert 'megatron.core.models.gpt' in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_name_is_an_error_at_its_use() -> None:
    with pytest.raises(AttributeError, match="get_device_capability"):
        mcore_cpu.CpuCuda.get_device_capability()  # type: ignore[attr-defined]


def test_too_late_is_refused() -> None:
    done = run_python("import megatron.core.utils\nfrom megarpt.device import mcore_cpu\nmcore_cpu.install()")
    assert done.returncode == 1
    assert "must be installed before it is imported" in done.stderr


def test_torch_is_untouched_and_nothing_leaks_before_install() -> None:
    done = run_python(
        "import torch\nbefore = torch.cuda.current_device\n"
        "from megarpt.device import mcore_cpu\nassert not mcore_cpu.is_installed()\nmcore_cpu.install()\n"
        "import megatron.core.tensor_parallel.layers\nassert torch.cuda.current_device is before\n"
        "assert not torch.cuda.is_available()"
    )
    assert done.returncode == 0, done.stderr
