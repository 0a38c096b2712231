from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megarpt.corpus.encoders import PROBES
from megarpt.corpus.tokenizers import Tokenizer, load_tokenizer
from megarpt.errors import ConfigError, DataError

KINDS = ["bytes", "bpe_json", "sp_model"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else request.getfixturevalue(request.param))


def test_round_trip_and_batches(tokenizer: Tokenizer) -> None:
    for text in PROBES:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids)) == text
        assert all(0 <= each < tokenizer.vocab_size for each in ids)
    for ids, text in zip(tokenizer.encode_batch(PROBES), PROBES, strict=True):
        assert ids.tolist() == tokenizer.encode(text)


def test_bytes_of_tokens_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    for text in PROBES:
        if "<|endoftext|>" in text:
            continue  # a special token in tokenizer.json: its name is text, it has no bytes
        ids = tokenizer.encode(text)
        pieces = [tokenizer.token_bytes(each) for each in ids]
        assert b"".join(piece for piece in pieces if piece is not None) == text.encode()
        assert all(isinstance(tokenizer.token_text(each), str) for each in ids)


def test_fragments_of_utf8_are_shown_as_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert [tokenizer.token_text(each) for each in tokenizer.encode("aé")] == ["a", "\\xc3", "\\xa9"]
    assert tokenizer.decode(tokenizer.encode("aé")[:2]) == "a�"
    assert tokenizer.token_text(256) == "<|eod|>"


def test_special_tokens(bpe_json: str, sp_model: str) -> None:
    bpe, sp = load_tokenizer(bpe_json), load_tokenizer(sp_model)
    assert bpe.eod == 0 and bpe.token_text(0) == "<|endoftext|>" and bpe.token_bytes(0) is None
    assert sp.eod == 2 and sp.token_text(2) == "</s>" and sp.token_bytes(2) is None and sp.token_bytes(0) is None
    assert load_tokenizer(bpe_json, eod_token="!").eod == bpe.encode("!")[0]
    assert load_tokenizer(sp_model, eod_token="<s>").eod == 1


def test_eod_from_the_configuration_beside_it(bpe_json: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(Path(bpe_json).read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "!"}}))
    assert load_tokenizer(str(tmp_path)).eod == load_tokenizer(bpe_json).encode("!")[0]
    config.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read"):
        load_tokenizer(str(tmp_path))


def test_hash_is_of_the_content(bpe_json: str, tmp_path: Path) -> None:
    copy = tmp_path / "other_name.json"
    copy.write_bytes(Path(bpe_json).read_bytes())
    assert load_tokenizer(str(copy)).sha256 == load_tokenizer(bpe_json).sha256
    copy.write_bytes(Path(bpe_json).read_bytes() + b"\n")
    assert load_tokenizer(str(copy)).sha256 != load_tokenizer(bpe_json).sha256


def test_saved_truncation_and_padding_are_ignored(bpe_json: str, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(bpe_json)
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).encode("a long text " * 9) == load_tokenizer(bpe_json).encode(
        "a long text " * 9
    )


@pytest.mark.parametrize("kind", KINDS)
def test_travels_to_other_processes(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else request.getfixturevalue(kind))
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("some text") == tokenizer.encode("some text") and copy.eod == tokenizer.eod


def test_model_without_end(make_sentencepiece: Callable[..., str]) -> None:
    assert load_tokenizer(make_sentencepiece(eos_id=-1)).eod is None
    assert load_tokenizer(make_sentencepiece(eos_id=-1, user_defined_symbols=["<|endoftext|>"])).eod is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read tokenizer"),
        (b"", "no sentencepiece model .*the file is empty"),
        (b"\x00junk", "no sentencepiece model"),
        (b"{}", "no Hugging Face"),
    ],
)
def test_what_is_no_tokenizer(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(path))


def test_wrong_eod(bpe_json: str, sp_model: str) -> None:
    for spec in ("bytes", bpe_json, sp_model):
        with pytest.raises(ConfigError, match="eod token: got '<nope>'"):
            load_tokenizer(spec, eod_token="<nope>")
