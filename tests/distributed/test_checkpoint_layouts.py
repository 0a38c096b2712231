"""Checkpoints of several ranks: bit-exact under the same layout, loadable under another, failing on all ranks together."""

from __future__ import annotations

import random
import re
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from megarpt.config.schema import ParallelConfig
from megarpt.device import runtime
from megarpt.errors import CheckpointError
from megarpt.model.build import build_model
from megarpt.objectives.build import build_objective
from megarpt.parallel.layout import ParallelLayout
from megarpt.structs import Progress
from megarpt.testing.batches import random_batch
from megarpt.testing.configs import tiny_config
from megarpt.testing.distributed import spawn
from megarpt.train.checkpoint import CheckpointManager
from megarpt.train.checkpoint_files import check_files, list_checkpoints, read_manifest, resolve_checkpoint
from megarpt.train.optimizer import build_optimizer
from megarpt.train.sharded import content_hash
from megarpt.train.state import TrainState
from megarpt.train.step import TrainStep
from megarpt.train.weights import checkpoint_hash

VOCAB, S, SAMPLES = 300, 16, 4
SMALL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}
ONE: dict[str, Any] = {}
TP: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP: dict[str, Any] = {"pipeline_model_parallel_size": 2}
VPP: dict[str, Any] = {**PP, "virtual_pipeline_model_parallel_size": 2}
CP: dict[str, Any] = {"context_parallel_size": 2}
EP: dict[str, Any] = {"expert_model_parallel_size": 2}
ZERO: dict[str, Any] = {"use_distributed_optimizer": True}
OVERLAPPED: dict[str, Any] = {**ZERO, "overlap_grad_reduce": True, "overlap_param_gather": True}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}


def train(folder: str, parallel: dict[str, Any], until: int, save_at: int, settings: dict[str, Any]) -> list[Any]:
    """Continue from what is in the folder; the reports of the steps, or the message of the checkpoint error."""
    started = runtime.start("cpu")
    small = {**SMALL, "hidden_dropout": settings.get("dropout", 0.0), **settings.get("mcore", {})}
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
    chunks = build_model(cfg, layout, groups, started, vocab_size=VOCAB)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, chunks, groups)
    step = TrainStep(chunks, build_objective(cfg.objective, 1), optimizer, scheduler, groups)
    reports = []
    try:
        manager = CheckpointManager(Path(folder), cfg, tokenizer_sha256="ab", runtime=started, groups=groups)
        state = manager.load_latest(chunks, optimizer, scheduler) or TrainState()
        while state.progress.step < until:
            own = range(groups.dp_rank, SAMPLES, groups.dp_size)
            reports.append(
                step([random_batch(SAMPLES, S, VOCAB, state.progress.step, slice(i, i + 1)) for i in own], state.progress)
            )
            state = state.after_step(reports[-1], samples=SAMPLES, tokens_seen=SAMPLES * S)
            if state.progress.step == save_at:
                if settings.get("refuse_rank") == started.rank:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                step.gather_parameters()
                manager.save(state, chunks, optimizer, scheduler)
            manager.poll()
        manager.finish()
    except CheckpointError as error:
        return [str(error)]
    return reports


