"""Texts to ids, as fast as this machine can while giving the reference tokenizer's ids.

gigatoken is an order of magnitude faster than the libraries that define the ids. It is used when it gives the same ids on
samples of the very corpus and on a list of awkward texts. Known differences are kept away from it:

- it takes the name of a control piece in the text (a literal `<s>`) for the piece, as sentencepiece does not: it is given the
  model with these pieces renamed to what no text contains, and a text that contains it goes to the reference;
- texts with user-defined pieces, or with added tokens that swallow blanks or apply to normalized text, go to the reference;
- where a sentencepiece model's normalization would be done differently, sentencepiece itself does it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from megarpt.corpus.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Ids, SentencePieceTokenizer, Tokenizer
from megarpt.errors import DataError, ExtensionError

logger = logging.getLogger(__name__)

Backend = Literal["auto", "gigatoken", "reference"]
_BATCH_CHARS = 1 << 18  # text given to a reference library at a time: its intermediate results are a hundred times as large
_CACHE_BYTES = 144 << 20  # how much gigatoken's memory may grow before it is opened afresh
_ASSIGNED = ((0x80, 0xD800), (0xE000, 0x20000), (0x2F800, 0x2FB00), (0xE0000, 0xE0200))  # where rules have something to change
_FEW = 24  # names that are searched for one by one; more are filtered by their beginnings first

# Contractions, runs, digits, blanks of every kind, line ends, combining marks, joined emoji, scripts without spaces, private
# and unassigned code points, and spellings that only look special.
PROBES = (
    "",
    " ",
    "I'll say they've can't won't 'S 'RE ’s don''t",
    "a  b   c    d\t\te\n\nf\r\ng\r\rh \n \n\n\n   \u00a0\u2003\u3000\u2028\u2029\u200b\ufeff.",
    "0 1 12 123 1234 12345 1,234,567.89 1e-5 ٠١٢٣ ²½Ⅷ",
    "e\u0301 n\u0303 \u1e9b\u0323 ﬁ ﬀ ① ㍿ İıßſΣς \u0344\u0345",
    "日本語の文章。中文没有空格，한국어 띄어쓰기 ภาษาไทย हिन्दी العربية עברית",
    "👩‍👩‍👧 🇩🇪🇫🇷 👍🏽 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "<s></s><unk><pad><0x0A><|endoftext|> <|x|> [INST] </ s> <s >",
    "\x00\x01\x1f\x7f\x80\x85\xad\ue000\ufffd\ufffe\U000e0001\U0010ffff",
    "-" * 200 + "=" * 33 + "#" * 7 + " " * 65 + "\t" * 9 + "\n" * 12 + "a" * 99,
    "def f(x):\n    return {'a': x[0]**2, \"b\": 'it''s'}  # comment\n\n\nclass A_b1(C):\n\tpass\n",
    "https://example.org/a_b-c/?q=%20x&y=1#z foo@bar.baz C:\\dir\\file.txt /usr/lib/x86_64",
)


class Encoder(Protocol):
    """What a worker turns texts into ids with."""

    backend: str  # for the log

    @property
    def reference(self) -> Tokenizer:
        """What defines the ids."""

    def encode(self, texts: Sequence[str]) -> Iterator[Ids]:
        """The ids of each text, in order."""

    def trim_memory(self) -> None:
        """Give back what grew; called between blocks of texts."""


class ReferenceEncoder:
    """The library that defines the ids, in batches."""

    def __init__(self, reference: Tokenizer) -> None:
        self.reference = reference
        self.backend = {SentencePieceTokenizer: "sentencepiece", HuggingFaceTokenizer: "tokenizers"}.get(
            type(reference), "bytes"
        )

    def encode(self, texts: Sequence[str]) -> Iterator[Ids]:
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= _BATCH_CHARS:
                yield from self.reference.encode_batch(batch)
                batch, size = [], 0
        if batch:
            yield from self.reference.encode_batch(batch)

    def trim_memory(self) -> None:
        return


class GigatokenEncoder:
    """gigatoken, with the texts it is known to treat differently given to the reference.

    Raises:
        ExtensionError: gigatoken is not installed, or cannot take this kind of tokenizer.
    """

    def __init__(self, reference: SentencePieceTokenizer | HuggingFaceTokenizer) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise ExtensionError("gigatoken is not installed (pip install 'megarpt[fast]')") from error
        self.reference = reference
        self.backend = f"gigatoken {importlib.metadata.version('gigatoken')}"
        self._normalizer: _Normalizer | None = None
        if isinstance(reference, SentencePieceTokenizer):
            self._open, self._normalizer = gigatoken.Tokenizer.from_sentencepiece, _Normalizer(reference)
            self._content, avoided, self.names = _without_controls(reference)
        else:
            self._open, self._content = gigatoken.Tokenizer.from_json, reference.content
            avoided, self.names = _added_tokens(reference)
        self._is_avoided = _finder(avoided)
        try:
            self._fast = self._open(self._content)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ExtensionError(f"gigatoken cannot take {reference.name}: {str(error).splitlines()[0]}") from error
        self._first_bytes = _resident_bytes()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.reference,)

    def encode(self, texts: Sequence[str]) -> Iterator[Ids]:
        fast, is_avoided, normalizer = self._fast.encode, self._is_avoided, self._normalizer
        for text in texts:
            if is_avoided(text):
                yield np.array(self.reference.encode(text), dtype=np.uint32)
            elif normalizer is not None and normalizer.is_needed(text):
                yield self._fast.encode_no_normalize(normalizer.normalize(text))
            else:
                yield fast(text)

    def needs_reference(self, text: str) -> bool:
        """Whether a text is kept away from gigatoken."""
        return self._is_avoided(text)

    def trim_memory(self) -> None:
        """gigatoken remembers words it has seen, without a bound of its own."""
        if _resident_bytes() - self._first_bytes > _CACHE_BYTES:
            del self._fast
            self._fast = self._open(self._content)
            self._first_bytes = max(self._first_bytes, _resident_bytes())


def choose_encoder(tokenizer: Tokenizer, samples: Sequence[str], *, backend: Backend = "auto") -> Encoder:
    """The fastest encoder that gives the tokenizer's own ids on `PROBES` and on samples of the corpus.

    Raises:
        DataError: `backend` is gigatoken and its ids differ.
        ExtensionError: `backend` is gigatoken and it cannot be used.
    """
    if backend == "reference" or isinstance(tokenizer, ByteTokenizer):
        return ReferenceEncoder(tokenizer)
    assert isinstance(tokenizer, SentencePieceTokenizer | HuggingFaceTokenizer)
    try:
        fast = GigatokenEncoder(tokenizer)
    except ExtensionError as error:
        if backend == "gigatoken":
            raise
        logger.info("encoding with the reference library: %s", error)
        return ReferenceEncoder(tokenizer)
    difference = first_difference(fast, [*PROBES, *_name_probes(fast.names), *samples])
    if difference is None:
        logger.info("encoding with %s: its ids equal the reference's on %d samples of the corpus", fast.backend, len(samples))
        if samples and sum(map(fast.needs_reference, samples)) * 4 > len(samples):
            logger.warning("many texts hold user-defined pieces and are encoded with the reference library, which is slower")
        return fast
    message = f"{fast.backend} gives other ids than the reference for the text {difference!r}"
    if backend == "gigatoken":
        raise DataError(f"--backend gigatoken: {message}; expected equal ids: leave --backend out to use the reference")
    logger.warning("%s: encoding with the reference library, which is slower", message)
    return ReferenceEncoder(tokenizer)


def first_difference(encoder: Encoder, texts: Sequence[str]) -> str | None:
    """The first text whose ids differ from the reference's, shortened; None when all agree."""
    for text, ids, expected in zip(texts, encoder.encode(texts), encoder.reference.encode_batch(texts), strict=True):
        if not np.array_equal(ids, expected):
            return text if len(text) <= 80 else text[:77] + "..."
    return None


