"""Writing sharded state as a checkpoint does, without a run around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megarpt.train.sharded_save import Distribution, complete


def write_sharded(sharded: dict[str, Any], folder: Path) -> None:
    """Write a sharded state dict of a world of one rank into a new folder."""
    assert dist.group.WORLD is not None and dist.get_world_size() == 1
    folder.mkdir(parents=True)
    part = Distribution(dist.group.WORLD).part(sharded)
    part.freeze(None)
    complete(folder, [part.write(folder, 0)])
