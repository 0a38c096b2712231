"""A plain PyTorch language model of the Llama shape, written without megatron-core: the yardstick for losses and speed.

It computes what `TokenStatsGPT` computes with the preset's RMSNorm, SwiGLU and RoPE layers, and takes its weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden // heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        b, s, _ = x.shape
        y = self.norm1(x)
        q, k, v = (
            f(y).view(b, s, n, self.head_dim).transpose(1, 2)
            for f, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.o(attended.transpose(1, 2).reshape(b, s, -1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class PlainGPT(nn.Module):
    """Untied embedding, blocks, norm, head. `documents` [b, s] (document number of every token) keeps documents apart."""

    def __init__(self, vocab: int, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = [PlainBlock(hidden, heads, kv_heads, ffn, eps) for _ in range(layers)]
        self.blocks = nn.ModuleList(self.layers)
        self.norm = nn.RMSNorm(hidden, eps)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """[b, s] -> logits [b, s, v]."""
        b, s = tokens.shape
        if position_ids is None:
            position_ids = torch.arange(s).expand(b, s)
        head_dim = self.layers[0].head_dim
        half = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        angles = position_ids[..., None].float() * (1.0 / 10_000**half)
        angles = torch.cat((angles, angles), -1).unsqueeze(1)  # [b, 1, s, hn]
        mask = None
        if documents is not None:
            same = documents[:, :, None] == documents[:, None, :]
            mask = (same & torch.ones(s, s, dtype=torch.bool).tril()).unsqueeze(1)
        x = self.embedding(tokens)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.head(self.norm(x))

    @torch.no_grad()
    def load_mcore(self, state: dict[str, Tensor]) -> None:
        """Copy the weights of a one-rank TokenStatsGPT; megatron-core interleaves q, k, v by key/value group."""
        self.embedding.weight.copy_(state["embedding.word_embeddings.weight"])
        self.norm.weight.copy_(state["decoder.final_layernorm.weight"])
        self.head.weight.copy_(state["output_layer.weight"])
        for i, block in enumerate(self.layers):
            at = f"decoder.layers.{i}."
            per_group = block.heads // block.kv_heads
            qkv = state[at + "self_attention.linear_qkv.weight"].unflatten(0, (block.kv_heads, per_group + 2, block.head_dim))
            block.q.weight.copy_(qkv[:, :per_group].flatten(0, 2))
            block.k.weight.copy_(qkv[:, per_group].flatten(0, 1))
            block.v.weight.copy_(qkv[:, per_group + 1].flatten(0, 1))
            for ours, theirs in (
                ("norm1", "input_layernorm"),
                ("norm2", "pre_mlp_layernorm"),
                ("o", "self_attention.linear_proj"),
                ("gate_up", "mlp.linear_fc1"),
                ("down", "mlp.linear_fc2"),
            ):
                getattr(block, ours).weight.copy_(state[at + theirs + ".weight"])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