class _Piece(NamedTuple):
    """A piece of a sentencepiece model: its name, where the name's bytes lie in the file, and its type."""

    name: bytes
    at: int
    type: int


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def _without_controls(reference: SentencePieceTokenizer) -> tuple[bytes, list[str], list[str]]:
    """The model with its control pieces renamed, the names that must not reach gigatoken, and those that are worth a probe.

    A piece is renamed in place, to as many bytes of noncharacters, so that nothing else in the file has to change.

    Raises:
        ExtensionError: the model marks pieces as unused, which gigatoken would use.
    """
    pieces = list(_pieces(reference.content))
    if len(pieces) != reference.vocab_size or any(piece.type == _UNUSED for piece in pieces):
        raise ExtensionError(f"gigatoken cannot take {reference.name}: it marks some of its pieces as unused")
    vocabulary = frozenset(piece.name for piece in pieces)
    content = bytearray(reference.content)
    avoided: list[bytes] = []
    for number, (name, at, kind) in enumerate(pieces):
        if kind == _USER_DEFINED or (kind in (_UNKNOWN, _BYTE) and _has_halves(name, vocabulary)):
            avoided.append(name)
        elif kind == _CONTROL:
            new = ("\uffff" + chr(1 + number % 31) * (len(name) - 3)).encode()
            if len(new) == len(name) and new not in avoided:
                content[at : at + len(name)] = new
                avoided.append(new)
            else:  # shorter than a noncharacter
                avoided.append(name)
    special = [piece.name for piece in pieces if piece.type != _NORMAL]
    return bytes(content), [name.decode() for name in avoided], [name.decode() for name in special]


