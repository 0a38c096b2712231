"""Who may touch what, file by file. A new name on one of these lists is a decision to be made on purpose."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MEGATRON_SEAMS = {
    "megarpt/data/order.py": "its helper builds the blend",
    "megarpt/data/streams.py": "its IndexedDataset reads sidecars",
    "megarpt/data/windows.py": "its IndexedDataset reads corpora",
    "megarpt/device/without_te.py": "repairs it",
    "megarpt/model/attention.py": "core attention for its layer specs",
    "megarpt/model/build.py": "its model and data-parallel wrapper",
    "megarpt/parallel/context.py": "its all-gather along the sequence",
    "megarpt/model/decoding.py": "the parameters of its layers",
    "megarpt/model/experts.py": "its routers' losses",
    "megarpt/model/forward.py": "its pipeline schedules",
    "megarpt/model/norm.py": "norms for its layer specs",
    "megarpt/model/parameters.py": "its marks of shared parameters",
    "megarpt/model/specs.py": "its layer specs",
    "megarpt/model/token_stats_gpt.py": "the head seam of its GPTModel",
    "megarpt/parallel/layout.py": "its parallel state",
    "megarpt/streaming/chunks.py": "what it tells its layers of packed documents",
    "megarpt/streaming/layer.py": "its transformer layer",
    "megarpt/train/checkpoint.py": "is handed its optimizer and schedule",
    "megarpt/train/checkpoint_state.py": "state of its optimizer, schedule and random generators",
    "megarpt/train/optimizer.py": "its optimizer and schedule",
    "megarpt/train/optimizer_state.py": "what its optimizers store",
    "megarpt/train/sharded.py": "its dist_checkpointing, reading",
    "megarpt/train/sharded_save.py": "its dist_checkpointing, writing",
    "megarpt/train/step.py": "its schedules and gradient finalization",
}

TORCH_CUDA = {
    "megarpt/device/": "the device layer",
    "megarpt/run/doctor.py": "reports CUDA also where the device layer is what is broken",
}

ENVIRONMENT = {
    "megarpt/cli.py": "rank and world size, before torch is loaded, and the file for the exit code",
    "megarpt/device/": "the local rank torchrun gives",
    "megarpt/run/verify_resume.py": "plays torchrun for the ranks it watches",
    "megarpt/testing/slurm.py": "the environment of a throw-away cluster",
    "megarpt/testing/distributed.py": "plays torchrun for the ranks of a test",
}


def sources(*folders):
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(), str(path))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def uses(tree, owner, attribute):
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
        for node in ast.walk(tree)
    )


def outside(found, allowed):
    return sorted(
        file for file in found if not any(file == each or (each.endswith("/") and file.startswith(each)) for each in allowed)
    )


def test_megatron_is_imported_by_exactly_the_seams():
    found = {
        file
        for file, tree in sources("megarpt")
        if any(name.split(".")[0] == "megatron" for name in imported(tree)) and not file.startswith("megarpt/testing/")
    }
    assert found == set(MEGATRON_SEAMS)


def test_torch_cuda_is_named_by_the_device_layer_only():
    found = {file for file, tree in sources("megarpt") if uses(tree, "torch", "cuda") or "torch.cuda" in imported(tree)}
    assert outside(found, TORCH_CUDA) == []


def test_the_environment_is_read_in_few_places():
    found = {file for file, tree in sources("megarpt") if uses(tree, "os", "environ") or uses(tree, "os", "getenv")}
    assert outside(found, ENVIRONMENT) == []


def test_nothing_in_the_package_prints_or_uses_globals():
    for file, tree in sources("megarpt"):
        calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        assert "print" not in calls, file
        assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), file


def test_the_checks_see_a_violation():
    tree = ast.parse("import os\nfrom megatron.core import x\ntorch.cuda.synchronize()\nos.environ['A']")
    assert "megatron.core" in imported(tree) and uses(tree, "torch", "cuda") and uses(tree, "os", "environ")
    assert outside({"megarpt/a.py", "megarpt/device/b.py"}, TORCH_CUDA) == ["megarpt/a.py"]


def test_modules_say_what_they_are_for():
    without = [file for file, tree in sources("megarpt", "tools") if tree.body and ast.get_docstring(tree) is None]
    assert without == []


def test_nothing_ships_that_imports_tools_examples_or_tests():
    for file, tree in sources("megarpt"):
        assert not {name.split(".")[0] for name in imported(tree)} & {"tools", "examples", "tests"}, file


@pytest.mark.parametrize("tool", ["train_tokenizer", "preprocess_corpus", "inspect_corpus", "merge_corpora"])
def test_corpus_tools_load_neither_torch_nor_megatron(tool):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{tool}.py', '--help']\n"
        f"try: runpy.run_path(r'{ROOT / 'tools' / tool}.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {name.split('.')[0] for name in sys.modules} & {'torch', 'megatron'}\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout.lower()
