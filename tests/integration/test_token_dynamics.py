"""`tools/token_dynamics.py` on the checkpoints of a small run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarpt.corpus.manifest import SidecarManifest
from megarpt.device.runtime import Runtime
from megarpt.errors import CheckpointError, ConfigError, DataError, ExtensionError
from megarpt.run import pretrain, score
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.tiny import byte_tokenizer
from megarpt.train.checkpoint_files import list_checkpoints
from megarpt.train.token_dynamics import IGNORED, classify, fit_lines

TOOL = Path(__file__).parents[2] / "tools" / "token_dynamics.py"
spec = importlib.util.spec_from_file_location("token_dynamics_tool", TOOL)
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tool  # dataclasses look their module up
spec.loader.exec_module(tool)

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def trained(corpora: Path, tmp_path_factory: pytest.TempPathFactory, cpu_runtime: Runtime) -> Path:
    """A run folder with the checkpoints of steps 4, 8, 12 and 16."""
    folder = tmp_path_factory.mktemp("dynamics") / "run"
    cfg = tiny_config(
        **{
            "run.dir": str(folder),
            "model.mcore": TWO_LAYERS,
            "data.train": [{"path": str(corpora / "train")}],
            "data.valid": {"held": str(corpora / "held")},
            "batch": {"micro_batch_size": 8, "global_batch_size": 8},
            "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
            "train.train_tokens": 16 * 512,
            "checkpoint": {"interval_steps": 4, "keep_every_steps": 4},
            "logging.tensorboard": False,
        }
    )
    assert pretrain.run(cfg, cpu_runtime) == 0
    return folder


@pytest.fixture
def run(cpu_runtime: Runtime) -> Run:
    """Runs the tool in this process and returns what it wrote."""

    def go(output: Path, *argv: str | Path) -> dict[str, Any]:
        tool.run(tool.parse([*map(str, argv), "--output", str(output)]), cpu_runtime)
        return json.loads((output / "token_dynamics.json").read_text())

    return go


def test_the_result_follows_from_the_losses(
    run: Run, trained: Path, corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path, trained, "--npz", "--examples", "2", "--threshold", "0.5")
    assert [each["step"] for each in result["checkpoints"]] == [4, 8, 12, 16]
    assert [each["x"] for each in result["checkpoints"]] == [512.0 * step for step in (4, 8, 12, 16)]
    assert result["corpus"] == str(corpora / "held") and result["axis"] == "tokens seen"
    losses = np.stack([np.fromfile(f"{each['losses']}.bin", dtype=np.float32) for each in result["checkpoints"]])
    predicted = np.isfinite(losses).all(axis=0)
    start, end = fit_lines(losses, np.array([4.0, 8.0, 12.0, 16.0]))
    expected = classify(end - start, losses[-1], losses[-1][predicted].mean(), 0.5)
    assert result["tokens"] == predicted.sum() == sum(each["tokens"] for each in result["classes"].values())
    assert [each["tokens"] for each in result["classes"].values()] == [int((expected == i).sum()) for i in range(4)]
    assert sum(each["share"] for each in result["classes"].values()) == pytest.approx(1.0)
    assert result["mean_loss_nats"] == pytest.approx(losses[:, predicted].mean(axis=1).tolist(), rel=1e-5)
    assert result["mean_loss_nats"][-1] < result["mean_loss_nats"][0] - 0.3  # the run learned something
    with np.load(tmp_path / "tokens.npz") as content:
        np.testing.assert_array_equal(content["position"], np.flatnonzero(expected != IGNORED))
        np.testing.assert_array_equal(content["token_class"], expected[expected != IGNORED])
        np.testing.assert_array_equal(content["losses"], losses[:, expected != IGNORED])
    assert (tmp_path / "token_dynamics.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    ids = np.fromfile(corpora / "held.bin", dtype=np.uint16)
    for name, examples in result["examples"].items():
        assert len(examples) == min(2, result["classes"][name]["tokens"])
        for example in examples:
            number = int(ids[example["position"]])
            assert example["token"] == (chr(number) if number < 256 else byte_tokenizer().token_text(number))
            before = bytes(ids[example["position"] - len(example["before"]) : example["position"]].astype(np.uint8).tolist())
            assert example["before"] == before.decode()  # the corpus is bytes: what stands before a token is its document
            assert example["losses_nats"] == pytest.approx(losses[:, example["position"]].tolist(), abs=1e-4)
        assert name in shown


def test_what_is_scored_is_not_scored_again(run: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = list_checkpoints(trained / "checkpoints")[::-1]
    first = run(tmp_path, *checkpoints[:3], "--no-plot")
    assert not (tmp_path / "token_dynamics.png").exists()
    scored, original = [], score.run

    def counted(options: Any, runtime: Runtime) -> int:
        scored.append(options.reference)
        return original(options, runtime)

    monkeypatch.setattr(score, "run", counted)
    again = run(tmp_path, *checkpoints[:3], "--no-plot")
    assert scored == [] and again == first
    run(tmp_path, trained, "--no-plot")
    assert scored == [str(checkpoints[3])]
    sidecars = [each["losses"] for each in first["checkpoints"]]
    assert SidecarManifest.load(sidecars[0]).reference.endswith("(step_00000004)")
    by_hand = run(tmp_path / "sidecars", *sidecars, "--corpus", first["corpus"], "--no-plot", "--tokenizer", "bytes")
    assert by_hand["axis"] == "checkpoint" and by_hand["classes"] == first["classes"]  # evenly spaced: the same lines
    assert by_hand["examples"] == first["examples"]


def test_mistakes_are_named(run: Run, trained: Path, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = list_checkpoints(trained / "checkpoints")
    with pytest.raises(ConfigError, match=r"got 2 checkpoints .*at least 3.*checkpoint\.keep_every_steps=N"):
        run(tmp_path, *checkpoints[:2])
    with pytest.raises(CheckpointError, match="does not exist"):
        run(tmp_path, tmp_path / "nothing")
    first = run(tmp_path, trained, "--no-plot")
    sidecars = [each["losses"] for each in first["checkpoints"]]
    with pytest.raises(ConfigError, match="--corpus: a sidecar does not say"):
        run(tmp_path, *sidecars)
    with pytest.raises(DataError, match="does not belong to this corpus"):
        run(tmp_path, *sidecars, "--corpus", corpora / "train")
    with pytest.raises(ConfigError, match="--output: name a folder"):
        tool.own_folder(sidecars)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ExtensionError, match=r"extra `demo`.*--no-plot"):
        tool.main([str(trained)])


def test_as_a_command(trained: Path) -> None:
    """From a shell, into the run folder, with the exit codes of every other command."""
    command = [sys.executable, str(TOOL), str(trained), "--no-plot", "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "H->L" in result.stdout and (trained / "token_dynamics" / "token_dynamics.json").exists()
    refused = subprocess.run([*command, "--corpus", "nowhere"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 79 and refused.stderr.startswith("error: nowhere: got no file of this name")
