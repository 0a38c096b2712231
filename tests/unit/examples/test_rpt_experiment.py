"""The experiment compares what it says it compares, and reports what its runs wrote."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megarpt.cli import COMMANDS
from megarpt.config.load import load_config
from megarpt.config.schema import RLConfig, TrainingConfig
from megarpt.errors import DataError

EXAMPLES = Path(__file__).parents[3] / "examples"
for folder in ("demo", "rpt"):
    sys.path.insert(0, str(EXAMPLES / folder))

experiment = importlib.import_module("rpt_experiment")
results = importlib.import_module("rpt_results")

BANDS = {"easy": 20, "medium": 30, "hard": 50, "all": 100}


# The stages.


def write_metrics(run: Path, lines: list[dict[str, Any]]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = max((line["tokens/seen"] for line in lines), default=0)
    (run / "exit.json").write_text(json.dumps({"tokens_seen": seen}))


def pretrain_lines(tokens: int) -> list[dict[str, Any]]:
    """Ten steps, half a second each; the first line is half a second late."""
    return [
        {"kind": "train", "step": step, "tokens/seen": tokens * step // 10, "time/elapsed_s": 0.5 + 0.5 * step}
        for step in range(1, 11)
    ]


def rl_lines(steps: int = 20, reward: float = 0.1, growth: float = 0.04) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        value = reward + growth * step
        common = {"step": step, "tokens/seen": 3000 * step, "tokens/trained": 1000 * step}
        if step:
            train = {
                "rl/reward_mean": value,
                "rl/length_mean_tokens": 20.0,
                "rl/sampled_tokens": 900.0,
                "time/iteration_s": 2.0,
            }
            lines.append({"kind": "train", **common, **train})
        if step % 2 == 0:
            bands = {f"valid/heldout/band/{band}/accuracy": value for band in ("easy", "medium", "hard")}
            lines.append({"kind": "valid", **common, "valid/heldout/reward_mean": value, **bands})
    return lines


@pytest.fixture(params=sorted(experiment.SCALES))
def stages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """All of a seed whose reinforcement took 20,000 tokens and 40 seconds, where the base model read 1,000 tokens a second."""
    monkeypatch.chdir(experiment.ROOT)
    write_metrics(tmp_path / "base", pretrain_lines(5000))
    write_metrics(tmp_path / "rpt", rl_lines())
    before = experiment.build_stages(tmp_path, 2, experiment.SCALES[request.param], "cpu")
    return experiment.build_comparison(tmp_path, 2, "cpu", before)


@pytest.fixture
def configs(stages: list[Any]) -> dict[str, TrainingConfig]:
    return {
        stage.name: load_config(command.argv[2], command.argv[3:], kind=COMMANDS[command.argv[1]])
        for stage in stages
        for command in stage.commands
        if command.argv[0] == "megarpt" and command.argv[1] in COMMANDS
    }


def test_every_stage_needs_only_earlier_ones(stages: list[Any]) -> None:
    seen: set[str] = set()
    for stage in stages:
        assert set(stage.needs) <= seen and stage.name not in seen
        assert all(path.exists() for path in stage.files)
        seen.add(stage.name)


def test_every_run_is_a_valid_configuration_with_the_seed(configs: dict[str, TrainingConfig]) -> None:
    assert set(configs) == {"base", "sft", "rpt", "continued_tokens", "continued_time"}
    assert {config.run.seed for config in configs.values()} == {2}
    assert {config.data.tokenizer for config in configs.values()} == {"bytes"}
    assert len({json.dumps(config.model.mcore, sort_keys=True) for config in configs.values()}) == 1


def test_reinforcement_starts_from_the_warm_start_and_its_rivals_from_the_base(
    configs: dict[str, TrainingConfig], tmp_path: Path
) -> None:
    starts = {name: config.model.init_from for name, config in configs.items()}
    base = str(tmp_path / "base")
    assert starts == {
        "base": None,
        "sft": base,
        "rpt": str(tmp_path / "sft"),
        "continued_tokens": base,
        "continued_time": base,
    }


def test_the_rivals_get_the_tokens_and_the_time_of_reinforcement(configs: dict[str, Any]) -> None:
    assert configs["continued_tokens"].train.train_tokens == 20_000
    assert configs["continued_time"].train.train_tokens == 40_000


def test_reinforcement_is_on_policy_with_the_reward_of_the_text_alone(configs: dict[str, Any]) -> None:
    config = configs["rpt"]
    assert isinstance(config, RLConfig)
    assert [verifier.kind for verifier in config.verifiers] == ["next_token"]
    assert config.objective.updates_per_rollout == 1 and config.objective.kl_coef == 0.0
    assert config.rollout.group_size == 8 and config.logging.interval_steps == 1
    assert config.data.max_prompt_tokens + config.rollout.max_new_tokens <= config.data.seq_length


def test_prompts_for_training_and_for_validation_are_mined_from_different_parts(stages: list[Any], tmp_path: Path) -> None:
    [mine] = [stage for stage in stages if stage.name == "mine"]
    corpora = [command.argv[command.argv.index("--corpus") + 1] for command in mine.commands]
    assert corpora == [str(tmp_path / "data" / part) for part in ("rpt", "heldout")]


def test_another_seed_does_not_touch_what_the_others_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(experiment.ROOT)
    stage = experiment.one_stage(Path("runs/x"), 2, ("--device", "cpu"))
    assert stage.outputs == () and stage.side_by_side  # a stage that is started anew removes its outputs
    assert [command.argv[4:6] for command in stage.commands] == [("--seed", "1"), ("--seed", "2")]


# The report.


def write_seed(out: Path, seed: int, *, status: str = "finished", **more: Any) -> Path:
    folder = out / f"seed{seed}"
    for model in ("base", "sft", "continued_tokens", "continued_time"):
        write_metrics(folder / model, pretrain_lines(5000))
    write_metrics(folder / "rpt", rl_lines(**more))
    (folder / "results").mkdir()
    (folder / "stages").mkdir()
    modes = {"base": ["plain"], "sft": ["plain", "greedy"], "rpt": ["plain", "greedy"]}
    modes |= {"continued_tokens": ["plain"], "continued_time": ["plain"]}
    for model, names in modes.items():
        found = {
            mode: {band: {"questions": count, "accuracy": (0.9 if (model, mode) == ("rpt", "greedy") else 0.2) + seed / 100}
                   for band, count in BANDS.items()}
            for mode in names
        }  # fmt: skip
        content = {"checkpoint": "x", "questions": {"heldout": {"file": "y", "results": found}}}
        (folder / "results" / f"{model}.json").write_text(json.dumps(content))
    (folder / "stages" / "rpt.json").write_text(json.dumps({"finished": "key", "seconds": 50.0}))
    (folder / "stages" / "evaluate.json").write_text(json.dumps({status: "key", "seconds": 10.0}))
    return folder


def test_what_reinforcement_took(tmp_path: Path) -> None:
    write_metrics(tmp_path, rl_lines())
    assert results.spent_by(tmp_path) == results.Spent(20_000, 60_000, 18_000, 40.0)


def test_steps_that_are_missing_in_the_log_are_noticed(tmp_path: Path) -> None:
    write_metrics(tmp_path, [line for line in rl_lines() if line["step"] != 3])
    with pytest.raises(DataError, match="19 steps are logged"):
        results.spent_by(tmp_path)


def test_speed_is_that_between_two_lines(tmp_path: Path) -> None:
    write_metrics(tmp_path, pretrain_lines(5000))
    assert results.tokens_per_second(tmp_path) == pytest.approx(1000.0)
    write_metrics(tmp_path, pretrain_lines(5000)[:1])
    with pytest.raises(DataError, match="at least 2"):
        results.tokens_per_second(tmp_path)


def test_ends_are_a_tenth_of_the_steps(tmp_path: Path) -> None:
    seed = results.read_seed(write_seed(tmp_path, 1))
    assert seed.growth() == pytest.approx((0.16, 0.88))  # steps 1 and 2, 19 and 20
    assert seed.points[0].reward == pytest.approx(0.1) and seed.points[-1].tokens == 60_000
    assert seed.prompts == BANDS and seed.seconds == {"rpt": 50.0, "evaluate": 10.0}


def test_a_seed_that_is_being_evaluated_is_left_out(tmp_path: Path) -> None:
    write_seed(tmp_path, 1)
    write_seed(tmp_path, 2, status="started")
    assert [seed.seed for seed in results.read_seeds(tmp_path)] == [1]


def test_accuracies_are_spread_over_seeds(tmp_path: Path) -> None:
    write_seed(tmp_path, 1)
    write_seed(tmp_path, 3)
    accuracy = results.write_results(tmp_path)["accuracy"]
    assert list(accuracy) == list(results.ROWS)
    assert accuracy["rpt greedy"]["hard"]["mean"] == pytest.approx(0.92)
    assert accuracy["rpt greedy"]["hard"]["sd"] == pytest.approx(0.02**0.5 / 10)
    assert accuracy["base plain"]["all"]["by_seed"] == pytest.approx({"1": 0.21, "3": 0.23})


def test_the_law_is_found_again() -> None:
    points = [results.Point(step, 1000 * step, 0.9 - 2.0 * (1000 * step) ** -0.5, {}) for step in range(0, 100, 10) if step]
    start = results.Point(0, 0, 0.1, {})
    law = results.law_of([start, *points])
    assert (law.a, law.alpha, law.limit) == pytest.approx((-2.0, 0.5, 0.9), rel=1e-3)
    assert law.r_squared > 0.999
    assert results.law_of(points[:3]) is None
    assert results.law_of(points, "easy") is None


def test_everything_promised_is_written(tmp_path: Path) -> None:
    write_seed(tmp_path, 1)
    write_seed(tmp_path, 2, reward=0.05)
    with (tmp_path / "shown").open("w") as stream:
        results.write(tmp_path, Console(file=stream, width=200))
    text = (tmp_path / "results.md").read_text()
    assert "after RPT, reasoning" in (tmp_path / "shown").read_text()
    assert "| after RPT, reasoning | 91.5 ± 0.7 |" in text
    assert "| 1 | 0.160 | 0.880 | 5.5 | 0.100 | 0.900 | 9.0 | 20.0 to 20.0 | 20,000 | 0.7 |" in text
    assert (tmp_path / "rpt.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "results.json").read_text())["seeds"]) == 2


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    with (tmp_path / "shown").open("w") as stream:
        results.write(tmp_path, Console(file=stream))
    assert "No seed" in (tmp_path / "shown").read_text()
