"""Held-out loss on every token, whatever training selects, so that curves stay comparable across selection rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
import torch.distributed as dist

from megarpt.data.batches import evaluation_batches
from megarpt.data.windows import WindowDataset
from megarpt.model.forward import token_accuracy
from megarpt.parallel.collectives import from_last_stage
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import TokenBatch
from megarpt.train.reports import EvaluationResult

_BATCHES_PER_STAGE = 4  # micro-batches in the pipeline at a time, for each stage: its bubble is a fifth


@torch.no_grad()
def evaluate(
    chunks: Sequence[torch.nn.Module],
    datasets: Mapping[str, WindowDataset],
    groups: ProcessGroups,
    device: torch.device,
    *,
    micro_batch_size: int,
    max_tokens: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, EvaluationResult]:
    """One pass over each held-out corpus, split over the data-parallel ranks.

    Collectives: the model's; one all-reduce of three sums per corpus over the data-parallel group.
    Error: sums are kept in fp64.
    """
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    results = {}
    for name, dataset in datasets.items():
        started = time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, correct
        batches = evaluation_batches(
            dataset,
            micro_batch_size=micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            device=device,
            max_tokens=max_tokens,
        )
        for together in in_pipeline_loads(batches, groups):
            for batch, (logprob, correct) in zip(together, token_accuracy(chunks, together, groups), strict=False):
                valid = batch.loss_mask
                sums += torch.stack([-logprob[valid].double().sum(), valid.sum().double(), (correct & valid).sum().double()])
            for _ in together:
                on_batch()
        dist.all_reduce(sums, group=groups.dp)
        sums = from_last_stage(sums.cpu(), groups)
        nats, tokens, hits = sums.tolist()
        text_bytes = dataset.manifest.text_bytes
        results[name] = EvaluationResult(
            loss_sum_nats=nats,
            num_tokens=int(tokens),
            num_correct=int(hits),
            bytes_per_token=text_bytes / dataset.num_tokens if text_bytes else None,
            seconds=time.perf_counter() - started,
        )
    for chunk in chunks:
        chunk.train(was_training)
    return results


def in_pipeline_loads(batches: Iterator[TokenBatch], groups: ProcessGroups) -> Iterator[list[TokenBatch]]:
    """Micro-batches in groups that fill the pipeline; the last group is filled up with padding that counts nothing."""
    stages = groups.pp.size()
    size = 1 if stages == 1 else _BATCHES_PER_STAGE * stages
    while together := list(islice(batches, size)):
        padding = replace(together[-1], loss_mask=torch.zeros_like(together[-1].loss_mask))
        yield together + [padding] * (-len(together) % stages)
