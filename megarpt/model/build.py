"""Configuration and layout to a model that trains."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor

from megarpt.config.presets import PRESETS
from megarpt.config.schema import ModelConfig, PretrainConfig
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError
from megarpt.model.attention import PackedSegments
from megarpt.model.specs import Backend, decoder_spec, default_backend
from megarpt.model.token_stats_gpt import HeadMode, TokenStatsGPT
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.structs import TokenBatch, TokenStats

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def unknown_fields(block: str, given: Mapping[str, Any], target: type) -> list[str]:
    """One message for each key of an `mcore` block that megatron-core's dataclass `target` does not have."""
    known = {field.name for field in dataclasses.fields(target) if field.init}
    messages = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            messages.append(f"{block}.{key}: not a field of megatron-core's {target.__name__}{hint}")
    return messages


def model_mistakes(cfg: ModelConfig) -> list[str]:
    """What only the engine can know to be wrong in `model`, before anything is built."""
    return unknown_fields("model.mcore", {k: v for k, v in cfg.mcore.items() if k != "activation"}, TransformerConfig)


def transformer_config(cfg: PretrainConfig, layout: ParallelLayout, *, is_cuda: bool) -> TransformerConfig:
    """megatron-core's TransformerConfig of a run.

    Raises:
        ConfigError: unknown names, or values megatron-core refuses.
    """
    mistakes = model_mistakes(cfg.model)
    if mistakes:
        raise ConfigError("\n  ".join(mistakes))
    fields = dict(PRESETS[cfg.model.preset].transformer) | dict(cfg.model.mcore)
    activation = fields.pop("activation")
    bf16 = cfg.train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    defaults: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "persist_layer_norm": False}
    try:
        return TransformerConfig(
            **defaults | fields,
            activation_func=_ACTIVATIONS[activation],
            calculate_per_token_loss=True,
            bf16=bf16,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=cfg.parallel.sequence_parallel,
            use_cpu_initialization=not is_cuda,
        )
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"model.mcore: megatron-core refuses this model: {error}") from error


def padded_vocab_size(cfg: ModelConfig, tokenizer_vocab_size: int, tp: int) -> int:
    """Embedding rows over all ranks.

    Raises:
        ConfigError: the model has fewer rows than the tokenizer has entries.
    """
    rows = cfg.vocab_size or tokenizer_vocab_size
    if rows < tokenizer_vocab_size:
        raise ConfigError(
            f"model.vocab_size: got {rows}, but the tokenizer has {tokenizer_vocab_size} entries; "
            f"leave model.vocab_size out or set it to at least {tokenizer_vocab_size}"
        )
    multiple = cfg.make_vocab_size_divisible_by * tp
    return -(-rows // multiple) * multiple


def build_network(
    cfg: PretrainConfig, config: TransformerConfig, groups: ProcessGroups | None, *, vocab_size: int, backend: Backend
) -> TokenStatsGPT:
    """The bare network on megatron-core's current device; `groups` None takes megatron-core's own."""
    preset = PRESETS[cfg.model.preset]
    valid = cfg.model.vocab_size or vocab_size
    return TokenStatsGPT(
        config=config,
        transformer_layer_spec=decoder_spec(config, backend),
        vocab_size=padded_vocab_size(cfg.model, vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=preset.max_sequence_length,
        parallel_output=True,
        pg_collection=groups.collection if groups else None,
        valid_vocab_size=valid,
        head_chunk_tokens=cfg.train.head_chunk_tokens,
        **preset.gpt,
    )


def build_model(
    cfg: PretrainConfig, layout: ParallelLayout, groups: ProcessGroups, runtime: Runtime, *, vocab_size: int
) -> DistributedDataParallel:
    """The network, in its precision, on its device, ready for megatron-core's schedules and optimizer."""
    config = transformer_config(cfg, layout, is_cuda=runtime.is_cuda)
    network = build_network(cfg, config, groups, vocab_size=vocab_size, backend=default_backend(runtime.is_cuda))
    network.to(runtime.device)
    if config.bf16:
        network = Float16Module(config, network)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    return DistributedDataParallel(config, ddp, network, pg_collection=groups.collection)


def build_inference_network(
    cfg: PretrainConfig, layout: ParallelLayout, groups: ProcessGroups, runtime: Runtime, *, vocab_size: int
) -> TokenStatsGPT:
    """The network of a finished run: parameters in its precision, no optimizer, no gradient buffers."""
    config = transformer_config(cfg, layout, is_cuda=runtime.is_cuda)
    network = build_network(cfg, config, groups, vocab_size=vocab_size, backend=default_backend(runtime.is_cuda))
    return network.to(device=runtime.device, dtype=config.params_dtype)


def unwrap(model: torch.nn.Module) -> TokenStatsGPT:
    """The network inside megatron-core's wrappers."""
    network = unwrap_model(model)
    assert isinstance(network, TokenStatsGPT)
    return network


def token_stats(model: torch.nn.Module, batch: TokenBatch, max_seqlen: int, *, entropy: bool = False) -> TokenStats:
    """Run the model over a micro-batch, flattened so that documents are attention segments.

    Shapes: tokens [b, s] -> logprob [b, s], entropy [b, s] or None.
    """
    logprob, entropies = _run(model, batch, max_seqlen, HeadMode.LOGPROB_ENTROPY if entropy else HeadMode.LOGPROB)
    return TokenStats(logprob, entropies)


def token_accuracy(model: torch.nn.Module, batch: TokenBatch, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Without gradients: (logprob [b, s] of every label, correct [b, s] bool, whether the label is the likeliest token)."""
    with torch.no_grad():
        logprob, correct = _run(model, batch, max_seqlen, HeadMode.LOGPROB_TOP1)
    assert correct is not None
    return logprob, correct


def _run(model: torch.nn.Module, batch: TokenBatch, max_seqlen: int, mode: HeadMode) -> tuple[Tensor, Tensor | None]:
    b, s = batch.tokens.shape
    on_cpu = batch.tokens.device.type == "cpu"
    packed = PackedSegments(
        qkv_format="sbhd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        lengths=tuple(batch.cu_seqlens.diff().tolist()) if on_cpu else (),
    )
    unwrap(model).head_mode = mode
    first, second = model(
        input_ids=batch.tokens.reshape(1, b * s),
        position_ids=batch.position_ids.reshape(1, b * s),
        attention_mask=None,
        labels=batch.labels.reshape(1, b * s),
        packed_seq_params=packed,
    )
    return first.view(b, s), None if second is None else second.view(b, s)
