"""Two runs that should be the same: every kind of difference is found and named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megarpt.device.runtime import Runtime
from megarpt.testing.shards import write_sharded
from megarpt.train.checkpoint_files import MODEL, TRAINING
from megarpt.train.comparison import compare_lines, compare_objects, compare_tensors, tensor_difference
from megarpt.train.sharded import content_hash, read_objects, read_tensor, tensor_names

LINE = {"kind": "train", "step": 3, "data/order": "ab", "train/loss_nats": 2.5, "optim/grad_norm": math.nan, "time/step_s": 1.0}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, one_rank: Any) -> Write:
    """A checkpoint's two folders, small; changes by name."""

    def make(name: str, weight: torch.Tensor | None = None, moment: float = 0.5, **state: Any) -> Path:
        values = torch.arange(6, dtype=torch.float32).reshape(2, 3) if weight is None else weight
        parts = {
            MODEL: {"w": sharded("w", values), "bias": sharded("bias", torch.zeros(1))},
            TRAINING: {
                "m": sharded("optimizer.m", torch.full((2, 3), moment)),
                "rng": dist_checkpointing.mapping.ShardedObject("rng", state.pop("rng", {"cpu": [1, 2]}), (1,), (0,)),
                "state": {"restarts": 0, "progress": {"step": 4}, "loss": math.nan} | state,
            },
        }
        for part, content in parts.items():
            write_sharded(content, tmp_path / name / part)
        return tmp_path / name

    return make


def sharded(key: str, tensor: torch.Tensor) -> dist_checkpointing.ShardedTensor:
    return dist_checkpointing.ShardedTensor.from_rank_offsets(key, tensor)


def test_equal_checkpoints(write: Write, cpu_runtime: Runtime) -> None:
    one, other = write("one"), write("other", restarts=1)
    seen: list[None] = []
    tensors = compare_tensors("parameters", one / MODEL, other / MODEL, lambda: seen.append(None))
    assert (tensors.count, tensors.num_bytes, tensors.difference, len(seen)) == (2, 28, None, 2)
    objects = compare_objects("state", one, other)
    assert (objects.difference, objects.num_bytes) == (None, None) and objects.count >= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.tensor([[0.0, 1, 2], [3, 4, 5.5]])}, r"w\[1, 2\]: 5.0 and 5.5 (1 of 6 values differ)"),
        ({"weight": torch.tensor([[-0.0, 1, 2], [3, 4, 5]])}, "w[0, 0]: 0.0 and -0.0 (1 of 6 values differ)"),
        ({"weight": torch.zeros(2, 3, dtype=torch.bfloat16)}, "w: torch.float32 (2, 3) and torch.bfloat16 (2, 3)"),
        ({"moment": 0.25}, "optimizer.m[0, 0]: 0.5 and 0.25 (6 of 6 values differ)"),
        ({"rng": {"cpu": [1, 3]}}, "rng/shard_0_1[0].cpu[1]: 2 and 3"),
        ({"progress": {"step": 5}}, "state.progress.step: 4 and 5"),
        ({"skipped": 1}, "state.skipped: only in the second"),
    ],
)
def test_what_differs_is_named(write: Write, cpu_runtime: Runtime, changes: dict[str, Any], message: str) -> None:
    one, other = write("one"), write("other", **changes)
    found = [
        compare_tensors("parameters", one / MODEL, other / MODEL).difference,
        compare_tensors("optimizer state", one / TRAINING, other / TRAINING).difference,
        compare_objects("state", one, other).difference,
    ]
    assert [text for text in found if text is not None] == [message.replace("\\", "")]


def test_a_tensor_that_only_one_side_has(write: Write, cpu_runtime: Runtime) -> None:
    one = write("one")
    found = compare_tensors("all", one / MODEL, one / TRAINING)
    assert found.difference == f"bias: only in {one / MODEL}"


def test_reading_one_entry_at_a_time(write: Write, cpu_runtime: Runtime) -> None:
    one = write("one")
    assert tensor_names(one / MODEL) == ["bias", "w"]
    assert read_tensor(one / MODEL, "w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_objects(one / TRAINING)["rng/shard_0_1"] == [{"cpu": [1, 2]}]
    assert content_hash(one / MODEL, 10) == content_hash(write("other") / MODEL, 10)
    assert content_hash(one / MODEL, 10) != content_hash(one / TRAINING, 10)


@pytest.mark.parametrize("value", [float("nan"), True, 3, 2.0])
def test_tensors_of_any_kind_equal_themselves(value: Any) -> None:
    for shape in ((), (0,), (2, 3)):
        tensor = torch.full(shape, value)
        assert tensor_difference("t", tensor, tensor.clone()) is None
    assert tensor_difference("t", torch.tensor(value), torch.tensor(type(value)(0))) is not None


def test_lines_without_what_the_machine_decides() -> None:
    line = {**LINE, "time/step_s": 2.0, "sys/restarts": 1.0}
    assert compare_lines("lines", [LINE, LINE], [line, line]).difference is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train/loss_nats": 2.5000000000000004}, "train/loss_nats: 2.5 and 2.5000000000000004"),
        ({"data/order": "ac"}, "data/order: 'ab' and 'ac'"),
        ({"optim/grad_norm": 1.0}, "optim/grad_norm: nan and 1.0"),
        ({"new": 1.0}, "new: only in the second"),
    ],
)
def test_the_first_line_that_differs_is_named(change: dict[str, Any], message: str) -> None:
    found = compare_lines("lines", [LINE, {**LINE, "step": 4}], [LINE, {**LINE, "step": 4, **change}])
    assert found.difference == f"step 4, train line: {message}"


def test_a_line_that_only_one_side_has_is_named() -> None:
    assert compare_lines("lines", [LINE, {**LINE, "step": 4}], [LINE]).difference == "step 4, train line: only in the first"
    assert compare_lines("lines", [], [LINE]).difference == "step 3, train line: only in the second"
