"""`megarpt doctor`: what this machine can do, what it cannot, why, and what to do about it.

Everything is found out by trying it. Nothing here is imported at the top, so that the doctor can still speak when torch or
megatron-core is what is broken.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megarpt import __version__
from megarpt.errors import EXIT_ENVIRONMENT, EXIT_OK

Status = Literal["active", "absent", "broken"]
Import = Callable[[str], ModuleType]

MEGATRON_CORE = "0.16.1"
_OLDEST_PYTHON = (3, 11)
_STYLE = {"active": "green", "absent": "dim", "broken": "bold red"}
# What importing somebody else's package can raise when it, or a library it loads, does not fit the machine.
_IMPORT_FAILURES = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table."""

    component: str
    status: Status
    detail: str
    remedy: str = ""
    needed: bool = False  # a training run on this machine cannot do without it


@dataclass(frozen=True, slots=True)
class _Library:
    component: str
    module: str
    distribution: str
    purpose: str
    remedy: str
    needed: bool = False


_INSTALL = "pip install -e . in the repository"
_LIBRARIES = (
    _Library("psutil", "psutil", "psutil", "megatron-core's checkpoint writer hangs without it", _INSTALL, needed=True),
    _Library("sentencepiece", "sentencepiece", "sentencepiece", "tokenizer back end: .model files", _INSTALL, needed=True),
    _Library("tokenizers", "tokenizers", "tokenizers", "tokenizer back end: tokenizer.json files", _INSTALL, needed=True),
    _Library(
        "gigatoken", "gigatoken", "gigatoken", "fast tokenizer back end, used where its ids are equal", "pip install -e .[fast]"
    ),
    _Library("orjson", "orjson", "orjson", "reads jsonl corpora", _INSTALL, needed=True),
    _Library("zstandard", "zstandard", "zstandard", "reads .zst corpora", _INSTALL, needed=True),
    _Library("pyarrow", "pyarrow.parquet", "pyarrow", "reads .parquet corpora", "pip install -e .[parquet]"),
    _Library("safetensors", "safetensors.torch", "safetensors", "tools/convert_checkpoint.py", "pip install -e .[hf]"),
    _Library(
        "tensorboard", "torch.utils.tensorboard", "tensorboard", "curves, histograms, samples of a run", _INSTALL, needed=True
    ),
    _Library("math-verify", "math_verify", "math-verify", "verifier math", "pip install -e .[rl]"),
    _Library("starlette", "starlette", "starlette", "megarpt serve", "pip install -e .[serve]"),
    _Library("uvicorn", "uvicorn", "uvicorn", "megarpt serve", "pip install -e .[serve]"),
    _Library("httpx2", "httpx2", "httpx2", "rollout.engine server", "pip install -e .[serve]"),
    _Library("wandb", "wandb", "wandb", "logging.wandb_project", "pip install -e .[wandb]"),
    _Library(
        "Transformer Engine",
        "transformer_engine.pytorch",
        "transformer_engine",
        "fused layers on NVIDIA GPUs; without it mcore's local layers and torch attention are used",
        "pip install --no-build-isolation -e .[te], with CUDA",
    ),
    _Library(
        "apex",
        "apex.optimizers",
        "apex",
        "fused optimizer; without it torch's AdamW is used",
        "build it from its repository; not on PyPI",
    ),
    _Library(
        "flash-attn",
        "flash_attn",
        "flash_attn",
        "attention kernels for Transformer Engine",
        "pip install --no-build-isolation flash-attn, with CUDA",
    ),
)


