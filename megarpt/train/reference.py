"""The reference model of an online selection: it writes into the batches what sidecars would have held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from megarpt.model.forward import token_stats
from megarpt.model.token_stats_gpt import TokenStatsGPT
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import TokenBatch, TokenStats


class OnlineReference:
    """Adds `ref_nll` and, when asked for, `ref_entropy` to the batches of a step, from the same windows the student sees."""

    def __init__(self, network: TokenStatsGPT, groups: ProcessGroups, streams: Sequence[str]) -> None:
        self.network, self.groups = network.eval().requires_grad_(False), groups
        self.streams = tuple(streams)

    def __call__(self, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
        """Cost: one forward pass of the reference model. Only the last pipeline stage has the values, as only it selects."""
        stats = token_stats([self.network], batches, self.groups, entropy="ref_entropy" in self.streams)
        if not stats:
            return list(batches)
        return [
            replace(batch, streams={**batch.streams, **{name: self._value(name, own) for name in self.streams}})
            for batch, own in zip(batches, stats, strict=True)
        ]

    @staticmethod
    def _value(name: str, stats: TokenStats) -> Tensor:
        if name == "ref_nll":
            return -stats.logprob
        assert stats.entropy is not None
        return stats.entropy
