"""The few records that travel between layers.

Dims: b micro-batch, s sequence length, t = b * s packed tokens. Losses and log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """One micro-batch, from the data layer (or rollouts) to the training step."""

    tokens: Tensor  # [b, s] int64, the model's input
    labels: Tensor  # [b, s] int64, already shifted: labels[i, j] is the target of tokens[i, j]
    loss_mask: Tensor  # [b, s] bool, True where a token may train (padding and document boundaries are False)
    position_ids: Tensor  # [b, s] int64, restarting at 0 with every document when documents are kept apart
    cu_seqlens: Tensor  # [n + 1] int32, attention segments of the flattened batch: 0 = first, b * s = last
    sample_id: Tensor  # [b] int64, the window's number in its corpus; stable across epochs, ranks and resume
    source_id: Tensor  # [b] int64, index of the corpus in the blend
    sample_index: Tensor  # [b] int64, position of the sample in the whole run's order, whatever the layout; -1 for padding
    streams: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [b, s] fp32, aligned with labels: "ref_nll", ...


class TokenStats(NamedTuple):
    """All that an objective ever learns from the model."""

    logprob: Tensor  # [b, s] fp32 nats, <= 0, log p(label | prefix), differentiable
    entropy: Tensor | None  # [b, s] fp32 nats, of the full next-token distribution; None unless asked for


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; counts are global over all ranks."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # sequences consumed
    tokens_seen: int = 0  # tokens fed through the model
    tokens_trained: int = 0  # tokens whose loss was trained on (after masks and selection)
    data_order: str = ""  # fingerprint of the samples read, in their order (data/fingerprint.py)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did; plain Python numbers, equal on every rank."""

    loss_nats: float  # summed weighted loss over the trained tokens / their number
    grad_norm: float  # before clipping; nan or inf when the step was skipped for it
    learning_rate: float
    num_tokens: int  # trained tokens, global
    skipped: bool  # True when a non-finite loss or gradient, or a spike, kept the parameters unchanged
    metrics: Mapping[str, float]  # name -> global numerator / denominator
