"""Whether the values of corpora and sidecars are what their manifests say.

Opening a corpus checks its index and the size of its values. This reads the values themselves, each file once, the work shared
by all ranks; what was found whole is remembered by size, time and inode, so that a resume does not read it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from megarpt.corpus.indexed import bin_path
from megarpt.corpus.manifest import CorpusManifest, SidecarManifest, verify_values
from megarpt.data.samples import SampleDataset
from megarpt.errors import DataError

Stamps = Mapping[str, list[int | str]]  # path of a file -> size, time of its last change in ns, inode, sha256


def check_contents(
    datasets: Iterable[SampleDataset], known: Stamps, *, rank: int, world_size: int, on_block: Callable[[], None]
) -> dict[str, list[int | str]]:
    """Read this rank's share of the files that are not known to be whole; the stamps of those that are.

    Args:
        datasets: whose corpora and sidecars are read.
        known: stamps of earlier calls.
        rank: this one; the larger files are dealt out first.
        world_size: of the ranks that share the work.
        on_block: called after every few megabytes.

    Cost: the bytes of the files over the ranks, at 1 to 2 GB/s each.

    Raises:
        DataError: a file is not what its manifest says.
    """
    manifests = {prefix: each for dataset in datasets for prefix, each in dataset.manifests().items()}
    by_size = sorted(manifests, key=lambda prefix: (-bin_path(prefix).stat().st_size, prefix))
    unknown = [prefix for prefix in by_size if known.get(str(bin_path(prefix))) != _stamp(prefix, manifests[prefix])]
    found = {}
    for prefix in unknown[rank::world_size]:
        before = _stamp(prefix, manifests[prefix])
        verify_values(prefix, manifests[prefix], on_block=on_block)
        found[str(bin_path(prefix))] = before
    return found


def read_stamps(path: Path) -> Stamps:
    """What an earlier attempt found whole; nothing when the file is not there or cannot be understood: it is checked again."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _stamp(prefix: str, manifest: CorpusManifest | SidecarManifest) -> list[int | str]:
    path = bin_path(prefix)
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; copy the files again") from error
    return [status.st_size, status.st_mtime_ns, status.st_ino, manifest.bin_sha256]
