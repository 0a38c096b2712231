"""`megarpt rl` draws, rewards and trains alike under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarpt.config.schema import RLConfig
from megarpt.device import runtime
from megarpt.run import rl
from megarpt.testing.distributed import spawn
from megarpt.testing.policy import policy_config, write_policy, write_questions
from megarpt.train.metrics_file import read_metrics

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sp-dp2-zero": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "kl": {"objective.kl_coef": 0.05, "objective.kl_in": "reward"},
    "off policy, dynamic": {
        "objective.updates_per_rollout": 2,
        "objective.reduction": "rollout",
        "objective.dynamic_sampling": {"max_rounds": 4},
        "verifiers": [{"kind": "format", "pattern": r"(?s)[\x00-\x1f].*"}],
    },
}
SAME = ("rl/reward_mean", "rl/reward_std", "rl/dead_groups", "rl/completions", "rl/sampled_tokens", "tokens/trained")
CLOSE = ("train/loss_nats", "policy/loss", "policy/entropy_nats", "optim/grad_norm")


def build(folder: str) -> None:
    machine = runtime.start("cpu")
    write_policy(Path(folder) / "policy", machine)
    write_questions(Path(folder) / "questions.jsonl")
    machine.close()


def train(tree: dict[str, Any]) -> None:
    machine = runtime.start("cpu")
    assert rl.run(RLConfig.model_validate(tree), machine) == 0
    machine.close()


def first_steps(cfg: RLConfig) -> list[dict[str, Any]]:
    return list(read_metrics(Path(cfg.run.dir) / "metrics.jsonl", "train"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rl")
    spawn(1, build, str(made))
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What one process makes of every kind."""
    found = {}
    for kind, settings in KINDS.items():
        cfg = configuration(folder, f"{kind} alone", settings, {})
        spawn(1, train, cfg.model_dump())
        found[kind] = first_steps(cfg)
    return found


def configuration(folder: Path, run: str, settings: dict[str, Any], parallel: dict[str, Any]) -> RLConfig:
    shared = {"train.train_steps": 2, "parallel": parallel, "evaluation.interval_steps": 0}
    return policy_config(folder / run, folder / "policy", folder / "questions.jsonl", **settings, **shared)


def held_out(run: str) -> list[float]:
    return [line["valid/same/reward_mean"] for line in read_metrics(Path(run) / "metrics.jsonl", "valid")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_gives_what_one_process_gives(
    kind: str, layout: str, folder: Path, alone: dict[str, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    cfg = configuration(folder, f"{kind} {layout}", KINDS[kind], parallel)
    spawn(world_size, train, cfg.model_dump())
    for line, expected in zip(first_steps(cfg), alone[kind], strict=True):
        assert {tag: line[tag] for tag in SAME} == {tag: expected[tag] for tag in SAME}
        for tag in CLOSE:
            assert line[tag] == pytest.approx(expected[tag], rel=2e-4, abs=2e-6), tag
        assert line["policy/sampler_gap_max_nats"] < 1e-4 if "policy/sampler_gap_max_nats" in line else kind != "kl"
    assert held_out(cfg.run.dir) == held_out(str(folder / f"{kind} alone"))
