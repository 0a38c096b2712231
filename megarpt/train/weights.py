"""Weights of a checkpoint: which model they belong to, how to read them, what identifies them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarpt.errors import CheckpointError
from megarpt.model.build import unwrap
from megarpt.train.checkpoint_files import MODEL, Manifest, check_files, read_manifest, resolve_checkpoint
from megarpt.train.sharded import content_hash, first_error, load_sharded

logger = logging.getLogger(__name__)

# Everything in megatron-core's TransformerConfig that decides what weights mean, besides how they are computed.
_IDENTITY = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
)
_VOCABULARY = "model.vocab_size"


def load_weights(path: str | Path, model: Sequence[torch.nn.Module], *, tokenizer_sha256: str | None = None) -> Path:
    """Fill a model with the weights of a checkpoint, under any layout and precision; the checkpoint they came from.

    An optimizer built before must be told with `reload_model_params()`.

    Args:
        path: a run folder, its `checkpoints` folder or one checkpoint.
        model: this rank's chunks of the network, bare or in any of megatron-core's wrappings.
        tokenizer_sha256: of the run; the checkpoint's must be the same. None does not ask.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it does not fit the model.
    """
    started = time.perf_counter()
    checkpoint = resolve_checkpoint(path)
    manifest = read_manifest(checkpoint)
    names = sorted(name for name in manifest.files if name.startswith(MODEL + "/"))
    problems = check_files(checkpoint, manifest, names[dist.get_rank() :: dist.get_world_size()])
    problem = first_error("\n".join(problems))
    if problem:
        raise CheckpointError(problem)
    differences = weight_differences(manifest, unwrap(model[0]), tokenizer_sha256)
    if "data.tokenizer" in differences:
        raise CheckpointError(
            f"{checkpoint} was made with another tokenizer: data.tokenizer: {differences['data.tokenizer']}; "
            "use the tokenizer of the checkpoint, or another checkpoint"
        )
    load_model(checkpoint / MODEL, model, differences)
    for key, text in differences.items():
        logger.warning("weights of %s: %s: %s", checkpoint, key, text)
    logger.info("read the weights of %s in %.2f s", checkpoint, time.perf_counter() - started)
    return checkpoint


def checkpoint_hash(path: str | Path) -> str:
    """Identity of the weights: a hash of their values, the same for every layout, folder and file format.

    Cost: reads the weights once; memory of the largest tensor. No collectives: ask on one rank.

    Raises:
        CheckpointError: there is no checkpoint, or its weights are damaged.
    """
    checkpoint = resolve_checkpoint(path)
    manifest = read_manifest(checkpoint)
    problems = check_files(checkpoint, manifest, [name for name in manifest.files if name.startswith(MODEL + "/")])
    if problems:
        raise CheckpointError("\n".join(problems))
    return content_hash(checkpoint / MODEL, manifest.model[_VOCABULARY])


def describe_model(network: torch.nn.Module) -> dict[str, Any]:
    """Configuration key -> value, of all that decides the shapes and the meaning of a network's weights."""
    config: Any = network.config
    described = {f"model.mcore.{name}": getattr(config, name) for name in _IDENTITY}
    activation = config.activation_func
    described["model.mcore.activation"] = str(getattr(activation, "__name__", "gelu_tanh"))
    described["model.preset (position_embedding_type)"] = network.position_embedding_type
    described["model.preset (share_embeddings_and_output_weights)"] = network.share_embeddings_and_output_weights
    described["model.preset (rotary_base)"] = getattr(network, "rotary_base", None)
    described["model.gpt.rope_scaling_factor"] = network.rope_scaling_factor
    rotary = getattr(network, "rotary_pos_emb", None)
    described["model.gpt.seq_len_interpolation_factor"] = getattr(rotary, "seq_len_interpolation_factor", None)
    described[_VOCABULARY] = network.valid_vocab_size
    return described


def sharded_weights(model: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The parameters of this rank's chunks as megatron-core's sharded tensors, views of the parameters themselves."""
    return {f"model{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(model)}


def weight_differences(manifest: Manifest, network: torch.nn.Module, tokenizer_sha256: str | None) -> dict[str, str]:
    """Configuration key -> both values, where checkpoint and run differ."""
    here, there = describe_model(network), dict(manifest.model)
    if tokenizer_sha256 is not None:
        here["data.tokenizer"], there["data.tokenizer"] = tokenizer_sha256, manifest.tokenizer_sha256
    return {
        key: f"{there.get(key)!r} in the checkpoint, {here[key]!r} in this run" for key in here if here[key] != there.get(key)
    }


def load_model(folder: Path, model: Sequence[torch.nn.Module], differences: Mapping[str, str]) -> None:
    """Fill this rank's chunks from the folder of a network in a checkpoint whose files were checked."""
    loaded = load_sharded(
        sharded_weights(model),
        folder,
        what="model",
        differences=differences,
        same_vocabulary=_VOCABULARY not in differences,
    )
    for i, chunk in enumerate(model):
        unwrap(chunk).load_state_dict(loaded[f"model{i}"])
