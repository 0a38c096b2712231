"""Checkpoints of several ranks: bit-exact under the same layout, loadable under another, failing on all ranks together."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from megarpt.config.schema import ParallelConfig
from megarpt.device import runtime
from megarpt.errors import CheckpointError
from megarpt.model.build import build_model
from megarpt.objectives.build import build_objective
from megarpt.parallel.layout import ParallelLayout
from megarpt.structs import TokenBatch
from megarpt.testing.configs import tiny_config
from megarpt.testing.distributed import spawn
from megarpt.train.checkpoint import CheckpointManager
from megarpt.train.checkpoint_files import read_manifest, resolve_checkpoint
from megarpt.train.optimizer import build_optimizer
from megarpt.train.state import TrainState
from megarpt.train.step import TrainStep
from megarpt.train.weights import checkpoint_hash

VOCAB, S, SAMPLES = 300, 16, 4
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}
ONE: dict[str, Any] = {}
TP: dict[str, Any] = {"tensor_model_parallel_size": 2}


def make_batch(step: int, rows: slice) -> TokenBatch:
    tokens = torch.randint(0, VOCAB, (SAMPLES, S + 1), generator=torch.Generator().manual_seed(step))[rows]
    b = len(tokens)
    return TokenBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=torch.ones(b, S, dtype=torch.bool),
        position_ids=torch.arange(S).repeat(b, 1),
        cu_seqlens=torch.arange(0, b * S + 1, S, dtype=torch.int32),
        sample_id=torch.arange(b),
        source_id=torch.zeros(b, dtype=torch.int64),
        sample_index=torch.arange(b),
    )


def train(folder: str, parallel: dict[str, Any], until: int, save_at: int, settings: dict[str, Any]) -> list[Any]:
    """Continue from what is in the folder; the reports of the steps, or the message of the checkpoint error."""
    started = runtime.start("cpu")
    small = {**SMALL, "hidden_dropout": settings.get("dropout", 0.0)}
    cfg = tiny_config(
        **{
            "model": {"preset": "tiny", "mcore": small, "make_vocab_size_divisible_by": 64},  # 320 rows on one rank, 384 on TP2
            "data.seq_length": S,
            "parallel": parallel,
            "train.precision": settings.get("precision", "fp32"),
            "optimizer.lr": 1e-2,
        }
    )
    layout = ParallelLayout.resolve(ParallelConfig(**parallel), started.world_size)
    groups = layout.initialize(seed=1 + settings.get("seed", 0))
    torch.manual_seed(1 + settings.get("seed", 0))
    model = build_model(cfg, layout, groups, started, vocab_size=VOCAB)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, model, groups)
    step = TrainStep(model, build_objective(cfg.objective, 1), optimizer, scheduler, groups, seq_length=S)
    reports = []
    try:
        manager = CheckpointManager(Path(folder), cfg, tokenizer_sha256="ab", runtime=started, groups=groups)
        state = manager.load_latest([model], optimizer, scheduler) or TrainState()
        share = SAMPLES // groups.dp_size
        while state.progress.step < until:
            rows = slice(groups.dp_rank * share, (groups.dp_rank + 1) * share)
            reports.append(step([make_batch(state.progress.step, rows)], state.progress))
            state = state.after_step(reports[-1], samples=SAMPLES, tokens_seen=SAMPLES * S)
            if state.progress.step == save_at:
                if settings.get("refuse_rank") == started.rank:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                manager.save(state, [model], optimizer, scheduler)
            manager.poll()
        manager.finish()
    except CheckpointError as error:
        return [str(error)]
    return reports


@pytest.mark.parametrize(
    ("world", "parallel", "settings"),
    [(2, ONE, {}), (2, ONE, {"precision": "bf16", "dropout": 0.1}), (2, TP, {"dropout": 0.1}), (4, TP, {})],
    ids=["dp2", "dp2-bf16-dropout", "tp2-dropout", "tp2-dp2"],
)
def test_resuming_several_ranks_is_bit_exact(
    tmp_path: Path, world: int, parallel: dict[str, Any], settings: dict[str, Any]
) -> None:
    straight = spawn(world, train, str(tmp_path), parallel, 4, 2, settings)
    resumed = spawn(world, train, str(tmp_path), parallel, 4, 0, {**settings, "seed": 7})
    assert [rank[2:] for rank in straight] == resumed
    assert all(len(rank) == 2 and rank == resumed[0] for rank in resumed)


def test_replicas_share_the_writing(tmp_path: Path) -> None:
    spawn(2, train, str(tmp_path), ONE, 1, 1, {})
    manifest = read_manifest(resolve_checkpoint(tmp_path))
    shards = {name: entry["bytes"] for name, entry in manifest.files.items() if name.endswith(".distcp")}
    assert {name.split("/")[1] for name in shards} == {"__0_0.distcp", "__1_0.distcp"}
    assert max(shards.values()) < 0.8 * sum(shards.values())


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, TP), (1, ONE)), ((1, ONE), (2, TP)), ((2, ONE), (2, TP)), ((4, TP), (1, ONE))],
    ids=["tp2-one", "one-tp2", "dp2-tp2", "tp2dp2-one"],
)
def test_a_checkpoint_loads_under_another_layout(
    tmp_path: Path, first: tuple[int, dict[str, Any]], second: tuple[int, dict[str, Any]]
) -> None:
    straight = spawn(first[0], train, str(tmp_path), first[1], 4, 2, {})[0]
    before = checkpoint_hash(tmp_path)
    moved = spawn(second[0], train, str(tmp_path), second[1], 4, 4, {"seed": 7})[0]
    for a, b in zip(straight[2:], moved, strict=True):
        assert b.loss_nats == pytest.approx(a.loss_nats, abs=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)
        assert b.learning_rate == a.learning_rate
    assert checkpoint_hash(tmp_path) != before


def test_the_hash_of_the_weights_does_not_know_the_layout(tmp_path: Path) -> None:
    spawn(2, train, str(tmp_path), TP, 1, 1, {})
    before = checkpoint_hash(tmp_path)
    spawn(1, resave, str(tmp_path), str(tmp_path / "again"))
    assert checkpoint_hash(tmp_path / "again") == before
    names = [set(read_manifest(resolve_checkpoint(path)).files) for path in (tmp_path, tmp_path / "again")]
    assert names[0] != names[1]


def resave(source: str, target: str) -> None:
    """Write what one rank reads."""
    started = runtime.start("cpu")
    cfg = tiny_config(**{"model": {"preset": "tiny", "mcore": SMALL, "make_vocab_size_divisible_by": 64}, "data.seq_length": S})
    layout = ParallelLayout(tp=1, dp=1)
    groups = layout.initialize(seed=3)
    model = build_model(cfg, layout, groups, started, vocab_size=VOCAB)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, model, groups)
    managers = [
        CheckpointManager(Path(path), cfg, tokenizer_sha256="ab", runtime=started, groups=groups) for path in (source, target)
    ]
    state = managers[0].load_latest([model], optimizer, scheduler)
    assert state is not None
    managers[1].save(state, [model], optimizer, scheduler)
    managers[1].finish()


def test_damage_is_seen_by_all_ranks(tmp_path: Path) -> None:
    spawn(2, train, str(tmp_path), ONE, 1, 1, {})
    shard = resolve_checkpoint(tmp_path) / "training/__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-5])
    for (message,) in spawn(2, train, str(tmp_path), ONE, 2, 0, {}):
        assert f"{shard}: got" in message and "none of the 1 checkpoints is whole" in message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_write_refused_on_one_rank_fails_on_all(tmp_path: Path, rank: int) -> None:
    spawn(2, train, str(tmp_path), ONE, 1, 1, {})
    for (message,) in spawn(2, train, str(tmp_path), ONE, 2, 2, {"refuse_rank": rank}):
        assert "step_00000002 cannot be written" in message and "step_00000001 is intact" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
