"""The records of a rollout, from the prompt to the reward."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_NO_PARTS: Mapping[str, float] = {}  # rewards travel between ranks, which the read-only kind of mapping cannot


class StopReason(enum.Enum):
    """Why a completion ended."""

    STOP = "stop"  # at a stop token, which is its last one
    LENGTH = "length"  # it used up its tokens: truncated


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the policy is asked, and what a verifier has to know of the right answer."""

    id: str  # the same in every epoch and after a resume; seeds of sampling follow from it
    tokens: tuple[int, ...]
    answer: Mapping[str, Any] = field(default_factory=dict)  # see the verifier for its keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer of the policy."""

    tokens: tuple[int, ...]  # without the prompt's; the stop token is one of them
    logprobs: tuple[float, ...]  # nats, of each token under the distribution it was drawn from
    text: bytes  # of the tokens, special ones left out: bytes, because a token may be a part of a character
    stop: StopReason
    policy_version: int  # of the weights that drew it


class RolloutGroup(NamedTuple):
    """Completions of one prompt, which are compared with each other."""

    prompt: Prompt
    completions: Sequence[Completion]


class Reward(NamedTuple):
    """What a verifier says of a completion.

    A completion that could not be judged in time has no value: it is not wrong, takes no part in the comparison with the others
    of its group, and is counted apart.
    """

    value: float | None
    parts: Mapping[str, float] = _NO_PARTS  # what it is made of, for the log

    @property
    def is_known(self) -> bool:
        return self.value is not None
