"""What a step and an evaluation are called when they are written down.

`docs/metrics.md` is the list of all tags with their units; a test keeps the two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from megarpt.errors import DataError
from megarpt.structs import Progress, StepReport

# Fields whose values depend on the machine and the moment, not on the run: two equal runs differ in these and only these.
MACHINE_PREFIXES = ("time/", "perf/", "mem/", "sys/")
_ORDER_DIGITS = 16  # of the fingerprint's 64: enough to tell runs apart, short enough to read


class EvaluationScalars(Protocol):
    """What was measured on something that is held out."""

    def scalars(self, name: str) -> dict[str, float]:
        """Its tags, `name` being that of what is held out."""
        ...


@dataclass(frozen=True, slots=True)
class PartSums:
    """Global sums over some of the labels of a held-out corpus."""

    loss_sum_nats: float
    num_tokens: float  # whole
    num_correct: float


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """The labels of a held-out corpus in two parts, the same at every evaluation of a run."""

    kept_like: PartSums  # what the run's selection rule would keep
    dropped_like: PartSums
    step: int  # the evaluation whose losses decided


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Global sums over the labels of one held-out corpus; every valid label counts, whatever training selects."""

    loss_sum_nats: float
    num_tokens: int
    num_correct: int  # labels that were the most likely token
    bytes_per_token: float | None  # bytes of text / tokens of the whole corpus, from its manifest; None when unknown
    seconds: float
    split: TokenSplit | None = None

    def __post_init__(self) -> None:
        if self.num_tokens <= 0:
            raise DataError("evaluation: the held-out corpus has no token to predict; give one with at least two tokens")

    @property
    def loss_nats(self) -> float:
        """Mean negative log-likelihood of a token."""
        return self.loss_sum_nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss_nats)."""
        return _exp(self.loss_nats)

    @property
    def bits_per_byte(self) -> float | None:
        """nats * tokens / (ln 2 * bytes): comparable between tokenizers."""
        return None if self.bytes_per_token is None else self.loss_nats / (math.log(2.0) * self.bytes_per_token)

    @property
    def top1(self) -> float:
        """Share of labels that were the most likely token."""
        return self.num_correct / self.num_tokens

    def scalars(self, name: str) -> dict[str, float]:
        """The tags of this result for the held-out corpus `name`."""
        tags = {
            f"valid/{name}/loss_nats": self.loss_nats,
            f"valid/{name}/ppl": self.perplexity,
            f"valid/{name}/top1": self.top1,
            f"valid/{name}/tokens": float(self.num_tokens),
            f"time/valid/{name}_s": self.seconds,
        }
        if self.bits_per_byte is not None:
            tags[f"valid/{name}/bits_per_byte"] = self.bits_per_byte
        if self.split is not None:
            tags[f"valid/{name}/split_step"] = float(self.split.step)
            for part in ("kept_like", "dropped_like"):
                sums: PartSums = getattr(self.split, part)
                tags[f"valid/{name}/{part}_tokens"] = sums.num_tokens
                if sums.num_tokens:
                    tags[f"valid/{name}/{part}_loss_nats"] = sums.loss_sum_nats / sums.num_tokens
                    tags[f"valid/{name}/{part}_top1"] = sums.num_correct / sums.num_tokens
        return tags


def step_scalars(report: StepReport) -> dict[str, float]:
    """The tags of one optimizer step. Metrics of the objective keep their names; one without a group joins `train/`."""
    tags = {
        "train/loss_nats": report.loss_nats,
        "train/ppl": _exp(report.loss_nats),
        "train/step_tokens": float(report.num_tokens),
        "optim/grad_norm": report.grad_norm,
        "optim/learning_rate": report.learning_rate,
        "optim/skipped": float(report.skipped),
    }
    for name, value in report.metrics.items():
        tags[name if "/" in name else f"train/{name}"] = value
    return tags


def progress_fields(progress: Progress) -> dict[str, int | str]:
    """What every metrics line starts with: the counters, and which data they count."""
    return {
        "step": progress.step,
        "samples": progress.samples,
        "tokens/seen": progress.tokens_seen,
        "tokens/trained": progress.tokens_trained,
        "data/order": progress.data_order[:_ORDER_DIGITS],
    }


def comparable(line: Mapping[str, object]) -> dict[str, object]:
    """A metrics line without the fields that depend on the machine: equal for a run and the same run killed and resumed."""
    return {key: value for key, value in line.items() if not key.startswith(MACHINE_PREFIXES)}


def _exp(x: float) -> float:
    return math.exp(x) if x < 700.0 else (math.inf if x >= 700.0 else math.nan)
