"""Exported weights: verified, complete in themselves, and taken wherever a checkpoint is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megarpt.config.schema import EvaluateOptions, ExportOptions, GenerateOptions, PretrainConfig
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.device.runtime import Runtime
from megarpt.errors import CheckpointError, ConfigError
from megarpt.run import evaluate, export, generate, pretrain
from megarpt.testing.tiny import text_documents, write_text_corpus
from megarpt.train.checkpoint_files import read_manifest, resolve_checkpoint
from megarpt.train.weights import checkpoint_hash

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture
def trained(make_config: MakeConfig, train: Callable[[PretrainConfig], object]) -> PretrainConfig:
    cfg = make_config()
    train(cfg)
    return cfg


def test_an_export_does_what_its_run_does(
    trained: PretrainConfig,
    make_config: MakeConfig,
    cpu_runtime: Runtime,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "exported"
    assert export.run(ExportOptions(checkpoint=trained.run.dir, output=str(out))) == 0
    assert checkpoint_hash(out) == checkpoint_hash(trained.run.dir)
    manifest = read_manifest(out)
    assert {name.split("/")[0] for name in manifest.files} == {"model", "config.yaml"} and not manifest.has_training_state
    told = []
    for path in (trained.run.dir, str(out)):
        capsys.readouterr()
        assert evaluate.run(EvaluateOptions(checkpoint=path, output="json"), cpu_runtime) == 0
        told.append(json.loads(capsys.readouterr().out)["corpora"]["held"]["loss_nats"])
        assert generate.run(GenerateOptions(checkpoint=path, prompt="The ", max_new_tokens=8), cpu_runtime) == 0
        told.append(capsys.readouterr().out)
    assert told[:2] == told[2:]
    assert pretrain.run(make_config(**{"run.dir": str(tmp_path / "second"), "model.init_from": str(out)}), cpu_runtime) == 0


def test_a_run_cannot_be_continued_from_an_export(
    trained: PretrainConfig, make_config: MakeConfig, cpu_runtime: Runtime, tmp_path: Path
) -> None:
    target = tmp_path / "other" / "checkpoints" / "step_00000012"
    target.parent.mkdir(parents=True)
    export.run(ExportOptions(checkpoint=trained.run.dir, output=str(target)))
    with pytest.raises(CheckpointError, match=r"holds weights only.*\n?.*model.init_from"):
        pretrain.run(make_config(**{"run.dir": str(tmp_path / "other")}), cpu_runtime)


def test_an_export_carries_its_tokenizer(
    make_config: MakeConfig, cpu_runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "letters.json"
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["abc"], letters)
    tokenizer.save(str(file))
    write_text_corpus(tmp_path / "text", text_documents(50, seed=1), load_tokenizer(str(file)))
    cfg = make_config(
        **{
            "data": {"tokenizer": str(file), "train": [{"path": str(tmp_path / "text")}], "seq_length": 64},
            "train.train_tokens": 4 * 8 * 64,
        }
    )
    assert pretrain.run(cfg, cpu_runtime) == 0
    export.run(ExportOptions(checkpoint=cfg.run.dir, output=str(tmp_path / "out")))
    file.unlink()
    shutil.rmtree(cfg.run.dir)
    assert generate.run(GenerateOptions(checkpoint=str(tmp_path / "out"), prompt="The ", max_new_tokens=4), cpu_runtime) == 0
    assert "tokenizer.json" in read_manifest(tmp_path / "out").files


def test_what_cannot_be_exported_is_said_and_leaves_nothing(trained: PretrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="does not exist"):
        export.run(ExportOptions(checkpoint=str(tmp_path / "nowhere"), output=str(out)))
    shard = next(resolve_checkpoint(trained.run.dir).glob("model/*.distcp"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shutil.copyfile(shard, tmp_path / "whole")
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: got sha256"):
        export.run(ExportOptions(checkpoint=trained.run.dir, output=str(out)))
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    shutil.copyfile(tmp_path / "whole", shard)
    (tmp_path / ".out.tmp" / "model").mkdir(parents=True)  # as a killed export leaves it
    (tmp_path / ".out.tmp" / "model" / "old").touch()
    export.run(ExportOptions(checkpoint=trained.run.dir, output=str(out)))
    assert not (out / "model" / "old").exists()
    with pytest.raises(ConfigError, match="exists already"):
        export.run(ExportOptions(checkpoint=trained.run.dir, output=str(out)))


def test_export_loads_neither_torch_nor_megatron() -> None:
    code = "import sys, megarpt.run.export; sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
