import importlib.metadata
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megarpt.errors import EXIT_ENVIRONMENT, EXIT_OK
from megarpt.run import doctor


class FakeCuda:
    def __init__(self, available):
        self.is_available = lambda: available
        self.nccl = types.SimpleNamespace(version=lambda: (2, 27, 3))

    def device_count(self):
        return 1

    def get_device_capability(self, _index):
        return (9, 0)

    def get_device_name(self, _index):
        return "H100"

    def synchronize(self, _device):
        return None


class FakeTensor:
    device = "cuda:0"

    def __matmul__(self, other):
        return self


def fake_torch(*, cuda=None, gpu=False, gloo=True, nccl=False, product_fails=False):
    torch = types.ModuleType("torch")
    torch.__version__ = "2.13.0"

    def ones(*_, **__):
        if product_fails:
            raise RuntimeError("no kernel image is available for execution\nmore")
        return FakeTensor()

    torch.ones = ones
    torch.get_num_threads = lambda: 2
    torch.version = types.SimpleNamespace(cuda=cuda)
    torch.cuda = FakeCuda(gpu)
    torch.distributed = types.SimpleNamespace(
        is_available=lambda: True, is_gloo_available=lambda: gloo, is_nccl_available=lambda: nccl
    )
    return torch


OPTIONAL = {
    "gigatoken",
    "pyarrow.parquet",
    "safetensors.torch",
    "wandb",
    "transformer_engine.pytorch",
    "apex.optimizers",
    "flash_attn",
    "megarpt._C",
}


def world(failures=None, torch=None, version="0.16.1"):
    """What `examine` asks, for a machine where `failures` (module -> exception) do not import; optional ones are absent."""
    failures = {name: ModuleNotFoundError(f"No module named '{name}'", name=name.split(".")[0]) for name in OPTIONAL} | (
        failures or {}
    )
    failures["megarpt._C"] = ModuleNotFoundError("No module named 'megarpt._C'", name="megarpt._C")
    installed = []

    def imports(name):
        if name in failures:
            raise failures[name]
        if name == "torch":
            return torch or fake_torch()
        module = types.ModuleType(name)
        module.install = lambda: installed.append(name)
        return module

    def version_of(name):
        if name == "megatron-core":
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version
        return "1.0"

    return {"imports": imports, "version_of": version_of, "which": lambda name: f"/usr/bin/{name}", "python": (3, 11, 7)}


def examine(**changes):
    return {each.component: each for each in doctor.examine(**(world() | changes))}


def sick(findings):
    return [each.component for each in findings.values() if each.needed and each.status == "broken"]


def test_a_plain_cpu_machine_is_healthy():
    found = examine()
    assert sick(found) == []
    assert found["megatron-core"].detail == "0.16.1, through the CPU layer"
    assert found["CUDA"].status == "absent" and found["gloo"].status == "active" and found["NCCL"].status == "absent"
    assert found["Transformer Engine"].status == "absent" and "pip install" in found["Transformer Engine"].remedy
    assert "plain torch does its work" in found["compiled extension"].detail


def test_a_gpu_machine_needs_nccl_and_not_the_cpu_layer():
    found = examine(**world(torch=fake_torch(cuda="12.8", gpu=True, nccl=True)))
    assert sick(found) == []
    assert "H100 (sm_90)" in found["CUDA"].detail and found["NCCL"].detail == "used on GPUs 2.27.3"
    assert found["megatron-core"].detail == "0.16.1"
    assert sick(examine(**world(torch=fake_torch(cuda="12.8", gpu=True, nccl=False)))) == ["NCCL"]


def test_cuda_torch_without_a_gpu_falls_back_to_the_cpu():
    found = examine(**world(torch=fake_torch(cuda="12.8", gpu=False, nccl=True)))
    assert sick(found) == [] and found["CUDA"].status == "absent" and "no usable GPU" in found["CUDA"].detail
    assert found["device"].detail.startswith("cpu")


