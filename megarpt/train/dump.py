"""The batch of a step that was skipped, not finite or a spike, for a look afterwards: text, ids, losses.

    dumps/step_00000042_rank0.json   what was not finite, if anything, where, and the decoded text
    dumps/step_00000042_rank0.npz    every tensor of every micro-batch, as `<micro-batch>.<name>`

A dump never stops a run: when it cannot be written the reason is logged, and training decides by itself what to do.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarpt.corpus.atomic import atomic_write_bytes, atomic_write_json
from megarpt.errors import DataError
from megarpt.objectives.base import ObjectiveOutput
from megarpt.structs import StepReport, TokenBatch

logger = logging.getLogger(__name__)

_POSITIONS_LISTED = 50  # non-finite tokens spelled out for each micro-batch; the .npz has all


class BatchDumper:
    """Writes the micro-batches of skipped steps; every rank has one and writes its own."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        decode: Callable[[Sequence[int]], str],
        *,
        always: bool = True,
        source_names: Sequence[str] = (),
        limit: int = 20,
    ) -> None:
        """Dumps of one rank.

        Args:
            folder: where they go.
            rank: this one, for the names of the files.
            decode: ids to text.
            always: write although the losses of this rank are finite; one rank of a run should.
            source_names: corpora of the blend.
            limit: bounds the dumps of this rank in the folder, earlier attempts of the run included.
        """
        self._folder, self._rank, self._decode, self._always = folder, rank, decode, always
        self._source_names, self._limit = tuple(source_names), limit

    def dump(self, step: int, work: Sequence[tuple[TokenBatch, ObjectiveOutput]], report: StepReport) -> Path | None:
        """Write the micro-batches of `step`; the JSON file's path, or None when nothing was written.

        A rank whose own losses are finite writes nothing, but for the one that always does; nor does one that computes none.
        A step that is done again after a resume replaces its own dump.
        """
        if not self._always and not any(_bad_positions(batch, output) for batch, output in work):
            return None
        path = self._folder / f"step_{step:08d}_rank{self._rank}.json"
        others = {p for p in self._folder.glob(f"step_*_rank{self._rank}.json") if p != path}
        if len(others) >= self._limit:
            logger.warning(
                "step %d is skipped; %s already holds %d dumps, no more are written", step, self._folder, self._limit
            )
            return None
        arrays: dict[str, np.ndarray] = {}
        for i, (batch, output) in enumerate(work):
            arrays |= {f"{i}.{name}": array for name, array in _arrays(batch, output).items()}
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path.with_suffix(".npz"), packed.getvalue())
            atomic_write_json(path, self._describe(step, work, report))
        except (DataError, OSError) as error:
            logger.error("step %d is skipped and its batch could not be dumped: %s", step, error)
            return None
        logger.warning("step %d is skipped; its batch is in %s", step, path)
        return path

    def _describe(self, step: int, work: Sequence[tuple[TokenBatch, ObjectiveOutput]], report: StepReport) -> dict[str, Any]:
        micro_batches = [self._describe_micro_batch(batch, output) for batch, output in work]
        found = [name for name in ("loss_nats", "grad_norm") if not math.isfinite(getattr(report, name))]
        return {
            "step": step,
            "rank": self._rank,
            "not_finite": found,  # empty: a spike, or found by the optimizer in the gradients of another rank or bucket
            "loss_nats": str(report.loss_nats),
            "grad_norm": str(report.grad_norm),
            "on_this_rank": any(m["num_not_finite"] for m in micro_batches),
            "arrays": f"step_{step:08d}_rank{self._rank}.npz",
            "micro_batches": micro_batches,
        }

    def _describe_micro_batch(self, batch: TokenBatch, output: ObjectiveOutput) -> dict[str, Any]:
        token_loss, labels = output.token_loss.detach().float().cpu(), batch.labels.cpu()
        bad = _bad_positions(batch, output)
        return {
            "loss_sum": str(float(output.loss_sum)),
            "num_tokens": int(output.num_tokens),
            "num_not_finite": len(bad),
            "not_finite": [
                {
                    "row": row,
                    "position": position,
                    "label": int(labels[row, position]),
                    "text": self._decode([int(labels[row, position])]),
                    "loss_nats": str(float(token_loss[row, position])),
                }
                for row, position in bad[:_POSITIONS_LISTED]
            ],
            "streams_not_finite": {
                name: int((~torch.isfinite(stream.cpu()) & batch.loss_mask.cpu()).sum())
                for name, stream in batch.streams.items()
            },
            "rows": [
                {
                    "sample_index": int(batch.sample_index[row]),
                    "sample_id": int(batch.sample_id[row]),
                    "source": self._source(int(batch.source_id[row])),
                    "text": self._decode(batch.tokens[row].tolist()),
                }
                for row in range(batch.tokens.shape[0])
            ],
        }

    def _source(self, source_id: int) -> str | int:
        return self._source_names[source_id] if 0 <= source_id < len(self._source_names) else source_id


def _bad_positions(batch: TokenBatch, output: ObjectiveOutput) -> list[list[int]]:
    """[row, position] of the labels whose loss is not finite."""
    return (~torch.isfinite(output.token_loss) & batch.loss_mask).nonzero().tolist()


def _arrays(batch: TokenBatch, output: ObjectiveOutput) -> dict[str, np.ndarray]:
    tensors: dict[str, Tensor | None] = {
        "tokens": batch.tokens,
        "labels": batch.labels,
        "loss_mask": batch.loss_mask,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "sample_id": batch.sample_id,
        "source_id": batch.source_id,
        "sample_index": batch.sample_index,
        "token_loss": output.token_loss,
        "weight": output.weight,
        "score": output.score,
        **{f"stream.{name}": stream for name, stream in batch.streams.items()},
    }
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items() if tensor is not None}
