"""The log of a run. `metrics.jsonl` is the truth; TensorBoard and Weights & Biases are adapters that may be deleted.

Every line has a `kind` ("train", "valid" or "sample"), the counters of `Progress`, and tags with numbers; `docs/metrics.md`
lists them. After a resume at step k the lines beyond k are cut off, because those steps are done again: each step is in the
file once, and `reports.comparable` of the lines is that of a run that was never stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
from torch import Tensor

from megarpt.config.load import dump_resolved
from megarpt.config.schema import LoggingConfig, TrainingConfig
from megarpt.corpus.atomic import cannot_write
from megarpt.objectives.base import ObjectiveOutput
from megarpt.structs import Progress, StepReport, TokenBatch
from megarpt.train.metrics_file import MetricsFile, rewind_metrics
from megarpt.train.reports import EvaluationScalars, progress_fields, step_scalars
from megarpt.train.rundir import RunDir
from megarpt.train.samples import mark_kept, token_pieces
from megarpt.train.tensorboard import TensorBoardSink
from megarpt.train.wandb_sink import WandbSink

logger = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]

_SAMPLE_TOKENS = 512  # tokens of a decoded sample


class MetricSink(Protocol):
    """A dashboard that metrics are copied to."""

    def scalars(self, values: Mapping[str, float], progress: Progress) -> None: ...

    def histogram(self, tag: str, values: np.ndarray, progress: Progress) -> None: ...

    def rewind(self, progress: Progress) -> None: ...

    def text(self, tag: str, markdown: str, progress: Progress) -> None: ...

    def flush(self) -> None: ...

    def close(self, is_finished: bool) -> None: ...


class MetricLog:
    """Writes what happens in a run, on one rank; on the others every method returns at once."""

    def __init__(
        self,
        run: RunDir,
        config: LoggingConfig,
        *,
        sinks: Sequence[MetricSink] = (),
        resume: Progress | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open `metrics.jsonl` of the run and bring it to the point of the resume; `MetricLog.open` adds the dashboards.

        Args:
            run: the run folder; its writer rank is the one that writes here.
            config: intervals.
            sinks: dashboards, already opened at the same point.
            resume: where the run continues; None for a fresh start, which moves all older lines away.
            clock: seconds since the epoch.

        Raises:
            DataError: the file cannot be written.
        """
        self.path = run.metrics_path
        self._config, self._clock, self._started = config, clock, clock()
        self._restarts = run.restarts
        self._last_step = -1 if resume is None else resume.step
        self._kinds: set[str] = set()  # of the lines that _last_step has
        self._sinks: tuple[MetricSink, ...] = ()
        self._file: MetricsFile | None = None
        if run.is_writer:
            self._sinks = tuple(sinks)
            self._kinds = rewind_metrics(self.path, self._last_step)
            self._file = MetricsFile(self.path)

    @classmethod
    def open(
        cls,
        run: RunDir,
        config: TrainingConfig,
        *,
        resume: Progress | None,
        wandb_mode: Literal["offline", "online"] = "offline",
    ) -> Self:
        """The log with the dashboards that `config.logging` asks for, which show configuration and environment.

        Raises:
            DataError: a file cannot be written.
            ExtensionError: TensorBoard or wandb was asked for and is not installed.
        """
        sinks: list[MetricSink] = []
        resolved: dict[str, Any] = config.model_dump(mode="json")
        if run.is_writer and config.logging.tensorboard:
            board = TensorBoardSink(run.tensorboard_dir, resume=resume)
            board.settings(resolved, run.environment, dump_resolved(config), resume or Progress())
            sinks.append(board)
        if run.is_writer and config.logging.wandb_project is not None:
            sinks.append(WandbSink(run.path, config.logging.wandb_project, resolved, wandb_mode))
        return cls(run, config.logging, sinks=sinks, resume=resume)

    def is_due(self, step: int) -> bool:
        """Whether `step` is one that gets a line; equal on all ranks."""
        return step % self._config.interval_steps == 0

    def wants_tokens(self, step: int) -> bool:
        """Whether `tokens` should be called after `step`; equal on all ranks."""
        interval = self._config.histogram_interval_steps
        return interval > 0 and step % interval == 0

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation after `step` steps is on file, so that a resumed run need not repeat it.

        Known on the writer rank only: evaluation is collective, so the answer has to be broadcast.
        """
        return step == self._last_step and "valid" in self._kinds

    def step(self, report: StepReport, progress: Progress, extra: Mapping[str, float] | None = None) -> None:
        """Write an optimizer step, when it is due or was skipped. `progress` counts the step itself."""
        if self._file is not None and (self.is_due(progress.step) or report.skipped):
            self._write("train", {**step_scalars(report), **(extra or {})}, progress)

    def evaluation(
        self,
        results: Mapping[str, EvaluationScalars],
        progress: Progress,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        """Write the evaluation of all held-out corpora after `progress.step` steps."""
        if self._file is not None and results:
            tags = {tag: value for name, result in results.items() for tag, value in result.scalars(name).items()}
            self._write("valid", {**tags, **(extra or {})}, progress)

    def tokens(self, batch: TokenBatch, output: ObjectiveOutput, decode: Decode, progress: Progress) -> None:
        """Histograms of per-token numbers, the spread of the kept share, and one decoded sample with the kept tokens marked.

        Units: nats. Cost: copies one micro-batch to the host.
        """
        if self._file is None:
            return
        loss_mask = _to_numpy(batch.loss_mask).astype(bool)  # [b, s]
        scalars = kept_shares(loss_mask, _to_numpy(output.weight))
        for tag, values in _per_token(batch, output).items():
            finite = values[loss_mask & np.isfinite(values)]
            if finite.size:
                p05, p50, p95 = (float(q) for q in np.quantile(finite, (0.05, 0.5, 0.95)))
                scalars |= {f"{tag}_p05": p05, f"{tag}_p50": p50, f"{tag}_p95": p95}
                for sink in self._sinks:
                    self._send(sink.histogram, f"{tag}_histogram", finite, progress)
        self._write("sample", scalars, progress)
        if self._sinks:
            self.text("samples/kept_tokens", decoded_sample(batch, output, decode), progress)

    def text(self, tag: str, markdown: str, progress: Progress) -> None:
        """Show a text in the dashboards; it does not go into `metrics.jsonl`."""
        for sink in self._sinks:
            self._send(sink.text, tag, markdown, progress)

    def rewind(self, progress: Progress) -> None:
        """Go back to where a resume at `progress` would begin: the steps beyond it are done again."""
        self._last_step = progress.step
        if self._file is not None:
            self._kinds = rewind_metrics(self.path, progress.step)
        for sink in self._sinks:
            self._send(sink.rewind, progress)

    def flush(self) -> None:
        """Put everything on disk. To be called before a checkpoint, so that no checkpoint is ahead of its metrics."""
        if self._file is not None:
            self._file.sync()
        for sink in self._sinks:
            self._send(sink.flush)

    def close(self, is_finished: bool = False) -> None:
        """Flush and close; `is_finished` tells the dashboards whether the run reached its end."""
        if self._file is not None:
            self._file.sync()
            self._file.close()
            self._file = None
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            self._send(sink.close, is_finished)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(is_finished=error is None)

    def _write(self, kind: str, values: Mapping[str, float], progress: Progress) -> None:
        assert self._file is not None
        assert progress.step >= self._last_step, f"metrics go forward: step {progress.step} after {self._last_step}"
        if progress.step > self._last_step:
            self._last_step, self._kinds = progress.step, set()
        if kind in self._kinds:
            logger.info("the %s line of step %d is already in %s", kind, progress.step, self.path)
            return
        now = self._clock()
        machine = {
            "time/unix_s": round(now, 3),
            "time/elapsed_s": round(now - self._started, 3),
            "sys/restarts": float(self._restarts),
        }
        numbers = {tag: float(value) for tag, value in values.items()} | machine
        self._file.append({"kind": kind, **progress_fields(progress), **numbers})
        self._kinds.add(kind)
        del numbers["time/unix_s"]
        for sink in self._sinks:
            self._send(sink.scalars, numbers, progress)

    def _send(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except OSError as error:
            raise cannot_write(self.path.parent, error) from error


def kept_shares(loss_mask: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Smallest, mean and largest share of valid tokens kept, over the sequences of a micro-batch. Shapes: [b, s] both."""
    valid = loss_mask.sum(axis=1)  # [b]
    if not (valid > 0).any():
        return {}
    share = ((weight > 0) & loss_mask).sum(axis=1)[valid > 0] / valid[valid > 0]
    return {
        "select/sequence_kept_min": float(share.min()),
        "select/sequence_kept_mean": float(share.mean()),
        "select/sequence_kept_max": float(share.max()),
    }


