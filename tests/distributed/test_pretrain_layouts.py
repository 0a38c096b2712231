"""`megarpt pretrain` as a whole: a run of one process is continued under other layouts, and its metrics go on alike."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarpt.config.schema import EvaluateOptions, ParallelConfig, PretrainConfig, ScoreOptions
from megarpt.device import runtime
from megarpt.run import evaluate, pretrain, score
from megarpt.testing.configs import tiny_config
from megarpt.testing.distributed import spawn
from megarpt.testing.tiny import label_values, text_documents, write_sidecar, write_text_corpus
from megarpt.train.metrics_file import read_metrics
from megarpt.train.reports import comparable

SEQUENCE, STEP_TOKENS, SAVED, STEPS = 64, 8 * 64, 2, 6
SMALL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-sp-pp2-zero": (4, {**SP, **PP, "use_distributed_optimizer": True}),
    "pp2-interleaved-cp2": (4, {**PP, "virtual_pipeline_model_parallel_size": 2, "context_parallel_size": 2}),
    "dp2-zero-overlapped": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
}


def configuration(folder: Path, run: str, parallel: dict[str, Any]) -> PretrainConfig:
    """Selection from a sidecar over several micro-batches, evaluations, samples and checkpoints."""
    return tiny_config(
        **{
            "run.dir": str(folder / run),
            "model.mcore": SMALL,
            "model.vocab_size": 384,  # no padding under any layout
            "data.train": [{"path": str(folder / "train"), "streams": {"ref_nll": str(folder / "ref_nll")}}],
            "data.valid": {"held": {"path": str(folder / "held"), "streams": {"ref_nll": str(folder / "held_ref_nll")}}},
            "data.seq_length": SEQUENCE,
            "batch": {"micro_batch_size": 2, "global_batch_size": 8},
            "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "lr_decay_tokens": STEPS * STEP_TOKENS},
            "objective": {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": 0.6},
            "train.train_tokens": STEPS * STEP_TOKENS,
            "parallel": parallel,
            "evaluation": {"interval_steps": 3},
            "checkpoint": {"interval_steps": SAVED, "keep_last": 10},
            "logging": {"tensorboard": False, "histogram_interval_steps": 4},
        }
    )


def train(cfg: dict[str, Any]) -> int:
    return pretrain.run(PretrainConfig.model_validate(cfg), runtime.start("cpu"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpora and the finished run `one` of one process."""
    folder = tmp_path_factory.mktemp("layouts")
    documents = write_text_corpus(folder / "train", text_documents(120, seed=1))
    held = write_text_corpus(folder / "held", text_documents(12, seed=2))
    for name, corpus, texts in (("ref_nll", "train", documents), ("held_ref_nll", "held", held)):
        values = [[math.fmod(value, 7.0) for value in row] for row in label_values(texts)]
        write_sidecar(folder / name, folder / corpus, values, seq_length=SEQUENCE, separate_documents=True)
    spawn(1, train, configuration(folder, "one", {}).model_dump())
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_alike_under_another_layout(alone: Path, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    cfg = configuration(alone, layout, parallel)
    shutil.copytree(alone / "one", cfg.run.dir)
    for checkpoint in (Path(cfg.run.dir) / "checkpoints").glob("step_*"):
        if int(checkpoint.name[5:]) > SAVED:
            shutil.rmtree(checkpoint)
    assert spawn(world, train, cfg.model_dump()) == [0] * world
    for kind, count in (("train", STEPS), ("valid", STEPS // 3 + 1), ("sample", 1)):
        expected, got = (list(read_metrics(Path(path) / "metrics.jsonl", kind)) for path in (alone / "one", cfg.run.dir))
        assert len(got) == len(expected) == count
        for ours, theirs in zip(map(comparable, got), map(comparable, expected), strict=True):
            assert ours.keys() == theirs.keys()
            for tag, value in theirs.items():
                near = value if isinstance(value, str) else pytest.approx(value, rel=2e-3, abs=2e-3)
                assert ours[tag] == near, f"{kind} line of step {theirs['step']}: {tag}"
    assert (Path(cfg.run.dir) / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(2, {}), (2, PP), (4, {**SP, "context_parallel_size": 2}), (4, {**PP, "virtual_pipeline_model_parallel_size": 2})],
)
def test_held_out_tokens_are_split_alike_under_every_layout(alone: Path, world: int, parallel: dict[str, Any]) -> None:
    """Chosen with the losses of one checkpoint, by ranks that see a part of the windows each."""

    def chosen(name: str, ranks: int, layout: dict[str, Any], micro_batch_size: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The bits and the first evaluation of a run of one step."""
        cfg = configuration(alone, name, layout).model_dump()
        cfg["model"]["init_from"] = str(alone / "one")
        cfg["train"]["train_tokens"] = STEP_TOKENS
        cfg["evaluation"]["micro_batch_size"] = micro_batch_size
        if not Path(cfg["run"]["dir"]).exists():
            assert spawn(ranks, train, cfg) == [0] * ranks
        with np.load(Path(cfg["run"]["dir"]) / "valid_split" / "held.npz") as content:
            bits = np.unpackbits(content["kept"])
        return bits, next(iter(read_metrics(Path(cfg["run"]["dir"]) / "metrics.jsonl", "valid")))

    size = 2 if len(parallel) > 1 else 3  # 3 leaves rows of padding, which not every layout can divide
    (expected, expected_line), (got, line) = (
        chosen("split", 1, {}, 3),
        chosen(f"split-{world}-{len(parallel)}", world, parallel, size),
    )
    assert got.sum() == expected.sum() and (got != expected).sum() <= 2  # rounding at the threshold
    for tag in (tag for tag in expected_line if tag.startswith("valid/")):
        assert line[tag] == pytest.approx(expected_line[tag], rel=1e-4), tag


def score_and_evaluate(folder: str, prefix: str, parallel: dict[str, Any]) -> tuple[int, int]:
    """Exit codes of the two commands on this rank."""
    started, layout = runtime.start("cpu"), ParallelConfig(**parallel)
    options = ScoreOptions(
        reference=f"{folder}/one",
        corpus=f"{folder}/train",
        output_prefix=f"{folder}/{prefix}",
        streams=("ref_nll", "ref_entropy"),
        micro_batch_size=2,
        parallel=layout,
    )
    evaluated = EvaluateOptions(checkpoint=f"{folder}/one", output="json", parallel=layout)
    with Path(f"{folder}/{prefix}_rank{started.rank}.json").open("w") as file, contextlib.redirect_stdout(file):
        return score.run(options, started), evaluate.run(evaluated, started)


@pytest.mark.parametrize(("world", "parallel"), [(2, PP), (4, {**SP, "context_parallel_size": 2}), (2, {})])
def test_scores_and_evaluations_are_those_of_one_process(alone: Path, world: int, parallel: dict[str, Any]) -> None:
    name = f"scored-{world}-{len(parallel)}"
    if not (alone / "scored_ref_nll.json").exists():
        spawn(1, score_and_evaluate, str(alone), "scored", {})
    assert spawn(world, score_and_evaluate, str(alone), name, parallel) == [(0, 0)] * world
    for stream in ("ref_nll", "ref_entropy"):
        expected, got = (np.fromfile(alone / f"{prefix}_{stream}.bin", dtype=np.float32) for prefix in ("scored", name))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    reports = ((alone / f"{prefix}_rank0.json").read_text() for prefix in ("scored", name))
    expected, got = (json.loads(report)["corpora"]["held"] for report in reports)
    assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("world", "parallel", "message"),
    [
        (3, {"pipeline_model_parallel_size": 3}, "4 layers do not divide into 3 stages"),
        (3, {"context_parallel_size": 3}, "do not divide into 2 x 3 pieces"),
    ],
)
def test_a_model_that_cannot_be_divided_like_that_is_refused(
    alone: Path, world: int, parallel: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        spawn(world, score_and_evaluate, str(alone), "refused", parallel)
