from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megarpt.corpus.markers import MarkedText
from megarpt.corpus.tokenizers import load_tokenizer

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def test_a_text_without_names_is_one_part() -> None:
    marked = MarkedText(load_tokenizer("bytes"))
    assert marked.split("") == [""] and marked.split("a < b > c") == ["a < b > c"]


def test_names_are_split_off_with_texts_around_them(make_sentencepiece: Callable[..., str]) -> None:
    tokenizer: Any = load_tokenizer(make_sentencepiece(control_symbols=["<turn>", "<turn>>"], **IDENTITY))
    marked = MarkedText(tokenizer)
    short, long = (tokenizer.processor.piece_to_id(name) for name in ("<turn>", "<turn>>"))
    assert marked.split("<s>a<turn>>b<turn>") == ["", 1, "a", long, "b", short, ""]


def test_added_tokens_stay_in_the_text(bpe_json: str) -> None:
    marked = MarkedText(load_tokenizer(bpe_json))
    parts = marked.split("a<|endoftext|>b")
    assert parts == ["a<|endoftext|>b"] and 0 in marked.encode(parts, is_first=True)


def test_only_the_first_text_gets_the_blank_of_a_dummy_prefix(make_sentencepiece: Callable[..., str]) -> None:
    tokenizer = load_tokenizer(make_sentencepiece(**IDENTITY))
    marked = MarkedText(tokenizer)

    def text(ids: list[int]) -> bytes:
        return b"".join(tokenizer.token_bytes(each) or b"" for each in ids)

    assert text(marked.encode([1, "def", 2, "return"], is_first=True)) == b" defreturn"
    assert text(marked.encode(["def", "return"], is_first=False)) == b"defreturn"
