"""The log of a run. `metrics.jsonl` is the truth; TensorBoard and Weights & Biases are adapters that may be deleted.

Every line is strict JSON: `kind` ("train", "valid" or "sample"), the counters of `Progress`, and tags with numbers. JSON has
no NaN, so a non-finite number is written as the string "nan", "inf" or "-inf"; `read_metrics` turns it back.

A line reaches the operating system before the call returns, so a killed process loses none. After a resume at step k the
lines beyond k are cut off, because those steps are done again: each step is in the file once.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from torch import Tensor

from megarpt.config.schema import LoggingConfig
from megarpt.errors import DataError
from megarpt.objectives.base import ObjectiveOutput
from megarpt.structs import Progress, StepReport, TokenBatch
from megarpt.train.atomic import cannot_write, sync_directory
from megarpt.train.reports import EvaluationResult, progress_fields, step_scalars
from megarpt.train.samples import mark_kept, token_pieces

logger = logging.getLogger(__name__)

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_SAMPLE_TOKENS = 512  # tokens of a decoded sample
_DISCARDED = "metrics.discarded.jsonl"


class MetricSink(Protocol):
    """A dashboard that metrics are copied to."""

    def scalars(self, values: Mapping[str, float], progress: Progress) -> None: ...

    def histogram(self, tag: str, values: np.ndarray, progress: Progress) -> None: ...

    def text(self, tag: str, markdown: str, progress: Progress) -> None: ...

    def flush(self) -> None: ...

    def close(self, is_finished: bool) -> None: ...


class MetricLog:
    """Writes what happens in a run, on one rank; on the others every method returns at once."""

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        *,
        sinks: Sequence[MetricSink] = (),
        resume: Progress | None = None,
        is_writer: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open `run_dir/metrics.jsonl` and bring it to the point of the resume.

        Args:
            run_dir: the run folder.
            config: intervals.
            sinks: dashboards, already opened at the same point.
            resume: where the run continues; None for a fresh start, which moves all older lines away.
            is_writer: True on the one rank that writes.
            clock: seconds since the epoch.

        Raises:
            DataError: the file cannot be written or its last lines belong to no run.
        """
        self.path = run_dir / "metrics.jsonl"
        self._config = config
        self._sinks = tuple(sinks) if is_writer else ()
        self._clock = clock
        self._started = clock()
        self._is_writer = is_writer
        self._last_step = -1 if resume is None else resume.step
        self._kinds_at_last_step: set[str] = set()
        self._file = -1
        if is_writer:
            self._kinds_at_last_step = rewind_metrics(self.path, -1 if resume is None else resume.step)
            try:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
                sync_directory(run_dir)
            except OSError as error:
                raise cannot_write(self.path, error) from error

    def is_due(self, step: int) -> bool:
        """Whether `step` is one that gets a line; equal on all ranks."""
        return step % self._config.interval_steps == 0

    def wants_tokens(self, step: int) -> bool:
        """Whether `tokens` should be called after `step`; equal on all ranks."""
        interval = self._config.histogram_interval_steps
        return interval > 0 and step % interval == 0

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation at the step of the resume is already on file. Known to the writer only."""
        return step == self._last_step and "valid" in self._kinds_at_last_step

    def step(self, report: StepReport, progress: Progress, extra: Mapping[str, float] | None = None) -> None:
        """Write an optimizer step, when it is due or was skipped. `progress` counts the step itself."""
        if self._is_writer and (self.is_due(progress.step) or report.skipped):
            self._write("train", {**step_scalars(report), **(extra or {})}, progress)

    def evaluation(self, results: Mapping[str, EvaluationResult], progress: Progress) -> None:
        """Write the evaluation of all held-out corpora after `progress.step` steps."""
        if self._is_writer and results:
            tags = [result.scalars(name) for name, result in results.items()]
            self._write("valid", {tag: value for group in tags for tag, value in group.items()}, progress)

    def tokens(
        self, batch: TokenBatch, output: ObjectiveOutput, decode: Callable[[Sequence[int]], str], progress: Progress
    ) -> None:
        """Histograms of per-token numbers, the spread of the kept share, and one decoded sample with the kept tokens marked.

        Units: nats. Cost: copies one micro-batch to the host.
        """
        if not self._is_writer:
            return
        loss_mask = _to_numpy(batch.loss_mask).astype(bool)  # [b, s]
        weight, nll = _to_numpy(output.weight), _to_numpy(output.token_loss)  # [b, s]
        per_token = {"train/token_loss_nats": nll}
        if "ref_nll" in batch.streams:
            per_token["select/excess_nats"] = nll - _to_numpy(batch.streams["ref_nll"])
        elif output.score is not None:
            per_token["select/score"] = _to_numpy(output.score)
        scalars: dict[str, float] = {}
        for tag, values in per_token.items():
            finite = values[loss_mask & np.isfinite(values)]
            if finite.size:
                p05, p50, p95 = np.quantile(finite, (0.05, 0.5, 0.95))
                scalars |= {f"{tag}_p05": float(p05), f"{tag}_p50": float(p50), f"{tag}_p95": float(p95)}
                for sink in self._sinks:
                    self._send(sink.histogram, f"{tag}_histogram", finite, progress)
        valid = loss_mask.sum(axis=1)  # [b]
        if (valid > 0).any():
            kept = ((weight > 0) & loss_mask).sum(axis=1)[valid > 0] / valid[valid > 0]
            scalars |= {
                "select/sequence_kept_min": float(kept.min()),
                "select/sequence_kept_mean": float(kept.mean()),
                "select/sequence_kept_max": float(kept.max()),
            }
        self._write("sample", scalars, progress)
        if self._sinks:
            sample = decoded_sample(batch, output, decode)
            for sink in self._sinks:
                self._send(sink.text, "samples/kept_tokens", sample, progress)

    def text(self, tag: str, markdown: str, progress: Progress) -> None:
        """Show a text in the dashboards; `metrics.jsonl` holds numbers only."""
        for sink in self._sinks:
            self._send(sink.text, tag, markdown, progress)

    def flush(self) -> None:
        """Put everything on disk. To be called before a checkpoint, so that no checkpoint is ahead of its metrics."""
        if self._file >= 0:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise cannot_write(self.path, error) from error
        for sink in self._sinks:
            self._send(sink.flush)

    def close(self, is_finished: bool = False) -> None:
        """Flush and close; `is_finished` tells the dashboards whether the run reached its end."""
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1
        for sink in self._sinks:
            self._send(sink.close, is_finished)
        self._sinks = ()
        self._is_writer = False

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(is_finished=error is None)

    def _write(self, kind: str, values: Mapping[str, float], progress: Progress) -> None:
        assert progress.step >= self._last_step, f"metrics go forward: step {progress.step} after {self._last_step}"
        if progress.step > self._last_step:
            self._last_step = progress.step
            self._kinds_at_last_step.clear()
        if kind in self._kinds_at_last_step:
            logger.info("the %s line of step %d is already in %s", kind, progress.step, self.path)
            return
        now = self._clock()
        times = {"time/unix_s": round(now, 3), "time/elapsed_s": round(now - self._started, 3)}
        numbers = {tag: _strict(float(value)) for tag, value in {**values, **times}.items()}
        self._append(json.dumps({"kind": kind, **progress_fields(progress), **numbers}, allow_nan=False).encode() + b"\n")
        self._kinds_at_last_step.add(kind)
        for sink in self._sinks:
            self._send(sink.scalars, values, progress)

    def _append(self, line: bytes) -> None:
        try:
            written = os.write(self._file, line)
            if written != len(line):
                # A disk that fills up takes a part of the line: take it back, so that the file stays a list of whole lines.
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _send(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except OSError as error:
            raise cannot_write(self.path.parent, error) from error


def read_metrics(path: Path, kind: str | None = None) -> Iterator[dict[str, object]]:
    """The lines of a `metrics.jsonl`, with non-finite numbers restored; a partial last line is left out.

    Raises:
        DataError: a line other than a partial last one is not a JSON object.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            line = _parse(raw)
            if line is None:
                raise DataError(f"{path}, line {number}: not a metrics line: {raw[:80]!r}; remove the line to read the rest")
            if kind is None or line.get("kind") == kind:
                yield {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in line.items()}


