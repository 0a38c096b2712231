"""The reference model of an online selection: it writes into the batch what a sidecar would have held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megarpt.model.build import token_stats
from megarpt.structs import TokenBatch


class OnlineReference:
    """Adds `ref_nll` and, when asked for, `ref_entropy` to a batch, from the same windows the student sees."""

    def __init__(self, network: torch.nn.Module, streams: Sequence[str]) -> None:
        self.network = network.eval()
        self.streams = tuple(streams)
        for parameter in network.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """Cost: one forward pass of the reference model."""
        stats = token_stats(self.network, batch, batch.tokens.shape[1], entropy="ref_entropy" in self.streams)
        values = {"ref_nll": -stats.logprob}
        if stats.entropy is not None:
            values["ref_entropy"] = stats.entropy
        return replace(batch, streams={**batch.streams, **{name: values[name] for name in self.streams}})
