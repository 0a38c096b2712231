"""A trained model, from its checkpoint: network, tokenizer and the configuration it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megarpt.config.schema import ParallelConfig, PretrainConfig
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.device.runtime import Runtime
from megarpt.model.build import build_inference_network
from megarpt.model.token_stats_gpt import TokenStatsGPT
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.run.tokenizer_files import find_tokenizer
from megarpt.train.checkpoint_files import read_config, resolve_checkpoint
from megarpt.train.weights import load_weights


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What a checkpoint holds, ready to be asked."""

    checkpoint: Path
    config: PretrainConfig
    tokenizer: Tokenizer
    network: TokenStatsGPT


def load_pretrained(
    path: str, runtime: Runtime, layout: ParallelLayout, groups: ProcessGroups, parallel: ParallelConfig
) -> Pretrained:
    """This rank's part of the model of a run folder or checkpoint, in evaluation mode and without gradients.

    Args:
        path: the run folder or checkpoint.
        runtime: where it is to compute.
        layout: how the model is divided now, whatever it was trained under.
        groups: of that layout.
        parallel: the configuration of that layout.

    Raises:
        CheckpointError: there is no complete checkpoint, it is damaged, or its tokenizer cannot be found.
    """
    checkpoint = resolve_checkpoint(path)
    config = read_config(checkpoint).model_copy(update={"parallel": parallel})
    tokenizer = find_tokenizer(config, checkpoint)
    network = build_inference_network(config, layout, groups, runtime, vocab_size=tokenizer.vocab_size)
    load_weights(checkpoint, [network])
    network.eval().requires_grad_(False)
    return Pretrained(checkpoint, config, tokenizer, network)
