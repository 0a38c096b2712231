"""Tokenizers small enough to be made for every test session, of the kinds people use."""

from __future__ import annotations

import inspect
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megarpt.corpus.console import StopSignal
from megarpt.corpus.encoders import PROBES
from megarpt.corpus.sentencepiece_training import TrainingOptions, train_tokenizer

TEXT = "\n\n".join([inspect.getsource(module) for module in (json, random, string)] + list(PROBES))


def train_bpe(path: Path, *, vocab_size: int = 600, special: tuple[str, ...] = ("<|endoftext|>",), nfc: bool = False) -> str:
    """A byte-level BPE tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="session")
def bpe_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="session")
def make_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Trains with sentencepiece itself, the settings a published model might have."""
    import sentencepiece

    made: dict[str, str] = {}

    def make(**settings: Any) -> str:
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            prefix = tmp_path_factory.mktemp("sp") / "tok"
            defaults = {"vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "num_threads": 1}
            lines = [line for line in TEXT.splitlines() if line and "\0" not in line]
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines if settings.get("model_type") != "unigram" else lines[-400:]),
                model_prefix=str(prefix),
                max_sentence_length=65536,
                **defaults | settings,
            )
            made[key] = f"{prefix}.model"
        return made[key]

    return make


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What tools/train_tokenizer.py makes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_bytes(TEXT.encode())
    options = TrainingOptions(inputs=[str(folder / "text.txt")], output=str(folder / "tok.model"), vocab_size=700)
    train_tokenizer(options, StopSignal())
    return str(folder / "tok.model")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Documents to a jsonl file."""

    def write(documents: list[str], name: str = "in.jsonl", **more: Any) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in documents))
        return str(path)

    return write
