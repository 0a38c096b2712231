"""Held-out tokens that selection would keep, and those it would drop: chosen once, at the first evaluation of a run.

Under selection the loss of dropped tokens may rise for ever, so one mean over all tokens looks worse than the run is. The two
curves only mean something when they are of the same tokens from beginning to end; chosen anew at each evaluation, the kept
ones would always be those with a high loss. So the sets belong to the run: a bitmap in the run folder, read again on a resume.

Dims: b micro-batch, s sequence, w windows of a held-out corpus.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.corpus.atomic import atomic_write_bytes
from megarpt.data.samples import SampleDataset
from megarpt.errors import DataError
from megarpt.objectives.language_model import WeightedLanguageModel
from megarpt.parallel.collectives import from_last_stage
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import Progress, TokenBatch, TokenStats
from megarpt.train.sharded import from_rank_0

logger = logging.getLogger(__name__)

Annotate = Callable[[Sequence[TokenBatch]], list[TokenBatch]]


@dataclass(frozen=True, slots=True)
class KeptSet:
    """The kept-like tokens of one corpus, a bit for every label."""

    bits: Tensor  # [w, ceil(s / 8)] uint8, the first label in the lowest bit
    step: int  # after which they were chosen

    def mask(self, batch: TokenBatch) -> Tensor:
        """Shapes: -> [b, s] bool, False for rows of padding."""
        rows = self.bits[batch.sample_id.clamp(min=0)]  # [b, ceil(s / 8)]
        spread = (rows[..., None] >> _positions(rows.device)) & 1
        return spread.flatten(1)[:, : batch.labels.shape[1]].bool() & (batch.sample_id >= 0)[:, None]


class HeldOutSplit:
    """The sets of every held-out corpus of a run.

    Args:
        folder: where they are kept, one file for each corpus.
        objective: ranks tokens, and chooses among all of a corpus; its weights are 0 and 1.
        rule: what the choice depends on besides corpus and windows; sets of another rule are made anew.
        groups: of the layout. Sets do not depend on it.
        annotate: adds the reference's streams to batches; None when sidecars hold them.
        resumes_at: the step the run goes on from; None for a fresh start, to which older files mean nothing.
        is_writer: whether this rank writes the files; rank 0 does.
    """

    def __init__(
        self,
        folder: Path,
        objective: WeightedLanguageModel,
        rule: Mapping[str, Any],
        groups: ProcessGroups,
        *,
        annotate: Annotate | None,
        resumes_at: int | None,
        is_writer: bool,
    ) -> None:
        self._folder, self._objective, self._rule = folder, objective, dict(rule)
        self._groups, self._annotate, self._is_writer = groups, annotate, is_writer
        self._resumes_at = resumes_at
        self._sets: dict[str, KeptSet] = {}
        self._looked_for: set[str] = set()

    def applies_to(self, dataset: SampleDataset) -> bool:
        """Whether the tokens of a corpus can be ranked."""
        return self._annotate is not None or all(name in dataset.streams for name in self._objective.streams)

    def annotated(self, batches: list[TokenBatch]) -> list[TokenBatch]:
        """The batches with what the scorer reads. Collectives: the reference model's, when there is one."""
        return batches if self._annotate is None else self._annotate(batches)

    def find(self, name: str, dataset: SampleDataset, max_tokens: int | None, device: torch.device) -> KeptSet | None:
        """The sets of this corpus, None when they are yet to be chosen. Collectives: the first time one broadcast of objects.

        Raises:
            DataError: their file is damaged.
        """
        if name not in self._looked_for:
            self._looked_for.add(name)
            path, about = self._path(name), self._about(dataset, max_tokens)
            found = from_rank_0(self._read(path, about) if self._is_writer and self._resumes_at is not None else None)
            if found is not None:
                self._sets[name] = KeptSet(torch.from_numpy(found[0]).to(device), found[1])
        return self._sets.get(name)

    def choose(
        self,
        name: str,
        dataset: SampleDataset,
        max_tokens: int | None,
        batches: Sequence[TokenBatch],
        logprobs: Sequence[Tensor],
        step: int,
    ) -> KeptSet:
        """Choose the sets of a corpus from the losses of all its evaluated tokens and write them down.

        Args:
            name: of the corpus.
            dataset: the corpus.
            max_tokens: limit of the evaluation.
            batches: what this rank evaluated, with the streams the scorer reads.
            logprobs: of their labels, [b, s] each; empty on all pipeline stages but the last.
            step: of the evaluation.

        Collectives: the selection's; one sum of the bitmap over the data-parallel group; with a pipeline one broadcast of it.

        Raises:
            DataError: the file cannot be written.
        """
        groups, device = self._groups, batches[0].tokens.device
        num_windows = _num_windows(dataset, max_tokens)
        bits = torch.zeros(num_windows, -(-dataset.seq_length // 8), dtype=torch.uint8, device=device)
        if logprobs:
            stats = [TokenStats(logprob, None) for logprob in logprobs]
            weights = self._objective.select(stats, batches, Progress(step=step), groups.dp)
            for batch, chosen in zip(batches, weights, strict=True):
                inside = batch.loss_mask.any(dim=1)  # padding of a pipeline's load repeats a window without any label
                bits[batch.sample_id[inside]] = _pack(chosen.weight[inside] > 0.0)
            dist.all_reduce(bits, group=groups.dp)  # every window is on one rank, so that the sum is the union
        bits = from_last_stage(bits.cpu(), groups)
        if self._is_writer:
            self._folder.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            np.savez(content, kept=bits.numpy(), about=json.dumps({**self._about(dataset, max_tokens), "step": step}))
            atomic_write_bytes(self._path(name), content.getvalue())
        self._sets[name] = KeptSet(bits.to(device), step)
        return self._sets[name]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npz"

    def _about(self, dataset: SampleDataset, max_tokens: int | None) -> dict[str, Any]:
        """What the sets depend on, besides the losses of the model."""
        return {
            **self._rule,
            "corpus_sha256": dataset.content_sha256,
            "documents_sha256": dataset.documents_sha256,
            "streams": {name: dataset.streams[name].manifest.bin_sha256 for name in sorted(dataset.streams)},
            "seq_length": dataset.seq_length,
            "separate_documents": dataset.separate_documents,
            "num_windows": _num_windows(dataset, max_tokens),
        }

    def _read(self, path: Path, about: Mapping[str, Any]) -> tuple[np.ndarray, int] | None:
        """Bits and step of a file; None when there is none, or it is of other sets than this run's."""
        assert self._resumes_at is not None
        try:
            with np.load(path, allow_pickle=False) as content:
                bits, stored = content["kept"], json.loads(str(content["about"]))
            step = int(stored.pop("step"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} is damaged ({error!r}); restore it from a copy, or remove it to have the tokens chosen anew at the "
                "next evaluation, which begins new curves"
            ) from error
        if stored != about:
            changed = ", ".join(sorted(key for key in {*stored, *about} if stored.get(key) != about.get(key)))
            logger.warning("%s: kept-like tokens are chosen anew, because these changed: %s", path, changed)
            return None
        # Written behind the checkpoint by an attempt that was killed: that evaluation is made again.
        return (bits, step) if step <= self._resumes_at else None


def _num_windows(dataset: SampleDataset, max_tokens: int | None) -> int:
    return dataset.num_windows if max_tokens is None else min(dataset.num_windows, -(-max_tokens // dataset.seq_length))


def _positions(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _pack(mask: Tensor) -> Tensor:
    """Shapes: [b, s] bool -> [b, ceil(s / 8)] uint8."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    return (padded.unflatten(1, (-1, 8)) << _positions(mask.device)).sum(dim=2, dtype=torch.uint8)
