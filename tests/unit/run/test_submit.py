from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarpt import cli
from megarpt.config.load import load_config
from megarpt.config.schema import SubmitOptions
from megarpt.errors import EXIT_CONFIG, EXIT_ENVIRONMENT, ConfigError
from megarpt.run import submit

ROOT = Path(__file__).parents[3]
MINIMAL = """\
run: {dir: runs/x}
data: {tokenizer: bytes, train: [{path: a}]}
train: {train_tokens: 1000}
batch: {global_batch_size: 128}
"""
SBATCH = """#!/usr/bin/env bash
echo "$@" >>calls
if [ "$1" = --test-only ]; then
    cat >tried
    [ -z "$REFUSE" ] || { echo "allocation failure: $REFUSE" >&2; exit 1; }
    echo "sbatch: Job 41 to start at noon" >&2
    exit
fi
echo "42;cluster"
"""


@pytest.fixture(autouse=True)
def _cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_as_before: None) -> None:
    """A folder to submit from and a stand-in for sbatch."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    (tmp_path / "c.yaml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name in ("RANK", "WORLD_SIZE", "REFUSE"):
        monkeypatch.delenv(name, raising=False)


def call(*more: str) -> int:
    return cli.main(["submit", "c.yaml", "--nodes", "2", "--time", "1-00:00:00", *more])


def header(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    pairs = [line.partition("=")[::2] for line in lines]
    assert len(dict(pairs)) == len(pairs), "an option is given twice"
    return dict(pairs)


def test_what_is_submitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("optimizer.lr=1e-3", "--partition", "h100", "--account", "me", "--sbatch=--qos=high") == 0
    folder = tmp_path / "runs/x/slurm"
    script = (folder / "train.sbatch").read_text()
    assert (tmp_path / "tried").read_text() == script
    assert (tmp_path / "calls").read_text().splitlines() == ["--test-only", f"--parsable {folder}/train.sbatch"]
    options = header(script)
    assert options == header((ROOT / "slurm/train.sbatch").read_text()) | {
        "job-name": "x",
        "nodes": "2",
        "gpus-per-node": "8",
        "time": "1-00:00:00",
        "output": f"{folder}/%j.log",
        "chdir": str(tmp_path),
        "partition": "h100",
        "account": "me",
        "qos": "high",
    }
    (config,) = folder.glob("config-*.yaml")
    assert f"set -- {config}\n" in script and load_config(config).optimizer.lr == 1e-3
    said = capsys.readouterr().out
    for word in ("job 42", "says   to start at noon", f"{folder}/42.log", "squeue --jobs 42", "tensorboard"):
        assert word in said


def test_the_body_is_the_shipped_script() -> None:
    shipped = (ROOT / "slurm/train.sbatch").read_text()
    options = SubmitOptions(nodes=2, time="10:00:00")
    script = submit.render(shipped, options, config=Path("/c.yaml"), home=Path("/h"), output=Path("/runs/x/slurm/%j.log"))
    added = [line for line in script.splitlines() if line not in shipped.splitlines() and not line.startswith("#SBATCH")]
    assert added == [
        "export MEGARPT_HOME=/h",
        "export MEGARPT_RANKS_PER_NODE=8",
        f'[ -n "${{MEGARPT_CONTAINER:-}}" ] || export MEGARPT_PYTHON={sys.executable}',
        "set -- /c.yaml",
    ]
    body = [line for line in shipped.splitlines() if not line.startswith("#SBATCH")]
    assert [line for line in script.splitlines() if line not in added and not line.startswith("#SBATCH")] == body


def test_cpus_only(tmp_path: Path) -> None:
    assert call("--gpus-per-node", "0", "--ranks-per-node", "4") == 0
    script = (tmp_path / "tried").read_text()
    assert "gpus-per-node" not in header(script) and "MEGARPT_RANKS_PER_NODE=4\n" in script


def test_a_dry_run_shows_the_script_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--dry-run") == 0
    assert header(capsys.readouterr().out)["nodes"] == "2"
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "c.yaml"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.seq_length=-1"], "data.seq_length"),
        (["batch.global_batch_size=8"], "expected a multiple of 128"),
        (["parallel.tensor_model_parallel_size=3"], "a world of 16 ranks"),
        (["--time", "soon"], "--time: got 'soon'"),
        (["--time", "1:2:3:4"], "--time: got '1:2:3:4'"),
        (["--time", "5"], "expected more than 300 s"),
        (["--time", "5", "--sbatch=--signal=B:USR1@301"], "expected more than 301 s"),
        (["--nodes", "0"], "nodes: got 0"),
        (["--sbatch=qos=high"], "--sbatch: got 'qos=high'"),
        (["run.device=cpu"], "--gpus-per-node: got 8, but run.device is cpu"),
        (["run.device=cuda", "--gpus-per-node", "0"], "--gpus-per-node: got 0, but run.device is cuda"),
        (["batch.global_batch_size=256", "--ranks-per-node", "16"], "--ranks-per-node: got 16"),
    ],
)
def test_impossible_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert call(*arguments) == EXIT_CONFIG
    assert message in capsys.readouterr().err
    assert not (tmp_path / "calls").exists() and not (tmp_path / "runs").exists()


def test_what_slurm_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("REFUSE", "Requested node configuration is not available")
    assert call() == EXIT_CONFIG
    assert "Requested node configuration is not available" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call() == EXIT_ENVIRONMENT
    assert "sbatch: not found" in capsys.readouterr().err
    assert call("--dry-run") == 0


def test_no_scripts_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(submit.megarpt, "__file__", str(tmp_path / "megarpt/__init__.py"))
    assert call() == EXIT_ENVIRONMENT
    assert "pip install -e ." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("1:02:03", 3723),
        ("1-0", 86400),
        ("1-2:03", 93780),
        ("2-00:00:01", 172801),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert submit.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "-1", "1-", "1-2-3", "1:2:3:4", "1.5", ":30"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match="--time: got"):
        submit.seconds_of(text)


def test_submitting_loads_neither_torch_nor_megatron(tmp_path: Path) -> None:
    code = (
        "import sys; from megarpt import cli\n"
        "code = cli.main(['submit', 'c.yaml', '--nodes', '2', '--time', '10:00:00'])\n"
        "heavy = {name.split('.')[0] for name in sys.modules} & {'torch', 'megatron'}\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert (tmp_path / "tried").exists()
