"""Settings of published models (Hugging Face's config.json) as megarpt's `model` section, and back.

Everything that decides what a model computes is mapped, or refused by the name of its key; nothing is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megarpt.config.presets import PRESETS, Preset
from megarpt.config.schema import ModelConfig
from megarpt.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model as both sides can say it."""

    family: str  # Hugging Face's model_type
    transformer: Mapping[str, Any]  # every field of _TRANSFORMER_FIELDS
    gpt: Mapping[str, Any]  # every field of _GPT_FIELDS; None is none
    max_sequence_length: int
    vocab_size: int
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def heads(self) -> Heads:
        t = self.transformer
        groups = t["num_query_groups"]
        return Heads(groups, t["num_attention_heads"] // groups, t["kv_channels"])


@dataclass(frozen=True, slots=True)
class Heads:
    """How attention is divided."""

    groups: int
    per_group: int
    size: int


_TRANSFORMER_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "gated_linear_unit",
    "activation",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
)
_GPT_FIELDS = ("share_embeddings_and_output_weights", "rotary_base", "rope_scaling_factor", "seq_len_interpolation_factor")

# Fields of megatron-core that change how a model is trained or computed, and not what it is.
_NOT_THE_MODEL = re.compile(
    r"(recompute_|cpu_offloading|tp_comm_|moe_).*|.*(dropout|_fusion|init_method.*|perform_initialization)"
    r"|attention_softmax_in_fp32|distribute_saved_activations|deterministic_mode|persist_layer_norm|test_mode"
    r"|num_layers_in_(first|last)_pipeline_stage|account_for_.*_in_pipeline_split|pipeline_model_parallel_layout"
)

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# Keys of config.json that say nothing about what the weights compute: names, special tokens, training, caches, class heads.
_ASIDE = frozenset(
    """
    _name_or_path architectures model_type transformers_version torch_dtype dtype use_cache initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id cls_token_id tokenizer_class
    attention_dropout attn_pdrop embd_pdrop resid_pdrop pretraining_tp max_window_layers task_specific_params
    output_attentions output_hidden_states return_dict output_past chunk_size_feed_forward is_encoder_decoder
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj id2label label2id
    problem_type finetuning_task prefix n_ctx gradient_checkpointing _attn_implementation _attn_implementation_autoset
    is_llama_config transformers.js_config
    """.split()  # n_ctx repeats n_positions
)


