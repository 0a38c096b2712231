"""How a context-parallel group divides tokens, and that attention from its pieces is attention over the whole."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megarpt.device.runtime import Runtime
from megarpt.model.attention import PackedSegments, SdpaCoreAttention
from megarpt.parallel.context import query_ranges, take_share
from megarpt.parallel.layout import ProcessGroups

T = 48
DOCUMENTS = ((48,), (1, 46, 1), (12, 12, 12, 12), (5, 30, 13), (1,) * 48, (23, 2, 23))


class FakeGroup:
    """A place in a group of which nobody else is there."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def edges_of(documents: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(documents).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_the_shares_are_all_tokens_once_and_equally_much_work(cp_size: int) -> None:
    shares = [take_share(torch.arange(T), FakeGroup(rank, cp_size)) for rank in range(cp_size)]  # type: ignore[arg-type]
    assert sorted(torch.cat(shares).tolist()) == list(range(T))
    assert len({int((share + 1).sum()) for share in shares}) == 1  # token i of one document has i + 1 keys


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_attention_from_the_pieces_is_attention_over_the_whole(
    cpu_runtime: Runtime, one_rank: ProcessGroups, documents: tuple[int, ...], cp_size: int
) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0)
    attention = SdpaCoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=one_rank.collection)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(T, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    edges = edges_of(documents)

    number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    mask = (number[:, None] == number[None]) & torch.ones(T, T, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) / 4.0
    whole = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v.repeat_interleave(2, 1))

    for rank in range(cp_size):
        group = FakeGroup(rank, cp_size)
        ranges = query_ranges(edges, T, rank, cp_size)
        own = take_share(q, group)  # type: ignore[arg-type]
        packed = PackedSegments(ranges=ranges, max_seqlen_q=T)
        out = attention(own[:, None], k[:, None], v[:, None], None, packed_seq_params=packed)
        torch.testing.assert_close(out.view(-1, 4, 16), take_share(whole, group))  # type: ignore[arg-type]
        for each in ranges:  # what the kernel of a GPU reads says the same
            assert each.cu_seqlens_q.diff().tolist() == list(each.query_lengths)
            assert each.cu_seqlens_k.diff().tolist() == list(each.key_lengths)
            assert (
                int(each.cu_seqlens_q[-1]) == each.num_queries
                and int(each.cu_seqlens_k[-1]) == each.keys.stop - each.keys.start
            )
