"""`megarpt export`: the weights of a checkpoint in a folder of their own, without what only a resume needs.

The folder is a checkpoint with the files of `model/`, the configuration and the tokenizer, hashed in a manifest of its own: it
goes wherever a checkpoint goes, except that a run cannot be continued from it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megarpt.config.schema import ExportOptions
from megarpt.corpus.atomic import fsync_directory, require_free_bytes, write_errors
from megarpt.errors import EXIT_OK, CheckpointError, ConfigError
from megarpt.run.tokenizer_files import keep_tokenizer, locate_tokenizer
from megarpt.train.checkpoint_files import (
    CONFIG,
    MODEL,
    check_files,
    describe_file,
    read_config,
    read_manifest,
    resolve_checkpoint,
)

logger = logging.getLogger(__name__)


def run(options: ExportOptions) -> int:
    """Write the folder; it appears under its name only when it is whole.

    Raises:
        ConfigError: the folder exists already.
        CheckpointError: there is no checkpoint, or its weights are damaged.
        DataError: the file system refused, or has not enough space.
    """
    target = Path(options.output)
    if target.exists():
        raise ConfigError(f"{target} exists already; name a folder that does not, or remove it")
    source = resolve_checkpoint(options.checkpoint)
    config, manifest = read_config(source), read_manifest(source)
    names = [CONFIG, *(name for name in manifest.files if name.startswith(f"{MODEL}/"))]
    problems = check_files(source, manifest, names)
    if problems:
        raise CheckpointError("\n".join(problems))
    expected = {name: manifest.files[name] for name in names}
    num_bytes = sum(int(entry["bytes"]) for entry in expected.values())
    require_free_bytes(target, num_bytes)
    tokenizer, _ = locate_tokenizer(config, source)
    temporary = target.with_name(f".{target.name}.tmp")
    with write_errors(target, needed=num_bytes):
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        files = _copy(source, temporary, expected)
        keep_tokenizer(temporary, tokenizer)
        files |= {path.name: describe_file(path) for path in temporary.glob("tokenizer*")}
        replace(manifest, files=files).write(temporary)
        temporary.rename(target)
        fsync_directory(target.parent)
    logger.info("exported the weights of %s to %s: %.1f MB", source, target, num_bytes / 1e6)
    return EXIT_OK


def _copy(source: Path, target: Path, expected: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for name, entry in expected.items():
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)
        files[name] = describe_file(copy)
        if files[name] != entry:
            raise CheckpointError(f"{source / name} changed while it was copied; is something writing there?")
    for folder in {copy.parent for copy in map(target.joinpath, expected)}:
        fsync_directory(folder)
    return files
