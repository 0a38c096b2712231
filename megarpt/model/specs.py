"""Layer specs: Transformer Engine's modules where it is present, torch's otherwise."""

from __future__ import annotations

from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megarpt.device.libraries import has_transformer_engine
from megarpt.model.attention import SdpaCoreAttention
from megarpt.model.norm import TorchNorm

Backend = Literal["te", "torch"]


def default_backend(is_cuda: bool) -> Backend:
    """Transformer Engine when it can be imported and there is a GPU for it."""
    return "te" if is_cuda and has_transformer_engine() else "torch"


def decoder_spec(config: TransformerConfig, backend: Backend) -> ModuleSpec | TransformerBlockSubmodules:
    """What megatron-core's GPTModel builds its decoder from."""
    if backend == "te":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = TorchNorm
    attention.core_attention = SdpaCoreAttention
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=TorchNorm)
