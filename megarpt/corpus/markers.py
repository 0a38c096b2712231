"""Texts with special tokens in them, tokenized in parts: what templates of prompts and of conversations are made of.

Special tokens are written by their names. Of a Hugging Face `tokenizer.json` these are its added tokens, of a sentencepiece
model its control and user-defined symbols (`<s>`, `</s>`), of `bytes` `<|eod|>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from megarpt.corpus.tokenizers import HuggingFaceTokenizer, Tokenizer

Parts = list[str | int]  # texts, and special tokens by their ids

_MARKER = re.compile(r"[<\[].*[>\]]")  # how special tokens are spelled
_ANCHOR = "\n"  # a text that does not grow together with what follows it


class MarkedText:
    """Splits texts at the names of special tokens, and tokenizes what comes of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._pads = (tokenizer.token_bytes(tokenizer.encode("a")[0]) or b"").startswith(b" ")

    def split(self, text: str) -> Parts:
        """Texts with the special tokens between them; the first and the last part are texts, maybe empty.

        Added tokens of a `tokenizer.json` stay in the texts, since its library finds them there.

        Cost: the first time one look at every id, where the text has anything like a name.
        """
        has_names = not isinstance(self.tokenizer, HuggingFaceTokenizer) and _MARKER.search(text) is not None
        specials = {name: number for name, number in self._specials.items() if name in text} if has_names else {}
        if not specials:
            return [text]
        longest_first = sorted(specials, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        return [specials[part] if place % 2 else part for place, part in enumerate(parts)]

    def encode(self, parts: Sequence[str | int], *, is_first: bool) -> list[int]:
        """Ids of texts and special tokens that stand in a row.

        Args:
            parts: neighbouring texts are tokenized apart.
            is_first: nothing precedes them. The first text is the first one even behind special tokens.
        """
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self.tokenizer.encode(part) if is_first else self._encode_within(part)
                is_first = False
        return ids

    def _encode_within(self, text: str) -> list[int]:
        """Ids of a text that something precedes. Tokenizers with a dummy prefix put a blank before whatever they are given,
        which is meant for the beginning of a document only."""
        ids = self.tokenizer.encode(text)
        if not self._pads:
            return ids
        anchor, anchored = self.tokenizer.encode(_ANCHOR), self.tokenizer.encode(_ANCHOR + text)
        without = anchored[len(anchor) :]
        is_apart = anchored[: len(anchor)] == anchor and self._bytes(anchor).endswith(_ANCHOR.encode())
        return without if is_apart and without and b" " + self._bytes(without) == self._bytes(ids) else ids

    @cached_property
    def _specials(self) -> dict[str, int]:
        tokenizer = self.tokenizer
        names = {tokenizer.token_text(i): i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) is None}
        return {name: number for name, number in names.items() if _MARKER.fullmatch(name)}

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokenizer.token_bytes(each) or b"" for each in ids)