def decoded_sample(batch: TokenBatch, output: ObjectiveOutput, decode: Decode) -> str:
    """The first row with labels as Markdown, kept tokens strong. A weight belongs to a label, so labels are shown."""
    row = int(batch.loss_mask.any(dim=1).int().argmax())  # rows may be padding
    is_label = batch.loss_mask[row, :_SAMPLE_TOKENS].tolist()
    length = max((i + 1 for i, valid in enumerate(is_label) if valid), default=0)
    labels = batch.labels[row, :length].tolist()
    weight = output.weight[row, :length].tolist()
    kept = [w if valid else 0.0 for w, valid in zip(weight, is_label[:length], strict=True)]
    head = (
        f"source {int(batch.source_id[row])}, sample {int(batch.sample_id[row])}: "
        f"{sum(w > 0 for w in kept)} of {sum(is_label)} tokens kept (bold)"
    )
    return f"{head}\n\n{mark_kept(token_pieces(decode, labels), kept)}"


def _per_token(batch: TokenBatch, output: ObjectiveOutput) -> dict[str, np.ndarray]:
    nll = _to_numpy(output.token_loss)
    values = {"train/token_loss_nats": nll}
    if "ref_nll" in batch.streams:
        values["select/excess_nats"] = nll - _to_numpy(batch.streams["ref_nll"])
    elif output.score is not None:
        values["select/score"] = _to_numpy(output.score)
    return values


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().float().cpu().numpy())
