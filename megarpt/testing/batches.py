"""Micro-batches of random tokens, for tests and benchmarks of whole steps."""

from __future__ import annotations

import torch

from megarpt.structs import TokenBatch


def random_batch(num_samples: int, seq_length: int, vocab_size: int, seed: int, rows: slice = slice(None)) -> TokenBatch:
    """The given rows of a batch that depends on the seed alone; every sample is one document, and all of it trains."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (num_samples, seq_length + 1), generator=generator)[rows]
    b, s = len(tokens), seq_length
    return TokenBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=torch.ones(b, s, dtype=torch.bool),
        position_ids=torch.arange(s).repeat(b, 1),
        cu_seqlens=torch.arange(0, b * s + 1, s, dtype=torch.int32),
        sample_id=torch.arange(num_samples)[rows],
        source_id=torch.zeros(b, dtype=torch.int64),
        sample_index=torch.arange(num_samples)[rows],
    )
