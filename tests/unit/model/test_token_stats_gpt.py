"""The network against plain torch: documents kept apart, positions restarting, KV cache, evaluation head."""

import pytest
import torch
import torch.nn.functional as F

from megarpt.device.runtime import Runtime
from megarpt.model import build, forward
from megarpt.model.attention import SdpaCoreAttention
from megarpt.model.token_stats_gpt import HeadMode, TokenStatsGPT
from megarpt.parallel.layout import ParallelLayout, ProcessGroups
from megarpt.structs import TokenBatch, TokenStats
from megarpt.testing.configs import TWO_LAYERS, tiny_config
from megarpt.testing.plain_gpt import PlainGPT

VOCAB, B, S = 300, 2, 24
DOCUMENTS = ((10, 9, 5), (1, 23))


def make_network(groups: ProcessGroups, **overrides: object) -> TokenStatsGPT:
    torch.manual_seed(7)
    cfg = tiny_config(**{"model.mcore": TWO_LAYERS, "data.seq_length": S} | overrides)
    config = build.transformer_config(cfg, ParallelLayout(), is_cuda=False)
    return build.build_network(cfg, config, groups, vocab_size=VOCAB, backend="torch")


def make_batch(tokens: torch.Tensor, documents: tuple[tuple[int, ...], ...] = DOCUMENTS) -> TokenBatch:
    lengths = torch.tensor([length for row in documents for length in row])
    positions = torch.cat([torch.arange(int(length)) for length in lengths]).view(B, S)
    return TokenBatch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=torch.ones(B, S, dtype=torch.bool),
        position_ids=positions,
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(),
        sample_id=torch.arange(B),
        source_id=torch.zeros(B, dtype=torch.int64),
        sample_index=torch.arange(B),
    )


def stats_of(network: TokenStatsGPT, batch: TokenBatch) -> TokenStats:
    return TokenStats(*forward.head_output(network, batch, HeadMode.LOGPROB))


def document_numbers(documents: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents])


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (B, S + 1), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("documents", [DOCUMENTS, ((S,), (S,)), ((12, 12), (12, 12))])
def test_equals_plain_torch(cpu_runtime: Runtime, one_rank: ProcessGroups, tokens: torch.Tensor, documents: tuple) -> None:
    network = make_network(one_rank)
    batch = make_batch(tokens, documents)
    plain = PlainGPT(384, 2, 64, 4, 2, 96)
    plain.load_mcore(network.state_dict())
    logits = plain(batch.tokens, batch.position_ids, document_numbers(documents))[..., :VOCAB]
    expected = -F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view(B, S)
    stats = stats_of(network, batch)
    torch.testing.assert_close(stats.logprob, expected, rtol=0, atol=2e-6)
    stats.logprob.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(network.output_layer.weight.grad, plain.head.weight.grad, rtol=0, atol=2e-5)
    torch.testing.assert_close(network.embedding.word_embeddings.weight.grad, plain.embedding.weight.grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize("preset", ["tiny", "gpt2-124m"])
def test_editing_a_document_changes_nothing_in_its_neighbours(
    cpu_runtime: Runtime, one_rank: ProcessGroups, tokens: torch.Tensor, preset: str
) -> None:
    network = make_network(one_rank, **{"model.preset": preset})
    before = stats_of(network, make_batch(tokens)).logprob
    edited = tokens.clone()
    edited[0, 10:19] = (edited[0, 10:19] + 1) % VOCAB  # the middle document of the first sample
    after = stats_of(network, make_batch(edited)).logprob
    same = torch.ones(B, S, dtype=torch.bool)
    same[0, 9:19] = False  # the label at position 9 is the edited document's first token
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])


@pytest.mark.parametrize("preset", ["tiny", "gpt2-124m"])
def test_a_document_means_the_same_wherever_it_is_packed(
    cpu_runtime: Runtime, one_rank: ProcessGroups, tokens: torch.Tensor, preset: str
) -> None:
    network = make_network(one_rank, **{"model.preset": preset})
    moved = tokens.clone()
    moved[1, 1:10] = tokens[0, 10:19]  # the nine tokens of a document, at another offset of another sample
    packed = make_batch(moved, ((10, 9, 5), (1, 9, 14)))
    logprob = stats_of(network, packed).logprob
    torch.testing.assert_close(logprob[0, 10:18], logprob[1, 1:9], rtol=0, atol=2e-6)


def test_evaluation_head_agrees_with_the_training_head(
    cpu_runtime: Runtime, one_rank: ProcessGroups, tokens: torch.Tensor
) -> None:
    network, batch = make_network(one_rank), make_batch(tokens)
    logprob, correct = forward.token_accuracy([network], [batch], one_rank)[0]
    torch.testing.assert_close(logprob, stats_of(network, batch).logprob, rtol=0, atol=1e-6)
    greedy = make_batch(tokens)
    plain = PlainGPT(384, 2, 64, 4, 2, 96)
    plain.load_mcore(network.state_dict())
    best = plain(greedy.tokens, greedy.position_ids, document_numbers(DOCUMENTS))[..., :VOCAB].argmax(-1)
    assert torch.equal(correct, best == batch.labels)


def test_padded_vocabulary_carries_no_probability(cpu_runtime: Runtime, one_rank: ProcessGroups, tokens: torch.Tensor) -> None:
    network, batch = make_network(one_rank), make_batch(tokens)
    assert network.output_layer.weight.shape[0] == 384 > VOCAB
    before = stats_of(network, batch).logprob
    with torch.no_grad():
        network.output_layer.weight[VOCAB:] = 100.0
    assert torch.equal(before, stats_of(network, batch).logprob)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 5), (3, 5)])
def test_dense_attention_is_aligned_bottom_right(
    cpu_runtime: Runtime, one_rank: ProcessGroups, queries: int, keys: int
) -> None:
    network = make_network(one_rank)
    attention = network.decoder.layers[0].self_attention.core_attention
    assert isinstance(attention, SdpaCoreAttention)
    q = torch.randn(keys, 2, 4, 16, dtype=torch.float64)
    k, v = torch.randn(2, keys, 2, 2, 16, dtype=torch.float64)
    full, part = attention(q, k, v, None), attention(q[-queries:], k, v, None)
    torch.testing.assert_close(full[-queries:], part)