class _Keys:
    """Reads settings and knows which of them nobody asked for."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self._read = config, set(_ASIDE)

    def __contains__(self, name: str) -> bool:
        return name in self.config

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _refused(name, value, "a whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise _refused(name, value, "a number above 0")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise _refused(name, value, "true or false")
        return value

    def require(self, name: str, expected: Any, default: Any) -> None:
        """Refuse any other value than the one that megatron-core computes with."""
        value = self.get(name, default)
        if value != expected:
            raise _refused(name, value, repr(expected))

    def rest(self) -> list[str]:
        return sorted(name for name, value in self.config.items() if name not in self._read and value is not None)


def _refused(name: str, got: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{name}: got {got!r}, expected {expected}; megarpt cannot compute this model otherwise")


def read_settings(config: Mapping[str, Any], *, ignored: Collection[str] = ()) -> Architecture:
    """The model that a config.json describes.

    Args:
        config: what it holds.
        ignored: keys that somebody has found to change nothing.

    Raises:
        CheckpointError: another family, or a setting that megarpt cannot compute with; the message begins with its key.
    """
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise CheckpointError(f"model_type: got {name!r}, expected one of {', '.join(FAMILIES)}")
    classes = config.get("architectures") or [family.model_class]
    if classes != [family.model_class]:
        raise CheckpointError(f"architectures: got {classes}, expected [{family.model_class!r}]: a model that predicts tokens")
    keys = _Keys({key: value for key, value in config.items() if key not in ignored})
    architecture = family.read(keys, family)
    if keys.rest():
        raise CheckpointError(
            "\n  ".join(
                ["settings that megarpt does not know, so that it could not compute what the model computes:"]
                + [f"{key}: {config[key]!r}" for key in keys.rest()]
            )
            + "\nname a key in --ignore-key only after making sure that it changes nothing"
        )
    return architecture


def _read_rotary(keys: _Keys, family: Family) -> Architecture:
    """Llama, Mistral, Qwen2 and Qwen3: RMSNorm, rotary angles, a gated feed-forward."""
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    for name in ("use_mrope", "rope_interleaved"):
        keys.require(name, False, False)
    groups = keys.integer("num_key_value_heads", heads)
    if heads % groups:
        raise _refused("num_key_value_heads", groups, f"a divisor of num_attention_heads {heads}")
    if keys.get("head_dim") is None and hidden % heads:
        raise _refused("hidden_size", hidden, f"a multiple of num_attention_heads {heads}, or a head_dim")
    positions, notes = _positions(keys, family)
    # megatron-core has biases of all matrices, or of queries, keys and values; not of the attention's alone.
    has_biases = keys.flag("mlp_bias", False) if family.has_linear_bias else False
    keys.require("attention_bias", has_biases, False)
    transformer = {
        "num_layers": keys.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": keys.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": keys.integer("head_dim", hidden // heads),
        "normalization": "RMSNorm",
        "layernorm_epsilon": keys.number("rms_norm_eps", 1e-6),
        "gated_linear_unit": True,
        "activation": _activation(keys, "hidden_act", "silu"),
        "add_bias_linear": has_biases,
        "add_qkv_bias": family.has_qkv_bias,
        "qk_layernorm": family.has_qk_norm,
    }
    gpt = {"share_embeddings_and_output_weights": keys.flag("tie_word_embeddings", False), **_rotary_angles(keys)}
    return Architecture(
        family=family.name,
        transformer=transformer,
        gpt=gpt,
        max_sequence_length=positions,
        vocab_size=keys.integer("vocab_size"),
        notes=notes,
    )


def _positions(keys: _Keys, family: Family) -> tuple[int, tuple[str, ...]]:
    """How long a sample may be: up to its sliding window a model's attention is ordinary."""
    positions = keys.integer("max_position_embeddings")
    given = keys.config.get("sliding_window", family.sliding_window)  # null is none, and absent is the family's default
    keys.get("sliding_window")
    is_used = keys.flag("use_sliding_window", not family.window_is_optional)
    kinds = set(keys.get("layer_types", []))
    if kinds - {"full_attention", "sliding_attention"}:
        raise _refused("layer_types", sorted(kinds), "full_attention")
    window = given if is_used or "sliding_attention" in kinds else None
    if window is None:
        if "sliding_attention" in kinds:
            raise _refused("sliding_window", None, "a number, because layer_types has sliding_attention")
        return positions, ()
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise _refused("sliding_window", window, "a whole number above 0")
    if window >= positions:
        return positions, ()
    return window, (
        f"sliding_window: attention beyond {window} tokens is not supported, so samples may have at most {window} tokens "
        f"instead of {positions} (max_position_embeddings); up to there the model computes the same",
    )


