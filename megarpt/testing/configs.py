"""Small configurations for tests, written as the differences that matter."""

from __future__ import annotations

from typing import Any

from megarpt.config.schema import PretrainConfig

TWO_LAYERS = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96}
"""`model.mcore` of a model that trains a step in milliseconds."""


def tiny_config(**overrides: Any) -> PretrainConfig:
    """A configuration of the tiny preset; overrides by dotted key: `tiny_config(**{"data.seq_length": 64})`."""
    tree: dict[str, Any] = {
        "run": {"dir": "runs/tiny"},
        "model": {"preset": "tiny"},
        "data": {"tokenizer": "bytes", "train": [{"path": "corpus"}], "seq_length": 64},
        "train": {"train_tokens": 1 << 20},
    }
    for key, value in overrides.items():
        *path, last = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return PretrainConfig.model_validate(tree)
