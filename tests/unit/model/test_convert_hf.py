"""Tensors of published models: order, names and shapes, against sums written out by hand."""

import pytest
import torch
from torch import Tensor

from megarpt.config.hf_settings import FAMILIES, Architecture, Heads
from megarpt.errors import CheckpointError
from megarpt.model.convert_hf import (
    COPY,
    FUSED_QKV,
    FUSED_QKV_BIAS,
    QKV,
    STACK,
    TENSORS,
    TRANSPOSE,
    Kind,
    Move,
    is_constant,
    misfits,
    moves,
)

GROUPS, PER_GROUP, SIZE, HIDDEN = 3, 2, 5, 7
HEADS = Heads(GROUPS, PER_GROUP, SIZE)
SHAPES = {
    "embedding.word_embeddings.weight": (384, HIDDEN),
    "decoder.layers.0.self_attention.linear_qkv.weight": (GROUPS * (PER_GROUP + 2) * SIZE, HIDDEN),
    "decoder.layers.1.self_attention.linear_qkv.weight": (GROUPS * (PER_GROUP + 2) * SIZE, HIDDEN),
    "decoder.layers.1.mlp.linear_fc1.weight": (22, HIDDEN),
    "decoder.final_layernorm.weight": (HIDDEN,),
    "output_layer.weight": (384, HIDDEN),
}


def architecture(family: str = "llama", vocab_size: int = 301) -> Architecture:
    fields = {"num_query_groups": GROUPS, "num_attention_heads": GROUPS * PER_GROUP, "kv_channels": SIZE}
    return Architecture(family=family, transformer=fields, gpt={}, max_sequence_length=8, vocab_size=vocab_size)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = []
    for group in range(GROUPS):
        for head in range(group * PER_GROUP, (group + 1) * PER_GROUP):
            rows += [q[head * SIZE + i] for i in range(SIZE)]
        for part in (k, v):
            rows += [part[group * SIZE + i] for i in range(SIZE)]
    return torch.stack(rows)


@pytest.mark.parametrize("columns", [(HIDDEN,), ()], ids=["matrix", "bias"])
def test_queries_keys_and_values_lie_together_by_group(columns: tuple[int, ...]) -> None:
    q, k, v = rand(GROUPS * PER_GROUP * SIZE, *columns), rand(GROUPS * SIZE, *columns), rand(GROUPS * SIZE, *columns) + 1
    assert torch.equal(QKV.join([q, k, v], HEADS), interleaved(q, k, v))


def test_gpt2_keeps_all_in_one_and_the_other_way_round() -> None:
    heads = Heads(GROUPS, 1, SIZE)
    fused = rand(HIDDEN, 3 * GROUPS * SIZE)
    expected = torch.stack(
        [fused[:, part * GROUPS * SIZE + g * SIZE + i] for g in range(GROUPS) for part in range(3) for i in range(SIZE)]
    )
    assert torch.equal(FUSED_QKV.join([fused], heads), expected)
    bias = rand(3 * GROUPS * SIZE)
    expected = torch.stack(
        [bias[part * GROUPS * SIZE + g * SIZE + i] for g in range(GROUPS) for part in range(3) for i in range(SIZE)]
    )
    assert torch.equal(FUSED_QKV_BIAS.join([bias], heads), expected)
    assert torch.equal(TRANSPOSE.join([rand(2, 3)], heads), rand(2, 3).T)


def test_the_gate_comes_before_up() -> None:
    gate, up = torch.zeros(4, 2), torch.ones(4, 2)
    assert STACK.join([gate, up], HEADS).sum(1).tolist() == [0] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("kind", "heads", "shapes"),
    [
        (COPY, HEADS, [(4, 3)]),
        (STACK, HEADS, [(4, 3), (4, 3)]),
        (TRANSPOSE, HEADS, [(4, 3)]),
        (QKV, HEADS, [(GROUPS * PER_GROUP * SIZE, 3), (GROUPS * SIZE, 3), (GROUPS * SIZE, 3)]),
        (FUSED_QKV, Heads(GROUPS, 1, SIZE), [(3, 3 * GROUPS * SIZE)]),
        (FUSED_QKV_BIAS, Heads(GROUPS, 1, SIZE), [(3 * GROUPS * SIZE,)]),
    ],
)
def test_what_was_joined_is_split_again(kind: Kind, heads: Heads, shapes: list[tuple[int, ...]]) -> None:
    parts = [rand(*shape) + i for i, shape in enumerate(shapes)]
    back = kind.split(kind.join(parts, heads), heads)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


