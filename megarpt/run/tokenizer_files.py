"""The tokenizer of a checkpoint: where its file may lie, and the copies that runs and exports keep of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from megarpt.config.schema import TrainingConfig
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.errors import CheckpointError, DataError
from megarpt.train.checkpoint_files import read_manifest


def find_tokenizer(config: TrainingConfig, checkpoint: Path) -> Tokenizer:
    """The tokenizer the checkpoint was trained with.

    Raises:
        CheckpointError: it is nowhere; the message names the places.
    """
    return locate_tokenizer(config, checkpoint)[1]


def locate_tokenizer(config: TrainingConfig, checkpoint: Path) -> tuple[str, Tokenizer]:
    """Where the tokenizer is and what it is: as the configuration says, or the copy in the run folder or the export.

    Raises:
        CheckpointError: it is at neither place; the message names them.
    """
    expected = read_manifest(checkpoint).tokenizer_sha256
    spec = config.data.tokenizer
    tried = []
    for place in (spec, *(str(tokenizer_copy(folder, spec)) for folder in (checkpoint.parent.parent, checkpoint))):
        try:
            tokenizer = load_tokenizer(place)
        except DataError as error:
            tried.append(f"{place}: {error}")
            continue
        if tokenizer.sha256 == expected:
            return place, tokenizer
        tried.append(f"{place}: sha256 {tokenizer.sha256[:12]}")
    raise CheckpointError(
        f"{checkpoint}: no tokenizer with sha256 {expected[:12]}, the one it was trained with; looked at "
        + "; ".join(tried)
        + ". Put the tokenizer back at one of these places"
    )


def tokenizer_copy(folder: Path, spec: str) -> Path:
    """Where a run folder or an export keeps its own copy of the tokenizer."""
    return folder / f"tokenizer{Path(spec).suffix}"


def keep_tokenizer(folder: Path, spec: str) -> None:
    """Copy a tokenizer file into a folder, so that its model can be used where the original is not."""
    if Path(spec).is_file():
        copy = tokenizer_copy(folder, spec)
        part = copy.with_name(copy.name + ".tmp")
        shutil.copyfile(spec, part)
        part.replace(copy)
