"""A trained model, from its checkpoint: network, tokenizer and the configuration it was trained with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from megarpt.config.schema import PretrainConfig
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.device.runtime import Runtime
from megarpt.errors import CheckpointError, DataError
from megarpt.model.build import build_inference_network
from megarpt.model.token_stats_gpt import TokenStatsGPT
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.train.checkpoint_files import read_config, read_manifest, resolve_checkpoint
from megarpt.train.weights import load_weights


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What a checkpoint holds, ready to be asked."""

    checkpoint: Path
    config: PretrainConfig
    tokenizer: Tokenizer
    network: TokenStatsGPT


def load_pretrained(path: str, runtime: Runtime, layout: ParallelLayout, groups: ProcessGroups) -> Pretrained:
    """The model of a run folder or checkpoint, in evaluation mode and without gradients.

    Raises:
        CheckpointError: there is no complete checkpoint, it is damaged, or its tokenizer cannot be found.
    """
    checkpoint = resolve_checkpoint(path)
    config = read_config(checkpoint)
    tokenizer = find_tokenizer(config, checkpoint)
    network = build_inference_network(config, layout, groups, runtime, vocab_size=tokenizer.vocab_size)
    load_weights(checkpoint, [network])
    network.eval().requires_grad_(False)
    return Pretrained(checkpoint, config, tokenizer, network)


def find_tokenizer(config: PretrainConfig, checkpoint: Path) -> Tokenizer:
    """The tokenizer the checkpoint was trained with: where the configuration says, or the copy in its run folder.

    Raises:
        CheckpointError: neither is the one; the message names both.
    """
    expected = read_manifest(checkpoint).tokenizer_sha256
    tried = []
    for spec in (config.data.tokenizer, str(tokenizer_copy(checkpoint.parent.parent, config.data.tokenizer))):
        try:
            tokenizer = load_tokenizer(spec)
        except DataError as error:
            tried.append(f"{spec}: {error}")
            continue
        if tokenizer.sha256 == expected:
            return tokenizer
        tried.append(f"{spec}: sha256 {tokenizer.sha256[:12]}")
    raise CheckpointError(
        f"{checkpoint}: no tokenizer with sha256 {expected[:12]}, the one it was trained with; looked at "
        + "; ".join(tried)
        + ". Put the tokenizer back at one of these places"
    )


def tokenizer_copy(run_dir: Path, spec: str) -> Path:
    """Where a run folder keeps its own copy of the tokenizer."""
    return run_dir / f"tokenizer{Path(spec).suffix}"


def keep_tokenizer(run_dir: Path, spec: str) -> None:
    """Copy a tokenizer file into the run folder, so that the run can be used where the original is not."""
    if Path(spec).is_file():
        copy = tokenizer_copy(run_dir, spec)
        part = copy.with_name(copy.name + ".tmp")
        shutil.copyfile(spec, part)
        part.replace(copy)
