"""`megarpt sft` as a whole."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megarpt.config import validate
from megarpt.config.schema import EvaluateOptions, GenerateOptions, ParallelConfig, SftConfig
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.data.answers import AnswerDataset
from megarpt.data.batches import evaluation_batches
from megarpt.data.build import build_eval_sets
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError, DataError, StopRequested
from megarpt.model.build import unwrap
from megarpt.model.forward import token_stats
from megarpt.parallel.layout import ParallelLayout
from megarpt.run import evaluate, generate, pretrain
from megarpt.run.pretrained import load_pretrained
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.plain_gpt import PlainGPT
from megarpt.train.metrics_file import read_metrics
from megarpt.train.reports import comparable
from megarpt.train.signals import StopSignal
from megarpt.train.weights import checkpoint_hash

S, STEP_TOKENS, STEPS = 64, 8 * 64, 20
MakeAnswers = Callable[..., SftConfig]


def write_answers(path: Path, count: int, seed: int) -> str:
    """A long prompt that nothing follows from, and one of two answers with equal chances; half of them as conversations."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            prompt, answer = "".join(rng.choices("0123456789", k=12)), rng.choice("ab")
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            pair = {"prompt": f"{prompt}:", "completion": answer}
            file.write(json.dumps({"messages": messages} if number % 2 else pair) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpora: Path, cpu_runtime: Runtime) -> str:
    """A run to start from."""
    folder = tmp_path_factory.mktemp("start") / "run"
    cfg = tiny_config(
        **{
            "run.dir": str(folder),
            "model.mcore": TWO_LAYERS,
            "data.train": [{"path": str(corpora / "train")}],
            "data.seq_length": S,
            "batch": {"micro_batch_size": 4, "global_batch_size": 8},
            "train.train_tokens": 2 * STEP_TOKENS,
        }
    )
    assert pretrain.run(cfg, cpu_runtime) == 0
    return str(folder)


