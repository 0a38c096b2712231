"""Model shapes, as data. Parameter counts are checked by a test against the published ones.

`transformer` holds fields of megatron-core's TransformerConfig, `gpt` arguments of its GPTModel, `vocab_size` the published
embedding rows (a run takes its tokenizer's size instead), `parameters` the published count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""What `activation` may be in a preset and in model.mcore."""

_LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation": "silu",
    "add_bias_linear": False,
    "layernorm_epsilon": 1e-5,
}
_ROPE: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": 10_000, "share_embeddings_and_output_weights": False}
_GPT2: dict[str, Any] = {
    "normalization": "LayerNorm",
    "gated_linear_unit": False,
    "activation": "gelu_tanh",
    "add_bias_linear": True,
    "layernorm_epsilon": 1e-5,
}


def _shape(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": kv_heads,
        "ffn_hidden_size": ffn,
    } | more


def _experts(count: int, topk: int, ffn: int, aux_loss: float) -> dict[str, Any]:
    return {
        "num_moe_experts": count,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": ffn,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": aux_loss,
        "moe_router_dtype": "fp32",
    }


@dataclass(frozen=True, slots=True)
class Preset:
    """One model shape."""

    transformer: Mapping[str, Any]
    gpt: Mapping[str, Any]
    max_sequence_length: int
    vocab_size: int
    parameters: int

    def gpt_arguments(self, over: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of GPTModel: the preset's, and over them those that are not None."""
        given = {name: value for name, value in over.items() if value is not None}
        arguments = {"max_sequence_length": self.max_sequence_length, **self.gpt, **given}
        return arguments | {"rope_scaling": True} if "rope_scaling_factor" in arguments else arguments


PRESETS: Mapping[str, Preset] = {
    # trains on a laptop
    "tiny": Preset(_LLAMA | _shape(4, 256, 4, 2, 768), _ROPE, 4096, 8192, 7_342_336),
    "gpt2-124m": Preset(
        _GPT2 | _shape(12, 768, 12, 12, 3072),
        {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
        1024,
        50_257,
        124_439_808,
    ),
    "tinyllama-1.1b": Preset(_LLAMA | _shape(22, 2048, 32, 4, 5632), _ROPE, 2048, 32_000, 1_100_048_384),
    # up to its sliding window of 4096 tokens, within which attention is ordinary
    "mistral-7b": Preset(_LLAMA | _shape(32, 4096, 32, 8, 14_336), _ROPE, 4096, 32_000, 7_241_732_096),
    "llama-3-8b": Preset(
        _LLAMA | _shape(32, 4096, 32, 8, 14_336), _ROPE | {"rotary_base": 500_000}, 8192, 128_256, 8_030_261_248
    ),
    "qwen2.5-1.5b": Preset(
        _LLAMA | _shape(28, 1536, 12, 2, 8960, add_qkv_bias=True, layernorm_epsilon=1e-6),
        _ROPE | {"rotary_base": 1_000_000, "share_embeddings_and_output_weights": True},
        32_768,
        151_936,
        1_543_714_304,
    ),
    "qwen2.5-7b": Preset(
        _LLAMA | _shape(28, 3584, 28, 4, 18_944, add_qkv_bias=True, layernorm_epsilon=1e-6),
        _ROPE | {"rotary_base": 1_000_000},
        32_768,
        152_064,
        7_615_616_512,
    ),
    "qwen3-0.6b": Preset(
        _LLAMA | _shape(28, 1024, 16, 8, 3072, kv_channels=128, qk_layernorm=True, layernorm_epsilon=1e-6),
        _ROPE | {"rotary_base": 1_000_000, "share_embeddings_and_output_weights": True},
        32_768,
        151_936,
        596_049_920,
    ),
    "qwen3-8b": Preset(
        _LLAMA | _shape(36, 4096, 32, 8, 12_288, kv_channels=128, qk_layernorm=True, layernorm_epsilon=1e-6),
        _ROPE | {"rotary_base": 1_000_000},
        32_768,
        151_936,
        8_190_735_360,
    ),
    # mixtures of experts: the first trains on a laptop
    "tiny-moe": Preset(_LLAMA | _shape(4, 256, 4, 2, 768) | _experts(4, 2, 384, 0.01), _ROPE, 4096, 8192, 9_705_728),
    "mixtral-8x7b": Preset(
        _LLAMA | _shape(32, 4096, 32, 8, 14_336) | _experts(8, 2, 14_336, 0.02),
        _ROPE | {"rotary_base": 1_000_000},
        32_768,
        32_000,
        46_702_792_704,
    ),
    "qwen3-30b-a3b": Preset(
        _LLAMA
        | _shape(48, 2048, 32, 4, 6144, kv_channels=128, qk_layernorm=True, layernorm_epsilon=1e-6)
        | _experts(128, 8, 768, 0.001),
        _ROPE | {"rotary_base": 1_000_000},
        32_768,
        151_936,
        30_532_122_624,
    ),
}
