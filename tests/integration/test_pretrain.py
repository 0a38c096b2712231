"""`megarpt pretrain` as a whole, in this process."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megarpt.config.schema import PretrainConfig, ScoreOptions
from megarpt.corpus.manifest import SidecarManifest
from megarpt.data.build import build_train_batches
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError, DataError, NumericsError, StopRequested
from megarpt.model.build import build_model, unwrap
from megarpt.parallel.layout import ParallelLayout
from megarpt.run import evaluate, generate, pretrain, score
from megarpt.testing.plain_gpt import PlainGPT
from megarpt.testing.tiny import byte_tokenizer, write_corpus
from megarpt.train.checkpoint_files import latest_checkpoint
from megarpt.train.metrics_file import read_metrics
from megarpt.train.reports import comparable
from megarpt.train.signals import StopSignal
from megarpt.train.step import TrainStep
from megarpt.train.trainer import Trainer

STEP_TOKENS = 8 * 64
SELECTION = {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": 0.6}


def exit_record(cfg: PretrainConfig) -> dict[str, Any]:
    """How the run ended."""
    return json.loads((Path(cfg.run.dir) / "exit.json").read_text())


def test_a_run_learns_and_leaves_its_records(make_config, train) -> None:
    cfg = make_config(
        **{"evaluation.interval_steps": 6, "checkpoint.interval_steps": 6, "train.train_tokens": 40 * STEP_TOKENS}
    )
    lines = train(cfg)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["train/loss_nats"] < lines[0]["train/loss_nats"] - 1.5
    assert lines[-1]["tokens/seen"] == 40 * STEP_TOKENS
    folder = Path(cfg.run.dir)
    valid = list(read_metrics(folder / "metrics.jsonl", "valid"))
    assert [line["step"] for line in valid] == [0, 6, 12, 18, 24, 30, 36, 40]
    assert {"valid/held/loss_nats", "valid/held/bits_per_byte", "valid/held/top1"} <= valid[0].keys()
    assert exit_record(cfg)["status"] == "finished"
    assert sorted(p.name for p in (folder / "checkpoints").glob("step_*")) == ["step_00000036", "step_00000040"]
    assert list((folder / "tensorboard").glob("events*"))


def test_two_hundred_steps_are_the_same_with_streamed_layers(make_config, train, tmp_path: Path) -> None:
    curves = []
    for name, stream in (("whole", {}), ("streamed", {"layers": True, "chunk_tokens": 100})):
        cfg = make_config(
            **{"run.dir": str(tmp_path / name), "train.train_tokens": 200 * STEP_TOKENS, "stream": stream, "optimizer.lr": 1e-3}
        )
        curves.append([line["train/loss_nats"] for line in train(cfg)])
    whole, streamed = (torch.tensor(curve) for curve in curves)
    assert len(whole) == 200 and whole[-1] < whole[0] - 2
    assert (whole - streamed).abs().max() < 1e-3 and (whole - streamed)[:20].abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_equal_a_plain_loop(make_config, train, one_rank, cpu_runtime: Runtime, precision: str) -> None:
    """The same model, data and seed in a loop written without megatron-core."""
    cfg = make_config(**{"train.train_tokens": 20 * STEP_TOKENS, "train.precision": precision, "optimizer.clip_grad": 0.5})
    ours = [line["train/loss_nats"] for line in train(cfg)]
    tokenizer = byte_tokenizer()
    torch.manual_seed(cfg.run.seed)
    layout = ParallelLayout()
    groups = layout.initialize(cfg.run.seed)
    weights = unwrap(build_model(cfg, layout, groups, cpu_runtime, vocab_size=tokenizer.vocab_size)[0])
    plain = PlainGPT(384, 2, 64, 4, 2, 96)
    plain.load_mcore({name: w.float() for name, w in weights.state_dict().items() if isinstance(w, torch.Tensor)})
    decayed, norms = ([p for p in plain.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    batches = build_train_batches(cfg, tokenizer, dp_rank=0, dp_size=1, device=torch.device("cpu"))
    theirs = []
    with batches:
        for step in range(20):
            micro_batches = batches.next_step()
            nll = []
            for batch in micro_batches:
                documents = torch.searchsorted(batch.cu_seqlens, torch.arange(batch.tokens.numel()), right=True)
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    logits = plain(batch.tokens, batch.position_ids, documents.view_as(batch.tokens))
                losses = F.cross_entropy(
                    logits[..., : tokenizer.vocab_size].float().flatten(0, 1), batch.labels.flatten(), reduction="none"
                )
                nll.append(losses[batch.loss_mask.flatten()])
            loss = torch.cat(nll).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            seen, o = (step + 1) * STEP_TOKENS, cfg.optimizer
            share = (seen - o.lr_warmup_tokens) / (cfg.train.train_tokens - o.lr_warmup_tokens)
            cosine = o.min_lr + (o.lr - o.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
            for group in optimizer.param_groups:
                group["lr"] = o.lr * seen / o.lr_warmup_tokens if seen <= o.lr_warmup_tokens else cosine
            optimizer.step()
            theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=1e-4 if precision == "fp32" else 3e-2)


def test_fraction_one_is_language_modeling_to_the_last_bit(make_config, train, tmp_path: Path) -> None:
    plain = train(make_config())
    kept = train(
        make_config(**{"run.dir": str(tmp_path / "all"), "objective": SELECTION | {"scorer": "random", "fraction": 1.0}})
    )
    for a, b in zip(plain, kept, strict=True):
        assert (a["train/loss_nats"], a["optim/grad_norm"]) == (b["train/loss_nats"], b["optim/grad_norm"])


@pytest.mark.parametrize("scorer", ["excess_loss", "reference_loss", "reference_entropy"])
def test_online_reference_and_sidecar_select_the_same(
    make_config, train, cpu_runtime: Runtime, tmp_path: Path, scorer: str
) -> None:
    reference = make_config(**{"run.dir": str(tmp_path / "reference")})
    train(reference)
    corpus, stream = reference.data.train[0].path, "ref_entropy" if scorer == "reference_entropy" else "ref_nll"
    options = ScoreOptions(reference=reference.run.dir, corpus=corpus, output_prefix=str(tmp_path / "side"), streams=(stream,))
    assert score.run(options, cpu_runtime) == 0
    selection = SELECTION | {"scorer": scorer}
    offline = make_config(
        **{
            "run.dir": str(tmp_path / "offline"),
            "data.train": [{"path": corpus, "streams": {stream: str(tmp_path / "side")}}],
            "objective": selection,
        }
    )
    online = make_config(
        **{"run.dir": str(tmp_path / "online"), "objective": selection | {"reference": {"checkpoint": reference.run.dir}}}
    )
    for a, b in zip(train(offline), train(online), strict=True):
        a, b = comparable(a), comparable(b)
        assert a.keys() == b.keys()
        assert a["data/order"] == b["data/order"] != ""
        for key in a.keys() - {"kind", "data/order"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
    assert abs(a["select/kept_fraction"] - 0.6) < 0.01


def test_a_scoring_job_that_was_stopped_goes_on_to_the_same_bytes(
    make_config, train, cpu_runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = make_config(**{"train.train_tokens": 4 * STEP_TOKENS})
    train(reference)
    corpus = reference.data.train[0].path
    options = ScoreOptions(reference=reference.run.dir, corpus=corpus, micro_batch_size=4, streams=("ref_nll", "ref_entropy"))
    whole = options.model_copy(update={"output_prefix": str(tmp_path / "whole")})
    assert score.run(whole, cpu_runtime) == 0
    parts = options.model_copy(update={"output_prefix": str(tmp_path / "parts")})
    warm_up = [False] * 3
    stops = iter([*warm_up, False, False, True, *warm_up, False, True] + [False] * 1000)

    def agreed(self: StopSignal) -> bool:
        self._received = signal.SIGTERM if next(stops) else 0
        return self._received != 0

    monkeypatch.setattr(StopSignal, "agreed", agreed)
    for _ in range(2):
        with pytest.raises(StopRequested, match="stopped on SIGTERM after"):
            score.run(parts, cpu_runtime)
        assert not Path(f"{tmp_path}/parts_ref_nll.json").exists()
    assert score.run(parts, cpu_runtime) == 0
    for stream in ("ref_nll", "ref_entropy"):
        for suffix in ("bin", "idx"):
            a, b = (Path(f"{tmp_path}/{name}_{stream}.{suffix}").read_bytes() for name in ("whole", "parts"))
            assert a == b, f"{stream}.{suffix}"
    assert sorted(p.name for p in tmp_path.glob("parts*")) == sorted(
        p.name.replace("whole", "parts") for p in tmp_path.glob("whole*")
    )
    killed = options.model_copy(update={"output_prefix": str(tmp_path / "killed")})
    moments = iter([*warm_up, *[False] * 4, None])  # dies after values were appended and before the journal says so

    def die(self: StopSignal) -> bool:
        if (moment := next(moments)) is None:
            raise RuntimeError("as if killed")
        return moment

    with monkeypatch.context() as patch:
        patch.setattr(score, "_DURABLE_EVERY_S", 0.0)
        patch.setattr(StopSignal, "agreed", die)
        with pytest.raises(RuntimeError, match="as if killed"):
            score.run(killed, cpu_runtime)
    assert score.run(killed, cpu_runtime) == 0
    for stream in ("ref_nll", "ref_entropy"):
        assert Path(f"{tmp_path}/killed_{stream}.bin").read_bytes() == Path(f"{tmp_path}/whole_{stream}.bin").read_bytes()
    values = np.fromfile(f"{tmp_path}/whole_ref_nll.bin", dtype=np.float32)
    assert np.isnan(values[0]) and np.isfinite(values).mean() > 0.98
    assert SidecarManifest.load(f"{tmp_path}/whole_ref_nll").num_tokens == len(values)


def test_one_step_that_is_not_finite_is_skipped_dumped_and_survived(
    make_config, train, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config()
    original, parameters = TrainStep.__call__, []

    def poison(self: TrainStep, batches, progress):  # type: ignore[no-untyped-def]
        parameters.append(torch.cat([p.detach().flatten().clone() for p in self.chunks[0].parameters()]))
        if progress.step == 5:
            objective = self.objective
            monkeypatch.setattr(
                self,
                "objective",
                type(
                    "Poisoned",
                    (),
                    {
                        "__getattr__": lambda _, name: getattr(objective, name),
                        "__call__": lambda _, stats, *rest: objective(stats._replace(logprob=stats.logprob * torch.nan), *rest),
                    },
                )(),
            )
            report = original(self, batches, progress)
            monkeypatch.setattr(self, "objective", objective)
            return report
        return original(self, batches, progress)

    monkeypatch.setattr(TrainStep, "__call__", poison)
    lines = train(cfg)
    assert [line["optim/skipped"] for line in lines] == [float(step == 6) for step in range(1, 13)]
    assert torch.equal(parameters[5], parameters[6])  # the skipped step changed nothing
    assert not torch.equal(parameters[6], parameters[7])
    assert lines[-1]["optim/skipped_total"] == 1.0
    dump = json.loads(next(Path(cfg.run.dir, "dumps").glob("step_00000006*.json")).read_text())
    assert dump["micro_batches"][0]["num_not_finite"] > 0 and dump["micro_batches"][0]["rows"][0]["text"]
    assert exit_record(cfg)["status"] == "finished"


def test_a_run_that_stays_broken_ends_with_its_own_exit_code(
    make_config, cpu_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config(**{"train.max_skipped_steps": 3, "checkpoint.interval_steps": 2})
    original = TrainStep.__call__

    def explode(self: TrainStep, batches, progress):  # type: ignore[no-untyped-def]
        if progress.step == 4:
            with torch.no_grad():
                next(self.chunks[0].parameters()).fill_(torch.inf)
        return original(self, batches, progress)

    monkeypatch.setattr(TrainStep, "__call__", explode)
    with pytest.raises(NumericsError, match="4 steps in a row"):
        pretrain.run(cfg, cpu_runtime)
    record = exit_record(cfg)
    assert (record["status"], record["exit_code"]) == ("unstable", 76)
    monkeypatch.undo()
    assert pretrain.run(cfg, cpu_runtime) == 0  # what it left behind is a run that can go on


@pytest.mark.parametrize(
    ("where", "count", "saved"),
    [
        ("before opening the data", 1, None),
        ("in the evaluation after step 0", 2, 0),
        ("at step 7", 1, 7),
        ("in the evaluation after step 8", 3, 8),
        ("in the evaluation after step 12", 1, 12),
    ],
)
def test_stop_and_go_on(
    make_config, train, cpu_runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, count: int, saved
) -> None:
    """Stopped at any safe point, the run goes on to the same lines, evaluations that were cut short included."""
    settings = {
        "objective": SELECTION | {"scorer": "random"},
        "evaluation": {"interval_steps": 4, "micro_batch_size": 2, "max_tokens": 1024},
    }
    straight, cfg = make_config(**settings, **{"run.dir": str(tmp_path / "straight")}), make_config(**settings)
    train(straight)
    reached, check = [], StopSignal.check

    def stop_there(self: StopSignal, place: str) -> None:
        reached.append(place)
        if reached.count(where) == count:
            self._received = signal.SIGUSR1
        check(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "check", stop_there)
        with pytest.raises(StopRequested, match=f"stopped on SIGUSR1 {where}; run the same command again"):
            pretrain.run(cfg, cpu_runtime)
    record = exit_record(cfg)
    assert (record["status"], record["exit_code"]) == ("resumable", 75)
    newest = latest_checkpoint(f"{cfg.run.dir}/checkpoints")
    assert record["checkpoint"] == (None if newest is None else str(newest))
    assert (None if newest is None else int(newest.name[5:])) == saved
    train(cfg)
    for kind in ("train", "valid"):
        lines = [list(map(comparable, read_metrics(Path(each.run.dir) / "metrics.jsonl", kind))) for each in (cfg, straight)]
        assert lines[0] == lines[1] and lines[0]


def test_stopped_in_the_warm_up_a_resumed_run_keeps_naming_its_checkpoint(
    make_config, train, cpu_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config()
    train(cfg)
    before = exit_record(cfg)
    enter = StopSignal.__enter__

    def signalled(self: StopSignal) -> StopSignal:
        self._received = signal.SIGTERM
        return enter(self)

    monkeypatch.setattr(StopSignal, "__enter__", signalled)
    with pytest.raises(StopRequested, match="stopped on SIGTERM before building the model"):
        pretrain.run(cfg, cpu_runtime)
    record = exit_record(cfg)
    assert (record["status"], record["restarts"]) == ("resumable", 1)
    assert record["checkpoint"] == before["checkpoint"] and record["step"] == before["step"] == 12


@pytest.mark.parametrize("interval", [0, 4])
def test_an_evaluation_that_was_missed_is_made_up_for(
    make_config, train, cpu_runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int
) -> None:
    """A process can end after a checkpoint and before the evaluation of the same step."""
    last = 12 if interval == 0 else 4
    cfg = make_config(
        **{"evaluation": {"interval_steps": interval}, "checkpoint.interval_steps": 4, "logging.tensorboard": False}
    )
    train(cfg)
    wanted = [comparable(line) for line in read_metrics(Path(cfg.run.dir) / "metrics.jsonl")]
    assert [line["step"] for line in wanted if line["kind"] == "valid"] == [0, 12] if interval == 0 else [0, 4, 8, 12]

    killed = cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(tmp_path / "killed")})})
    evaluate = Trainer.evaluate

    def killed_before(trainer: Trainer) -> None:
        if trainer.state.progress.step == last:
            trainer.save()
            raise KeyboardInterrupt
        evaluate(trainer)

    with monkeypatch.context() as context:
        context.setattr(Trainer, "evaluate", killed_before)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(killed, cpu_runtime)
    for _ in range(2):  # and a second time there is nothing left to do
        train(killed)
        assert [comparable(line) for line in read_metrics(Path(killed.run.dir) / "metrics.jsonl")] == wanted


def test_evaluate_and_generate_read_a_run(make_config, train, cpu_runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    from megarpt.config.schema import EvaluateOptions, GenerateOptions

    cfg = make_config()
    train(cfg)
    last = list(read_metrics(Path(cfg.run.dir) / "metrics.jsonl", "valid"))[-1]
    capsys.readouterr()
    assert evaluate.run(EvaluateOptions(checkpoint=cfg.run.dir, output="json"), cpu_runtime) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["corpora"]["held"]["loss_nats"] == pytest.approx(last["valid/held/loss_nats"], abs=1e-6)
    assert (
        generate.run(GenerateOptions(checkpoint=cfg.run.dir, prompt="The ", max_new_tokens=8, num_samples=2), cpu_runtime) == 0
    )
    assert capsys.readouterr().out.count("The ") == 2
    with pytest.raises(ConfigError, match="exceed the 64 tokens"):
        generate.run(GenerateOptions(checkpoint=cfg.run.dir, prompt="The ", max_new_tokens=500), cpu_runtime)


def test_a_corpus_smaller_than_a_batch_and_a_document_longer_than_the_sequence(make_config, train, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokenizer = byte_tokenizer()
    from megarpt.corpus.manifest import TokenizerRecord

    write_corpus(tmp_path / "small", [rng.integers(0, 256, 100)], tokenizer=TokenizerRecord.of(tokenizer))
    lines = train(make_config(**{"data.train": [{"path": str(tmp_path / "small")}]}))
    assert lines[-1]["train/loss_nats"] < lines[0]["train/loss_nats"]
    assert lines[0]["train/step_tokens"] == 8 // 2 * 99  # two windows of the corpus' 99 labels, four times over


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            {"model.mcore": {"hidden_sise": 64}, "optimizer.mcore": {"lrr": 1}},
            ConfigError,
            "(?s)2 mistakes.*hidden_size.*optimizer.mcore.lrr",
        ),
        ({"data.train": [{"path": "nowhere"}]}, DataError, "nowhere"),
        ({"data.tokenizer": "nowhere.model"}, DataError, "nowhere.model"),
        ({"model.init_from": "nowhere"}, Exception, "nowhere does not exist"),
        ({"batch.global_batch_size": 6}, ConfigError, "multiple"),
    ],
)
def test_mistakes_end_with_an_error_that_names_them(make_config, cpu_runtime: Runtime, overrides, error, message: str) -> None:
    with pytest.raises(error, match=message):
        pretrain.run(make_config(**overrides), cpu_runtime)
