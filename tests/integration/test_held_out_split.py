"""Held-out loss of kept-like and dropped-like tokens: the sets are right, belong to the run, and stay."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarpt.config.schema import ScoreOptions
from megarpt.device.runtime import Runtime
from megarpt.errors import DataError, StopRequested
from megarpt.run import pretrain, score
from megarpt.train.checkpoint_files import latest_checkpoint
from megarpt.train.metrics_file import read_metrics
from megarpt.train.reports import comparable
from megarpt.train.signals import StopSignal

FRACTION = 0.6
SELECTION = {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": FRACTION}
EVALUATION = {"interval_steps": 4, "micro_batch_size": 3}
PARTS = ("kept_like", "dropped_like")


@pytest.fixture(scope="module")
def reference(corpora: Path, tmp_path_factory: pytest.TempPathFactory, cpu_runtime: Runtime) -> Path:
    """A folder with a trained reference model and its losses on both corpora."""
    from megarpt.testing.configs import TWO_LAYERS, tiny_config

    folder = tmp_path_factory.mktemp("reference")
    cfg = tiny_config(
        **{
            "run": {"dir": str(folder / "model"), "seed": 7},
            "model.mcore": TWO_LAYERS,
            "data.train": [{"path": str(corpora / "train")}],
            "batch": {"micro_batch_size": 8, "global_batch_size": 8},
            "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
            "train.train_tokens": 30 * 512,
        }
    )
    assert pretrain.run(cfg, cpu_runtime) == 0
    for name in ("train", "held"):
        options = ScoreOptions(reference=cfg.run.dir, corpus=str(corpora / name), output_prefix=str(folder / name))
        assert score.run(options, cpu_runtime) == 0
    return folder


@pytest.fixture
def settings(corpora: Path, reference: Path) -> dict[str, Any]:
    """Of a run that selects by sidecars."""
    return {
        "data.train": [{"path": str(corpora / "train"), "streams": {"ref_nll": str(reference / "train")}}],
        "data.valid": {"held": {"path": str(corpora / "held"), "streams": {"ref_nll": str(reference / "held")}}},
        "objective": SELECTION,
        "evaluation": EVALUATION,
        "checkpoint.interval_steps": 4,
        "logging.tensorboard": False,
    }


def valid_lines(run: str) -> list[dict[str, Any]]:
    return [comparable(line) for line in read_metrics(Path(run) / "metrics.jsonl", "valid")]


def kept_bits(run: str) -> np.ndarray:
    """[windows, s] bool."""
    with np.load(Path(run) / "valid_split" / "held.npz") as content:
        return np.unpackbits(content["kept"], axis=1, bitorder="little").astype(bool)


def test_the_parts_add_up_and_are_those_of_the_first_evaluation(
    make_config, train, settings: dict[str, Any], reference: Path, cpu_runtime: Runtime, tmp_path: Path
) -> None:
    cfg = make_config(**settings)
    train(cfg)
    lines = valid_lines(cfg.run.dir)
    assert [line["step"] for line in lines] == [0, 4, 8, 12]
    sizes = {tuple(line[f"valid/held/{part}_tokens"] for part in PARTS) for line in lines}
    assert len(sizes) == 1
    ((kept, dropped),) = sizes
    for line in lines:
        assert kept + dropped == line["valid/held/tokens"] and kept == np.floor(FRACTION * (kept + dropped) + 0.5)
        assert line["valid/held/split_step"] == 0.0
        for name in ("loss_nats", "top1"):
            sums = kept * line[f"valid/held/kept_like_{name}"] + dropped * line[f"valid/held/dropped_like_{name}"]
            assert sums / (kept + dropped) == pytest.approx(line[f"valid/held/{name}"], rel=1e-12)
    # The same choice from files: the untrained model's losses minus the reference's, sorted.
    start = make_config(
        **{
            "run.dir": str(tmp_path / "start"),
            "train.train_tokens": 512,
            "optimizer.lr": 1e-30,
            "optimizer.min_lr": 0.0,
            "optimizer.lr_warmup_tokens": 0,
        }
    )
    train(start)
    options = ScoreOptions(reference=start.run.dir, corpus=start.data.valid["held"].path, output_prefix=str(tmp_path / "own"))
    assert score.run(options, cpu_runtime) == 0
    own, ref = (np.fromfile(f"{path}.bin", dtype=np.float32)[1:] for path in (tmp_path / "own", reference / "held"))
    excess = own - ref
    valid = np.isfinite(excess)
    best = np.argsort(np.where(valid, -excess, np.inf), kind="stable")[: int(kept)]
    expected = np.zeros(len(excess), dtype=bool)
    expected[best] = True
    assert (kept_bits(cfg.run.dir).flatten()[: len(excess)] != expected).sum() <= 2  # rounding at the threshold


def test_online_reference_and_sidecar_split_alike(
    make_config, train, settings: dict[str, Any], corpora: Path, reference: Path, tmp_path: Path
) -> None:
    offline = make_config(**settings)
    online = make_config(
        **settings
        | {
            "run.dir": str(tmp_path / "online"),
            "data.train": [{"path": str(corpora / "train")}],
            "data.valid": {"held": str(corpora / "held")},
            "objective": SELECTION | {"reference": {"checkpoint": str(reference / "model")}},
        }
    )
    train(offline)
    train(online)
    for a, b in zip(valid_lines(offline.run.dir), valid_lines(online.run.dir), strict=True):
        assert a.keys() == b.keys() and a["valid/held/kept_like_tokens"] == b["valid/held/kept_like_tokens"]
        for tag in (tag for tag in a if tag.endswith(("_nats", "_top1"))):
            assert a[tag] == pytest.approx(b[tag], rel=1e-3), tag


def test_a_baseline_is_split_by_the_rule_of_the_run_it_is_compared_with(
    make_config, train, settings: dict[str, Any], corpora: Path, tmp_path: Path
) -> None:
    selecting = make_config(**settings)
    baseline = make_config(
        **settings
        | {
            "run.dir": str(tmp_path / "clm"),
            "data.train": [{"path": str(corpora / "train")}],
            "objective": {},
            "evaluation": EVALUATION | {"split_fraction": FRACTION},
        }
    )
    train(selecting)
    train(baseline)
    a, b = (valid_lines(cfg.run.dir) for cfg in (selecting, baseline))
    assert a[0] | {"data/order": ""} == b[0] | {"data/order": ""}  # the same initialization, the same sets
    assert np.array_equal(kept_bits(selecting.run.dir), kept_bits(baseline.run.dir))
    assert a[-1]["valid/held/kept_like_loss_nats"] != b[-1]["valid/held/kept_like_loss_nats"]


@pytest.mark.parametrize("objective", [{}, SELECTION | {"scorer": "loss"}])
def test_without_a_reference_there_is_no_split(make_config, train, objective: dict[str, Any]) -> None:
    cfg = make_config(**{"objective": objective})
    train(cfg)
    assert not any("_like" in tag or "split" in tag for line in valid_lines(cfg.run.dir) for tag in line)
    assert not (Path(cfg.run.dir) / "valid_split").exists()


@pytest.mark.parametrize(
    "where", ["in the evaluation after step 0", "at step 3", "in the evaluation after step 4", "at step 7"]
)
def test_a_resumed_run_keeps_its_sets(
    make_config,
    train,
    settings: dict[str, Any],
    cpu_runtime: Runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    straight, cfg = make_config(**settings, **{"run.dir": str(tmp_path / "straight")}), make_config(**settings)
    train(straight)
    check = StopSignal.check

    def stop_there(self: StopSignal, place: str) -> None:
        if place == where:
            self._received = signal.SIGUSR1
        check(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "check", stop_there)
        with pytest.raises(StopRequested, match=where):
            pretrain.run(cfg, cpu_runtime)
    train(cfg)
    assert valid_lines(cfg.run.dir) == valid_lines(straight.run.dir)
    assert np.array_equal(kept_bits(cfg.run.dir), kept_bits(straight.run.dir))


def test_lost_sets_are_chosen_anew_and_say_when(make_config, train, settings: dict[str, Any]) -> None:
    settings = settings | {"optimizer.lr_decay_tokens": 12 * 512}
    cfg = make_config(**settings)
    train(cfg)
    (Path(cfg.run.dir) / "valid_split" / "held.npz").unlink()
    train(make_config(**settings | {"train.train_tokens": 16 * 512}))
    assert [line["valid/held/split_step"] for line in valid_lines(cfg.run.dir)] == [0.0, 0.0, 0.0, 0.0, 16.0]


def test_sets_of_another_rule_are_not_taken(
    make_config, train, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings | {"optimizer.lr_decay_tokens": 12 * 512}
    cfg = make_config(**settings)
    train(cfg)
    longer = settings | {"train.train_tokens": 16 * 512, "evaluation": EVALUATION | {"split_fraction": 0.3}}
    with caplog.at_level(logging.WARNING):
        train(make_config(**longer))
    assert "chosen anew, because these changed: fraction" in caplog.text
    last = valid_lines(cfg.run.dir)[-1]
    assert last["valid/held/split_step"] == 16.0
    assert last["valid/held/kept_like_tokens"] == pytest.approx(0.3 * last["valid/held/tokens"], abs=1)


def test_a_new_run_in_an_old_folder_chooses_its_own(make_config, train, settings: dict[str, Any], tmp_path: Path) -> None:
    """Without a checkpoint nothing of an earlier attempt is this run's, not even sets that say step 0."""
    other = make_config(**settings | {"run": {"dir": str(tmp_path / "other"), "seed": 99}})
    cfg = make_config(**settings)
    train(other)
    old = kept_bits(other.run.dir)
    (Path(cfg.run.dir) / "valid_split").mkdir(parents=True)
    (Path(cfg.run.dir) / "valid_split" / "held.npz").write_bytes(
        (Path(other.run.dir) / "valid_split" / "held.npz").read_bytes()
    )
    train(cfg)
    assert latest_checkpoint(f"{cfg.run.dir}/checkpoints") is not None
    assert not np.array_equal(kept_bits(cfg.run.dir), old)


def test_a_damaged_file_is_named(make_config, train, settings: dict[str, Any]) -> None:
    settings = settings | {"optimizer.lr_decay_tokens": 12 * 512}
    cfg = make_config(**settings)
    train(cfg)
    path = Path(cfg.run.dir) / "valid_split" / "held.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"held\.npz is damaged .*remove it"):
        train(make_config(**settings | {"train.train_tokens": 16 * 512}))
