"""Settings of published models: which are understood, as what, and which are refused by their name."""

import copy

import pytest

from megarpt.config.hf_settings import FAMILIES, from_model_config, read_settings, to_model_config, write_settings
from megarpt.config.presets import PRESETS
from megarpt.config.schema import ModelConfig
from megarpt.errors import CheckpointError

# As published, without what says nothing about the computation.
TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3 = TINYLLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA_3_1 = LLAMA_3 | {
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
MISTRAL = {k: v for k, v in TINYLLAMA.items() if k not in ("attention_bias", "pretraining_tp", "rope_scaling")} | {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3 = {k: v for k, v in QWEN2_5.items() if k != "use_mrope"} | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "sliding_window": None,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "summary_first_dropout": 0.1,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


@pytest.mark.parametrize(
    ("config", "preset", "gpt"),
    [
        (TINYLLAMA, "tinyllama-1.1b", {}),
        (LLAMA_3, "llama-3-8b", {}),
        (LLAMA_3_1, "llama-3-8b", {"max_sequence_length": 131072, "rope_scaling_factor": 8.0}),
        (MISTRAL, "mistral-7b", {}),
        (
            MISTRAL | {"rope_theta": 1e6, "sliding_window": None},
            "mistral-7b",
            {"max_sequence_length": 32768, "rotary_base": 1e6},
        ),
        (QWEN2_5, "qwen2.5-1.5b", {"max_sequence_length": 131072}),
        (QWEN_3, "qwen3-0.6b", {}),
        (GPT2, "gpt2-124m", {}),
    ],
)
def test_a_published_model_is_its_preset(config: dict, preset: str, gpt: dict) -> None:
    section = to_model_config(read_settings(config))
    assert section == {"preset": preset, "mcore": {}, "gpt": gpt, "vocab_size": PRESETS[preset].vocab_size}
    assert ModelConfig.model_validate(section)


def test_transformers_5_writes_the_same_model_otherwise() -> None:
    new = {k: v for k, v in LLAMA_3_1.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")} | {
        "dtype": "bfloat16",
        "head_dim": 128,
        "rope_parameters": LLAMA_3_1["rope_scaling"] | {"rope_theta": 500000.0},
    }
    assert read_settings(new) == read_settings(LLAMA_3_1)


@pytest.mark.parametrize("name", sorted(name for name, each in PRESETS.items() if "num_moe_experts" not in each.transformer))
def test_every_dense_preset_goes_out_and_comes_back(name: str) -> None:
    out = from_model_config(ModelConfig(preset=name), PRESETS[name].vocab_size)
    written = write_settings(out, dtype="float32", eos=0)
    back = read_settings(written)
    assert back == out
    section = to_model_config(back)
    same = PRESETS[section["preset"]]
    assert (section["mcore"], section["gpt"]) == ({}, {})
    assert (same.transformer, same.gpt) == (PRESETS[name].transformer, PRESETS[name].gpt)


def test_a_model_far_from_every_preset_carries_what_differs() -> None:
    config = TINYLLAMA | {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    section = to_model_config(read_settings(config | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}))
    described = from_model_config(ModelConfig.model_validate(section), 32000)
    assert described.transformer["hidden_size"] == 64 and described.transformer["kv_channels"] == 32
    assert described.transformer["add_bias_linear"] and described.gpt["share_embeddings_and_output_weights"]
    assert described.max_sequence_length == 2048


def test_a_sliding_window_bounds_the_samples_and_is_said() -> None:
    assert read_settings(MISTRAL).max_sequence_length == 4096
    assert "sliding_window" in read_settings(MISTRAL).notes[0]
    absent = {k: v for k, v in MISTRAL.items() if k != "sliding_window"}
    assert read_settings(absent).max_sequence_length == 4096  # the class's default
    assert read_settings(MISTRAL | {"sliding_window": None}).max_sequence_length == 32768
    assert read_settings(MISTRAL | {"max_position_embeddings": 4096}).notes == ()
    assert read_settings(QWEN2_5 | {"sliding_window": 1024}).max_sequence_length == 131072  # not used
    assert read_settings(QWEN2_5 | {"sliding_window": 1024, "use_sliding_window": True}).max_sequence_length == 1024
    layers = ["full_attention", "sliding_attention"]
    assert read_settings(QWEN2_5 | {"sliding_window": 1024, "layer_types": layers}).max_sequence_length == 1024


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINYLLAMA | {"model_type": "mamba"}, "model_type: got 'mamba', expected one of llama"),
        (TINYLLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "architectures: .*LlamaForCausalLM"),
        ({k: v for k, v in TINYLLAMA.items() if k != "hidden_size"}, "hidden_size: got None"),
        (TINYLLAMA | {"num_hidden_layers": "22"}, "num_hidden_layers: got '22', expected a whole number"),
        (TINYLLAMA | {"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of .* 32"),
        (TINYLLAMA | {"hidden_size": 2049}, "hidden_size: got 2049, expected a multiple of"),
        (TINYLLAMA | {"hidden_act": "relu"}, "hidden_act: got 'relu', expected one of silu"),
        (TINYLLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings: got 'yes', expected true or false"),
        (TINYLLAMA | {"attention_bias": True}, "attention_bias: got True, expected False"),
        (MISTRAL | {"attention_bias": True}, "attention_bias: got True, expected False"),
        (MISTRAL | {"mlp_bias": True}, "mlp_bias: True"),
        (TINYLLAMA | {"rms_norm_eps": 0}, "rms_norm_eps: got 0, expected a number above 0"),
        (TINYLLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type: got 'dynamic'"),
        (TINYLLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type: got 'yarn'"),
        (TINYLLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: got None"),
        (TINYLLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}}, r"rope_scaling: got the keys \['odd'\]"),
        (
            LLAMA_3_1 | {"rope_scaling": LLAMA_3_1["rope_scaling"] | {"low_freq_factor": 2.0}},
            "rope_scaling.low_freq_factor: got 2.0, expected 1, which megatron-core has built in",
        ),
        (TINYLLAMA | {"rope_scaling": "linear"}, "rope_scaling: got 'linear', expected an object"),
        (TINYLLAMA | {"rope_parameters": {"rope_theta": "big"}}, "rope_theta: got 'big', expected a number above 0"),
        (TINYLLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
        (QWEN2_5 | {"use_mrope": True}, "use_mrope: got True, expected False"),
        (MISTRAL | {"sliding_window": "wide"}, "sliding_window: got 'wide'"),
        (QWEN2_5 | {"layer_types": ["chunked_attention"]}, "layer_types: got"),
        (QWEN2_5 | {"layer_types": ["sliding_attention"], "sliding_window": None}, "sliding_window: got None"),
        (TINYLLAMA | {"quantization_config": {"bits": 4}}, "quantization_config: .*bits"),
        (TINYLLAMA | {"logit_scale": 2.0}, r"logit_scale: 2.0\n.*--ignore-key"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: got True, expected False"),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights: got False, expected True"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(config: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        read_settings(config)


def test_a_key_can_be_ignored_on_the_user_s_word() -> None:
    assert read_settings(TINYLLAMA | {"note": "mine"}, ignored=["note"]) == read_settings(TINYLLAMA)


@pytest.mark.parametrize(
    ("model", "family", "message"),
    [
        ({"preset": "mixtral-8x7b"}, None, "num_moe_experts"),
        ({"mcore": {"layernorm_zero_centered_gamma": True}}, None, "model.mcore.layernorm_zero_centered_gamma"),
        ({"mcore": {"add_bias_linear": True, "qk_layernorm": True}}, None, "qwen3: model.mcore.add_bias_linear is True"),
        ({"preset": "qwen3-0.6b"}, "llama", "llama: model.mcore.qk_layernorm is True and would have to be False"),
        ({"preset": "gpt2-124m"}, "llama", "llama: its positions are rotary angles"),
        ({"preset": "tiny"}, "gpt2", "gpt2: its positions are learned"),
        ({"preset": "gpt2-124m", "mcore": {"num_query_groups": 4}}, None, "gpt2: its heads do not share"),
    ],
)
def test_what_no_family_computes_is_not_written(model: dict, family: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_model_config(ModelConfig.model_validate(model), 300, family)


def test_settings_of_training_do_not_stand_in_the_way() -> None:
    mcore = {"recompute_granularity": "full", "hidden_dropout": 0.1, "init_method_std": 0.01, "bias_swiglu_fusion": False}
    assert from_model_config(ModelConfig(preset="tiny", mcore=mcore), 300) == from_model_config(ModelConfig(preset="tiny"), 300)


def test_a_family_can_be_chosen_where_several_compute_the_same() -> None:
    assert from_model_config(ModelConfig(preset="tinyllama-1.1b"), 32000).family == "llama"
    assert from_model_config(ModelConfig(preset="tinyllama-1.1b"), 32000, "mistral").family == "mistral"
    assert from_model_config(ModelConfig(preset="mistral-7b"), 32000).family == "mistral"


def test_reading_changes_nothing() -> None:
    before = copy.deepcopy(LLAMA_3_1)
    read_settings(LLAMA_3_1)
    assert before == LLAMA_3_1 and set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3", "gpt2"}
