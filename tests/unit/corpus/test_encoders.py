from __future__ import annotations

import json
import logging
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, pre_tokenizers

from megarpt.corpus import encoders
from megarpt.corpus.encoders import PROBES, GigatokenEncoder, ReferenceEncoder, choose_encoder, first_difference
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import DataError, ExtensionError

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SP_KINDS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "lower": {"normalization_rule_name": "nmt_nfkc_cf"},
    "symbols": {"user_defined_symbols": ["<x>", "[INST]"], "control_symbols": ["<sep>", "<cls>", "<a>", "|"]},
    "no prefix": {"add_dummy_prefix": False, "normalization_rule_name": "identity"},
}


def texts(seed: int, count: int) -> list[str]:
    """Noise from all over Unicode between pieces of the probes."""
    rng = random.Random(seed)
    pools = [*PROBES[1:], "abc XYZ 019 \n", "<s></s><unk><x>[INST]<sep><0x41>", "\u0300\u0301\u200d\ufe0f🏽é"]

    def piece() -> str:
        kind = rng.random()
        if kind < 0.5:
            pool = rng.choice(pools)
            start = rng.randrange(len(pool))
            return pool[start : start + rng.randrange(12)]
        if kind < 0.8:
            pool = rng.choice(pools)
            return "".join(rng.choice(pool) for _ in range(rng.randrange(6)))
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))

    return ["".join(piece() for _ in range(rng.choice([1, 3, 30]))) for _ in range(count)]


@pytest.mark.parametrize("kind", SP_KINDS)
def test_gigatoken_equals_sentencepiece(make_sentencepiece: Callable[..., str], kind: str) -> None:
    encoder = GigatokenEncoder(load_tokenizer(make_sentencepiece(**SP_KINDS[kind])))  # type: ignore[arg-type]
    assert first_difference(encoder, [*PROBES, *texts(1, 300)]) is None


@pytest.mark.parametrize("kind", ["gpt2", "llama", "nfc"])
def test_gigatoken_equals_tokenizers(bpe_json: str, tmp_path: Path, kind: str) -> None:
    backend = tokenizers.Tokenizer.from_file(bpe_json)
    if kind != "gpt2":
        split = pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if kind == "nfc":
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("<x>", rstrip=True), AddedToken("[INST]", lstrip=True)])
    backend.add_tokens([AddedToken("ABC", single_word=True, normalized=False)])
    backend.save(str(tmp_path / "t.json"))
    encoder = GigatokenEncoder(load_tokenizer(str(tmp_path / "t.json")))  # type: ignore[arg-type]
    assert first_difference(encoder, [*PROBES, *texts(2, 300), " ABC ABCD <x>  a  [INST] b"]) is None


def test_fallback_when_gigatoken_cannot_take_it(
    make_sentencepiece: Callable[..., str], bpe_json: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend = tokenizers.Tokenizer.from_file(bpe_json)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    backend.save(str(tmp_path / "odd.json"))
    backend = tokenizers.Tokenizer.from_file(bpe_json)
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.add_tokens([AddedToken("é", normalized=True)])  # to be found in normalized text
    backend.save(str(tmp_path / "nfc.json"))
    models = [make_sentencepiece(model_type="unigram"), make_sentencepiece(byte_fallback=False)]
    for spec in (*models, str(tmp_path / "odd.json"), str(tmp_path / "nfc.json")):
        tokenizer = load_tokenizer(spec)
        chosen = choose_encoder(tokenizer, ["some text"])
        assert isinstance(chosen, ReferenceEncoder)
        assert [ids.tolist() for ids in chosen.encode(PROBES)] == [tokenizer.encode(text) for text in PROBES]
        assert "gigatoken cannot take" in caplog.text
        with pytest.raises(ExtensionError, match="gigatoken cannot take"):
            choose_encoder(tokenizer, [], backend="gigatoken")
        caplog.clear()


class Wrong(GigatokenEncoder):
    """Differs on one word only."""

    def encode(self, texts: Any) -> Any:
        for text, ids in zip(texts, super().encode(texts), strict=True):
            yield ids[::-1] if "rare" in text else ids


def test_fallback_when_ids_differ_on_the_corpus(
    bpe_json: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoders, "GigatokenEncoder", Wrong)
    tokenizer = load_tokenizer(bpe_json)
    assert isinstance(choose_encoder(tokenizer, ["common text"]), Wrong)
    assert isinstance(choose_encoder(tokenizer, ["common text", "a rare word"]), ReferenceEncoder)
    assert "gives other ids than the reference for the text 'a rare word'" in caplog.text
    with pytest.raises(DataError, match="gives other ids"):
        choose_encoder(tokenizer, ["a rare word"], backend="gigatoken")


def test_fast_by_default(bpe_json: str, sp_model: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for spec in (bpe_json, sp_model):
        assert choose_encoder(load_tokenizer(spec), ["text"]).backend.startswith("gigatoken ")
        assert "its ids equal the reference's on 1 samples" in caplog.text
        assert choose_encoder(load_tokenizer(spec), [], backend="reference").backend in ("tokenizers", "sentencepiece")
    assert choose_encoder(load_tokenizer("bytes"), []).backend == "bytes"


def test_ordinary_texts_never_need_the_slow_library(sp_model: str, bpe_json: str) -> None:
    """Names of special pieces in a text cost nothing; only noncharacters do."""
    for spec in (sp_model, bpe_json):
        encoder = GigatokenEncoder(load_tokenizer(spec))  # type: ignore[arg-type]
        assert not any(encoder.needs_reference(text) for text in PROBES)
    assert GigatokenEncoder(load_tokenizer(sp_model)).needs_reference("\uffff")  # type: ignore[arg-type]


def test_many_added_tokens_are_found() -> None:
    names = [f"<|reserved_{i}|>" for i in range(300)] + ["x"]
    is_avoided = encoders._finder(names)
    assert (
        is_avoided("a <|reserved_299|>") and is_avoided("axe") and not is_avoided("<|reserved_300 <| ab") and not is_avoided("")
    )
    assert not encoders._finder([])("anything")


@pytest.mark.parametrize("kind", ["bpe_json", "sp_model"])
def test_memory_is_given_back_and_ids_stay(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_CACHE_BYTES", -1)
    encoder = GigatokenEncoder(load_tokenizer(request.getfixturevalue(kind)))
    before, opened = [ids.tolist() for ids in encoder.encode(PROBES)], encoder._fast
    encoder.trim_memory()
    assert encoder._fast is not opened and [ids.tolist() for ids in encoder.encode(PROBES)] == before


def test_encoders_travel_to_other_processes(bpe_json: str, sp_model: str) -> None:
    for encoder in (
        GigatokenEncoder(load_tokenizer(bpe_json)),  # type: ignore[arg-type]
        GigatokenEncoder(load_tokenizer(sp_model)),  # type: ignore[arg-type]
        ReferenceEncoder(load_tokenizer(sp_model)),
    ):
        copy = pickle.loads(pickle.dumps(encoder))
        assert all(np.array_equal(a, b) for a, b in zip(copy.encode(PROBES), encoder.encode(PROBES), strict=True))


def test_reference_batches_keep_order(bpe_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_BATCH_CHARS", 50)
    tokenizer = load_tokenizer(bpe_json)
    documents = [f"document {i} " * (i % 9) for i in range(100)]
    got = [ids.tolist() for ids in ReferenceEncoder(tokenizer).encode(documents)]
    assert got == [tokenizer.encode(text) for text in documents]


def test_probes_are_json() -> None:
    """They are written into error messages and logs."""
    assert json.loads(json.dumps(PROBES)) == list(PROBES)