def run(*, as_json: bool = False) -> int:
    """Print the table (or one JSON object) on standard output; EXIT_ENVIRONMENT when something needed is broken."""
    findings = examine()
    sick = [each for each in findings if each.needed and each.status == "broken"]
    if as_json:
        report = {"ok": not sick, "version": __version__, "findings": [asdict(each) for each in findings]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _show(findings, sick)
    return EXIT_ENVIRONMENT if sick else EXIT_OK


def examine(
    imports: Import = importlib.import_module,
    *,
    version_of: Callable[[str], str] = importlib.metadata.version,
    which: Callable[[str], str | None] = shutil.which,
    python: Sequence[int] = tuple(sys.version_info[:3]),
) -> list[Finding]:
    """Try everything once. The arguments are what the outside world is asked through, so that a test can break it."""
    findings = [Finding("megarpt", "active", __version__, needed=True), _python(python)]
    torch, finding = _load(imports, "torch", "torch", needed=True, remedy=_INSTALL)
    findings.append(finding)
    if torch is not None:
        findings += [*_devices(torch), *_collectives(torch)]
    findings += _megatron(imports, version_of, torch)
    for library in _LIBRARIES:
        findings.append(_library(imports, version_of, library))
    findings += [_extension(imports, torch), _compiler(which, torch)]
    return findings


def _python(version: Sequence[int]) -> Finding:
    detail = f"{'.'.join(map(str, version[:3]))}, {platform.platform()}"
    if tuple(version[:2]) >= _OLDEST_PYTHON:
        return Finding("Python", "active", detail, needed=True)
    return Finding("Python", "broken", f"got {detail}, expected 3.11 or newer", "make a virtual environment with it", True)


def _devices(torch: Any) -> list[Finding]:
    threads = f"{torch.get_num_threads()} threads"
    if torch.version.cuda is None:
        return [
            Finding("device", "active", f"cpu, {threads}", needed=True),
            Finding("CUDA", "absent", "this torch build is for the CPU", "for a GPU: install a CUDA build of torch"),
        ]
    if not torch.cuda.is_available():
        reason = f"torch is built for CUDA {torch.version.cuda}, but finds no usable GPU or driver"
        return [
            Finding("device", "active", f"cpu, {threads}", needed=True),
            Finding("CUDA", "absent", reason, "on a GPU machine: check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ]
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{index}: {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    detail = f"CUDA {torch.version.cuda}; {'; '.join(names)}"
    try:
        probe = torch.ones(8, 8, device="cuda")
        torch.cuda.synchronize((probe @ probe).device)
    except RuntimeError as error:
        remedy = "install a torch build for this GPU and driver"
        return [Finding("CUDA", "broken", f"{detail}; a matrix product fails: {_first_line(error)}", remedy, True)]
    return [Finding("device", "active", "cuda", needed=True), Finding("CUDA", "active", detail, needed=True)]


def _collectives(torch: Any) -> list[Finding]:
    distributed = torch.distributed
    gpu = torch.version.cuda is not None and torch.cuda.is_available()
    if not distributed.is_available():
        return [Finding("collectives", "broken", "this torch build has no torch.distributed", "install another build", True)]
    findings = []
    for name, present, needed in (
        ("gloo", distributed.is_gloo_available(), not gpu),
        ("NCCL", distributed.is_nccl_available(), gpu),
    ):
        use = "used on GPUs" if name == "NCCL" else "used on CPUs"
        if present:
            version = f" {'.'.join(map(str, torch.cuda.nccl.version()))}" if name == "NCCL" and gpu else ""
            findings.append(Finding(name, "active", f"{use}{version}", needed=needed))
        else:
            status: Status = "broken" if needed else "absent"
            remedy = f"install a torch build with {name}" if needed else ""
            findings.append(Finding(name, status, f"not in this torch build ({use})", remedy, needed))
    return findings


def _megatron(imports: Import, version_of: Callable[[str], str], torch: Any) -> list[Finding]:
    name, remedy = "megatron-core", f"pip install megatron-core=={MEGATRON_CORE}"
    try:
        version = version_of("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return [Finding(name, "broken", "not installed", remedy, True)]
    if version != MEGATRON_CORE:
        return [Finding(name, "broken", f"got {version}, expected {MEGATRON_CORE}", remedy, True)]
    if torch is None:
        return [Finding(name, "broken", f"{version}, cannot be imported without torch", "repair torch first", True)]
    layer = ""
    if torch.version.cuda is None or not torch.cuda.is_available():
        _, finding = _load(_installed_cpu_layer(imports), "megarpt.device.mcore_cpu", name, needed=True, remedy=remedy)
        if finding.status != "active":
            return [Finding(name, "broken", f"its CPU layer does not work: {finding.detail}", remedy, True)]
        layer = ", through the CPU layer"
    module, finding = _load(imports, "megatron.core", name, needed=True, remedy=remedy)
    if module is None:
        return [finding]
    helpers, finding = _load(
        imports, "megatron.core.datasets.helpers_cpp", "mcore data helpers", needed=True, remedy=f"reinstall: {remedy}"
    )
    if helpers is not None:
        finding = Finding("mcore data helpers", "active", "compiled, from the megatron-core wheel", needed=True)
    return [Finding(name, "active", f"{version}{layer}", needed=True), finding]


def _installed_cpu_layer(imports: Import) -> Import:
    def load(module: str) -> ModuleType:
        layer = imports(module)
        layer.install()
        return layer

    return load


def _library(imports: Import, version_of: Callable[[str], str], library: _Library) -> Finding:
    module, finding = _load(
        imports, library.module, library.component, needed=library.needed, remedy=library.remedy, purpose=library.purpose
    )
    if module is None:
        return finding
    try:
        version = version_of(library.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = str(getattr(module, "__version__", "version unknown"))
    return Finding(library.component, "active", f"{version}; {library.purpose}", needed=library.needed)


def _extension(imports: Import, torch: Any) -> Finding:
    name, remedy = "compiled extension", f"{_INSTALL}, with a C++ compiler; MEGARPT_BUILD=cpu makes a failure an error"
    module, finding = _load(imports, "megarpt._C", name, needed=False, remedy=remedy)
    if module is None:
        plain = "plain torch does its work, slower and in more memory"
        return replace(finding, detail=f"{finding.detail or 'not built'}; {plain}", remedy=remedy)
    gpu = torch is not None and torch.version.cuda is not None and torch.cuda.is_available()
    if gpu and not module.has_cuda:
        detail = f"CPU ({module.instruction_set}) only; on the GPU plain torch does its work"
        return Finding(name, "absent", detail, f"MEGARPT_BUILD=cuda {_INSTALL}")
    return Finding(name, "active", f"CPU ({module.instruction_set})" + (", CUDA" if module.has_cuda else ""))


def _compiler(which: Callable[[str], str | None], torch: Any) -> Finding:
    found = [path for path in map(which, ("c++", "g++", "nvcc")) if path]
    toolchain = f"; torch is built for CUDA {torch.version.cuda}" if torch is not None and torch.version.cuda else ""
    if found:
        return Finding("compiler", "active", f"{', '.join(found)}{toolchain}")
    return Finding("compiler", "absent", "no C++ compiler; compiled extensions need one", "install g++")


def _load(
    imports: Import, module: str, component: str, *, needed: bool, remedy: str, purpose: str = ""
) -> tuple[ModuleType | None, Finding]:
    """Import one module. Not installed is `absent`, or `broken` when it is needed; installed and failing is `broken`."""
    try:
        loaded = imports(module)
    except _IMPORT_FAILURES as error:
        parents = {".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 2)}
        if isinstance(error, ModuleNotFoundError) and error.name in parents:
            detail = f"not installed{f'; {purpose}' if purpose else ''}"
            return None, Finding(component, "broken" if needed else "absent", detail, remedy, needed)
        return None, Finding(component, "broken", f"installed, but does not import: {_first_line(error)}", remedy, needed)
    return loaded, Finding(component, "active", str(getattr(loaded, "__version__", "")), needed=needed)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def _show(findings: Sequence[Finding], sick: Sequence[Finding]) -> None:
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else 160)
    table = Table(title=f"megarpt {__version__}", title_justify="left")
    for column in ("component", "status", "detail", "what to do"):
        table.add_column(column, overflow="fold")
    for each in findings:
        status = f"{each.status}{' (needed)' if each.needed and each.status == 'broken' else ''}"
        table.add_row(each.component, Text(status, _STYLE[each.status]), Text(each.detail), Text(each.remedy))
    console.print(table)
    if sick:
        console.print(f"Needed and broken: {', '.join(each.component for each in sick)}.", style="bold red")
    else:
        console.print("Everything needed works.", style="green")
