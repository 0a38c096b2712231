"""Checkpoints of several ranks, published: shards and padding of the layout they were written under are not seen any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megarpt.config.schema import PretrainConfig
from megarpt.device import runtime
from megarpt.device.runtime import Runtime
from megarpt.run import convert, pretrain
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.distributed import spawn
from megarpt.testing.tiny import text_documents, write_text_corpus
from megarpt.train.sharded import stored_tensors


def train(cfg: PretrainConfig) -> int:
    return pretrain.run(cfg, runtime.start("cpu"))


@pytest.mark.parametrize(
    "parallel",
    [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    ids=["tp", "pp"],
)
def test_a_checkpoint_of_two_ranks_is_published_whole(parallel: dict[str, Any], cpu_runtime: Runtime, tmp_path: Path) -> None:
    write_text_corpus(tmp_path / "text", text_documents(40, seed=1))
    cfg = tiny_config(
        **{
            "run.dir": str(tmp_path / "run"),
            "model": {"preset": "tiny", "mcore": TWO_LAYERS, "make_vocab_size_divisible_by": 200},
            "data": {"tokenizer": "bytes", "train": [{"path": str(tmp_path / "text")}], "seq_length": 64},
            "train.train_tokens": 8 * 64,
            "parallel": parallel,
        }
    )
    assert spawn(2, train, cfg) == [0, 0]
    convert.export_model(cfg.run.dir, tmp_path / "published")
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "published" / "model.safetensors").items()}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (257, 64)
    folder = next((tmp_path / "run" / "checkpoints").glob("step_*/model"))
    assert stored_tensors(folder)["output_layer.weight"][1] == (400, 64)  # by 200 on each of two ranks, or twice
    verdict = convert.verify(tmp_path / "published", cfg.run.dir, cpu_runtime, num_sequences=2, num_tokens=32, seed=1)
    assert verdict.max_difference < 1e-5 and verdict.max_logit > 0.1