def test_a_gpu_that_cannot_compute_is_broken():
    found = examine(**world(torch=fake_torch(cuda="12.8", gpu=True, nccl=True, product_fails=True)))
    assert sick(found) == ["CUDA"]
    assert found["CUDA"].detail.endswith("RuntimeError: no kernel image is available for execution")


@pytest.mark.parametrize(
    ("module", "component"),
    [
        ("psutil", "psutil"),
        ("sentencepiece", "sentencepiece"),
        ("tokenizers", "tokenizers"),
        ("orjson", "orjson"),
        ("zstandard", "zstandard"),
        ("torch.utils.tensorboard", "tensorboard"),
        ("megatron.core", "megatron-core"),
        ("megatron.core.datasets.helpers_cpp", "mcore data helpers"),
        ("megarpt.device.mcore_cpu", "megatron-core"),
    ],
)
@pytest.mark.parametrize("kind", ["missing", "unloadable"])
def test_something_needed_that_does_not_import_is_broken(module, component, kind):
    error = (
        ModuleNotFoundError(f"No module named {module!r}", name=module)
        if kind == "missing"
        else OSError("libfoo.so.1: cannot open shared object file")
    )
    found = examine(**world({module: error}))
    assert sick(found) == [component]
    assert ("not installed" in found[component].detail) or ("libfoo.so.1" in found[component].detail)
    assert found[component].remedy


@pytest.mark.parametrize("module", sorted(OPTIONAL - {"megarpt._C"}))
def test_something_optional_may_be_absent_or_broken_without_failing(module):
    broken = examine(**world({module: RuntimeError("built for another torch")}))
    assert sick(broken) == []
    (finding,) = [each for each in broken.values() if each.status == "broken"]
    assert "RuntimeError: built for another torch" in finding.detail


def test_a_missing_dependency_of_an_optional_library_is_broken_not_absent():
    error = ModuleNotFoundError("No module named 'einops'", name="einops")
    found = examine(**world({"transformer_engine.pytorch": error}))
    assert found["Transformer Engine"].status == "broken" and "einops" in found["Transformer Engine"].detail


def test_torch_missing_is_said_once_and_nothing_crashes():
    found = examine(**world({"torch": ModuleNotFoundError("No module named 'torch'", name="torch")}))
    assert found["torch"].status == "broken" and found["megatron-core"].detail.endswith("cannot be imported without torch")
    assert "CUDA" not in found


def test_gloo_missing_on_a_cpu_machine():
    assert sick(examine(**world(torch=fake_torch(gloo=False)))) == ["gloo"]


@pytest.mark.parametrize(
    ("version", "detail"), [("0.19.2", "got 0.19.2, expected 0.16.1"), ("0.16.1", "0.16.1"), (None, "not installed")]
)
def test_only_the_tested_megatron_core_will_do(version, detail):
    found = examine(**world(version=version))["megatron-core"]
    assert found.detail.startswith(detail) and (found.status == "active") == (version == "0.16.1")


def test_old_python_and_no_compiler():
    found = examine(**(world() | {"python": (3, 10, 4), "which": lambda _name: None}))
    assert sick(found) == ["Python"] and found["compiler"].status == "absent"


def test_the_exit_code_and_the_table_follow(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("psutil", "broken", "not installed", "pip", True)])
    assert doctor.run() == EXIT_ENVIRONMENT
    out = capsys.readouterr().out
    assert "broken (needed)" in out and "Needed and broken: psutil." in out
    assert doctor.run(as_json=True) == EXIT_ENVIRONMENT
    assert json.loads(capsys.readouterr().out)["ok"] is False
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("wandb", "broken", "[brackets]", "", False)])
    assert doctor.run() == EXIT_OK
    assert "[brackets]" in capsys.readouterr().out


def test_this_machine():
    result = subprocess.run(
        [sys.executable, "-m", "megarpt", "doctor", "--json"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=240,
    )
    report = json.loads(result.stdout)
    assert result.returncode == EXIT_OK and report["ok"], report
    assert {"torch", "megatron-core", "psutil", "device"} <= {each["component"] for each in report["findings"]}
