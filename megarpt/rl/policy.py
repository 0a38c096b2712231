"""Log-probabilities of rollouts under the weights at hand and under a reference that is kept beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarpt.model.build import unwrap
from megarpt.model.forward import token_stats
from megarpt.model.token_stats_gpt import TokenStatsGPT
from megarpt.parallel.layout import ProcessGroups
from megarpt.structs import TokenBatch


def logprobs(chunks: Sequence[torch.nn.Module], batches: Sequence[TokenBatch], groups: ProcessGroups) -> list[Tensor]:
    """Of every label, [b, s] fp32 nats, for each micro-batch; empty on all pipeline stages but the last."""
    for chunk in chunks:
        chunk.eval()
    return [stats.logprob for stats in token_stats(chunks, batches, groups)]


class ReferencePolicy:
    """The policy that a KL divergence is measured from: a frozen copy of the weights.

    Its temperature is the policy's, so that both speak of the distribution that was sampled from.
    """

    def __init__(self, network: TokenStatsGPT, groups: ProcessGroups) -> None:
        self.network, self._groups = network.eval().requires_grad_(False), groups

    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """As the function of this name."""
        return logprobs([self.network], batches, self._groups)

    @torch.no_grad()
    def reset(self, policy: torch.nn.Module) -> None:
        """Become the policy of the moment.

        Args:
            policy: this rank's only chunk of it, bare or wrapped, with all parameters gathered.
        """
        for own, theirs in zip(self.network.parameters(), unwrap(policy).parameters(), strict=True):
            own.copy_(theirs)
