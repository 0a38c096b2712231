"""Tensors of published models (Hugging Face's names, order and shapes) as megatron-core's, and back. No files.

Dims: g query groups, d head size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarpt.config.hf_settings import Architecture, Heads
from megarpt.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """How tensors of one side are those of the other. `split` also works on the meta device, which gives the shapes."""

    join: Callable[[Sequence[Tensor], Heads], Tensor]
    split: Callable[[Tensor, Heads], list[Tensor]]
    is_view: bool = False  # joining one tensor copies nothing


def _join_qkv(parts: Sequence[Tensor], heads: Heads) -> Tensor:
    """megatron-core keeps the heads of a query group together: its queries, its key, its value, then the next group."""
    q, k, v = (part.unflatten(0, (heads.groups, -1)) for part in parts)  # [g, heads * d, ...]
    return torch.cat((q, k, v), dim=1).flatten(0, 1)


def _split_qkv(whole: Tensor, heads: Heads) -> list[Tensor]:
    sizes = [heads.per_group * heads.size, heads.size, heads.size]
    return [part.flatten(0, 1) for part in whole.unflatten(0, (heads.groups, -1)).split(sizes, dim=1)]


COPY = Kind(lambda parts, _: parts[0], lambda whole, _: [whole], is_view=True)
QKV = Kind(_join_qkv, _split_qkv)  # three matrices, or three biases
STACK = Kind(lambda parts, _: torch.cat(tuple(parts)), lambda whole, _: list(whole.chunk(2)))  # gate, then up
# GPT-2 stores its matrices the other way round, and queries, keys and values of all heads in one.
TRANSPOSE = Kind(lambda parts, _: parts[0].t().contiguous(), lambda whole, _: [whole.t()])
FUSED_QKV_BIAS = Kind(
    lambda parts, heads: _join_qkv(parts[0].chunk(3), heads), lambda whole, heads: [torch.cat(_split_qkv(whole, heads))]
)
FUSED_QKV = Kind(
    lambda parts, heads: _join_qkv(parts[0].t().chunk(3), heads),
    lambda whole, heads: [torch.cat(_split_qkv(whole, heads)).t()],
)

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Parameters with a row for every entry of the vocabulary, and rows that only pad it."""

Rules = Mapping[str, tuple[Kind, tuple[str, ...]]]  # megarpt's parameter -> how it comes from Hugging Face's, which

_ROTARY: Rules = {
    "embedding.word_embeddings.weight": (COPY, ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": (COPY, ("model.norm.weight",)),
    "output_layer.weight": (COPY, ("lm_head.weight",)),
    **{
        f"decoder.layers.#.{ours}": (kind, tuple(f"model.layers.#.{name}" for name in theirs))
        for ours, kind, theirs in (
            ("input_layernorm.weight", COPY, ("input_layernorm.weight",)),
            *(
                (f"self_attention.linear_qkv.{x}", QKV, tuple(f"self_attn.{name}_proj.{x}" for name in "qkv"))
                for x in ("weight", "bias")
            ),
            ("self_attention.q_layernorm.weight", COPY, ("self_attn.q_norm.weight",)),
            ("self_attention.k_layernorm.weight", COPY, ("self_attn.k_norm.weight",)),
            ("pre_mlp_layernorm.weight", COPY, ("post_attention_layernorm.weight",)),
            *(
                rule
                for x in ("weight", "bias")
                for rule in (
                    (f"self_attention.linear_proj.{x}", COPY, (f"self_attn.o_proj.{x}",)),
                    (f"mlp.linear_fc1.{x}", STACK, (f"mlp.gate_proj.{x}", f"mlp.up_proj.{x}")),
                    (f"mlp.linear_fc2.{x}", COPY, (f"mlp.down_proj.{x}",)),
                )
            ),
        )
    },
}

_GPT2: Rules = {
    "embedding.word_embeddings.weight": (COPY, ("transformer.wte.weight",)),
    "embedding.position_embeddings.weight": (COPY, ("transformer.wpe.weight",)),
    "output_layer.weight": (COPY, ("lm_head.weight",)),
    **{f"decoder.final_layernorm.{x}": (COPY, (f"transformer.ln_f.{x}",)) for x in ("weight", "bias")},
    **{
        f"decoder.layers.#.{ours}.{x}": (kind, (f"transformer.h.#.{theirs}.{x}",))
        for ours, theirs, weight, bias in (
            ("input_layernorm", "ln_1", COPY, COPY),
            ("self_attention.linear_qkv", "attn.c_attn", FUSED_QKV, FUSED_QKV_BIAS),
            ("self_attention.linear_proj", "attn.c_proj", TRANSPOSE, COPY),
            ("pre_mlp_layernorm", "ln_2", COPY, COPY),
            ("mlp.linear_fc1", "mlp.c_fc", TRANSPOSE, COPY),
            ("mlp.linear_fc2", "mlp.c_proj", TRANSPOSE, COPY),
        )
        for x, kind in (("weight", weight), ("bias", bias))
    },
}

TENSORS: Mapping[str, Rules] = {"gpt2": _GPT2, **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _ROTARY)}
"""Family -> its tensors."""

