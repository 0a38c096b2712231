"""Records that travel between layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megarpt.structs import TokenBatch
from megarpt.testing.batches import random_batch


def packed() -> TokenBatch:
    """Four samples of five tokens, two of them in two documents."""
    edges = torch.tensor([0, 3, 5, 10, 11, 15, 20], dtype=torch.int32)
    batch = random_batch(4, 5, vocab_size=100, seed=1)
    return replace(batch, cu_seqlens=edges, streams={"ref_nll": torch.rand(4, 5)})


@pytest.mark.parametrize(
    ("which", "edges"),
    [
        (slice(0, 1), [0, 3, 5]),
        (slice(1, 3), [0, 5, 6, 10]),
        (slice(3, 4), [0, 5]),
        (slice(0, 4), [0, 3, 5, 10, 11, 15, 20]),
        (slice(2, 2), [0]),
    ],
)
def test_samples_are_a_batch_of_their_own(which: slice, edges: list[int]) -> None:
    whole = packed()
    part = whole.samples(which)
    assert part.cu_seqlens.tolist() == edges and part.cu_seqlens.dtype == torch.int32
    assert torch.equal(part.streams["ref_nll"], whole.streams["ref_nll"][which])
    for name in ("tokens", "labels", "loss_mask", "position_ids", "sample_id", "source_id", "sample_index"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[which])