@pytest.mark.parametrize(
    ("world", "parallel", "settings"),
    [
        (2, ONE, {}),
        (2, ONE, {"precision": "bf16", "dropout": 0.1}),
        (2, TP, {"dropout": 0.1}),
        (2, VPP, {"dropout": 0.1}),
        (2, CP, {}),
        (2, OVERLAPPED, {}),
        (2, {**EP, **ZERO}, {"mcore": EXPERTS}),
        (4, {**TP, **PP, **ZERO}, {"precision": "bf16"}),
        (4, {**PP, **OVERLAPPED}, {"precision": "bf16", "dropout": 0.1}),
    ],
    ids=[
        "dp2",
        "dp2-bf16-dropout",
        "tp2-dropout",
        "pp2-interleaved-dropout",
        "cp2",
        "dp2-zero-overlapped",
        "ep2-zero",
        "tp2-pp2-zero-bf16",
        "pp2-dp2-zero-overlapped-bf16-dropout",
    ],
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


MOVES: dict[str, tuple[tuple[int, dict[str, Any]], tuple[int, dict[str, Any]], dict[str, Any]]] = {
    "tp2 to one": ((2, TP), (1, ONE), {}),
    "one to tp2": ((1, ONE), (2, TP), {}),
    "dp2 to tp2": ((2, ONE), (2, TP), {}),
    "tp2 dp2 to one": ((4, TP), (1, ONE), {}),
    "tp2 to pp2": ((2, TP), (2, PP), {}),
    "pp2 to tp2, bf16": ((2, PP), (2, TP), {"precision": "bf16"}),
    "pp2 interleaved to tp2": ((2, VPP), (2, TP), {}),
    "tp2 to pp2 interleaved": ((2, TP), (2, VPP), {}),
    "cp2 to dp2": ((2, CP), (2, ONE), {}),
    "zero dp2 to zero tp2": ((2, ZERO), (2, {**ZERO, **TP}), {}),
    "zero dp2 to zero tp2 pp2, bf16": ((2, ZERO), (4, {**ZERO, **TP, **PP}), {"precision": "bf16"}),
    "zero tp2 pp2 to zero one": ((4, {**ZERO, **TP, **PP}), (1, ZERO), {}),
    "zero overlapped dp2 to zero pp2 interleaved": ((2, OVERLAPPED), (2, {**ZERO, **VPP}), {}),
    "zero dp2 to plain tp2, bf16": ((2, ZERO), (2, TP), {"precision": "bf16"}),
    "plain tp2 to zero dp2, bf16": ((2, TP), (2, ZERO), {"precision": "bf16"}),
    "zero dp2 to plain one": ((2, ZERO), (1, ONE), {}),
    "plain one to zero dp2": ((1, ONE), (2, ZERO), {}),
    "experts: ep2 to one": ((2, EP), (1, ONE), {"mcore": EXPERTS}),
    "experts: zero one to zero ep2 pp2": ((1, ZERO), (4, {**EP, **PP, **ZERO}), {"mcore": EXPERTS}),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_checkpoint_loads_under_another_layout(tmp_path: Path, move: str) -> None:
    (world, parallel), (other_world, other), settings = MOVES[move]
    straight = spawn(world, train, str(tmp_path), parallel, 4, 2, settings)[0]
    before = checkpoint_hash(tmp_path)
    moved = spawn(other_world, train, str(tmp_path), other, 4, 4, {**settings, "seed": 7})[0]
    tolerance = 1e-5 if settings.get("precision", "fp32") == "fp32" else 1e-2
    for a, b in zip(straight[2:], moved, strict=True):
        assert b.loss_nats == pytest.approx(a.loss_nats, abs=tolerance)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=20 * tolerance)
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
    layout = ParallelLayout()
    groups = layout.initialize(seed=3)
    chunks = build_model(cfg, layout, groups, started, vocab_size=VOCAB)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, chunks, groups)
    managers = [
        CheckpointManager(Path(path), cfg, tokenizer_sha256="ab", runtime=started, groups=groups) for path in (source, target)
    ]
    state = managers[0].load_latest(chunks, optimizer, scheduler)
    assert state is not None
    managers[1].save(state, chunks, optimizer, scheduler)
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


def poll_while_training(folder: str, slow_rank: int, refuse_rank: int) -> list[Any]:
    """One save, then a poll after each of many pauses; what each returned, or the error and after how many it came."""
    started = runtime.start("cpu")
    _, manager, objects = build(folder, started, ONE, {})
    write, collectives = FileSystemWriter.write_data, []

    def hindered(self: FileSystemWriter, *arguments: Any) -> Any:
        time.sleep(0.3 if started.rank == slow_rank else 0.0)
        if started.rank == refuse_rank:
            raise OSError(28, "No space left on device")
        return write(self, *arguments)

    FileSystemWriter.write_data = hindered  # type: ignore[method-assign]
    reduce, gather = dist.all_reduce, dist.all_gather_object
    dist.all_reduce = lambda *a, **k: collectives.append("reduce") or reduce(*a, **k)
    dist.all_gather_object = lambda *a, **k: collectives.append("gather") or gather(*a, **k)
    manager.poll()
    assert collectives == []  # nothing is under way: the ranks do not talk
    manager.save(TrainState(progress=Progress(step=1)), *objects)
    polls = 0
    try:
        while not (saved := manager.poll()):
            polls += 1
            time.sleep(0.01)
    except CheckpointError as error:
        return [polls, str(error)]
    collectives.clear()
    assert manager.poll() == [] and collectives == []
    return [polls, saved[0].path.name]


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_all_ranks_learn_at_the_same_poll_that_a_checkpoint_is_complete(tmp_path: Path, slow_rank: int) -> None:
    first, second = spawn(2, poll_while_training, str(tmp_path), slow_rank, -1)
    assert first == second and first[0] > 0 and first[1] == "step_00000001"
    assert read_manifest(tmp_path / "step_00000001").layout["dp"] == 2