def _has_halves(name: bytes, vocabulary: frozenset[bytes]) -> bool:
    """Whether two pieces make up this one: gigatoken would merge them into it, as sentencepiece does not."""
    return any(name[:cut] in vocabulary and name[cut:] in vocabulary for cut in range(1, len(name)))


def _pieces(model: bytes) -> Iterator[_Piece]:
    """Walk the pieces of a sentencepiece model: field 1 of the message, holding name (1), score (2) and type (3)."""
    for field_number, start, end in _fields(model, 0, len(model)):
        if field_number == 1:
            at, length, kind = start, 0, _NORMAL
            for inner, first, last in _fields(model, start, end):
                if inner == 1:
                    at, length = first, last - first
                elif inner == 3:
                    kind = model[first]
            yield _Piece(model[at : at + length], at, kind)


def _fields(message: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number and extent of the fields of a protobuf message."""

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < end:
        key = varint()
        start = at
        if key & 7 == 0:
            varint()
        elif key & 7 == 2:
            length = varint()
            start = at
            at += length
        else:
            at += 8 if key & 7 == 1 else 4
        yield key >> 3, start, at


def _added_tokens(reference: HuggingFaceTokenizer) -> tuple[list[str], list[str]]:
    """Names of added tokens that must not reach gigatoken, and those that may.

    Raises:
        ExtensionError: names would have to be looked for in normalized text.
    """
    normalizes = reference.backend.normalizer is not None
    avoided: list[str] = []
    plain: list[str] = []
    for token in reference.backend.get_added_tokens_decoder().values():
        if token.normalized and normalizes:
            raise ExtensionError(
                f"gigatoken cannot take {reference.name}: its added token {token.content!r} is looked for in normalized text"
            )
        (avoided if token.lstrip or token.rstrip or token.single_word else plain).append(token.content)
    return avoided, plain


def _name_probes(names: Sequence[str]) -> list[str]:
    """Texts that spell special names, at most some dozens of them."""
    some = names[:: max(1, len(names) // 48)]
    return [f"a{name}b {name} c{name}{name}\n{name[:-1]} {name}" for name in some]


class _Normalizer:
    """sentencepiece's own normalization, and which texts gigatoken would normalize differently.

    gigatoken strips all blanks at the ends where sentencepiece strips spaces, and applies rules to grapheme clusters.
    """

    def __init__(self, reference: SentencePieceTokenizer) -> None:
        self.normalize: Callable[[str], str] = reference.processor.normalize
        letters = "".join(chr(code) for first, last in _ASSIGNED for code in range(first, last))
        self._has_rule = self.normalize(letters).removeprefix("▁") != letters
        self._strips = self.normalize("a  ").removeprefix("▁") == "a"

    def is_needed(self, text: str) -> bool:
        """Whether the text must be given to gigatoken normalized."""
        return (self._has_rule and not text.isascii()) or (self._strips and (text[:1].isspace() or text[-1:].isspace()))


def _finder(names: Sequence[str]) -> Callable[[str], bool]:
    """A quick test whether a text holds any of these names."""
    names = sorted({name for name in names if name})
    if len(names) <= _FEW:
        return lambda text: any(name in text for name in names)
    beginnings = sorted({name[:2] for name in names})
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    return lambda text: any(each in text for each in beginnings) and pattern.search(text) is not None


def _resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
