"""The tokenizers a corpus can be made with: a sentencepiece model, a Hugging Face `tokenizer.json`, or plain bytes.

These are the reference: slower back ends that everything faster is compared with (fast.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megarpt.errors import ConfigError, DataError, ExtensionError

Ids = npt.NDArray[Any]  # one-dimensional, any integer type

# How the families of published tokenizers spell "a document ends here", in the order they are tried.
EOD_NAMES = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eos|>",
    "<EOD>",
    "<eod>",
    "<EOS>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
)


class Tokenizer(Protocol):
    """Text to ids and back."""

    name: str  # base name of the file, or "bytes"
    spec: str  # what `load_tokenizer` was given
    vocab_size: int  # one more than the largest id
    eod: int | None  # the id that ends a document
    sha256: str  # of the tokenizer's content

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without special tokens added."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of several texts."""

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of ids; bytes that are no UTF-8 become replacement characters."""

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes one id stands for; None for special tokens and for ids whose bytes are not known."""

    def token_text(self, token_id: int) -> str:
        """One id, for showing: its text, with fragments of UTF-8 as `\\xNN` and special tokens by their name."""


def load_tokenizer(spec: str, *, eod_token: str | None = None) -> Tokenizer:
    """Open a tokenizer.

    Args:
        spec: a sentencepiece `.model`, a Hugging Face `tokenizer.json` (or its folder), or `bytes`.
        eod_token: the token that ends a document, when the usual names do not find it.

    Raises:
        ConfigError: `eod_token` is not in the vocabulary, or `bytes` was given one.
        DataError: the file is missing or is no tokenizer.
        ExtensionError: the library that reads it is not installed.
    """
    if spec == "bytes":
        if eod_token is not None:
            raise ConfigError(f"eod token: got {eod_token!r} with the bytes tokenizer, whose end of document is always id 256")
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read tokenizer {spec}: {error.strerror or error}; expected a sentencepiece .model, a Hugging Face "
            "tokenizer.json, or the word `bytes`"
        ) from error
    if content.lstrip()[:1] == b"{":
        return HuggingFaceTokenizer(path, content, eod_token)
    return SentencePieceTokenizer(path, content, eod_token)


class ByteTokenizer:
    """256 bytes and an end of document."""

    name = spec = "bytes"
    vocab_size = 257
    eod: int | None = 256
    sha256 = hashlib.sha256(b"megarpt bytes tokenizer: ids 0-255 are UTF-8 bytes, 256 ends a document").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return bytes(int(each) for each in ids if each < 256).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes | None:
        return bytes([token_id]) if token_id < 256 else None

    def token_text(self, token_id: int) -> str:
        return _show(self.token_bytes(token_id), "<|eod|>")


class SentencePieceTokenizer:
    """A sentencepiece model; its end of document is `</s>`."""

    def __init__(self, path: Path, content: bytes, eod_token: str | None = None) -> None:
        try:
            import sentencepiece  # a library of its own for each format: only the one that is needed is loaded
        except ImportError as error:
            raise ExtensionError(f"tokenizer {path} needs sentencepiece: pip install sentencepiece") from error
        self.spec, self.name, self.content = str(path), path.name, content
        self._eod_token = eod_token
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            if not content:
                raise ValueError("the file is empty")  # sentencepiece would make an uninitialized processor of it
            self.processor: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"{path}: this is no sentencepiece model and no tokenizer.json ({str(error).strip() or 'cannot be parsed'}); "
                "expected one of the two"
            ) from error
        self.vocab_size = int(self.processor.get_piece_size())
        self.eod = self._find_eod(eod_token)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (Path(self.spec), self.content, self._eod_token)

    def _find_eod(self, eod_token: str | None) -> int | None:
        if eod_token is None and self.processor.eos_id() >= 0:
            return int(self.processor.eos_id())
        for name in [eod_token] if eod_token else EOD_NAMES:
            found = int(self.processor.piece_to_id(name))
            if self.processor.id_to_piece(found) == name:
                return found
        if eod_token is not None:
            raise ConfigError(f"eod token: got {eod_token!r}, expected a piece of {self.spec}")
        return None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(ids, dtype=np.int32) for ids in self.processor.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        text: str = self.processor.decode([int(each) for each in ids])
        return text

    def token_bytes(self, token_id: int) -> bytes | None:
        if self.processor.is_control(token_id) or self.processor.is_unknown(token_id):
            return None
        piece: str = self.processor.id_to_piece(token_id)
        if self.processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        return _show(self.token_bytes(token_id), self.processor.id_to_piece(token_id))


class HuggingFaceTokenizer:
    """A `tokenizer.json`; its end of document is what a `tokenizer_config.json` beside it says, or one of the usual names."""

    def __init__(self, path: Path, content: bytes, eod_token: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise ExtensionError(f"tokenizer {path} needs the library tokenizers: pip install tokenizers") from error
        self.spec, self.name, self.content = str(path), path.name, content
        self._eod_token = eod_token
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self.backend = Backend.from_buffer(content)
        except ValueError as error:
            raise DataError(f"{path}: this is no Hugging Face tokenizer.json ({error}); expected one, or a .model") from error
        self.backend.no_truncation()  # a file saved by a training script may carry a maximum length
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eod = self._find_eod(vocabulary, eod_token)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (Path(self.spec), self.content, self._eod_token)

    def _find_eod(self, vocabulary: dict[str, int], eod_token: str | None) -> int | None:
        if eod_token is not None:
            if eod_token not in vocabulary:
                raise ConfigError(f"eod token: got {eod_token!r}, expected a token of {self.spec}")
            return vocabulary[eod_token]
        named = _configured_eos(Path(self.spec).with_name("tokenizer_config.json"))
        return next((vocabulary[name] for name in (named, *EOD_NAMES) if name in vocabulary), None)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype=np.int32) for each in encoded]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        return self.backend.decode([int(each) for each in ids], skip_special_tokens=False)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(number for number, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _byte_of(self) -> dict[str, int] | None:
        """Byte-level vocabularies spell each byte as one printable character; None when this one does not."""
        return _byte_level_alphabet() if "ByteLevel" in json.dumps(json.loads(self.content).get("decoder")) else None

    def token_bytes(self, token_id: int) -> bytes | None:
        token = self.backend.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return None
        if self._byte_of is not None:
            if token_id in self.backend.get_added_tokens_decoder():
                return token.encode()  # added tokens are spelled as they are
            known = [self._byte_of.get(letter) for letter in token]
            return None if None in known else bytes(each for each in known if each is not None)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode() if "▁" in json.dumps(self._metaspace, ensure_ascii=False) else None

    @cached_property
    def _metaspace(self) -> list[Any]:
        whole = json.loads(self.content)
        return [whole.get("decoder"), whole.get("pre_tokenizer"), whole.get("normalizer")]

    def token_text(self, token_id: int) -> str:
        return _show(self.token_bytes(token_id), self.backend.id_to_token(token_id) or f"<{token_id}>")


def _configured_eos(path: Path) -> str | None:
    """The `eos_token` of a tokenizer_config.json, a string or an object with its content; None when there is none."""
    try:
        token = json.loads(path.read_bytes()).get("eos_token")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); repair it, or remove it to use the usual names") from error
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _byte_level_alphabet() -> dict[str, int]:
    """The printable letter of each byte: itself where it is printable Latin-1, else the next letter from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _show(content: bytes | None, otherwise: str) -> str:
    return otherwise if content is None else content.decode(errors="backslashreplace")
