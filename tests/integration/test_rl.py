"""`megarpt rl` as a whole."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megarpt.config import validate
from megarpt.config.load import dump_resolved
from megarpt.config.schema import ParallelConfig
from megarpt.errors import CheckpointError, ConfigError, NumericsError, StopRequested
from megarpt.parallel.layout import ParallelLayout
from megarpt.rl.embedded_engine import EmbeddedEngine
from megarpt.run import rl
from megarpt.run.pretrained import load_pretrained
from megarpt.testing.policy import policy_config, write_policy, write_questions
from megarpt.train.checkpoint_files import REFERENCE, list_checkpoints, resolve_checkpoint
from megarpt.train.metrics_file import read_metrics
from megarpt.train.reports import comparable
from megarpt.train.sharded import content_hash
from megarpt.train.weights import checkpoint_hash

KL = {"objective.kl_coef": 0.05, "objective.kl_estimator": "k3"}
KINDS = {
    "off policy": {"objective.updates_per_rollout": 2, "objective.advantage": "group_zscore", "objective.reduction": "rollout"},
    "kl in the loss, dynamic": KL
    | {
        "objective.reference_reset_steps": 3,
        "objective.dynamic_sampling": {"start_step": 1, "max_rounds": 3},
        "objective.overlong": "mask",
    },
    "kl in the reward": KL
    | {
        "objective.kl_in": "reward",
        "objective.advantage": "leave_one_out",
        "objective.overlong": "penalty",
        "objective.overlong_buffer_tokens": 3,
        "objective.entropy_coef": 0.01,
    },
}


@pytest.fixture(scope="module")
def start_of(tmp_path_factory, cpu_runtime):
    """Policy and questions."""
    folder = tmp_path_factory.mktemp("policy")
    return write_policy(folder / "policy", cpu_runtime), write_questions(folder / "questions.jsonl")


@pytest.fixture
def train(cpu_runtime):
    def run(cfg):
        validate.check(cfg)
        assert rl.run(cfg, cpu_runtime) == 0
        return read_lines(cfg)

    return run


def read_lines(cfg, kind="train"):
    return list(read_metrics(Path(cfg.run.dir) / "metrics.jsonl", kind))


def test_the_reward_rises_and_everything_is_recorded(start_of, train, tmp_path):
    cfg = policy_config(tmp_path / "run", *start_of, **{"train.train_steps": 24})
    lines = train(cfg)
    reward = [line["rl/reward_mean"] for line in lines]
    assert len(lines) == 24 and sum(reward[-6:]) > 1.5 * sum(reward[:6]), reward
    first = lines[0]
    assert first["policy/ratio"] == 1.0 and first["policy/sampler_gap_max_nats"] < 1e-5
    assert all(line["policy/sampler_gap_max_nats"] < 1e-4 for line in lines), "the engine has the weights of the step"
    assert first["rl/completions"] == 16 and first["tokens/trained"] == first["rl/sampled_tokens"]
    assert {line["step"] for line in read_lines(cfg, "valid")} == {0, 3, 6, 9, 12, 15, 18, 21, 24}
    held_out = [line["valid/same/reward_mean"] for line in read_lines(cfg, "valid")]
    assert held_out[-1] >= held_out[0]
    assert sorted(path.name for path in (tmp_path / "run" / "rollouts").iterdir())[:2] == [
        "step_00000001.jsonl",
        "step_00000002.jsonl",
    ]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["status"] == "finished"


def test_every_tag_is_documented(start_of, train, tmp_path):
    cfg = policy_config(
        tmp_path / "run",
        *start_of,
        **KL,
        **{
            "objective.max_importance_ratio": 2.0,
            "objective.dual_clip": 3.0,
            "verifiers": [{"kind": "format", "pattern": "a"}, {"kind": "exact"}],
            "train.train_steps": 1,
        },
    )
    train(cfg)
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    tags = {tag for line in [*read_lines(cfg), *read_lines(cfg, "valid")] for tag in line if "/" in tag}
    general = {tag for tag in tags if tag.startswith(("rl/part/", "valid/same/", "time/valid/same_s"))}
    assert {tag for tag in tags - general if f"`{tag}`" not in text} == set()
    names = {tag.removeprefix("valid/same/") for tag in general if tag.startswith("valid/")}
    assert {name for name in names if f"{name}`" not in text} == set()


def test_the_policy_can_be_used_like_any_model(start_of, train, tmp_path, cpu_runtime):
    train(policy_config(tmp_path / "run", *start_of, **{"train.train_steps": 2}))
    layout = ParallelLayout()
    trained = load_pretrained(str(tmp_path / "run"), cpu_runtime, layout, layout.initialize(0), ParallelConfig())
    assert trained.config.command == "rl" and trained.tokenizer.name == "bytes"


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind, start_of, train, tmp_path):
    settings = KINDS[kind]
    whole = policy_config(tmp_path / "whole", *start_of, **settings, **{"train.train_steps": 4})
    train(whole)
    for steps in (2, 4):
        part = policy_config(tmp_path / "part", *start_of, **settings, **{"train.train_steps": steps})
        train(part)
    assert checkpoint_hash(part.run.dir) == checkpoint_hash(whole.run.dir)
    assert [comparable(line) for line in read_lines(part)] == [comparable(line) for line in read_lines(whole)]


def test_a_run_that_is_told_to_stop_in_the_middle_of_a_step_draws_that_step_again(start_of, train, tmp_path, monkeypatch):
    whole = policy_config(tmp_path / "whole", *start_of, **{"train.train_steps": 3})
    train(whole)
    cfg = policy_config(tmp_path / "stopped", *start_of, **{"train.train_steps": 3})
    generate, calls = EmbeddedEngine.generate, []

    def told_to_stop(self, *arguments, **options):
        calls.append(arguments)
        if options["sampling"].temperature > 0.0 and len(calls) == 3:  # the evaluation before the first step, and two steps
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(EmbeddedEngine, "generate", told_to_stop)
    with pytest.raises(StopRequested, match="in step 2"):
        train(cfg)
    monkeypatch.undo()
    train(cfg)
    assert checkpoint_hash(cfg.run.dir) == checkpoint_hash(whole.run.dir)
    assert [comparable(line) for line in read_lines(cfg)] == [comparable(line) for line in read_lines(whole)]


def test_the_reference_is_where_it_was_last_reset(start_of, train, tmp_path):
    cfg = policy_config(tmp_path / "run", *start_of, **KL, **{"objective.reference_reset_steps": 4, "checkpoint.keep_last": 9})
    lines = train(cfg)
    hashes = {}
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        model, reference = (content_hash(checkpoint / name, 384) for name in ("model", REFERENCE))
        hashes[checkpoint.name[-2:]] = (model, reference)
    start = checkpoint_hash(start_of[0])
    assert hashes["02"][1] == start != hashes["02"][0]
    assert hashes["04"][1] == hashes["04"][0] == hashes["06"][1] != hashes["06"][0]
    kl = [line["policy/kl_ref_nats"] for line in lines]
    assert kl[0] == pytest.approx(0.0, abs=1e-9) and kl[3] > 1e-6 and kl[4] == pytest.approx(0.0, abs=1e-9)


def test_a_kl_term_holds_the_policy_near_its_reference(start_of, train, tmp_path):
    far = train(policy_config(tmp_path / "far", *start_of, **{"objective.kl_coef": 1e-6, "train.train_steps": 10}))
    near = train(policy_config(tmp_path / "near", *start_of, **{"objective.kl_coef": 5.0, "train.train_steps": 10}))
    assert near[-1]["policy/kl_ref_nats"] < 0.5 * far[-1]["policy/kl_ref_nats"]


def test_dynamic_sampling_trains_on_groups_that_teach(start_of, train, tmp_path):
    plain = policy_config(tmp_path / "plain", *start_of, **{"verifiers": [{"kind": "format", "pattern": r"(?s)[a-d].*"}]})
    lines = train(plain)
    assert lines[0]["rl/dead_groups"] > 0.5, "the test needs groups that teach nothing"
    drawn = {"objective.dynamic_sampling": {"max_rounds": 8}}
    lines = train(policy_config(tmp_path / "drawn", *start_of, **drawn, verifiers=[v.model_dump() for v in plain.verifiers]))
    first = lines[0]
    assert first["rl/groups"] > 4, "others were drawn"
    assert first["rl/left_out_share"] > 0.0
    trained = (1.0 - first["rl/left_out_share"]) * first["rl/completions"]
    assert trained == pytest.approx(min(16, (1 - first["rl/dead_groups"]) * first["rl/completions"]))


def test_dynamic_sampling_can_end_a_run_that_learns_nothing(start_of, train, tmp_path):
    cfg = policy_config(
        tmp_path / "run",
        *start_of,
        **{
            "verifiers": [{"kind": "format", "pattern": "never"}],
            "objective.dynamic_sampling": {"max_rounds": 2, "at_cap": "stop"},
        },
    )
    with pytest.raises(NumericsError, match="after 2 rounds of prompts 0 groups"):
        train(cfg)
    cfg = policy_config(
        tmp_path / "on",
        *start_of,
        **{
            "verifiers": [{"kind": "format", "pattern": "never"}],
            "objective.dynamic_sampling": {"max_rounds": 2},
            "train.train_steps": 1,
        },
    )
    (line,) = train(cfg)
    assert line["optim/grad_norm"] == 0.0 and line["rl/groups"] == 8


def test_equal_rewards_change_nothing(start_of, train, tmp_path):
    settings = {"verifiers": [{"kind": "format", "pattern": "never"}], "optimizer.weight_decay": 0.0}
    cfg = policy_config(tmp_path / "run", *start_of, **settings, **{"train.train_steps": 2})
    assert [line["optim/grad_norm"] for line in train(cfg)] == [0.0, 0.0]
    assert checkpoint_hash(cfg.run.dir) == checkpoint_hash(start_of[0])


def test_several_updates_are_off_policy_after_the_first(start_of, train, tmp_path):
    on, off = (
        train(policy_config(tmp_path / f"{n}", *start_of, **{"objective.updates_per_rollout": n, "train.train_steps": 2}))
        for n in (1, 2)
    )
    assert on[0]["policy/kl_old_k3_nats"] == 0.0 < off[0]["policy/kl_old_k3_nats"]
    assert off[0]["rl/reward_mean"] == on[0]["rl/reward_mean"], "the same rollouts"


def test_a_run_is_not_continued_with_other_prompts(start_of, train, tmp_path):
    train(policy_config(tmp_path / "run", *start_of, **{"train.train_steps": 1}))
    other = policy_config(tmp_path / "run", start_of[0], write_questions(tmp_path / "other.jsonl", 9))
    with pytest.raises(ConfigError, match=r"data\.train"):
        train(other)
    path = start_of[1]
    text = path.read_text()
    try:
        path.write_text(text.replace("q3", "other"))
        with pytest.raises(CheckpointError, match="fingerprint"):
            train(policy_config(tmp_path / "run", *start_of))
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    ("stop", "words"), [(["ab"], "expected the text of a single token of bytes"), ([], None)], ids=["two tokens", "none"]
)
def test_stop_texts_are_single_tokens(stop, words, start_of, train, tmp_path):
    cfg = policy_config(tmp_path / "run", *start_of, **{"rollout.stop": stop, "train.train_steps": 1})
    if words is None:
        train(cfg)
    else:
        with pytest.raises(ConfigError, match=words):
            train(cfg)


def start_process(cfg):
    config = Path(cfg.run.dir).with_suffix(".yaml")
    config.write_text(dump_resolved(cfg))
    with config.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "megarpt", "rl", str(config)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def test_a_killed_run_goes_on_as_if_nothing_had_happened(start_of, train, tmp_path):
    settings = KL | {"train.train_steps": 12, "objective.reference_reset_steps": 4}
    whole = policy_config(tmp_path / "whole", *start_of, **settings)
    train(whole)
    cfg = policy_config(tmp_path / "killed", *start_of, **settings)
    metrics = Path(cfg.run.dir) / "metrics.jsonl"
    for enough in (5, 11):
        process, deadline = start_process(cfg), time.monotonic() + 120.0
        while not metrics.exists() or metrics.read_bytes().count(b'"kind": "train"') < enough:
            assert process.poll() is None and time.monotonic() < deadline, cfg.run.dir
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start_process(cfg).wait(120.0) == 0, Path(cfg.run.dir).with_suffix(".log").read_text()[-3000:]
    assert checkpoint_hash(cfg.run.dir) == checkpoint_hash(whole.run.dir)
    last = [resolve_checkpoint(each.run.dir) / REFERENCE for each in (cfg, whole)]
    assert content_hash(last[0], 384) == content_hash(last[1], 384)
    assert [comparable(line) for line in read_lines(cfg)] == [comparable(line) for line in read_lines(whole)]


def test_the_temperature_is_that_of_every_logprob(start_of, train, tmp_path):
    lines = train(policy_config(tmp_path / "run", *start_of, **{"rollout.temperature": 1.7, "train.train_steps": 3}))
    assert all(line["policy/sampler_gap_max_nats"] < 1e-4 for line in lines)
    assert lines[0]["policy/entropy_nats"] > 0.95 * math.log(257)


def test_a_truncated_distribution_shows_as_a_gap(start_of, train, tmp_path):
    lines = train(policy_config(tmp_path / "run", *start_of, **{"rollout.top_k": 20, "train.train_steps": 1}))
    assert lines[0]["policy/sampler_gap_nats"] > 1.0
    assert torch.isfinite(torch.tensor(lines[0]["train/loss_nats"]))


def test_a_server_draws_what_the_policy_itself_would(start_of, train, tmp_path):
    """Weights go to the server after every step, or the second step would differ."""
    weights_dir = tmp_path / "weights"
    weights_dir.mkdir()
    command = [sys.executable, "-m", "megarpt", "serve", str(start_of[0]), "--port", "0", "--weights-dir", str(weights_dir)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as server:
        log = []
        for line in server.stderr:
            log.append(line)
            if found := re.search(r"at (http://\S+)/v1", line):
                break
        else:
            raise AssertionError("".join(log))
        try:
            embedded, served = (
                policy_config(tmp_path / engine, *start_of, **settings, **{"train.train_steps": 3})
                for engine, settings in (
                    ("embedded", {}),
                    ("server", {"rollout.engine": "server", "rollout.url": found[1], "rollout.weights_dir": str(weights_dir)}),
                )
            )
            expected, lines = train(embedded), train(served)
        finally:
            server.terminate()
            server.communicate(timeout=60)
    tags = ("rl/reward_mean", "rl/sampled_tokens", "tokens/trained", "train/loss_nats", "optim/grad_norm")
    assert [{tag: line[tag] for tag in tags} for line in lines] == [{tag: line[tag] for tag in tags} for line in expected]
    assert checkpoint_hash(served.run.dir) == checkpoint_hash(embedded.run.dir)
    assert all(line["policy/sampler_gap_max_nats"] < 1e-4 for line in lines)