# Constants that old files carry beside the weights.
_CONSTANTS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")


@dataclass(frozen=True, slots=True)
class Move:
    """One parameter of megarpt and what it is at Hugging Face."""

    ours: str
    shape: Shape  # of ours, without rows that pad the vocabulary
    kind: Kind
    theirs: Mapping[str, Shape]  # in the order `kind` takes them

    def join(self, parts: Sequence[Tensor], heads: Heads, rows: int) -> Tensor:
        """Our parameter from theirs, with `rows` rows; those that pad the vocabulary are zero."""
        whole = self.kind.join(parts, heads)[: self.shape[0]]
        missing = rows - len(whole)
        return torch.cat((whole, whole.new_zeros(missing, *whole.shape[1:]))) if missing else whole

    def split(self, whole: Tensor, heads: Heads) -> dict[str, Tensor]:
        """Their tensors from our parameter."""
        return dict(zip(self.theirs, self.kind.split(whole[: self.shape[0]], heads), strict=True))


def moves(architecture: Architecture, parameters: Mapping[str, Shape]) -> list[Move]:
    """What becomes of every parameter of a network: name -> shape, of the whole model on one rank.

    Raises:
        CheckpointError: the family has no name for a parameter.
    """
    rules, heads, found = TENSORS[architecture.family], architecture.heads, []
    for name, shape in parameters.items():
        pattern = re.sub(r"\.layers\.(\d+)\.", ".layers.#.", name)
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if pattern not in rules:
            raise CheckpointError(
                f"{name}: the family {architecture.family} has no such parameter; expected one of {', '.join(rules)}"
            )
        kind, theirs = rules[pattern]
        if name in VOCABULARY:
            shape = (architecture.vocab_size, *shape[1:])
        parts = kind.split(torch.empty(shape, device="meta"), heads)
        names = [each.replace("#", layer[1]) if layer else each for each in theirs]
        shapes = {each: tuple(part.shape) for each, part in zip(names, parts, strict=True)}
        found.append(Move(name, shape, kind, shapes))
    return found


def misfits(planned: Sequence[Move], stored: Mapping[str, Shape], *, tied: bool) -> list[str]:
    """One message for each tensor of a Hugging Face model that is missing, unknown, or of another shape.

    Rows of the vocabulary beyond those that are wanted may be there: they are left out by whoever wanted fewer.
    """
    vocabulary = {name for move in planned if move.ours in VOCABULARY for name in move.theirs}
    expected = {name: shape for move in planned for name, shape in move.theirs.items()}
    problems = []
    for name, shape in expected.items():
        got = stored.get(name)
        if got is None:
            problems.append(f"{name}: missing, expected shape {shape}")
        elif got != shape and not (name in vocabulary and got[1:] == shape[1:] and got[0] > shape[0]):
            problems.append(f"{name}: got shape {got}, expected {shape}")
    for name, shape in stored.items():
        if name not in expected and not is_constant(name) and not (tied and name == "lm_head.weight"):
            problems.append(f"{name}: shape {shape}, not a tensor of this model")
    return problems


def is_constant(name: str) -> bool:
    """Whether a tensor follows from the settings and is no weight."""
    return _CONSTANTS.fullmatch(name) is not None
