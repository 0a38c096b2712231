"""Preset shapes are the published ones, counted on the meta device."""

import pytest
import torch

from megarpt.config.presets import PRESETS
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError
from megarpt.model import build
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.testing.configs import tiny_config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameter_count(name: str, cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    cfg = tiny_config(**{"model.preset": name, "model.make_vocab_size_divisible_by": 1, "data.seq_length": 8})
    config = build.transformer_config(cfg, ParallelLayout(), is_cuda=False)
    config.perform_initialization = False
    with torch.device("meta"):
        network = build.build_network(cfg, config, one_rank, vocab_size=PRESETS[name].vocab_size, backend="torch")
    assert sum(parameter.numel() for parameter in network.parameters()) == PRESETS[name].parameters


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.mcore": {"hiden_size": 3}}, "did you mean 'hidden_size'"),
        ({"model.mcore": {"num_query_groups": 3, "recompute_granularity": "half"}}, "megatron-core refuses"),
        ({"model.vocab_size": 10}, "the tokenizer has 300 entries"),
    ],
)
def test_a_wrong_model_is_refused(overrides: dict, message: str, cpu_runtime: Runtime, one_rank: ProcessGroups) -> None:
    with pytest.raises(ConfigError, match=message):
        cfg = tiny_config(**overrides)
        config = build.transformer_config(cfg, ParallelLayout(), is_cuda=False)
        with torch.device("meta"):
            build.build_network(cfg, config, one_rank, vocab_size=300, backend="torch")
