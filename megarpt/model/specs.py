"""Layer specs: Transformer Engine's modules where it is present, torch's otherwise; one core attention for both."""

from __future__ import annotations

from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megarpt.device.libraries import has_transformer_engine
from megarpt.model.attention import SdpaCoreAttention
from megarpt.model.norm import TorchNorm
from megarpt.streaming.layer import StreamedTransformerLayer

Backend = Literal["te", "torch"]


def default_backend(is_cuda: bool) -> Backend:
    """Transformer Engine when it can be imported and there is a GPU for it."""
    return "te" if is_cuda and has_transformer_engine() else "torch"


def decoder_spec(
    config: TransformerConfig, backend: Backend, *, streamed: bool = False, pp_rank: int = 0, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """What megatron-core's GPTModel builds the decoder layers of one pipeline stage (or one piece of it) from.

    `streamed` layers keep their input alone and have the same parameters.
    """
    is_te = backend == "te"
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=is_te, normalization=config.normalization, vp_stage=vp_stage, pp_rank=pp_rank
    )
    for layer in block.layer_specs:
        if streamed:
            layer.module = StreamedTransformerLayer
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = SdpaCoreAttention  # Transformer Engine's does not see document borders in this layout
        if is_te:
            continue
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchNorm
        if attention.q_layernorm is not IdentityOp:
            attention.q_layernorm = attention.k_layernorm = TorchNorm
    if not is_te:
        block.layer_norm = TorchNorm
    return block