@pytest.mark.parametrize("refuse_rank", [0, 1])
def test_all_ranks_learn_at_the_same_poll_that_a_write_failed(tmp_path: Path, refuse_rank: int) -> None:
    first, second = spawn(2, poll_while_training, str(tmp_path), refuse_rank, refuse_rank)
    assert first[0] == second[0] > 0
    for message in (first[1], second[1]):
        assert f"step_00000001 cannot be written: rank {refuse_rank}: [Errno 28] No space left" in message
    assert list(tmp_path.iterdir()) == []


def train_and_save(folder: str, steps: int, interval: int) -> list[Any]:
    """Up to `steps`, saving in the background."""
    started = runtime.start("cpu")
    cfg, manager, (model, optimizer, scheduler) = build(folder, started, ONE, {"checkpoint.keep_last": 3})
    groups = manager._groups
    step = TrainStep(model, build_objective(cfg.objective, 1), optimizer, scheduler, groups)
    state = manager.load_latest(model, optimizer, scheduler) or TrainState()
    share = SAMPLES // groups.dp_size
    while state.progress.step < steps:
        rows = slice(groups.dp_rank * share, (groups.dp_rank + 1) * share)
        report = step([random_batch(SAMPLES, S, VOCAB, state.progress.step, rows)], state.progress)
        state = state.after_step(report, samples=SAMPLES, tokens_seen=SAMPLES * S)
        if state.progress.step % interval == 0:
            manager.save(state, model, optimizer, scheduler)
        manager.poll()
    manager.finish()
    return [state.progress.step]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments_of_saves_nothing_is_lost(tmp_path: Path, world: int) -> None:
    """All ranks die by SIGKILL; every folder with a final name is whole, and the end is that of an uninterrupted run."""
    folder, straight = tmp_path / "killed", tmp_path / "straight"
    rng, reached, steps = random.Random(world), 0, 0
    for _ in range(4):
        with pytest.raises(RuntimeError, match="did not end within"):
            spawn(world, train_and_save, str(folder), 1 << 30, 1, timeout_s=2.0 + rng.random())
        whole = list_checkpoints(folder)
        for checkpoint in whole:
            manifest = read_manifest(checkpoint)
            assert check_files(checkpoint, manifest, manifest.files) == []
        others = {path.name for path in folder.iterdir()} - {path.name for path in whole}
        assert all(re.fullmatch(r"latest|\.latest\.tmp|step_\d+\.(tmp-\d+|deleting)", name) for name in others), others
        assert not whole or read_manifest(whole[0]).step >= reached
        reached = read_manifest(whole[0]).step if whole else 0
    assert reached > 0
    steps = reached + 2
    assert spawn(world, train_and_save, str(folder), steps, 1) == [[steps]] * world
    assert spawn(world, train_and_save, str(straight), steps, steps) == [[steps]] * world
    assert len(list(folder.iterdir())) == 4  # three checkpoints and `latest`: nothing is left of the killed
    assert checkpoint_hash(folder) == checkpoint_hash(straight)
    states = [content_hash(resolve_checkpoint(path) / "training", 1 << 30) for path in (folder, straight)]
    assert states[0] == states[1]


def build(folder: str, started: runtime.Runtime, parallel: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """Configuration, manager, and (model, optimizer, schedule)."""
    cfg = tiny_config(**{"model.mcore": SMALL, "data.seq_length": S, "parallel": parallel, "optimizer.lr": 1e-2} | overrides)
    layout = ParallelLayout.resolve(ParallelConfig(**parallel), started.world_size)
    groups = layout.initialize(seed=1)
    torch.manual_seed(1)
    model = build_model(cfg, layout, groups, started, vocab_size=VOCAB)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, model, groups)
    manager = CheckpointManager(Path(folder), cfg, tokenizer_sha256="ab", runtime=started, groups=groups)
    return cfg, manager, (model, optimizer, scheduler)