@pytest.fixture
def make_answers(start: str, tmp_path: Path) -> MakeAnswers:
    """Configurations that differ from a small run in what is given by dotted key."""

    def make(**overrides: Any) -> SftConfig:
        tree: dict[str, Any] = {
            "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
            "model": {"preset": "tiny", "init_from": start, "mcore": TWO_LAYERS},
            "data": {
                "tokenizer": "bytes",
                "train": [{"path": write_answers(tmp_path / "train.jsonl", 400, seed=1)}],
                "valid": {"held": write_answers(tmp_path / "held.jsonl", 200, seed=2)},
                "seq_length": S,
            },
            "batch": {"micro_batch_size": 4, "global_batch_size": 8},
            "optimizer": {"lr": 2e-2, "min_lr": 1e-3, "lr_warmup_tokens": STEP_TOKENS // 2},
            "train": {"train_tokens": STEPS * STEP_TOKENS},
        }
        for key, value in overrides.items():
            *path, last = key.split(".")
            section = tree
            for part in path:
                section = section.setdefault(part, {})
            section[last] = value
        cfg = SftConfig.model_validate(tree)
        validate.check(cfg, world_size=1)
        return cfg

    return make


def lines(cfg: SftConfig, kind: str) -> list[dict[str, Any]]:
    return list(read_metrics(Path(cfg.run.dir) / "metrics.jsonl", kind))


def test_twenty_steps_learn_the_answers_and_the_run_can_be_asked(
    make_answers: MakeAnswers, cpu_runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit to every two tokens, the answer and its end, is all that can be learned of the answers."""
    cfg = make_answers()
    assert pretrain.run(cfg, cpu_runtime) == 0
    first, last = (line["valid/held/loss_nats"] for line in lines(cfg, "valid"))
    least = math.log(2.0) / 2
    assert first > 3.0 and last == pytest.approx(least, abs=0.05)
    train = lines(cfg, "train")
    assert train[-1]["train/loss_nats"] == pytest.approx(least, abs=0.15)
    assert train[-1]["train/step_tokens"] < STEP_TOKENS / 4  # prompts train nothing

    capsys.readouterr()
    assert evaluate.run(EvaluateOptions(checkpoint=cfg.run.dir, output="json"), cpu_runtime) == 0
    (report,) = json.loads(capsys.readouterr().out)["corpora"].values()
    assert report["loss_nats"] == pytest.approx(last, abs=1e-6) and report["tokens"] == 400
    assert report["bits_per_byte"] == pytest.approx(2 * report["loss_nats"] / math.log(2.0))

    prompt = "012345678901:"
    options = GenerateOptions(checkpoint=cfg.run.dir, prompt=prompt, max_new_tokens=8, temperature=0.0)
    assert generate.run(options, cpu_runtime) == 0
    assert capsys.readouterr().out in (f"{prompt}a\n", f"{prompt}b\n")  # the end was learned too


def test_a_corpus_can_be_evaluated_as_well(
    make_answers: MakeAnswers, corpora: Path, cpu_runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = make_answers(**{"train.train_tokens": STEP_TOKENS})
    assert pretrain.run(cfg, cpu_runtime) == 0
    capsys.readouterr()
    options = EvaluateOptions(checkpoint=cfg.run.dir, corpora={"text": str(corpora / "held")}, output="json")
    assert evaluate.run(options, cpu_runtime) == 0
    assert set(json.loads(capsys.readouterr().out)["corpora"]) == {"text"}


def test_the_loss_of_packed_records_is_that_of_each_by_itself(
    make_answers: MakeAnswers, start: str, cpu_runtime: Runtime, tmp_path: Path
) -> None:
    """Compared with a plain model in fp64 that reads one record at a time and knows of neither rows nor masks."""
    layout = ParallelLayout()
    groups = layout.initialize(seed=1)
    network = load_pretrained(start, cpu_runtime, layout, groups, ParallelConfig()).network
    cfg, tokenizer = make_answers(), load_tokenizer("bytes")
    (dataset,) = build_eval_sets(cfg, tokenizer).values()
    assert isinstance(dataset, AnswerDataset)
    packed = torch.zeros((), dtype=torch.float64)
    for batch in evaluation_batches(dataset, micro_batch_size=4, dp_rank=0, dp_size=1, device=torch.device("cpu")):
        (stats,) = token_stats([network], [batch], groups)
        packed -= stats.logprob[batch.loss_mask].double().sum()

    plain = PlainGPT(384, 2, 64, 4, 2, 96)
    plain.load_mcore({name: w for name, w in unwrap(network).state_dict().items() if isinstance(w, torch.Tensor)})
    plain.double()
    alone, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for line in (tmp_path / "held.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "messages" in record:
            user, assistant = (each["content"] for each in record["messages"])
            record = {"prompt": f"User:\n{user}\n\nAssistant:\n", "completion": assistant}
        prompt, answer = record["prompt"].encode(), [*record["completion"].encode(), 256]
        tokens = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = plain(tokens[:, :-1], torch.arange(tokens.shape[1] - 1)[None])[0, len(prompt) - 1 :, :257]
        alone += F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        num_tokens += len(answer)
    assert num_tokens == dataset.num_answer_tokens
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)


def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    make_answers: MakeAnswers, cpu_runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = write_answers(tmp_path / "second.jsonl", 60, seed=3)
    settings = {
        "data.train": [{"path": str(tmp_path / "train.jsonl"), "weight": 2.0}, {"path": second}],
        "model.mcore": TWO_LAYERS | {"hidden_dropout": 0.1},
        "evaluation": {"interval_steps": 5},
        "train.train_tokens": 12 * STEP_TOKENS,
    }
    straight, stopped = (make_answers(**settings, **{"run.dir": str(tmp_path / name)}) for name in ("straight", "stopped"))
    assert pretrain.run(straight, cpu_runtime) == 0
    check = StopSignal.check

    def stop_there(self: StopSignal, place: str) -> None:
        if place == "at step 7":
            self._received = signal.SIGUSR1
        check(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "check", stop_there)
        with pytest.raises(StopRequested, match="at step 7"):
            pretrain.run(stopped, cpu_runtime)
    assert pretrain.run(stopped, cpu_runtime) == 0
    for kind in ("train", "valid"):
        assert [comparable(line) for line in lines(stopped, kind)] == [comparable(line) for line in lines(straight, kind)]
    assert len(lines(stopped, "train")) == 12
    assert checkpoint_hash(stopped.run.dir) == checkpoint_hash(straight.run.dir)


def test_a_checkpoint_does_not_go_on_with_other_answers(
    make_answers: MakeAnswers, cpu_runtime: Runtime, tmp_path: Path
) -> None:
    decay = {"optimizer.lr_decay_tokens": 2 * STEP_TOKENS}
    assert pretrain.run(make_answers(**decay, **{"train.train_tokens": STEP_TOKENS}), cpu_runtime) == 0
    cfg = make_answers(**decay, **{"train.train_tokens": 2 * STEP_TOKENS})
    write_answers(tmp_path / "train.jsonl", 400, seed=9)
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.answers_sha256"):
        pretrain.run(cfg, cpu_runtime)


@pytest.mark.parametrize("scorer", ["loss", "excess_loss"])
def test_answers_can_be_selected_from(make_answers: MakeAnswers, start: str, cpu_runtime: Runtime, scorer: str) -> None:
    """The objective is the one of `megarpt pretrain`, its reference model and the split of held-out loss included."""
    objective: dict[str, Any] = {"scorer": scorer, "weighting": "top_fraction", "fraction": 0.5}
    if scorer == "excess_loss":
        objective["reference"] = {"checkpoint": start}
    cfg = make_answers(objective=objective, **{"train.train_tokens": 2 * STEP_TOKENS})
    assert pretrain.run(cfg, cpu_runtime) == 0
    assert [line["select/kept_fraction"] for line in lines(cfg, "train")] == pytest.approx([0.5, 0.5], abs=0.02)
    assert any("kept_like" in tag for tag in lines(cfg, "valid")[-1]) == (scorer == "excess_loss")


def test_mistakes_end_with_an_error_that_names_them(make_answers: MakeAnswers, cpu_runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match=r"model\.init_from: missing"):
        make_answers(**{"model.init_from": None})
    with pytest.raises(ConfigError, match=r"data\.chat\.template: llama3 needs the special token"):
        pretrain.run(make_answers(**{"data.chat": {"template": "llama3"}}), cpu_runtime)
    with pytest.raises(DataError, match="cannot read prompts with answers nowhere"):
        pretrain.run(make_answers(**{"data.train": [{"path": "nowhere"}]}), cpu_runtime)
