"""A small policy and questions for it: everything a run of `megarpt rl` starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megarpt.config.schema import RLConfig
from megarpt.corpus.tokenizers import ByteTokenizer
from megarpt.device.runtime import Runtime
from megarpt.testing.configs import TWO_LAYERS
from megarpt.testing.tiny_run import tiny_run

POLICY: dict[str, Any] = {"preset": "tiny", "mcore": TWO_LAYERS, "vocab_size": 384}
"""`model` of it; no padding of the vocabulary under two tensor-parallel ranks."""


def write_policy(folder: Path, runtime: Runtime, *, seed: int = 3) -> Path:
    """A run folder with random weights, for the bytes tokenizer."""
    tokenizer = ByteTokenizer()
    overrides = {f"model.{name}": value for name, value in POLICY.items()} | {"data.seq_length": 64}
    tiny_run(folder, runtime, seed=seed, vocab=tokenizer.vocab_size, tokenizer=tokenizer.sha256, **overrides).save()
    return folder


def write_questions(path: Path, count: int = 12) -> Path:
    """Questions whose answer is a digit."""
    lines = [json.dumps({"id": f"q{i}", "question": f"{i} and {i * i}: ", "answer": str(i % 10)}) for i in range(count)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def policy_config(folder: Path, policy: Path, questions: Path, **overrides: Any) -> RLConfig:
    """A run of some iterations in `folder`, rewarded for completions that begin with a byte below 128; overrides by dotted
    key."""
    tree: dict[str, Any] = {
        "command": "rl",
        "run": {"dir": str(folder), "seed": 5},
        "model": POLICY | {"init_from": str(policy)},
        "data": {
            "tokenizer": "bytes",
            "train": str(questions),
            "valid": {"same": str(questions)},
            "seq_length": 40,
            "max_prompt_tokens": 16,
            "template": "{question}",
        },
        "batch": {"micro_batch_size": 4},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 6},
        "verifiers": [{"kind": "format", "pattern": r"(?s)[\x00-\x7f].*"}],
        "optimizer": {"lr": 1e-2},
        "train": {"train_steps": 6},
        "evaluation": {"interval_steps": 3, "max_prompts": 4},
        "checkpoint": {"interval_steps": 2},
        "logging": {"tensorboard": False, "histogram_interval_steps": 2},
    }
    for key, value in overrides.items():
        *path, last = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return RLConfig.model_validate(tree)
