"""Selections that need more than one run to be seen: other models as the reference, and what is carried from step to step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarpt.config.schema import PretrainConfig, ScoreOptions
from megarpt.device.runtime import Runtime
from megarpt.run import score
from megarpt.testing.configs import TWO_LAYERS
from megarpt.train.reports import comparable
from megarpt.train.weights import checkpoint_hash

STEP_TOKENS, STEPS = 8 * 64, 8
LR = 1e-4  # slow: where losses fall faster than they differ among tokens, the threshold of the step before is out of date
WEAKER = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 48}
SEVERAL = {"batch": {"micro_batch_size": 2, "global_batch_size": 8}, "logging": {"tensorboard": False}}
EXCESS = {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": 0.6}
SELF = {
    "scorer": "reference_loss",
    "weighting": "top_fraction",
    "fraction": 0.7,
    "second": {"scorer": "reference_entropy", "fraction": 0.7},
}

MakeConfig = Callable[..., PretrainConfig]
Train = Callable[[PretrainConfig], list[dict[str, Any]]]


@pytest.fixture
def weaker(make_config: MakeConfig, train: Train, cpu_runtime: Runtime, tmp_path: Path) -> PretrainConfig:
    """A reference model with a quarter of the student's width, trained on the student's corpus, which it has scored."""
    cfg = make_config(
        **{"run.dir": str(tmp_path / "weaker"), "model.mcore": WEAKER, "train.train_tokens": 6 * STEP_TOKENS}, **SEVERAL
    )
    train(cfg)
    options = ScoreOptions(
        reference=cfg.run.dir,
        corpus=cfg.data.train[0].path,
        output_prefix=str(tmp_path / "side"),
        streams=("ref_nll", "ref_entropy"),
    )
    assert score.run(options, cpu_runtime) == 0
    return cfg


def test_a_weaker_reference_selects_the_same_online_and_from_sidecars(
    make_config: MakeConfig, train: Train, tmp_path: Path, weaker: PretrainConfig
) -> None:
    """Each model is built as its own checkpoint says; only the tokenizer is common."""
    sidecars = {stream: str(tmp_path / f"side_{stream}") for stream in ("ref_nll", "ref_entropy")}
    source = {"path": weaker.data.train[0].path, "streams": sidecars}
    shares = {}
    for name, objective in {
        "excess": EXCESS,
        "intersection": SELF,
        "union": SELF | {"combine": "union"},
    }.items():
        common = {"train.train_tokens": 3 * STEP_TOKENS, "model.mcore": TWO_LAYERS, **SEVERAL}
        offline = make_config(
            **{"run.dir": str(tmp_path / f"{name}-off"), "data.train": [source], "objective": objective}, **common
        )
        online = make_config(
            **{
                "run.dir": str(tmp_path / f"{name}-on"),
                "objective": objective | {"reference": {"checkpoint": weaker.run.dir}},
            },
            **common,
        )
        for a, b in zip(train(offline), train(online), strict=True):
            a, b = comparable(a), comparable(b)
            assert a.keys() == b.keys()
            for key in a.keys() - {"kind", "data/order"}:
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), (name, key)
        shares[name] = {tag: value for tag, value in a.items() if tag.startswith("select/kept_fraction")}
    sets = {f"select/kept_fraction/set_{i}": pytest.approx(0.7, abs=2e-3) for i in (0, 1)}
    low, high = (shares[name].pop("select/kept_fraction") for name in ("intersection", "union"))
    assert shares["intersection"] == shares["union"] == sets
    assert 0.4 <= low < 0.7 < high <= 1.0 and low + high == pytest.approx(1.4, abs=4e-3)


def test_a_lagged_run_in_two_attempts_is_one_in_one(
    make_config: MakeConfig, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def cfg(name: str, steps: int) -> PretrainConfig:
        schedule = {"lr": LR, "min_lr": LR, "lr_decay_style": "constant"}
        selection = {"scorer": "loss", "weighting": "top_fraction", "fraction": 0.6, "scope": "lagged_global_batch"}
        changes = {"run.dir": str(tmp_path / name), "train.train_tokens": steps * STEP_TOKENS, "optimizer": schedule}
        return make_config(**changes, **SEVERAL, objective=selection)

    caplog.set_level(logging.INFO, logger="megarpt")
    straight = train(cfg("straight", STEPS))
    first = [record.getMessage() for record in caplog.records if "lagged_global_batch" in record.getMessage()]
    assert len(first) == 1 and "no threshold of a step before; in step 1 " in first[0]

    train(cfg("parts", STEPS // 2))
    caplog.clear()
    parts = train(cfg("parts", STEPS))
    assert not [record for record in caplog.records if "lagged_global_batch" in record.getMessage()]
    assert [comparable(line) for line in parts] == [comparable(line) for line in straight]
    assert checkpoint_hash(cfg("parts", STEPS).run.dir) == checkpoint_hash(cfg("straight", STEPS).run.dir)

    for line in straight[1:]:
        assert abs(line["select/kept_fraction"] - 0.6) < 0.15
        assert line["select/overlap_with_exact"] > 0.8
    assert min(line["select/jaccard_with_exact"] for line in straight[1:]) < 1.0
