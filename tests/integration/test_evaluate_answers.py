"""`megarpt evaluate --questions` on a run: numbers by another way of decoding, under other layouts, and refusals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megarpt import cli
from megarpt.config.schema import EvaluateAnswersOptions, EvaluateOptions, ParallelConfig, PretrainConfig, RLConfig
from megarpt.device import runtime
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_CONFIG, EXIT_OK, ConfigError, DataError, StopRequested
from megarpt.model.build import build_model
from megarpt.parallel.layout import ParallelLayout
from megarpt.rl.pass_at_k import wilson_interval
from megarpt.rl.prompts import next_token_record
from megarpt.rl.rollout import Sampling
from megarpt.rl.structs import Completion, Prompt, RolloutGroup, StopReason
from megarpt.run import evaluate_answers, pretrain
from megarpt.run.pretrained import load_pretrained
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.distributed import spawn
from megarpt.testing.tiny import byte_tokenizer, text_documents, write_text_corpus
from megarpt.train.checkpoint import CheckpointManager
from megarpt.train.optimizer import build_optimizer
from megarpt.train.state import TrainState

SEQUENCE, NEW = 128, 24
PATTERN = r"(?s).*e.*"  # what an answer has to hold to be right: something that a small model says now and then
LEFT_OUT: Any = object()
PLAIN: dict[str, Any] = {"mode": "plain", "template": LEFT_OUT, "verifiers": LEFT_OUT, "max_new_tokens": LEFT_OUT}
RARE = [{"kind": "format", "pattern": r"(?s).*u.*"}]
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cpu_runtime: Runtime) -> str:
    """A run that has seen some invented sentences."""
    folder = tmp_path_factory.mktemp("trained")
    write_text_corpus(folder / "train", text_documents(200, seed=1))
    cfg: PretrainConfig = tiny_config(
        **{
            "run.dir": str(folder / "run"),
            "model.mcore": TWO_LAYERS,
            "data.train": [{"path": str(folder / "train")}],
            "data.seq_length": SEQUENCE,
            "batch": {"micro_batch_size": 4, "global_batch_size": 8},
            "optimizer": {"lr": 1e-2},
            "train.train_tokens": 30 * 8 * SEQUENCE,
            "logging.tensorboard": False,
        }
    )
    assert pretrain.run(cfg, cpu_runtime) == EXIT_OK
    return cfg.run.dir


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(
        tmp_path_factory.mktemp("questions") / "sums.jsonl",
        [{"question": text[:40], "answer": f"#### {i}"} for i, text in enumerate(text_documents(14, seed=3))],
    )


@pytest.fixture(scope="module")
def next_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_tokenizer()
    records = []
    for document, text in enumerate(text_documents(20, seed=5)):
        ids, position = tokenizer.encode(text), 10 + document % 7
        records.append(
            next_token_record(
                document=document,
                position=position,
                context=ids[:position],
                continuation=bytes(ids[position : position + 8]),
                boundaries=range(1, 9),
                entropy=1.0,
                band=("easy", "medium", "hard")[document % 3],
                tokenizer_sha256=tokenizer.sha256,
            )
        )
    return write_lines(tmp_path_factory.mktemp("tokens") / "tokens.jsonl", records)


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def options_for(checkpoint: str, path: Path, **changes: Any) -> EvaluateAnswersOptions:
    fields = {
        "checkpoint": checkpoint,
        "questions": {"set": str(path)},
        "template": "plain",
        "verifiers": [{"kind": "format", "pattern": PATTERN}],
        "max_new_tokens": NEW,
        "device": "cpu",
        "output": "json",
    }
    given = {name: value for name, value in (fields | changes).items() if value is not LEFT_OUT}
    return EvaluateAnswersOptions.model_validate(given)


def report_of(options: EvaluateAnswersOptions, runtime: Runtime) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert evaluate_answers.run(options, runtime) == EXIT_OK
    return out.getvalue()


@pytest.fixture
def evaluate(trained: str, cpu_runtime: Runtime) -> Evaluate:
    """The results of one file: mode -> band -> numbers."""

    def go(path: Path, checkpoint: str = trained, **changes: Any) -> dict[str, Any]:
        report = json.loads(report_of(options_for(checkpoint, path, **changes), cpu_runtime))
        assert report["questions"]["set"]["file"] == str(path)
        return report["questions"]["set"]["results"]

    return go


def greedy_answers(checkpoint: str, runtime: Runtime, prompts: list[bytes], new: int) -> list[bytes]:
    """By the whole forward pass for every token, one prompt after the other."""
    layout = ParallelLayout()
    model = load_pretrained(checkpoint, runtime, layout, layout.initialize(seed=0), ParallelConfig())
    rows = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + new and ids[-1] != 256:
            with torch.no_grad():
                logits = model.network(torch.tensor([ids]), torch.arange(len(ids))[None], None, runtime_gather_output=True)
            ids.append(int(logits[0, -1, :257].argmax()))
        rows.append(ids[len(prompt) :])
    return [bytes(each for each in row if each < 256) for row in rows]


# --------------------------------------------------------------------------------------------------------------- numbers


def test_greedy_answers_are_counted_right(evaluate: Evaluate, trained: str, questions: Path, cpu_runtime: Runtime) -> None:
    asked = [json.loads(line)["question"].encode() for line in questions.read_text().splitlines()]
    said = greedy_answers(trained, cpu_runtime, asked, NEW)
    right = sum(re.fullmatch(PATTERN, text.decode(errors="replace")) is not None for text in said)
    assert 0 < right < len(said)  # else any mistake would go unseen
    found = evaluate(questions)
    assert set(found) == {"greedy"} and set(found["greedy"]) == {"all"}
    numbers = found["greedy"]["all"]
    assert (numbers["questions"], numbers["right"], numbers["unknown"]) == (14, right, 0)
    assert numbers["accuracy"] == numbers["reward_mean"] == right / 14
    assert numbers["interval"] == list(wilson_interval(right, 14))


def test_plain_prediction_is_the_likeliest_token_by_band(
    evaluate: Evaluate, trained: str, next_tokens: Path, cpu_runtime: Runtime
) -> None:
    records = [json.loads(line) for line in next_tokens.read_text().splitlines()]
    likeliest = greedy_answers(trained, cpu_runtime, [bytes(each["context"]) for each in records], 1)
    true = [byte_tokenizer().encode(text)[10 + i % 7] for i, text in enumerate(text_documents(20, seed=5))]
    hits = [said == bytes([token]) for said, token in zip(likeliest, true, strict=True)]
    assert 0 < sum(hits) < len(hits)
    found = evaluate(next_tokens, template="minimal", verifiers=[{"kind": "next_token"}])
    assert set(found) == {"plain", "greedy"}
    assert list(found["plain"]) == ["all", "easy", "medium", "hard"]
    for place, band in enumerate(("easy", "medium", "hard")):
        part = hits[place::3]
        numbers = found["plain"][band]
        assert (numbers["right"], numbers["questions"]) == (sum(part), len(part))
        assert numbers["first_token_accuracy"] == numbers["accuracy"]
    assert found["plain"]["all"]["right"] == sum(hits)
    reasoning = found["greedy"]["all"]  # a model that has never seen a box
    assert (reasoning["right"], reasoning["format_rate"], reasoning["truncated_share"]) == (0, 0.0, 1.0)
    assert reasoning["length_mean_tokens"] == NEW and reasoning["interval"][1] > 0.0


def test_modes_can_be_had_alone(evaluate: Evaluate, next_tokens: Path) -> None:
    plain = evaluate(next_tokens, **PLAIN)
    assert set(plain) == {"plain"}
    reasoning = evaluate(next_tokens, mode="reasoning", verifiers=[{"kind": "next_token"}], max_questions=4)
    assert set(reasoning) == {"greedy"} and reasoning["greedy"]["all"]["questions"] == 4


def test_the_plain_mode_sees_the_context_that_reasoning_sees(evaluate: Evaluate, next_tokens: Path) -> None:
    """Cut to one token for both, so that only that decides."""
    around = "{context}" + "x" * 9
    cut = evaluate(next_tokens, template=around, verifiers=[{"kind": "next_token"}], max_prompt_tokens=10)
    alone = evaluate(next_tokens, **PLAIN, max_prompt_tokens=1)
    whole = evaluate(next_tokens, **PLAIN)
    assert cut["plain"] == alone["plain"] != whole["plain"]


def test_samples_give_pass_at_k(evaluate: Evaluate, questions: Path) -> None:
    sampling = {"samples": 5, "greedy": False, "temperature": 1.5, "verifiers": RARE}
    found = evaluate(questions, **sampling)["sampled"]["all"]
    assert list(found["pass_at_k"]) == ["1", "2", "4", "5"] and found["answers"] == 70
    values = [found["pass_at_k"][k]["value"] for k in ("1", "2", "4", "5")]
    assert values == sorted(values) and 0.0 < values[0] < values[-1] and values[0] == pytest.approx(found["right"] / 70)
    for each in found["pass_at_k"].values():
        low, high = each["interval"]
        assert each["questions"] == 14 and low <= each["value"] <= high and low < high
    again = evaluate(questions, **sampling, k=(5, 2))["sampled"]["all"]
    assert again["pass_at_k"] == {k: found["pass_at_k"][k] for k in ("2", "5")}
    other = evaluate(questions, **sampling, seed=7)["sampled"]["all"]
    assert other["length_mean_tokens"] != found["length_mean_tokens"] or other["right"] != found["right"]


def test_a_table_shows_every_measure(trained: str, next_tokens: Path, questions: Path, cpu_runtime: Runtime) -> None:
    both = {"tokens": str(next_tokens), "sums": str(questions)}
    options = options_for(trained, next_tokens, questions=both, samples=2, output="table")
    shown = report_of(options, cpu_runtime)
    assert max(map(len, shown.splitlines()[1:])) <= 80 and "…" not in shown
    for word in ("tokens", "sums", "easy", "hard", "plain", "greedy", "pass@1", "pass@2", "95%"):
        assert word in shown


class Scripted:
    """An engine that says what it was told to, one completion after the other, whatever it is asked."""

    def __init__(self, said: Sequence[str], on_call: Callable[[], None] = lambda: None) -> None:
        self.said, self.on_call, self.policy_version = iter(said), on_call, 0

    def generate(self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling) -> list[RolloutGroup]:
        self.on_call()
        return [RolloutGroup(prompt, [self.completion(next(self.said)) for _ in range(group_size)]) for prompt in prompts]

    @staticmethod
    def completion(text: str) -> Completion:
        stop = StopReason.LENGTH if text.endswith("...") else StopReason.STOP
        content = text.encode()
        return Completion(tokens=tuple(content), logprobs=(0.0,) * len(content), text=content, stop=stop, policy_version=0)


# a record as it is published, the verifier of its kind, and three right and three wrong answers
PUBLISHED: dict[str, tuple[dict[str, Any], str, Sequence[str], Sequence[str]]] = {
    "gsm8k": (
        {"question": "How much is 6 + 12?", "answer": "6 + 12 = <<6+12=18>>18\n#### 18"},
        "math",
        ("so</think>\\boxed{18}", "</think>It is $\\boxed{\\frac{36}{2}}$.", "a</think>b</think>\\boxed{18.0}"),
        ("so</think>\\boxed{19}", "\\boxed{18}", "so</think>\\boxed{18..."),
    ),
    "svamp": (
        {"Body": "There are 290 bananas in 2 groups", "Question": "How big is each?", "Answer": 145.0, "ID": "chal-777"},
        "math",
        ("x</think>\\boxed{145}", "x</think>\\boxed{145.0}", "x</think>\\boxed{290/2}"),
        ("x</think>\\boxed{290}", "x</think>", "x..."),
    ),
    "choice": (
        {"question": "Which is a fruit?", "choices": ["stone", "fig", "sock"], "answer": "B"},
        "multiple_choice",
        ("</think>\\boxed{B}", "</think>\\boxed{(b)}", "</think>The answer is B."),
        ("</think>\\boxed{C}", "</think>B or C", "B..."),
    ),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_formats_from_the_file_to_the_numbers(
    kind: str, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, verifier, right, wrong = PUBLISHED[kind]
    path = write_lines(tmp_path / "asked.jsonl", [record | {"ID": f"q{i}"} for i in range(3)])
    greedy = [right[0], wrong[0], right[1]]
    samples = [right[0], wrong[0], right[1], wrong[1], *wrong, wrong[0], right[2], right[0], right[1], right[2]]
    monkeypatch.setattr(evaluate_answers, "EmbeddedEngine", lambda *_, **__: Scripted([*greedy, *samples]))
    found = evaluate(path, template="{question}?", verifiers=[{"kind": verifier}], samples=4)
    assert found["greedy"]["all"]["right"] == 2 and found["greedy"]["all"]["accuracy"] == 2 / 3
    sampled = found["sampled"]["all"]
    assert (sampled["right"], sampled["answers"], sampled["unknown"]) == (6, 12, 0)
    assert sampled["truncated_share"] == sum(text.endswith("...") for text in samples) / 12
    values = {k: each["value"] for k, each in sampled["pass_at_k"].items()}
    # of four answers two, none and four are right
    assert values == pytest.approx({"1": (1 / 2 + 0 + 1) / 3, "2": (5 / 6 + 0 + 1) / 3, "4": 2 / 3})


def test_a_signal_ends_it_without_a_report(
    trained: str,
    questions: Path,
    cpu_runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = Scripted(["x"] * 14, on_call=lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(evaluate_answers, "EmbeddedEngine", lambda *_, **__: engine)
    with pytest.raises(StopRequested, match="stopped on SIGTERM in the evaluation"):
        evaluate_answers.run(options_for(trained, questions), cpu_runtime)
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------------------------- layouts


def on_a_rank(options: EvaluateAnswersOptions) -> str:
    return report_of(options, runtime.start("cpu"))


@pytest.mark.parametrize("parallel", [{}, {"tensor_model_parallel_size": 2}], ids=["dp2", "tp2"])
def test_two_ranks_are_one_process(
    parallel: dict[str, int], trained: str, questions: Path, next_tokens: Path, cpu_runtime: Runtime
) -> None:
    changes = {"questions": {"sums": str(questions), "tokens": str(next_tokens)}, "samples": 2, "max_new_tokens": 8}
    alone = report_of(options_for(trained, questions, **changes), cpu_runtime)
    first, second = spawn(2, on_a_rank, options_for(trained, questions, **changes, parallel=parallel))
    assert json.loads(first) == json.loads(alone) and second == ""


# --------------------------------------------------------------------------------------------------- runs of `megarpt rl`


def test_a_run_of_rl_says_what_it_was_trained_for(
    tmp_path: Path, questions: Path, cpu_runtime: Runtime, evaluate: Evaluate
) -> None:
    checkpoint = untrained_rl_run(tmp_path, cpu_runtime)
    found = evaluate(questions, checkpoint, template=None, verifiers=[], max_new_tokens=None)["greedy"]["all"]
    assert found["length_mean_tokens"] <= 12 and found["format_rate"] is not None  # rollout.max_new_tokens, and `exact`
    assert evaluate(questions, checkpoint, template=None, verifiers=[])["greedy"]["all"]["length_mean_tokens"] > 12
    stopped = evaluate(questions, checkpoint, stop=tuple(map(chr, range(128))))["greedy"]["all"]
    assert stopped["length_mean_tokens"] < found["length_mean_tokens"]


def untrained_rl_run(folder: Path, runtime: Runtime) -> str:
    cfg = RLConfig.model_validate(
        {
            "command": "rl",
            "run": {"dir": str(folder)},
            "model": {"preset": "tiny", "mcore": TWO_LAYERS, "init_from": "somewhere"},
            "data": {"tokenizer": "bytes", "train": "prompts.jsonl", "template": "question_minimal", "max_prompt_tokens": 100},
            "rollout": {"max_new_tokens": 12},
            "verifiers": [{"kind": "exact"}],
            "train": {"train_steps": 1},
        }
    )
    layout = ParallelLayout()
    groups = layout.initialize(seed=1)
    torch.manual_seed(1)
    chunks = build_model(cfg, layout, groups, runtime, vocab_size=257)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, chunks, groups)
    sha256 = byte_tokenizer().sha256
    with CheckpointManager(folder / "checkpoints", cfg, tokenizer_sha256=sha256, runtime=runtime, groups=groups) as manager:
        manager.save(TrainState(data={}), chunks, optimizer, scheduler)
        manager.finish()
        return str(manager.newest)


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": None, "verifiers": []}, "--template and --verifier: missing"),
        ({"verifiers": []}, "--verifier: missing"),
        ({"greedy": False}, "got 0 with --no-greedy"),
        ({"samples": 2, "k": (1, 3)}, "--k: got 3, expected at most the 2 answers"),
        ({"max_new_tokens": SEQUENCE}, "exceed the 128 tokens"),
        ({"max_prompt_tokens": 120}, "prompts of up to 120 tokens and 24 new ones"),
        (PLAIN, "--mode: got plain, but .* holds questions"),
        (PLAIN | {"samples": 2, "template": "question"}, "got plain, .* ignores --samples, --template"),
        ({"temperature": 0.5, "top_k": 3}, "--samples: got 0, expected at least 1 with --temperature, --top-k"),
        ({"stop": ("two",)}, "--stop: got 'two', expected the text of a single token"),
        ({"parallel": {"pipeline_model_parallel_size": 2}}, "world"),
        ({"template": "minimal"}, r"expected one with \{question\}"),
    ],
)
def test_options_that_do_not_go_together(
    changes: dict[str, Any], words: str, trained: str, questions: Path, cpu_runtime: Runtime
) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluate_answers.run(options_for(trained, questions, **changes), cpu_runtime)


def test_answers_of_another_kind_are_refused(trained: str, questions: Path, cpu_runtime: Runtime) -> None:
    with pytest.raises(DataError, match="needs answer"):
        evaluate_answers.run(options_for(trained, questions, verifiers=[{"kind": "next_token"}]), cpu_runtime)


# ------------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, logging_as_before: None) -> Callable[..., list[EvaluateAnswersOptions]]:
    """Runs `megarpt evaluate run ...` without evaluating."""

    def go(*arguments: str, code: int = EXIT_OK) -> list[EvaluateAnswersOptions]:
        calls: list[EvaluateAnswersOptions] = []

        def note(options: EvaluateAnswersOptions, runtime: Runtime) -> int:
            calls.append(options)
            return EXIT_OK

        monkeypatch.setattr(evaluate_answers, "run", note)
        monkeypatch.setattr(runtime, "start", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(contextlib.nullcontext, "close", lambda self: None, raising=False)
        assert cli.main(["evaluate", "run", *arguments]) == code
        return calls

    return go


def test_options_of_the_command_line(command: Callable[..., list[EvaluateAnswersOptions]]) -> None:
    (plain,) = command("--questions", "data/gsm8k_test.jsonl", "--template", "question", "--verifier", "math")
    assert plain.questions == {"gsm8k_test": "data/gsm8k_test.jsonl"} and plain.verifiers[0].kind == "math"
    assert (plain.greedy, plain.samples, plain.k, plain.stop, plain.output) == (True, 0, (), None, "table")
    (bare,) = command("--questions", "q", "--mode", "plain")  # what was not said is not set
    assert bare.model_fields_set == {"checkpoint", "questions", "mode", "parallel", "device", "output"}
    rules = ["--verifier", "math,require_box=true,limit_s=2.5", "--verifier", "format,weight=0.5,pattern=a+"]
    sampling = ["--samples", "8", "--k", "1, 8", "--no-greedy", "--temperature", "0.6", "--top-p", "0.9", "--stop", "\n"]
    (full,) = command("--questions", "a=x", "--questions", "b=y", *rules, *sampling, "--tensor-model-parallel-size", "2")
    assert full.questions == {"a": "x", "b": "y"} and full.parallel.tensor_model_parallel_size == 2
    assert [(each.kind, each.require_box, each.limit_s, each.weight, each.pattern) for each in full.verifiers] == [
        ("math", True, 2.5, 1.0, None),
        ("format", False, None, 0.5, "a+"),
    ]
    assert (full.samples, full.k, full.greedy, full.temperature, full.top_p, full.stop) == (8, (1, 8), False, 0.6, 0.9, ("\n",))


def test_every_option_of_questions_is_refused_without_them() -> None:
    own = set(EvaluateAnswersOptions.model_fields) - set(EvaluateOptions.model_fields)
    assert {"questions", "verifiers", *cli._ONLY_QUESTIONS} == own | {"verifier"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--questions", "q", "--corpus", "a=b"], "--corpus: no effect with --questions"),
        (["--questions", "q", "--max-tokens", "9"], "--max-tokens: no effect with --questions"),
        (["--samples", "4", "--template", "t"], "--template, --samples: no effect without --questions"),
        (["--corpus", "a=b", "--no-greedy"], "--greedy: no effect without --questions"),
        (["--questions", "a/q.jsonl", "--questions", "b/q.jsonl"], "a second of this name"),
        (["--questions", "=q"], "expected FILE or NAME=FILE"),
        (["--questions", "q", "--verifier", "math,require_box"], "expected KIND,OPTION=VALUE"),
        (["--questions", "q", "--verifier", "maths"], "verifiers.0.kind: got 'maths'"),
        (["--questions", "q", "--k", "1,two"], "--k: got '1,two'"),
    ],
)
def test_a_command_line_that_means_nothing(
    arguments: list[str],
    words: str,
    command: Callable[..., list[EvaluateAnswersOptions]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(*arguments, code=EXIT_CONFIG) == []
    assert words in capsys.readouterr().err
