"""What the preflight measures between nodes, with ranks in the place of nodes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarpt.testing.distributed import spawn

SCRIPT = str(Path(__file__).parents[2] / "slurm" / "preflight.py")


def measure() -> tuple[float, float]:
    """Bandwidth over all ranks, and the best with a neighbour."""
    preflight, rank, world = runpy.run_path(SCRIPT), dist.get_rank(), dist.get_world_size()
    buffer = torch.ones(1 << 12)
    everywhere = preflight["bandwidth"](buffer, None, world, 2)
    return everywhere, preflight["pair_bandwidth"](buffer, rank, world, 1, 2)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_node_meets_a_neighbour(world: int) -> None:
    for everywhere, pair in spawn(world, measure):
        assert everywhere > 0
        assert pair is None if world == 2 else pair > 0
