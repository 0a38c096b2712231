"""The metrics log: each step once, whatever happened to the process."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from megarpt.config.schema import LoggingConfig, ObjectiveConfig
from megarpt.errors import DataError
from megarpt.objectives.build import build_objective
from megarpt.structs import Progress, TokenStats
from megarpt.train.metrics import MetricLog, decoded_sample, kept_shares
from megarpt.train.metrics_file import MetricsFile, read_metrics, rewind_metrics
from megarpt.train.perf import PerfMeter, host_memory
from megarpt.train.phases import Phase
from megarpt.train.reports import MACHINE_PREFIXES, EvaluationResult, PartSums, TokenSplit, comparable, step_scalars
from megarpt.train.rundir import RunDir
from megarpt.train.stragglers import Slowest
from megarpt.train.timers import StepTimers

RESULT = EvaluationResult(loss_sum_nats=200.0, num_tokens=100, num_correct=25, bytes_per_token=4.0, seconds=1.5)
SPLIT_RESULT = replace(RESULT, split=TokenSplit(PartSums(60.0, 60.0, 20.0), PartSums(140.0, 40.0, 5.0), 3))


class RecordingSink:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def scalars(self, values: Any, progress: Progress) -> None:
        self.calls.append(("scalars", dict(values), progress.step))

    def histogram(self, tag: str, values: np.ndarray, progress: Progress) -> None:
        self.calls.append(("histogram", tag, values, progress.step))

    def text(self, tag: str, markdown: str, progress: Progress) -> None:
        self.calls.append(("text", tag, markdown, progress.step))

    def rewind(self, progress: Progress) -> None:
        self.calls.append(("rewind", progress.step))

    def flush(self) -> None:
        self.calls.append(("flush",))

    def close(self, is_finished: bool) -> None:
        self.calls.append(("close", is_finished))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path, is_writer=True)


def train(run: RunDir, steps: range, resume: Progress | None, report_at: Any, progress_at: Any, clock: float = 0.0) -> None:
    """A loop that evaluates every third step; the clock makes machine fields differ between attempts."""
    ticks = iter(np.arange(clock, clock + 1e6))
    with MetricLog(run, LoggingConfig(), resume=resume, clock=lambda: float(next(ticks))) as log:
        for step in steps:
            log.step(report_at(step), progress_at(step), {"perf/tokens_per_s": clock + step})
            if step % 3 == 0 and not log.has_evaluation(step):
                log.evaluation({"clean": RESULT}, progress_at(step))
            log.flush()


def test_lines_are_strict_json_with_the_counters_first(run: RunDir, report_at: Any, progress_at: Any) -> None:
    train(run, range(1, 4), None, report_at, progress_at)
    lines = run.metrics_path.read_text().splitlines()
    first = json.loads(lines[0], parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert list(first)[:5] == ["kind", "step", "samples", "tokens/seen", "tokens/trained"]
    assert first["train/loss_nats"] == 5.0 and first["select/kept_fraction"] == 0.6 and first["train/aux"] == 0.1
    assert [json.loads(line)["kind"] for line in lines] == ["train", "train", "train", "valid"]


def test_non_finite_numbers_are_strings_in_the_file_and_numbers_for_the_reader(
    run: RunDir, progress_at: Any, report_at: Any
) -> None:
    with MetricLog(run, LoggingConfig()) as log:
        log.step(report_at(1, skipped=True), progress_at(1), {"optim/a": math.inf, "optim/b": -math.inf})
    raw = json.loads(run.metrics_path.read_text())
    assert (raw["train/loss_nats"], raw["optim/a"], raw["optim/b"]) == ("nan", "inf", "-inf")
    (line,) = read_metrics(run.metrics_path)
    assert math.isnan(float(line["train/loss_nats"])) and line["optim/a"] == math.inf and line["optim/b"] == -math.inf
    assert line["kind"] == "train"


@pytest.mark.parametrize("killed_after", [4, 5, 6, 7, 9])
@pytest.mark.parametrize("torn", [b"", b'{"kind": "train", "step": 10, "sam', b"\x00" * 300])
def test_a_killed_and_resumed_file_equals_the_uninterrupted_one(
    tmp_path: Path, killed_after: int, torn: bytes, report_at: Any, progress_at: Any
) -> None:
    straight, resumed = tmp_path / "a", tmp_path / "b"
    straight.mkdir()
    resumed.mkdir()
    train(RunDir(straight, is_writer=True), range(1, 13), None, report_at, progress_at)
    run = RunDir(resumed, is_writer=True)
    train(run, range(1, killed_after + 1), None, report_at, progress_at, clock=100.0)
    with run.metrics_path.open("ab") as file:
        file.write(torn)
    run.restarts = 1
    train(run, range(5, 13), progress_at(4), report_at, progress_at, clock=900.0)

    lines = [list(map(comparable, read_metrics(folder / "metrics.jsonl"))) for folder in (straight, resumed)]
    assert lines[0] == lines[1]
    assert list(read_metrics(straight / "metrics.jsonl")) != list(read_metrics(resumed / "metrics.jsonl"))


def test_a_fresh_start_moves_older_lines_away(run: RunDir, report_at: Any, progress_at: Any) -> None:
    train(run, range(1, 4), None, report_at, progress_at)
    before = run.metrics_path.read_bytes()
    train(run, range(1, 2), None, report_at, progress_at)
    assert [line["step"] for line in read_metrics(run.metrics_path)] == [1]
    assert run.metrics_path.with_name("metrics.discarded.jsonl").read_bytes() == before


def test_rewinding_twice_changes_nothing(run: RunDir, report_at: Any, progress_at: Any) -> None:
    train(run, range(1, 7), None, report_at, progress_at)
    assert rewind_metrics(run.metrics_path, 3) == {"train", "valid"}
    once = run.metrics_path.read_bytes()
    assert rewind_metrics(run.metrics_path, 3) == {"train", "valid"}
    assert run.metrics_path.read_bytes() == once


def test_going_back_in_a_run_leaves_what_a_resume_would(run: RunDir, report_at: Any, progress_at: Any) -> None:
    sink = RecordingSink()
    with MetricLog(run, LoggingConfig(), sinks=[sink]) as log:
        for step in (1, 2, 3, 4, 5):
            log.step(report_at(step), progress_at(step))
            if step % 3 == 0:
                log.evaluation({"clean": RESULT}, progress_at(step))
        log.rewind(progress_at(2))
        for step in (3, 4):
            log.step(report_at(step), progress_at(step))
        log.evaluation({"clean": RESULT}, progress_at(4))
    lines = [(line["kind"], line["step"]) for line in read_metrics(run.metrics_path)]
    assert lines == [("train", 1), ("train", 2), ("train", 3), ("train", 4), ("valid", 4)]
    discarded = run.metrics_path.with_name("metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [3, 3, 4, 5]
    assert sink.calls[6] == ("rewind", 2)


def test_an_evaluation_on_file_is_not_written_again(run: RunDir, report_at: Any, progress_at: Any) -> None:
    train(run, range(1, 4), None, report_at, progress_at)
    sink = RecordingSink()
    log = MetricLog(run, LoggingConfig(), sinks=[sink], resume=progress_at(3))
    assert log.has_evaluation(3) and not log.has_evaluation(2)
    log.evaluation({"clean": RESULT}, progress_at(3))
    log.close()
    assert [line["kind"] for line in read_metrics(run.metrics_path, "valid")] == ["valid"]
    assert [call[0] for call in sink.calls] == ["close"]


def test_steps_not_due_are_left_out_and_skipped_steps_never(run: RunDir, report_at: Any, progress_at: Any) -> None:
    with MetricLog(run, LoggingConfig(interval_steps=4)) as log:
        for step in range(1, 10):
            log.step(report_at(step, skipped=step == 6), progress_at(step))
    assert [line["step"] for line in read_metrics(run.metrics_path)] == [4, 6, 8]


def test_only_the_writer_writes(tmp_path: Path, report_at: Any, progress_at: Any, token_work: Any, decode_bytes: Any) -> None:
    sink = RecordingSink()
    run = RunDir(tmp_path / "absent", is_writer=False)
    with MetricLog(run, LoggingConfig(), sinks=[sink]) as log:
        log.step(report_at(1), progress_at(1))
        log.evaluation({"clean": SPLIT_RESULT}, progress_at(1))
        log.tokens(*token_work, decode_bytes, progress_at(1))
        log.text("a", "b", progress_at(1))
        log.flush()
    assert not run.path.exists() and sink.calls == []


def test_going_backwards_is_a_mistake(run: RunDir, report_at: Any, progress_at: Any) -> None:
    with MetricLog(run, LoggingConfig()) as log:
        log.step(report_at(5), progress_at(5))
        with pytest.raises(AssertionError, match="step 4 after 5"):
            log.step(report_at(4), progress_at(4))


def test_tokens_send_histograms_shares_and_a_sample(run: RunDir, token_work: Any, decode_bytes: Any, progress_at: Any) -> None:
    sink = RecordingSink()
    with MetricLog(run, LoggingConfig(), sinks=[sink]) as log:
        log.tokens(*token_work, decode_bytes, progress_at(2))
    (line,) = read_metrics(run.metrics_path)
    assert line["kind"] == "sample"
    assert line["select/sequence_kept_min"] == pytest.approx(0.4) and line["select/sequence_kept_max"] == pytest.approx(0.8)
    assert line["train/token_loss_nats_p50"] == pytest.approx(1.25)  # of 0, 1/4 .. 1 and 3/2 .. 5/2
    histograms = {call[1]: call[2] for call in sink.calls if call[0] == "histogram"}
    assert set(histograms) == {"train/token_loss_nats_histogram", "select/excess_nats_histogram"}
    assert histograms["select/excess_nats_histogram"].size == 10
    np.testing.assert_allclose(np.sort(histograms["select/excess_nats_histogram"])[[0, -1]], [-1.0, 1.5])
    (text,) = [call for call in sink.calls if call[0] == "text"]
    assert text[1] == "samples/kept_tokens"
    assert text[2].endswith("<strong>he</strong> <strong>ca</strong>")


def test_a_sample_shows_labels_and_not_padding(token_work: Any, decode_bytes: Any) -> None:
    batch, output = token_work
    batch.loss_mask[0, 2:] = False
    head, body = decoded_sample(batch, output, decode_bytes).split("\n\n")
    assert head == "source 0, sample 7: 2 of 2 tokens kept (bold)"
    assert body == "<strong>he</strong>"


def test_non_finite_token_losses_do_not_break_the_histograms(
    run: RunDir, token_work: Any, decode_bytes: Any, progress_at: Any
) -> None:
    batch, output = token_work
    output.token_loss[:] = math.nan
    output.weight[:] = 0.0
    batch.loss_mask[0] = False
    with MetricLog(run, LoggingConfig(), sinks=[RecordingSink()]) as log:
        log.tokens(batch, output, decode_bytes, progress_at(2))
    (line,) = read_metrics(run.metrics_path)
    assert line["select/sequence_kept_mean"] == 0.0 and "train/token_loss_nats_p50" not in line


def test_shares_of_a_batch_without_labels_are_absent() -> None:
    assert kept_shares(np.zeros((2, 3), bool), np.ones((2, 3))) == {}


def test_a_full_disk_leaves_whole_lines_and_says_what_to_do(
    run: RunDir, report_at: Any, progress_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    log = MetricLog(run, LoggingConfig())
    log.step(report_at(1), progress_at(1))
    whole = run.metrics_path.read_bytes()
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:20]))
    with pytest.raises(DataError, match=r"cannot write .*metrics\.jsonl: No space left.*free space"):
        log.step(report_at(2), progress_at(2))
    monkeypatch.undo()
    assert run.metrics_path.read_bytes() == whole
    log.step(report_at(3), progress_at(3))
    log.close()
    assert [line["step"] for line in read_metrics(run.metrics_path)] == [1, 3]


def test_a_device_without_room_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    file = MetricsFile(path)
    with pytest.raises(DataError, match="No space left on device"):
        file.append({"kind": "train", "step": 1})
    file.close()


@pytest.mark.parametrize("delay_s", [0.0, 0.004, 0.02])
def test_a_process_killed_while_writing_leaves_every_line_it_was_told_of(tmp_path: Path, delay_s: float) -> None:
    path = tmp_path / "metrics.jsonl"
    script = (
        "import itertools, os, sys\n"
        "from pathlib import Path\n"
        "from megarpt.train.metrics_file import MetricsFile\n"
        "file = MetricsFile(Path(sys.argv[1]))\n"
        "for step in itertools.count(1):\n"
        "    file.append({'kind': 'train', 'step': step, 'x': 'y' * 500})\n"
        "    os.write(1, b'%d\\n' % step)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(delay_s)
    process.kill()
    told = (first + process.stdout.read()).splitlines()
    process.wait()
    steps = [line["step"] for line in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= len(told) - 1
    rewind_metrics(path, len(steps) // 2)
    assert [line["step"] for line in read_metrics(path)] == steps[: len(steps) // 2]


def test_a_dashboard_on_a_full_disk_is_an_error_with_a_path(run: RunDir, report_at: Any, progress_at: Any) -> None:
    class Full(RecordingSink):
        def scalars(self, values: Any, progress: Progress) -> None:
            raise OSError(28, "No space left on device")

    log = MetricLog(run, LoggingConfig(), sinks=[Full()])
    with pytest.raises(DataError, match="No space left"):
        log.step(report_at(1), progress_at(1))
    assert len(list(read_metrics(run.metrics_path))) == 1


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        list(read_metrics(path))


def test_the_file_may_be_empty_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert rewind_metrics(path, 3) == set()
    path.touch()
    assert rewind_metrics(path, 3) == set()
    path.write_bytes(b'{"kind"')
    assert rewind_metrics(path, 3) == set()
    assert path.read_bytes() == b""


def test_evaluation_arithmetic() -> None:
    assert RESULT.loss_nats == 2.0 and RESULT.top1 == 0.25
    assert RESULT.perplexity == pytest.approx(math.e**2)
    assert RESULT.bits_per_byte == pytest.approx(2.0 / math.log(2.0) / 4.0)
    unknown = EvaluationResult(loss_sum_nats=2e6, num_tokens=2, num_correct=0, bytes_per_token=None, seconds=0.0)
    assert unknown.bits_per_byte is None and unknown.perplexity == math.inf
    assert "valid/x/bits_per_byte" not in unknown.scalars("x")


def test_the_parts_of_a_split_have_their_own_means() -> None:
    tags = SPLIT_RESULT.scalars("x")
    assert (tags["valid/x/kept_like_loss_nats"], tags["valid/x/dropped_like_loss_nats"]) == (1.0, 3.5)
    assert (tags["valid/x/kept_like_top1"], tags["valid/x/dropped_like_top1"]) == (20 / 60, 5 / 40)
    assert tags["valid/x/split_step"] == 3.0
    everything = TokenSplit(PartSums(200.0, 100.0, 25.0), PartSums(0.0, 0.0, 0.0), 3)
    nothing = replace(RESULT, split=everything).scalars("x")
    assert nothing["valid/x/dropped_like_tokens"] == 0.0 and "valid/x/dropped_like_top1" not in nothing


def test_an_evaluation_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="no token to predict"):
        EvaluationResult(loss_sum_nats=0.0, num_tokens=0, num_correct=0, bytes_per_token=None, seconds=0.0)


def objective_tags(token_work: Any) -> set[str]:
    """Everything that selections report."""
    batch, output = token_work
    stats = TokenStats(logprob=-output.token_loss, entropy=None)
    tags: set[str] = set()
    for options in ({}, {"second": {"scorer": "loss", "fraction": 0.6}}, {"scope": "lagged_global_batch"}):
        sections = {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": 0.6, **options}
        objective = build_objective(ObjectiveConfig.model_validate(sections), seed=1, num_sources=2)
        chosen = objective.select([stats], [batch], Progress(), None)
        result = objective(stats, batch, chosen[0], Progress())
        tags |= set(result.metrics)
        if objective.learns_from_steps:
            tags |= set(objective.settle([(batch, result)], None))
    return tags


def test_every_tag_is_documented(run: RunDir, report_at: Any, progress_at: Any, token_work: Any, decode_bytes: Any) -> None:
    document = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", document, flags=re.MULTILINE)
    documented = [re.compile(re.escape(tag).replace("<set>", "[^/]+").replace("<n>", "[0-9]+") + "$") for tag, _ in rows]
    assert rows and all(unit.strip() for _, unit in rows)

    timers = StepTimers()
    meter = PerfMeter(flops_per_token=1.0, peak_flops=1.0, memory=lambda: host_memory(run.path), timers=timers)
    with meter.step():
        for phase in get_args(Phase):
            with timers.phase(phase):
                meter.count_tokens(1)
    meter.add("save", 2.0)
    meter.add("save_stall", 0.1)
    with meter.phase("evaluation"):
        pass
    with MetricLog(run, LoggingConfig()) as log:
        log.step(report_at(1), progress_at(1), meter.scalars() | Slowest(0, 1.0, 1.0, 1.0).scalars())
        log.evaluation({"clean": SPLIT_RESULT}, progress_at(1))
        log.tokens(*token_work, decode_bytes, progress_at(1))
    written = {tag for line in read_metrics(run.metrics_path) for tag in line} - {"train/aux"}
    written |= objective_tags(token_work)
    assert {
        "perf/mfu",
        "time/save_s",
        "time/save_stall_s",
        "time/param_gather_s",
        "time/rank_spread",
        "mem/host_rss_bytes",
        "valid/clean/top1",
        "select/threshold",
    } <= written
    undocumented = {tag for tag in written if not any(pattern.match(tag) for pattern in documented)}
    assert undocumented == set()


def test_machine_fields_are_the_only_ones_dropped(report_at: Callable[..., Any]) -> None:
    line = {"step": 3, **step_scalars(report_at(3)), **dict.fromkeys((p + "x" for p in MACHINE_PREFIXES), 1.0)}
    assert comparable(line) == {"step": 3, **step_scalars(report_at(3))}


def test_the_file_is_only_ever_appended_to(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    for step in range(3):
        file.append({"kind": "train", "step": step})
    file.close()
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [0, 1, 2]
