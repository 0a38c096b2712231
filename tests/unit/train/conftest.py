"""Records that the tests of what a run writes have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megarpt.config.load import config_from_dict
from megarpt.config.schema import PretrainConfig
from megarpt.device.runtime import Runtime
from megarpt.objectives.base import ObjectiveOutput
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import Progress, StepReport, TokenBatch
from megarpt.testing.tiny_run import TinyRun, tiny_run

MakeConfig = Callable[..., PretrainConfig]
TokenWork = tuple[TokenBatch, ObjectiveOutput]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """A small valid configuration in `tmp_path/run`; keyword `section={...}` merges into a section."""

    def make(**sections: dict[str, Any]) -> PretrainConfig:
        data: dict[str, Any] = {
            "run": {"dir": str(tmp_path / "run")},
            "data": {"tokenizer": "bytes", "train": [{"path": "mix"}], "valid": {"clean": "clean"}, "seq_length": 8},
            "train": {"train_tokens": 6400},
        }
        for name, values in sections.items():
            data[name] = {**data.get(name, {}), **values}
        return config_from_dict(data)

    return make


@pytest.fixture
def make_run(tmp_path: Path, cpu_runtime: Runtime, one_rank: ProcessGroups) -> Callable[..., TinyRun]:
    """A freshly built run in `tmp_path/checkpoints`; every one begins with other random states and other weights."""
    seeds = iter(range(100))

    def make(seed: int | None = None, **options: Any) -> TinyRun:
        return tiny_run(tmp_path, cpu_runtime, seed=next(seeds) if seed is None else seed, **options)

    return make


@pytest.fixture
def progress_at() -> Callable[[int], Progress]:
    return lambda step: Progress(step=step, samples=8 * step, tokens_seen=64 * step, tokens_trained=38 * step)


@pytest.fixture
def report_at() -> Callable[[int], StepReport]:
    """A step report that depends on the step alone."""

    def make(step: int, skipped: bool = False) -> StepReport:
        return StepReport(
            loss_nats=float("nan") if skipped else 5.0 / step,
            grad_norm=1.0 / step,
            learning_rate=1e-3,
            num_tokens=38,
            skipped=skipped,
            metrics={"select/kept_fraction": 0.6, "aux": 0.1 * step},
        )

    return make


@pytest.fixture
def token_work() -> TokenWork:
    """Two sequences of six bytes; the last position of each is no label, the best four labels of each are kept."""
    text = [list(b"The cat"), list(b"a <b>*d")]
    tokens = torch.tensor([row[:-1] for row in text])
    labels = torch.tensor([row[1:] for row in text])
    loss_mask = torch.ones(2, 6, dtype=torch.bool)
    loss_mask[:, -1] = False
    token_loss = torch.arange(12, dtype=torch.float32).reshape(2, 6) / 4.0
    weight = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    batch = TokenBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=torch.arange(6).repeat(2, 1),
        cu_seqlens=torch.tensor([0, 6, 12], dtype=torch.int32),
        sample_id=torch.tensor([7, 9]),
        source_id=torch.tensor([0, 1]),
        sample_index=torch.tensor([40, 41]),
        streams={"ref_nll": torch.full((2, 6), 1.0)},
    )
    output = ObjectiveOutput(
        loss_sum=(token_loss * weight).sum(),
        num_tokens=torch.tensor(6, dtype=torch.int32),
        metrics={},
        token_loss=token_loss,
        weight=weight,
        scores=(token_loss - 1.0,),
    )
    return batch, output


@pytest.fixture
def decode_bytes() -> Callable[[Any], str]:
    return lambda ids: bytes(ids).decode("utf-8", errors="replace")
