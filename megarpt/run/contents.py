"""All ranks together make sure that the data are what their manifests say, before anything is computed from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megarpt.corpus.atomic import atomic_write_json
from megarpt.data.contents import check_contents, read_stamps
from megarpt.data.samples import SampleDataset
from megarpt.device.runtime import Runtime
from megarpt.train.failures import together
from megarpt.train.sharded import gathered

logger = logging.getLogger(__name__)


def verify_contents(
    datasets: Sequence[SampleDataset], runtime: Runtime, *, on_block: Callable[[], None], record: Path | None = None
) -> None:
    """Read the values of corpora and sidecars, each file on one rank; what `record` knows to be whole is not read again.

    Collectives: two gathers of objects.

    Raises:
        DataError: on every rank, when any file is not what its manifest says.
    """
    known = read_stamps(record) if record is not None else {}
    check = partial(check_contents, datasets, known, rank=runtime.rank, world_size=runtime.world_size, on_block=on_block)
    found = {path: stamp for each in gathered(together(check)) for path, stamp in each.items()}
    if found:
        logger.info("the values of %d corpora and sidecars are what their manifests say", len(found))
    if record is not None and found and runtime.rank == 0:
        atomic_write_json(record, {**known, **found})