def test_a_plan_names_every_tensor_with_its_shape() -> None:
    planned = {move.ours: move for move in moves(architecture(), SHAPES)}
    assert planned["embedding.word_embeddings.weight"].theirs == {"model.embed_tokens.weight": (301, HIDDEN)}
    assert planned["decoder.layers.1.self_attention.linear_qkv.weight"].theirs == {
        "model.layers.1.self_attn.q_proj.weight": (GROUPS * PER_GROUP * SIZE, HIDDEN),
        "model.layers.1.self_attn.k_proj.weight": (GROUPS * SIZE, HIDDEN),
        "model.layers.1.self_attn.v_proj.weight": (GROUPS * SIZE, HIDDEN),
    }
    with pytest.raises(CheckpointError, match=r"decoder.layers.0.mlp.router.weight: the family llama has no such parameter"):
        moves(architecture(), {"decoder.layers.0.mlp.router.weight": (4, HIDDEN)})


def test_the_vocabulary_is_padded_with_zeros_and_cut_again() -> None:
    move = next(each for each in moves(architecture(), SHAPES) if each.ours == "output_layer.weight")
    theirs = rand(301, HIDDEN)
    padded = move.join([theirs], HEADS, rows=384)
    assert torch.equal(padded[:301], theirs) and padded.shape == (384, HIDDEN) and not padded[301:].any()
    assert torch.equal(move.split(padded, HEADS)["lm_head.weight"], theirs)
    longer = rand(400, HIDDEN)  # its user keeps 301 rows of these
    assert torch.equal(move.join([longer], HEADS, rows=384)[:301], longer[:301])
    assert not move.join([longer], HEADS, rows=384)[301:].any()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model.norm.weight": None}, f"model.norm.weight: missing, expected shape ({HIDDEN},)"),
        ({"model.norm.weight": (8,)}, f"model.norm.weight: got shape (8,), expected ({HIDDEN},)"),
        ({"model.layers.2.mlp.up_proj.weight": (1, 1)}, "model.layers.2.mlp.up_proj.weight: shape (1, 1), not a tensor"),
        ({"lm_head.weight": (300, HIDDEN)}, f"lm_head.weight: got shape (300, {HIDDEN}), expected (301, {HIDDEN})"),
        ({"model.layers.1.self_attn.q_proj.weight.absmax": (4,)}, "absmax: shape (4,), not a tensor of this model"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict, problem: str) -> None:
    planned = moves(architecture(), SHAPES)
    stored = {name: shape for move in planned for name, shape in move.theirs.items()}
    assert misfits(planned, stored, tied=False) == []
    found = misfits(planned, {k: v for k, v in (stored | change).items() if v is not None}, tied=False)
    assert len(found) == 1 and problem in found[0]


def test_constants_and_longer_vocabularies_are_no_misfits() -> None:
    planned: list[Move] = moves(architecture(), {k: v for k, v in SHAPES.items() if k != "output_layer.weight"})
    stored = {name: shape for move in planned for name, shape in move.theirs.items()}
    more = {"model.embed_tokens.weight": (400, HIDDEN), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    assert misfits(planned, stored | more, tied=False) == []
    assert misfits(planned, stored | {"lm_head.weight": (301, HIDDEN)}, tied=True) == []
    assert len(misfits(planned, stored | {"lm_head.weight": (301, HIDDEN)}, tied=False)) == 1
    assert is_constant("transformer.h.0.attn.bias") and not is_constant("transformer.h.0.attn.c_attn.bias")


def test_every_family_has_its_tensors() -> None:
    assert set(TENSORS) == set(FAMILIES)
