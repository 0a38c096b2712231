"""Random statistics and batches, without a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megarpt.structs import TokenBatch, TokenStats

MakeTokens = Callable[..., tuple[TokenStats, TokenBatch]]


@pytest.fixture
def make_tokens() -> MakeTokens:
    """(statistics with a gradient, batch with streams) of b sequences; keyword arguments replace what is random."""

    def make(
        b: int = 3, s: int = 16, seed: int = 0, valid: float = 0.8, first_sample: int = 0
    ) -> tuple[TokenStats, TokenBatch]:
        generator = torch.Generator().manual_seed(seed)
        logprob = -4.0 * torch.rand(b, s, generator=generator)
        batch = TokenBatch(
            tokens=torch.randint(0, 99, (b, s), generator=generator),
            labels=torch.randint(0, 99, (b, s), generator=generator),
            loss_mask=torch.rand(b, s, generator=generator) < valid,
            position_ids=torch.arange(s).expand(b, s),
            cu_seqlens=torch.arange(b + 1, dtype=torch.int32) * s,
            sample_id=torch.arange(b) * 7 + seed,
            source_id=torch.arange(b) % 2,
            sample_index=torch.arange(b) + first_sample,
            streams={
                "ref_nll": 4.0 * torch.rand(b, s, generator=generator),
                "ref_entropy": 2.0 * torch.rand(b, s, generator=generator),
            },
        )
        return TokenStats(logprob.requires_grad_(), None), batch

    return make
