"""A run without its loop: a small model that can be trained, saved and loaded step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarpt.config.schema import PretrainConfig
from megarpt.device.runtime import Runtime
from megarpt.model.build import build_model, unwrap
from megarpt.objectives.build import build_objective
from megarpt.parallel.layout import ParallelLayout
from megarpt.structs import StepReport
from megarpt.testing.batches import random_batch
from megarpt.testing.configs import tiny_config
from megarpt.train.checkpoint import CheckpointManager
from megarpt.train.optimizer import build_optimizer
from megarpt.train.state import TrainState
from megarpt.train.step import TrainStep

VOCAB, B, S = 300, 2, 16
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}
TOKENIZER = "ab" * 32


@dataclass
class TinyRun:
    """One rank; everything a checkpoint is made of."""

    cfg: PretrainConfig
    model: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    step: TrainStep
    checkpoints: CheckpointManager
    state: TrainState = field(default_factory=lambda: TrainState(data={"consumed_samples": 0}))

    def train(self, until: int) -> list[StepReport]:
        """The reports of the steps up to `until`."""
        reports = []
        while self.state.progress.step < until:
            reports.append(self.step([random_batch(B, S, VOCAB, seed=self.state.progress.step)], self.state.progress))
            self.state = self.state.after_step(reports[-1], samples=B, tokens_seen=B * S)
        return reports

    def begin_save(self) -> None:
        """Return when training may go on."""
        self.checkpoints.save(self.state, self.model, self.optimizer, self.scheduler)

    def save(self) -> Path:
        """Return a complete checkpoint."""
        self.begin_save()
        self.checkpoints.finish()
        assert self.checkpoints.newest is not None
        return self.checkpoints.newest

    def load(self) -> TrainState | None:
        """Continue from the newest checkpoint."""
        loaded = self.checkpoints.load_latest(self.model, self.optimizer, self.scheduler)
        self.state = loaded or self.state
        return loaded

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters."""
        return {name: p.detach().clone() for name, p in unwrap(self.model[0]).named_parameters()}

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors themselves, fp32 masters and step counts included."""
        found: dict[str, torch.Tensor] = {}
        for part in self.optimizer.chained_optimizers:
            parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
            for i, parameter in enumerate(parameters):
                state = part.optimizer.state[parameter]
                found |= {f"{i}.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
                found[f"{i}.master"] = parameter.detach()
        return found


def tiny_run(
    folder: Path, runtime: Runtime, *, seed: int, vocab: int = VOCAB, tokenizer: str = TOKENIZER, **overrides: Any
) -> TinyRun:
    """A freshly built run with checkpoints in `folder/checkpoints`; overrides by dotted key."""
    base = {"model.mcore": SMALL, "data.seq_length": S, "run.dir": str(folder), "optimizer.lr": 1e-2}
    cfg = tiny_config(**base | overrides)
    layout = ParallelLayout()
    groups = layout.initialize(seed)
    torch.manual_seed(seed)
    chunks = build_model(cfg, layout, groups, runtime, vocab_size=vocab)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, chunks, groups)
    step = TrainStep(chunks, build_objective(cfg.objective, 1), optimizer, scheduler, groups)
    checkpoints = CheckpointManager(folder / "checkpoints", cfg, tokenizer_sha256=tokenizer, runtime=runtime, groups=groups)
    return TinyRun(cfg, list(chunks), optimizer, scheduler, step, checkpoints)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal names and bits."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
