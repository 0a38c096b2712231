"""A trained model, from its checkpoint: network, tokenizer and the configuration it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megarpt.config.schema import HeldOutCorpus, ParallelConfig, PretrainConfig, TrainingConfig
from megarpt.config.validate import layout_problems
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError
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
    config: TrainingConfig
    tokenizer: Tokenizer
    network: TokenStatsGPT


def held_out_corpora(config: TrainingConfig) -> dict[str, HeldOutCorpus]:
    """The tokenized corpora that a run was evaluated on, by name; those of `megarpt sft` and `megarpt rl` have none."""
    return config.data.valid if isinstance(config, PretrainConfig) else {}


def only_held_out(config: TrainingConfig) -> HeldOutCorpus:
    """The held-out corpus of a run that has one, for tools that look at one corpus.

    Raises:
        ConfigError: it has none or several.
    """
    valid = held_out_corpora(config)
    if len(valid) != 1:
        raise ConfigError(
            f"--corpus: the run has {len(valid)} held-out corpora ({', '.join(valid) or 'none'}), expected exactly one to take "
            "by itself; name the prefix of one"
        )
    return next(iter(valid.values()))


def load_pretrained(
    path: str,
    runtime: Runtime,
    layout: ParallelLayout,
    groups: ProcessGroups,
    parallel: ParallelConfig,
    *,
    micro_batch_size: int | None = None,
    seq_length: int | None = None,
) -> Pretrained:
    """This rank's part of the model of a run folder or checkpoint, in evaluation mode and without gradients.

    Args:
        path: the run folder or checkpoint.
        runtime: where it is to compute.
        layout: how the model is divided now, whatever it was trained under.
        groups: of that layout.
        parallel: the configuration of that layout.
        micro_batch_size: samples of a forward pass; None takes its run's.
        seq_length: tokens of a sample; None takes its run's.

    Raises:
        ConfigError: the model or its micro-batches cannot be divided that way.
        CheckpointError: there is no complete checkpoint, it is damaged, or its tokenizer cannot be found.
    """
    checkpoint = resolve_checkpoint(path)
    trained = read_config(checkpoint)
    batch = trained.batch.model_copy(update={"micro_batch_size": micro_batch_size or trained.batch.micro_batch_size})
    data = trained.data.model_copy(update={"seq_length": seq_length or trained.data.seq_length})
    config = trained.model_copy(update={"parallel": parallel, "batch": batch, "data": data})
    mistakes = layout_problems(config)
    if mistakes:
        raise ConfigError("\n  ".join([f"{checkpoint} cannot be divided like this:", *mistakes]))
    tokenizer = find_tokenizer(config, checkpoint)
    network = build_inference_network(config, layout, groups, runtime, vocab_size=tokenizer.vocab_size)
    load_weights(checkpoint, [network])
    network.eval().requires_grad_(False)
    return Pretrained(checkpoint, config, tokenizer, network)
