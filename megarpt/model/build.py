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
from megarpt.config.schema import DEFAULT_CHUNK_TOKENS, DEFAULT_HEAD_KEEP_MIB, LanguageModelConfig, ModelConfig, TrainingConfig
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError
from megarpt.model.specs import Backend, decoder_spec, default_backend
from megarpt.model.token_stats_gpt import TokenStatsGPT
from megarpt.parallel.layout import ParallelLayout, ProcessGroups

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


def transformer_config(cfg: TrainingConfig, layout: ParallelLayout, *, is_cuda: bool) -> TransformerConfig:
    """megatron-core's TransformerConfig of a run.

    Raises:
        ConfigError: unknown names, or values megatron-core refuses.
    """
    mistakes = model_mistakes(cfg.model)
    if mistakes:
        raise ConfigError("\n  ".join(mistakes))
    fields = dict(PRESETS[cfg.model.preset].transformer) | dict(cfg.model.mcore)
    activation = fields.pop("activation")
    if "moe_aux_loss_coeff" in fields:
        fields["moe_aux_loss_coeff"] = _per_token(fields["moe_aux_loss_coeff"], cfg, layout)
    bf16 = cfg.train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    defaults: dict[str, Any] = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "persist_layer_norm": False,
        "moe_token_dispatcher_type": "alltoall" if is_cuda else "allgather",
    }
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
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            # The interleaved schedule computes wrong gradients with any other pair; 1F1B refuses overlap.
            overlap_p2p_comm=layout.vpp is not None,
            batch_p2p_comm=layout.vpp is None,
            deallocate_pipeline_outputs=layout.pp > 1 and is_cuda,  # gloo may still be sending from that memory
            use_cpu_initialization=not is_cuda,
        )
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"model.mcore: megatron-core refuses this model: {error}") from error


def _per_token(coefficient: Any, cfg: TrainingConfig, layout: ParallelLayout) -> Any:
    """The auxiliary loss' coefficient such that it weighs the same under every layout and selection.

    megatron-core multiplies the loss by the tokens of one rank of the tensor- and context-parallel group, and divides it by
    the tokens that the whole group trains on.
    """
    if isinstance(coefficient, list):
        return [_per_token(each, cfg, layout) for each in coefficient]
    kept = 1.0
    if isinstance(cfg, LanguageModelConfig) and cfg.objective.weighting == "top_fraction":
        kept = cfg.objective.fraction
    return coefficient * layout.tp * layout.cp * kept


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
    cfg: TrainingConfig,
    config: TransformerConfig,
    groups: ProcessGroups | None,
    *,
    vocab_size: int,
    backend: Backend,
    vp_stage: int | None = None,
) -> TokenStatsGPT:
    """The bare network of this rank, or one piece of it, on megatron-core's current device.

    `groups` None takes megatron-core's own.
    """
    preset = PRESETS[cfg.model.preset]
    valid = cfg.model.vocab_size or vocab_size
    pp_rank, last_stage = (groups.pp.rank(), groups.pp.size() - 1) if groups else (0, 0)
    last_piece = (config.virtual_pipeline_model_parallel_size or 1) - 1
    keep_mib = DEFAULT_HEAD_KEEP_MIB if cfg.train.head_keep_mib is None else cfg.train.head_keep_mib
    return TokenStatsGPT(
        config=config,
        transformer_layer_spec=decoder_spec(config, backend, streamed=cfg.stream.layers, pp_rank=pp_rank, vp_stage=vp_stage),
        vocab_size=padded_vocab_size(cfg.model, vocab_size, config.tensor_model_parallel_size),
        pre_process=pp_rank == 0 and not vp_stage,
        post_process=pp_rank == last_stage and vp_stage in (None, last_piece),
        parallel_output=True,
        pg_collection=groups.collection if groups else None,
        vp_stage=vp_stage,
        valid_vocab_size=valid,
        head_chunk_tokens=cfg.train.head_chunk_tokens,
        head_keep_bytes=keep_mib * 2**20,
        stream_chunk_tokens=(cfg.stream.chunk_tokens or DEFAULT_CHUNK_TOKENS) if cfg.stream.layers else 0,
        **preset.gpt_arguments(cfg.model.gpt.model_dump()),
    )


def build_model(
    cfg: TrainingConfig, layout: ParallelLayout, groups: ProcessGroups, runtime: Runtime, *, vocab_size: int
) -> list[DistributedDataParallel]:
    """The network of this rank as model chunks, in its precision, on its device, ready for megatron-core's schedules.

    One chunk, or as many as the interleaved schedule has pieces on a stage.
    """
    config = transformer_config(cfg, layout, is_cuda=runtime.is_cuda)
    parallel = cfg.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    chunks = []
    for vp_stage in [None] if layout.vpp is None else range(layout.vpp):
        network = build_network(
            cfg, config, groups, vocab_size=vocab_size, backend=default_backend(runtime.is_cuda), vp_stage=vp_stage
        )
        network.to(runtime.device)
        if config.bf16:
            network = Float16Module(config, network)
        is_first = not vp_stage
        # Gradients of the later pieces come first, long before the step ends: one bucket each is enough for them.
        chunks.append(
            DistributedDataParallel(config, ddp, network, pg_collection=groups.collection, disable_bucketing=not is_first)
        )
    if parallel.overlap_grad_reduce:
        suspend = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = suspend if len(chunks) > 1 else suspend[0]
    return chunks


def build_inference_network(
    cfg: TrainingConfig, layout: ParallelLayout, groups: ProcessGroups, runtime: Runtime, *, vocab_size: int
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
