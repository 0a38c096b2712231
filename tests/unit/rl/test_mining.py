"""Mining: the entropy of a proxy, which windows it reads, bands, chance without state, and how documents go on."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from megarpt.corpus.console import StopSignal
from megarpt.corpus.sentencepiece_training import TrainingOptions, train_tokenizer
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import ConfigError
from megarpt.model.build import build_inference_network
from megarpt.parallel.layout import ParallelLayout
from megarpt.rl import mining
from megarpt.rl.mining import (
    BANDS,
    Continuations,
    Thresholds,
    is_validation,
    next_token_entropy,
    position_keys,
    top_entropy,
    windows,
)
from megarpt.testing.configs import TWO_LAYERS, tiny_config

VOCAB = 300
TEXT = "The quick brown fox jumps over the lazy dog. Ein schöner Tag, 日本 – naïve café {x} \\boxed{y}.\n"


# ------------------------------------------------------------------------------------------------------------- entropy


def plain_entropy(logits, top=16):
    """In fp64, from the whole softmax."""
    p = np.exp(logits.double().numpy())
    p = np.sort(p / p.sum(-1, keepdims=True), axis=-1)[..., -top:]
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1)


@pytest.fixture(scope="module")
def make_network(cpu_runtime, one_rank):
    def make(**overrides):
        torch.manual_seed(3)
        cfg = tiny_config(**{"model.mcore": TWO_LAYERS, "data.seq_length": 32} | overrides)
        network = build_inference_network(cfg, ParallelLayout(), one_rank, cpu_runtime, vocab_size=VOCAB)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(6.0)  # so that the distributions are not flat
        return network.eval()

    return make


def test_entropy_of_the_likeliest_tokens():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, 400) * 6
    assert np.allclose(top_entropy(logits).numpy(), plain_entropy(logits), rtol=0, atol=2e-6)
    few = torch.randn(3, 9)
    assert np.allclose(top_entropy(few).numpy(), plain_entropy(few, top=9), rtol=0, atol=2e-6)
    assert top_entropy(torch.zeros(50)).item() == pytest.approx(np.log(16.0))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", [1 << 27, 4 * 384 * 3])
def test_entropy_of_a_network(make_network, monkeypatch, tied, limit):
    """Against the logits of every text alone; in one piece, and three rows of the head at a time."""
    monkeypatch.setattr(mining, "LOGITS_BYTES", limit)
    network = make_network(**{"model.gpt": {"share_embeddings_and_output_weights": tied}})
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, VOCAB, size=length).astype(np.uint16) for length in (5, 32, 1, 17)]
    found = next_token_entropy(network, parts, torch.device("cpu"))
    for part, values in zip(parts, found, strict=True):
        tokens = torch.from_numpy(part.astype(np.int64))[None]
        with torch.no_grad():
            logits = network(tokens, torch.arange(len(part))[None], None, runtime_gather_output=True)
        expected = plain_entropy(logits[0, :, :VOCAB])
        assert expected.min() < 2.0 and values.dtype == torch.float32
        assert np.allclose(values.numpy(), expected, rtol=0, atol=1e-4)


def test_never_more_logits_than_the_limit(make_network, monkeypatch):
    monkeypatch.setattr(mining, "LOGITS_BYTES", 4 * 384 * 3)
    network = make_network()
    sizes = []
    network.output_layer.register_forward_hook(lambda module, inputs, output: sizes.append(output[0].shape))
    next_token_entropy(network, [np.arange(8), np.arange(2)], torch.device("cpu"))
    assert [tuple(size) for size in sizes] == [(3, 1, 384)] * 3 + [(1, 1, 384)]


def test_the_network_is_left_as_it_was(make_network):
    network = make_network()
    tokens, places = torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None]
    before = network(tokens, places, None, runtime_gather_output=True)
    with pytest.raises(IndexError):
        next_token_entropy(network, [np.array([5000])], torch.device("cpu"))
    assert network.post_process
    assert torch.equal(network(tokens, places, None, runtime_gather_output=True), before)


# ------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("seq_length", [1, 2, 7, 8])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 10, 16, 17, 50])
def test_windows_predict_every_token_once(length, seq_length):
    predicted = []
    for window in windows(length, seq_length):
        assert 0 <= window.start < window.end <= length - 1 and window.end - window.start <= seq_length
        rows = range(window.start + window.first_row, window.end)
        assert len(rows) and (window.start == 0 or window.first_row >= seq_length // 2)
        predicted += [row + 1 for row in rows]
    assert predicted == list(range(1, length))


# --------------------------------------------------------------------------------------------------------------- bands


def test_bands_hold_their_lower_ends():
    entropy = np.array([0.0, 0.4999, 0.5, 0.99, 1.0, 1.4999, 1.5, 2.7], dtype=np.float32)
    names = [BANDS[place] for place in Thresholds().band(entropy)]
    assert names == ["trivial", "trivial", "easy", "easy", "medium", "medium", "hard", "hard"]
    assert BANDS[Thresholds(0.1, 0.2, 0.3).band(np.float32([0.3]))[0]] == "hard"


@pytest.mark.parametrize(
    "values", [(0.5, 0.5, 1.0), (1.0, 0.5, 1.5), (-0.1, 0.5, 1.0), (0.5, 1.0, float("inf")), (0.5, float("nan"), 1)]
)
def test_thresholds_that_are_none(values):
    with pytest.raises(ConfigError, match="expected three rising numbers"):
        Thresholds(*values).check()


# -------------------------------------------------------------------------------------------------------------- chance


def test_keys_of_positions():
    keys = position_keys(1, 5, 1000)
    assert np.array_equal(position_keys(1, 5, 10), keys[:10]) and len(np.unique(keys)) == 1000
    assert not np.array_equal(position_keys(1, 6, 10), keys[:10]) and not np.array_equal(position_keys(2, 5, 10), keys[:10])
    assert 0.45 < (keys / 2.0**64).mean() < 0.55


def test_the_split_is_a_share_of_the_documents():
    held = [is_validation(0, document, 0.2) for document in range(5000)]
    assert 0.18 < np.mean(held) < 0.22
    assert held == [is_validation(0, document, 0.2) for document in range(5000)]
    assert held != [is_validation(1, document, 0.2) for document in range(5000)]
    assert not any(is_validation(0, document, 0.0) for document in range(1000))


# ------------------------------------------------------------------------------------------------------- continuations


@pytest.fixture(scope="module")
def make_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")

    def sentencepiece():
        (folder / "text.txt").write_text(TEXT * 40)
        options = TrainingOptions(inputs=[str(folder / "text.txt")], output=str(folder / "tok.model"), vocab_size=330)
        train_tokenizer(options, StopSignal())
        return str(folder / "tok.model")

    def bpe():
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator([TEXT], trainer)
        backend.save(str(folder / "tokenizer.json"))
        return str(folder / "tokenizer.json")

    kinds = {"bytes": lambda: "bytes", "sentencepiece": sentencepiece, "bpe": bpe}
    return lambda kind: load_tokenizer(kinds[kind]())


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "bpe"])
def test_continuations_are_the_bytes_of_the_tokens(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind)
    text = "A naïve 日本 fox – 🦊 {x}.\n" * 3
    ids = tokenizer.encode(text)
    document = np.array([*ids, tokenizer.eod], dtype=np.uint16)
    pieces = [tokenizer.token_bytes(each) for each in ids]
    assert any(b"\xf0" in piece and len(piece) < 4 for piece in pieces)  # the fox is in fragments
    whole, ends = text.encode(), np.cumsum([len(piece) for piece in pieces]).tolist()
    starts = [0, *ends]
    continuations = Continuations(tokenizer, 10)
    assert continuations.can_be_asked(document).tolist() == [True] * len(ids) + [False]
    for position in range(len(ids)):
        found, boundaries = continuations.after(document, position)
        assert whole[starts[position] :].startswith(found)
        assert [starts[position] + each for each in boundaries] == ends[position : position + len(boundaries)]
        assert boundaries[-1] == len(found)
        rest = len(whole) - starts[position]
        assert len(found) >= min(10, rest) and (len(boundaries) == 1 or boundaries[-2] < 10)


def test_a_continuation_ends_before_a_special_token():
    tokenizer = load_tokenizer("bytes")
    document = np.array([97, 98, 256, 99, 256])
    continuations = Continuations(tokenizer, 64)
    assert continuations.after(document, 0) == (b"ab", [1, 2])
    assert continuations.after(document, 2) == (b"", [])
    assert continuations.can_be_asked(document).tolist() == [True, True, False, True, False]
    assert continuations.can_be_asked(document[:0]).tolist() == []