def rewind_metrics(path: Path, step: int) -> set[str]:
    """Cut off the lines beyond `step`, and a partial last line; return the kinds of the lines that `step` itself has.

    The lines are moved to `metrics.discarded.jsonl` first. Cutting is one `ftruncate`, so a process killed here leaves the file
    as it was or as it is wanted, and doing it again changes nothing. Reads backwards: the cost is that of the lines cut.
    """
    if not path.exists() or path.stat().st_size == 0:
        return set()
    kinds: set[str] = set()
    try:
        with path.open("r+b") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                keep = _end_of_step(content, step)
                discarded = content[keep:]
                for start, end in _lines_backwards(content, keep):
                    line = _parse(content[start:end])
                    if line is None or line["step"] != step:
                        break
                    kinds.add(str(line["kind"]))
            if discarded:
                with path.with_name(_DISCARDED).open("ab") as bin_file:
                    bin_file.write(discarded if discarded.endswith(b"\n") else discarded + b"\n")
                    bin_file.flush()
                    os.fsync(bin_file.fileno())
                file.truncate(keep)
                os.fsync(file.fileno())
                logger.info("moved %d bytes of metrics beyond step %d to %s", len(discarded), step, _DISCARDED)
    except OSError as error:
        raise cannot_write(path, error) from error
    return kinds


def decoded_sample(batch: TokenBatch, output: ObjectiveOutput, decode: Callable[[Sequence[int]], str]) -> str:
    """The first row of a micro-batch as Markdown, kept tokens strong. A weight belongs to a label, so labels are shown."""
    labels = batch.labels[0, :_SAMPLE_TOKENS].tolist()
    is_label = batch.loss_mask[0, :_SAMPLE_TOKENS].tolist()
    weight = output.weight[0, :_SAMPLE_TOKENS].tolist()
    last = max((i for i, valid in enumerate(is_label) if valid), default=-1)
    kept = [w if valid else 0.0 for w, valid in zip(weight, is_label, strict=True)][: last + 1]
    num_kept, num_valid = sum(w > 0 for w in kept), sum(is_label)
    head = f"source {int(batch.source_id[0])}, sample {int(batch.sample_id[0])}: {num_kept} of {num_valid} tokens kept (bold)"
    return f"{head}\n\n{mark_kept(token_pieces(decode, labels[: last + 1]), kept)}"


def _end_of_step(content: mmap.mmap, step: int) -> int:
    """Offset behind the last whole line whose step is at most `step`."""
    for start, end in _lines_backwards(content, len(content)):
        line = _parse(content[start:end])
        if line is not None and int(str(line["step"])) <= step:
            return end
    return 0


def _lines_backwards(content: mmap.mmap, end: int) -> Iterator[tuple[int, int]]:
    while end > 0:
        start = content.rfind(b"\n", 0, end - 1) + 1
        yield start, end
        end = start


def _parse(raw: bytes) -> dict[str, object] | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line else None


def _strict(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().float().cpu().numpy())
