from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarpt.corpus import sentencepiece_training
from megarpt.corpus.console import StopSignal
from megarpt.corpus.sentencepiece_training import TrainingOptions, _pieces, _Sample, train_tokenizer
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def trained(sp_model: str) -> Tokenizer:
    return load_tokenizer(sp_model)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_every_text_comes_back(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text.replace("▁", " ")


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "a", "def ", "<s>", "\u3000"])).map("".join))
def test_blanks_come_back(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_special_pieces(trained: Tokenizer) -> None:
    assert [trained.token_text(number) for number in range(3)] == ["<unk>", "<s>", "</s>"] and trained.eod == 2
    assert [trained.token_text(number) for number in range(3, 6)] == ["\x00", "\x01", "\x02"] and trained.vocab_size == 700


def train(tmp_path: Path, source: str, **more: Any) -> Tokenizer:
    defaults: dict[str, Any] = {"inputs": [source], "output": str(tmp_path / "t.model"), "vocab_size": 290, "overwrite": True}
    return train_tokenizer(TrainingOptions(**defaults | more), StopSignal())


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_manifest_and_repeatability(tmp_path: Path, write_jsonl: Callable[..., str], model_type: Any) -> None:
    texts = [f"some text number {i}, with words that repeat\n" for i in range(300)]
    source = write_jsonl(texts)
    first = train(tmp_path, source, model_type=model_type)
    manifest = json.loads((tmp_path / "t.model.json").read_bytes())
    assert (
        manifest["sha256"] == first.sha256
        and manifest["num_documents"] == 300
        and manifest["settings"]["model_type"] == model_type
    )
    assert manifest["text_bytes"] == sum(map(len, texts)) and manifest["inputs"][0]["name"] == "in.jsonl"
    assert train(tmp_path, source, model_type=model_type).sha256 == first.sha256


def test_sample_is_bounded_uniform_and_repeatable() -> None:
    def sample(seed: int, **limits: int) -> list[str]:
        chosen = _Sample(limits.get("sentences", 10**9), limits.get("size", 10**9), seed)
        for number in range(2000):
            chosen.add(f"text {number:04d}")
        assert chosen.seen == 2000 * 9
        return list(chosen.in_order())

    assert len(sample(0)) == 2000 and len(sample(0, sentences=50)) == 50 and len(sample(0, size=900)) == 100
    assert sample(1, sentences=50) == sample(1, sentences=50) != sample(2, sentences=50)
    halves = sum(int(text[5:]) < 1000 for text in sample(3, sentences=400))
    assert 150 < halves < 250 and sample(3, sentences=400) == sorted(sample(3, sentences=400))


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab\n é", max_size=300))
def test_pieces_add_up(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_training, "_SENTENCE_BYTES", 16)
        pieces = list(_pieces(text))
    assert "".join(pieces) == text and all(0 < len(piece) <= 16 for piece in pieces)


def test_mistakes(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    source = write_jsonl(["a b c"] * 5)
    with pytest.raises(ConfigError, match="got 259, expected at least 260"):
        train(tmp_path, source, vocab_size=259)
    with pytest.raises(ConfigError, match=r"cannot train 5000 bpe pieces on this text: .*choose another --vocab-size"):
        train(tmp_path, source, vocab_size=5000)
    with pytest.raises(DataError, match="no text in"):
        train(tmp_path, write_jsonl([], "empty.jsonl"))
    with pytest.raises(DataError, match=r"bad\.jsonl:1: malformed"):
        (tmp_path / "bad.jsonl").write_text("broken\n")
        train(tmp_path, str(tmp_path / "bad.jsonl"))
    assert not (tmp_path / "t.model").exists()
    (tmp_path / "t.model").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        train(tmp_path, source, overwrite=False)
    assert (tmp_path / "t.model").read_text() == "mine"
