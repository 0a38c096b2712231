"""A small world: a corpus of invented sentences, a held-out one, and the configuration of a run on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarpt.config.schema import PretrainConfig
from megarpt.device.runtime import Runtime
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.tiny import text_documents, write_text_corpus
from megarpt.train.metrics_file import read_metrics

STEP_TOKENS = 8 * 64

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpora `train` and `held`."""
    folder = tmp_path_factory.mktemp("corpora")
    write_text_corpus(folder / "train", text_documents(200, seed=1))
    write_text_corpus(folder / "held", text_documents(20, seed=2))
    return folder


@pytest.fixture
def make_config(corpora: Path, tmp_path: Path) -> MakeConfig:
    """Configurations that differ from a small run in what is given by dotted key."""

    def make(**overrides: Any) -> PretrainConfig:
        base: dict[str, Any] = {
            "run.dir": str(tmp_path / "run"),
            "model.mcore": TWO_LAYERS,
            "data.train": [{"path": str(corpora / "train")}],
            "data.valid": {"held": str(corpora / "held")},
            "data.seq_length": 64,
            "batch": {"micro_batch_size": 4, "global_batch_size": 8},
            "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_tokens": 2 * STEP_TOKENS},
            "train.train_tokens": 12 * STEP_TOKENS,
        }
        return tiny_config(**base | overrides)

    return make


@pytest.fixture
def train(cpu_runtime: Runtime) -> Callable[[PretrainConfig], list[dict[str, Any]]]:
    """Runs a configuration in this process and returns its training lines."""
    from megarpt.run import pretrain

    def run(cfg: PretrainConfig) -> list[dict[str, Any]]:
        assert pretrain.run(cfg, cpu_runtime) == 0
        return list(read_metrics(Path(cfg.run.dir) / "metrics.jsonl", "train"))

    return run
