"""The parts of a step. Needs neither torch nor megatron-core."""

from __future__ import annotations

from typing import Literal, get_args

Phase = Literal[
    "data_wait",
    "reference",
    "forward",
    "select",
    "backward",
    "pipeline_wait",
    "grad_reduce",
    "grad_norm",
    "optimizer",
    "param_gather",
    "other",
]
PHASES: tuple[Phase, ...] = get_args(Phase)

OWN_WORK: frozenset[Phase] = frozenset({"data_wait", "reference", "forward", "backward", "optimizer"})
"""Phases in which a rank does not wait for the ranks that do the same work; tensor, context and expert parallelism, whose
collectives lie inside the layers, excepted."""
