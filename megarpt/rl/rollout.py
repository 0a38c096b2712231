"""What draws completions from the policy, whatever computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megarpt.rl.structs import Prompt, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. What is drawn for (seed, prompt id, number of the completion in its group) does not depend on what
    else is drawn at the same time, or where."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the likeliest token, whose log-probability is then 0
    top_k: int = 0  # only among the k likeliest; 0 for all
    top_p: float = 1.0  # only among the likeliest of this mass together
    stop_tokens: tuple[int, ...] = ()  # any of them ends a completion, and is its last token
    seed: int = 1234


class RolloutEngine(Protocol):
    """Draws groups of completions from the weights it was given last."""

    policy_version: int  # of those weights; every completion carries it

    def publish(self, version: int) -> None:
        """Take over the policy's weights as they are now, and call them `version`. Every rank calls it."""
        ...

    def generate(self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling) -> list[RolloutGroup]:
        """`group_size` completions of every prompt, in the order of the prompts. Every rank that shares a copy of the model
        calls it with the same prompts and gets the same groups.

        Raises:
            RolloutError: a prompt leaves no room for a token, or the engine failed.
        """
        ...
