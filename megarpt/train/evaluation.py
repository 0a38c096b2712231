"""Held-out loss on every token, whatever training selects, so that curves stay comparable across selection rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from megarpt.data.batches import evaluation_batches
from megarpt.data.windows import WindowDataset
from megarpt.model.build import token_accuracy
from megarpt.parallel.layout import ProcessGroups
from megarpt.train.reports import EvaluationResult


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    datasets: Mapping[str, WindowDataset],
    groups: ProcessGroups,
    device: torch.device,
    *,
    micro_batch_size: int,
    max_tokens: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, EvaluationResult]:
    """One pass over each held-out corpus, split over the data-parallel ranks.

    Collectives: one all-reduce of three sums per corpus over the data-parallel group.
    Error: sums are kept in fp64.
    """
    was_training = model.training
    model.eval()
    results = {}
    for name, dataset in datasets.items():
        started = time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, correct
        for batch in evaluation_batches(
            dataset,
            micro_batch_size=micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            device=device,
            max_tokens=max_tokens,
        ):
            logprob, correct = token_accuracy(model, batch, dataset.seq_length)
            valid = batch.loss_mask
            sums += torch.stack([-logprob[valid].double().sum(), valid.sum().double(), (correct & valid).sum().double()])
            on_batch()
        dist.all_reduce(sums, group=groups.dp)
        nats, tokens, hits = sums.tolist()
        text_bytes = dataset.manifest.text_bytes
        results[name] = EvaluationResult(
            loss_sum_nats=nats,
            num_tokens=int(tokens),
            num_correct=int(hits),
            bytes_per_token=text_bytes / dataset.num_tokens if text_bytes else None,
            seconds=time.perf_counter() - started,
        )
    model.train(was_training)
    return results
