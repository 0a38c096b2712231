"""`megarpt verify-resume`: sees that a resume is exact, and sees it when it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarpt.config.load import dump_resolved
from megarpt.config.schema import PretrainConfig, VerifyResumeOptions
from megarpt.device.runtime import Runtime
from megarpt.errors import EXIT_DATA, EXIT_NOT_REPRODUCED, EXIT_OK, ConfigError
from megarpt.model.build import build_model
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.run import verify_resume
from megarpt.run.verify_resume import AttemptFailedError, Verification
from megarpt.testing.configs import TWO_LAYERS
from megarpt.train.comparison import Comparison
from megarpt.train.optimizer import build_optimizer

STEPS, STEP_TOKENS = 12, 8 * 64
SETTINGS: dict[str, Any] = {
    "train.precision": "bf16",
    "model.mcore": TWO_LAYERS | {"hidden_dropout": 0.1},
    "objective": {"scorer": "loss", "weighting": "top_fraction", "fraction": 0.6},
    "logging.histogram_interval_steps": 5,
    "run.device": "cpu",
}

# `megarpt`, with the random states left as they are when a checkpoint is loaded.
FORGETFUL = """
import json
import subprocess
import sys
from megarpt.device.runtime import Runtime
Runtime.set_rng_state = lambda self, state: None
from megarpt.cli import main
sys.exit(main())
"""

MakeConfig = Callable[..., PretrainConfig]


def verify(cfg: PretrainConfig, runtime: Runtime, **options: Any) -> int:
    return verify_resume.run(cfg, VerifyResumeOptions(steps=STEPS, **options), runtime)


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes that import everything, on machines that are busy
def test_an_exact_resume_is_called_equal(
    make_config: MakeConfig, cpu_runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = make_config(**SETTINGS)
    before = sorted(tmp_path.iterdir())
    assert verify(cfg, cpu_runtime, nproc_per_node=2) == EXIT_OK
    shown = capsys.readouterr().out
    assert "Equal to the last bit: 2 ranks, killed in step" in shown and "resumed from step 6, ended at step 12." in shown
    assert shown.count(" equal ") == 6 and "DIFFERENT" not in shown
    assert sorted(tmp_path.iterdir()) == before  # neither the user's run folder nor ours


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes that import everything, on machines that are busy
def test_a_resume_that_forgets_its_random_states_is_caught(
    make_config: MakeConfig,
    cpu_runtime: Runtime,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    monkeypatch.setattr(verify_resume, "PROGRAM", (str(tmp_path / "forgetful.py"),))
    assert verify(make_config(**SETTINGS), cpu_runtime) == EXIT_NOT_REPRODUCED
    shown = capsys.readouterr().out
    assert "NOT EQUAL: 1 rank" in shown and "it is the resume that changes the run" in shown
    for named in (
        "  metrics lines: step 7, train line: train/loss_nats: ",
        "  parameters: ",
        "  optimizer state: optimizer.state.",
        "  random states, schedule, data position, counters: ",
    ):
        assert named in shown, shown
    (kept,) = tmp_path.glob("run.verify-resume-*")
    assert f"The runs are kept in {kept}" in shown and (kept / "resumed" / "metrics.discarded.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes that import everything, on machines that are busy
def test_under_a_launcher_every_rank_watches_its_own(make_config: MakeConfig, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_resolved(make_config(**SETTINGS)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "megarpt", "verify-resume", str(config), "--steps", str(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("Equal to the last bit: 2 ranks") == 1


@pytest.mark.parametrize(
    ("program", "message", "code"),
    [
        (
            "import sys; print('no such corpus'); sys.exit(79)",
            r"straight attempt ended with exit code 79 on rank 0; (.|\n)*corpus",
            EXIT_DATA,
        ),
        ("import os; os.kill(os.getpid(), 11)", "straight attempt ended with exit code -11 on rank 0", 1),
        ("pass", "interrupted attempt ended before it could be killed: use more --steps", 1),
    ],
)
def test_an_attempt_that_fails_says_why(
    make_config: MakeConfig,
    cpu_runtime: Runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    message: str,
    code: int,
) -> None:
    monkeypatch.setattr(verify_resume, "PROGRAM", ("-c", program))
    with pytest.raises(AttemptFailedError, match=message) as failed:
        verify(make_config(**SETTINGS), cpu_runtime)
    assert failed.value.exit_code == code
    assert list(tmp_path.glob("run.verify-resume-*/*.rank0.log"))


def test_nothing_outlives_an_interruption(
    make_config: MakeConfig, cpu_runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Noted)
    monkeypatch.setattr(Verification, "_progress", interrupt)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        verify(make_config(**SETTINGS), cpu_runtime)
    assert len(started) == 1 and started[0].poll() == -9
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("style", ["cosine", "constant"])
def test_the_attempts_keep_the_learning_rates_and_leave_the_users_files_alone(
    make_config: MakeConfig, cpu_runtime: Runtime, one_rank: ProcessGroups, tmp_path: Path, style: str
) -> None:
    cfg = make_config(
        **SETTINGS,
        **{
            "train.train_tokens": 100 * STEP_TOKENS,
            "optimizer": {"lr": 3e-3, "lr_warmup_tokens": 15 * STEP_TOKENS, "lr_decay_style": style},
            "logging.wandb_project": "p",
            "checkpoint": {"interval_steps": 50, "keep_every_steps": 100},
        },
    )
    made = Verification(cfg, VerifyResumeOptions(steps=STEPS), cpu_runtime, tmp_path / "ours")
    assert made.middle == 6 and 7 <= made._kill_from <= 11
    wanted = learning_rates(cfg, cpu_runtime, one_rank)
    assert len(set(wanted)) >= 15
    for steps, save_every in ((STEPS, 0), (600, 6)):
        attempt = made._config("straight", steps, save_every=save_every)
        assert attempt.train.train_tokens == steps * STEP_TOKENS
        assert learning_rates(attempt, cpu_runtime, one_rank) == wanted
        assert Path(attempt.run.dir).parent == tmp_path / "ours"
        assert (attempt.evaluation.interval_steps, attempt.evaluation.max_tokens) == (3, STEP_TOKENS)
        assert (attempt.logging.tensorboard, attempt.logging.wandb_project) == (False, None)
        for section in ("model", "data", "batch", "objective", "parallel"):
            assert getattr(attempt, section) == getattr(cfg, section)


def learning_rates(cfg: PretrainConfig, runtime: Runtime, groups: ProcessGroups) -> list[float]:
    """Of the first 40 steps."""
    model = build_model(cfg, ParallelLayout(tp=1, dp=1), groups, runtime, vocab_size=257)
    optimizer, scheduler = build_optimizer(cfg.optimizer, cfg.train, model, groups)
    rates = []
    for _ in range(40):
        scheduler.step(increment=STEP_TOKENS)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (7, None),
        (0, "the resume threw away the steps from 0 on, expected those from step 7 on"),
        (None, "the resume threw away no steps, expected those from step 7 on"),
    ],
)
def test_beginning_again_is_no_resume(
    make_config: MakeConfig, cpu_runtime: Runtime, tmp_path: Path, first: int | None, message: str | None
) -> None:
    made = Verification(make_config(**SETTINGS), VerifyResumeOptions(steps=STEPS), cpu_runtime, tmp_path)
    (tmp_path / "resumed").mkdir()
    if first is not None:
        lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in range(first, 10)]
        (tmp_path / "resumed" / "metrics.discarded.jsonl").write_text("".join(lines))
    assert made._start_of_the_resume().difference == message


@pytest.mark.parametrize(
    ("backend", "where", "words"),
    [
        ("gloo", 0, "the steps themselves are not repeatable here."),
        ("nccl", 0, "CUBLAS_WORKSPACE_CONFIG"),
        ("nccl", 1, "it is the resume that changes the run"),
    ],
)
def test_the_verdict_says_whose_fault_it_is(
    make_config: MakeConfig, cpu_runtime: Runtime, tmp_path: Path, backend: str, where: int, words: str
) -> None:
    made = Verification(make_config(**SETTINGS), VerifyResumeOptions(steps=STEPS), cpu_runtime, tmp_path)
    (tmp_path / "straight").mkdir()
    (tmp_path / "straight" / "environment.json").write_text(json.dumps({"backend": backend}))
    results = [Comparison(f"thing {i}", 1, None, "a: 1 and 2" if i >= where else None) for i in range(3)]
    text = made.verdict(results)
    assert words in text and "  thing 2: a: 1 and 2" in text
    assert ("CUBLAS" in text) == ((backend, where) == ("nccl", 0))


def test_ranks_are_asked_for_once(make_config: MakeConfig) -> None:
    two = Runtime(device=None, backend="gloo", rank=0, world_size=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--nproc-per-node: got 4, but a launcher has started 2 ranks already"):
        verify(make_config(**SETTINGS), two, nproc_per_node=4)