def _rotary_angles(keys: _Keys) -> dict[str, Any]:
    """Base and scaling, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) write them."""
    where = "rope_parameters" if keys.get("rope_parameters") else "rope_scaling"
    blocks = [keys.get(name, {}) for name in ("rope_scaling", "rope_parameters")]
    for name, block in zip(("rope_scaling", "rope_parameters"), blocks, strict=True):
        if not isinstance(block, Mapping):
            raise _refused(name, block, "an object")
    scaling = {**blocks[0], **blocks[1]}
    base = keys.number("rope_theta", 10_000)
    if "rope_theta" in scaling:
        base = _Keys(scaling).number("rope_theta")
        del scaling["rope_theta"]
    old_kind = scaling.pop("type", "default")  # of transformers before 4.43; some files have both
    kind = scaling.pop("rope_type", old_kind)
    angles: dict[str, Any] = {"rotary_base": base, "rope_scaling_factor": None, "seq_len_interpolation_factor": None}
    if kind == "linear":
        angles["seq_len_interpolation_factor"] = _factor(scaling.pop("factor", None), where)
    elif kind == "llama3":
        angles["rope_scaling_factor"] = _factor(scaling.pop("factor", None), where)
        for name, fixed in (("low_freq_factor", 1), ("high_freq_factor", 4), ("original_max_position_embeddings", 8192)):
            got = scaling.pop(name, None)
            if got != fixed:
                raise _refused(f"{where}.{name}", got, f"{fixed}, which megatron-core has built in")
    elif kind != "default":
        raise _refused(f"{where}.rope_type", kind, "default, linear or llama3")
    partial = keys.get("partial_rotary_factor", scaling.pop("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise _refused("partial_rotary_factor", partial, "1.0")
    if scaling:
        raise CheckpointError(f"{where}: got the keys {sorted(scaling)}, which are unknown with rope_type {kind}")
    return angles


def _factor(value: Any, where: str) -> float | None:
    if not isinstance(value, int | float) or value < 1:
        raise _refused(f"{where}.factor", value, "a number, 1 or above")
    return value if value > 1 else None


def _read_gpt2(keys: _Keys, family: Family) -> Architecture:
    hidden, heads = keys.integer("n_embd"), keys.integer("n_head")
    if hidden % heads:
        raise _refused("n_embd", hidden, f"a multiple of n_head {heads}")
    keys.require("scale_attn_weights", True, True)
    keys.require("scale_attn_by_inverse_layer_idx", False, False)
    keys.require("reorder_and_upcast_attn", False, False)
    keys.require("add_cross_attention", False, False)
    transformer = {
        "num_layers": keys.integer("n_layer"),
        "hidden_size": hidden,
        "ffn_hidden_size": keys.integer("n_inner", 4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "normalization": "LayerNorm",
        "layernorm_epsilon": keys.number("layer_norm_epsilon", 1e-5),
        "gated_linear_unit": False,
        "activation": _activation(keys, "activation_function", "gelu_new"),
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    }
    return Architecture(
        family=family.name,
        transformer=transformer,
        gpt=dict.fromkeys(_GPT_FIELDS) | {"share_embeddings_and_output_weights": keys.flag("tie_word_embeddings", True)},
        max_sequence_length=keys.integer("n_positions"),
        vocab_size=keys.integer("vocab_size"),
    )


def _activation(keys: _Keys, name: str, default: str) -> str:
    value = keys.get(name, default)
    if value not in _ACTIVATIONS:
        raise _refused(name, value, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _write_rotary(a: Architecture, family: Family) -> dict[str, Any]:
    t, gpt = a.transformer, a.gpt
    angles: dict[str, Any] = {"rope_theta": float(gpt["rotary_base"])}
    scaling: dict[str, Any] | None = None
    if gpt["rope_scaling_factor"] is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": gpt["rope_scaling_factor"],
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    elif gpt["seq_len_interpolation_factor"] is not None:
        scaling = {"rope_type": "linear", "factor": gpt["seq_len_interpolation_factor"]}
    written = {
        "hidden_size": t["hidden_size"],
        "intermediate_size": t["ffn_hidden_size"],
        "num_hidden_layers": t["num_layers"],
        "num_attention_heads": t["num_attention_heads"],
        "num_key_value_heads": t["num_query_groups"],
        "head_dim": t["kv_channels"],
        "hidden_act": _ACTIVATION_NAMES[t["activation"]],
        "rms_norm_eps": t["layernorm_epsilon"],
        "max_position_embeddings": a.max_sequence_length,
        **angles,
        "rope_scaling": scaling,
    }
    if family.has_linear_bias:
        written |= {"attention_bias": t["add_bias_linear"], "mlp_bias": t["add_bias_linear"]}
    if family.window_is_optional:
        written["use_sliding_window"] = False
    if family.sliding_window is not None:
        written["sliding_window"] = None
    return written


def _write_gpt2(a: Architecture, _: Family) -> dict[str, Any]:
    t = a.transformer
    return {
        "n_embd": t["hidden_size"],
        "n_inner": t["ffn_hidden_size"],
        "n_layer": t["num_layers"],
        "n_head": t["num_attention_heads"],
        "n_positions": a.max_sequence_length,
        "activation_function": "gelu_new" if t["activation"] == "gelu_tanh" else _ACTIVATION_NAMES[t["activation"]],
        "layer_norm_epsilon": t["layernorm_epsilon"],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model_type of Hugging Face."""

    name: str
    model_class: str
    read: Callable[[_Keys, Family], Architecture] = _read_rotary
    write: Callable[[Architecture, Family], dict[str, Any]] = _write_rotary
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_linear_bias: bool = False  # may have biases of all matrices
    sliding_window: int | None = None  # of a config.json that does not name it
    window_is_optional: bool = False  # use_sliding_window decides, false by default

    def mismatch(self, a: Architecture) -> str | None:
        """Why this family cannot say what a model computes."""
        wanted: dict[str, Any] = {"add_qkv_bias": self.has_qkv_bias, "qk_layernorm": self.has_qk_norm}
        if self.read is _read_rotary:
            wanted |= {"normalization": "RMSNorm", "gated_linear_unit": True}
            if not self.has_linear_bias:
                wanted["add_bias_linear"] = False
            if a.gpt["rotary_base"] is None:
                return "its positions are rotary angles, the model's are learned"
        else:
            wanted |= {"normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True}
            if a.gpt["rotary_base"] is not None:
                return "its positions are learned, the model's are rotary angles"
            if len({a.transformer[name] for name in ("num_attention_heads", "num_query_groups")}) > 1:
                return "its heads do not share keys and values"
        for name, value in wanted.items():
            if a.transformer[name] != value:
                return f"model.mcore.{name} is {a.transformer[name]!r} and would have to be {value!r}"
        return None


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(name="llama", model_class="LlamaForCausalLM", has_linear_bias=True),
        Family(name="mistral", model_class="MistralForCausalLM", sliding_window=4096),
        Family(name="qwen2", model_class="Qwen2ForCausalLM", has_qkv_bias=True, window_is_optional=True),
        Family(name="qwen3", model_class="Qwen3ForCausalLM", has_qk_norm=True, window_is_optional=True),
        Family(name="gpt2", model_class="GPT2LMHeadModel", read=_read_gpt2, write=_write_gpt2),
    )
}
"""What can be converted."""


def to_model_config(architecture: Architecture) -> dict[str, Any]:
    """The `model` section: the preset that comes nearest, by its name alone where nothing differs, else with what differs."""
    learned = architecture.gpt["rotary_base"] is None
    best: dict[str, Any] | None = None
    for name, preset in PRESETS.items():
        if "num_moe_experts" in preset.transformer or (preset.gpt["position_embedding_type"] != "rope") != learned:
            continue
        here = _described(preset, ModelConfig(preset=name))
        section: dict[str, Any] = {
            "preset": name,
            "mcore": {k: v for k, v in architecture.transformer.items() if here.transformer[k] != v},
            "gpt": {k: v for k, v in architecture.gpt.items() if here.gpt[k] != v},
        }
        if here.max_sequence_length != architecture.max_sequence_length:
            section["gpt"]["max_sequence_length"] = architecture.max_sequence_length
        if best is None or _differences(section) < _differences(best):
            best = section
    assert best is not None
    return best | {"vocab_size": architecture.vocab_size}


def from_model_config(model: ModelConfig, vocab_size: int, family: str | None = None) -> Architecture:
    """The model of a configuration.

    Args:
        model: its `model` section.
        vocab_size: of the network.
        family: Hugging Face's model_type; None takes the one that fits.

    Raises:
        CheckpointError: no family, or not this one, computes what the model computes.
    """
    preset = PRESETS[model.preset]
    fields = {**preset.transformer, **model.mcore}
    others = [k for k in fields if k not in _TRANSFORMER_FIELDS and not _NOT_THE_MODEL.fullmatch(k)]
    if fields.get("num_moe_experts"):
        raise CheckpointError("model.mcore.num_moe_experts: mixtures of experts cannot be converted; expected a dense model")
    if others:
        raise CheckpointError(f"model.mcore.{others[0]}: got {fields[others[0]]!r}, which no known family of Hugging Face has")
    described = _described(preset, model, vocab_size)
    reasons = {name: each.mismatch(described) for name, each in FAMILIES.items()}
    preferred = [family] if family else ["mistral"] * (model.preset == "mistral-7b") + list(FAMILIES)
    for name in preferred:
        if name in reasons and reasons[name] is None:
            return _described(preset, model, vocab_size, name)
    lines = [f"{name}: {reason}" for name, reason in reasons.items() if reason and (family in (None, name))]
    head = f"the model cannot be written as {family or 'any known family of Hugging Face'}:"
    raise CheckpointError("\n  ".join([head, *(lines or [f"expected one of {', '.join(FAMILIES)}"])]))


def write_settings(architecture: Architecture, *, dtype: str, eos: int | None) -> dict[str, Any]:
    """The config.json of a model, in a form that transformers 4 and 5 read."""
    family = FAMILIES[architecture.family]
    return {
        "architectures": [family.model_class],
        "model_type": family.name,
        **family.write(architecture, family),
        "vocab_size": architecture.vocab_size,
        "tie_word_embeddings": architecture.gpt["share_embeddings_and_output_weights"],
        "bos_token_id": None,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }


def _described(preset: Preset, model: ModelConfig, vocab_size: int = 1, family: str = "") -> Architecture:
    fields = {"add_qkv_bias": False, "qk_layernorm": False, **preset.transformer, **model.mcore}
    heads = fields["num_attention_heads"]
    if fields.get("num_query_groups") is None:
        fields["num_query_groups"] = heads
    if fields.get("kv_channels") is None:
        fields["kv_channels"] = fields["hidden_size"] // heads
    gpt = preset.gpt_arguments(model.gpt.model_dump())
    return Architecture(
        family=family,
        transformer={name: fields[name] for name in _TRANSFORMER_FIELDS},
        gpt={name: gpt.get(name) for name in _GPT_FIELDS},
        max_sequence_length=gpt["max_sequence_length"],
        vocab_size=vocab_size,
    )


def _differences(section: Mapping[str, Any]) -> int:
    return len(section["mcore"]) + len(section["gpt"])
