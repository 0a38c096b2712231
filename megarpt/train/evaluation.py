"""Held-out loss on every token, whatever training selects, so that curves stay comparable across selection rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.data.batches import evaluation_batches
from megarpt.data.samples import SampleDataset
from megarpt.model.forward import token_accuracy
from megarpt.parallel.collectives import from_last_stage
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import TokenBatch
from megarpt.train.held_out_split import HeldOutSplit, KeptSet
from megarpt.train.reports import EvaluationResult, PartSums, TokenSplit

_BATCHES_PER_STAGE = 4  # micro-batches in the pipeline at a time, for each stage: its bubble is a fifth


@torch.no_grad()
def evaluate(
    chunks: Sequence[torch.nn.Module],
    datasets: Mapping[str, SampleDataset],
    groups: ProcessGroups,
    device: torch.device,
    *,
    micro_batch_size: int,
    max_tokens: int | None = None,
    split: HeldOutSplit | None = None,
    step: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, EvaluationResult]:
    """One pass over each held-out corpus, split over the data-parallel ranks.

    Args:
        chunks: of this rank.
        datasets: the corpora by name.
        groups: of the layout.
        device: where batches are wanted.
        micro_batch_size: windows of a forward pass.
        max_tokens: limit per corpus.
        split: tells kept-like from dropped-like tokens, whose sums are then reported as well.
        step: optimizer steps done.
        on_batch: called after every micro-batch.

    Cost: a forward pass; where `split` has yet to choose, also the reference's, and some 30 bytes a token until it has chosen.
    Collectives: the model's; one all-reduce of nine sums per corpus over the data-parallel group; those of `split`.
    Error: sums are kept in fp64.
    """
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    results = {}
    for name, dataset in datasets.items():
        started = time.perf_counter()
        splits = split if split is not None and split.applies_to(dataset) else None
        kept = splits.find(name, dataset, max_tokens, device) if splits is not None else None
        chooser = splits if kept is None else None  # then sums wait until it is known which tokens are kept
        seen: list[TokenBatch] = []
        outputs: list[tuple[Tensor, Tensor]] = []  # (logprob, correct) of the same batches; empty before the last stage
        sums = torch.zeros(3, 3, dtype=torch.float64, device=device)  # (all, kept, dropped) x (nats, tokens, correct)
        batches = evaluation_batches(
            dataset,
            micro_batch_size=micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            device=device,
            max_tokens=max_tokens,
        )
        for together in in_pipeline_loads(batches, groups):
            if chooser is not None:
                seen += chooser.annotated(together)
                outputs += token_accuracy(chunks, together, groups)
            else:
                for batch, output in zip(together, token_accuracy(chunks, together, groups), strict=False):
                    sums += _sums(batch, *output, kept)
            for _ in together:
                on_batch()
        if chooser is not None:
            kept = chooser.choose(name, dataset, max_tokens, seen, [logprob for logprob, _ in outputs], step)
            for batch, output in zip(seen, outputs, strict=False):
                sums += _sums(batch, *output, kept)
        dist.all_reduce(sums, group=groups.dp)
        every, like_kept, like_dropped = from_last_stage(sums.cpu(), groups).tolist()
        results[name] = EvaluationResult(
            loss_sum_nats=every[0],
            num_tokens=int(every[1]),
            num_correct=int(every[2]),
            bytes_per_token=dataset.bytes_per_token,
            seconds=time.perf_counter() - started,
            split=None if kept is None else TokenSplit(PartSums(*like_kept), PartSums(*like_dropped), kept.step),
        )
    for chunk in chunks:
        chunk.train(was_training)
    return results


def _sums(batch: TokenBatch, logprob: Tensor, correct: Tensor, kept: KeptSet | None) -> Tensor:
    """Nats, tokens and correct ones of all, kept-like and dropped-like tokens. Shapes: -> [3, 3] fp64."""
    valid = batch.loss_mask
    nothing = torch.zeros_like(valid)
    is_kept = nothing if kept is None else kept.mask(batch)
    parts = [valid, valid & is_kept, nothing if kept is None else valid & ~is_kept]
    return torch.stack(
        [torch.stack([-logprob[part].double().sum(), part.sum().double(), (correct & part).sum().double()]) for part in parts]
    )


def in_pipeline_loads(batches: Iterator[TokenBatch], groups: ProcessGroups) -> Iterator[list[TokenBatch]]:
    """Micro-batches in groups that fill the pipeline; the last group is filled up with padding that counts nothing."""
    stages = groups.pp.size()
    size = 1 if stages == 1 else _BATCHES_PER_STAGE * stages
    while together := list(islice(batches, size)):
        padding = replace(together[-1], loss_mask=torch.zeros_like(together[-1].loss_mask))
        yield together + [padding] * (-len(together) % stages)
