"""Templates: what becomes of a placeholder, of special tokens, and of the places where texts meet."""

from __future__ import annotations

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.errors import ConfigError
from megarpt.rl.templates import TEMPLATES, PromptTemplate, find_template

LINES = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "user assistant"] * 20
DEFAULTS = {
    "vocab_size": 330,
    "model_type": "bpe",
    "byte_fallback": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "minloglevel": 2,
    "num_threads": 1,
}


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """A sentencepiece model that puts a blank before every text, as most published ones do."""

    def make(**settings):
        prefix = tmp_path_factory.mktemp("sp") / "tok"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_prefix=str(prefix),
            **DEFAULTS | settings,
        )
        return load_tokenizer(f"{prefix}.model")

    return make


@pytest.fixture(scope="module")
def chat_json(tmp_path_factory):
    """A byte-level tokenizer.json with chat markers."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    path = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(str(path))


def text_of(tokenizer, ids):
    return b"".join(tokenizer.token_bytes(each) or b"" for each in ids).decode()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_built_in_template_is_its_text_around_the_placeholder(name):
    tokenizer = load_tokenizer("bytes")
    form = PromptTemplate(name, tokenizer)
    around = TEMPLATES[name].replace("{" + form.placeholder + "}", "A{x}\\z")
    assert form.takes("context") or form.takes("question")
    assert text_of(tokenizer, form.around_context(list(b"A{x}\\z"))) == around
    assert text_of(tokenizer, form.around_question("A{x}\\z")) == around
    assert form.num_tokens == len(around) - 6


def test_the_variants_differ():
    texts = [TEMPLATES[f"v{number}"] for number in range(7)]
    assert len(set(texts)) == 7
    opened = [text.rstrip().endswith("<think>") for text in texts]
    assert any(opened) and not all(opened)
    assert all("\\boxed{" in text and "</think>" in text for text in texts)


def test_a_template_of_ones_own():
    assert find_template("see: {context} and {braces}{}") == "see: {context} and {braces}{}"
    assert PromptTemplate("{question}!", load_tokenizer("bytes")).around_question("why?") == tuple(b"why?!")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("v7", r"data\.template: got 'v7', expected one of v0, .*or a text with one of {context}"),
        ("minimum", "did you mean 'minimal'"),
        ("questions", "did you mean 'question'"),
        ("continue this", "or a text with one of {context}"),
        ("{context}{context}", r"2 placeholders \({context}, {context}\), expected exactly one"),
        ("{context} {question}", "2 placeholders"),
        ("", "got '', expected one of"),
    ],
)
def test_what_is_no_template(value, message):
    with pytest.raises(ConfigError, match=message):
        find_template(value, where="data.template")


def test_a_context_keeps_its_ids(chat_json):
    """Its letters are not what the tokenizer makes of `quick`."""
    split = [number for letter in "quick" for number in chat_json.encode(letter)]
    assert split != chat_json.encode("quick")
    form = PromptTemplate("lazy {context} box", chat_json)
    assert form.around_context(split) == (*chat_json.encode("lazy "), *split, *chat_json.encode(" box"))


def test_a_question_grows_together_with_its_surroundings(chat_json):
    form = PromptTemplate("the {question}x", chat_json)
    assert form.around_question("qui") == tuple(chat_json.encode("the quix"))
    assert form.around_question("qui") != (*chat_json.encode("the "), *chat_json.encode("qui"), *chat_json.encode("x"))


def test_chat_markers_of_a_tokenizer_json(chat_json):
    start, end = 1, 2
    form = PromptTemplate("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", chat_json)
    assert form.around_question("quick?") == (
        *(start, *chat_json.encode("user\nquick?"), end),
        *(*chat_json.encode("\n"), start, *chat_json.encode("assistant\n")),
    )


def test_special_tokens_of_a_sentencepiece_model(make_model):
    tokenizer = make_model(user_defined_symbols=["<|user|>"], control_symbols=["<turn>"])
    user, turn = tokenizer.processor.piece_to_id("<|user|>"), tokenizer.processor.piece_to_id("<turn>")
    form = PromptTemplate("<s><|user|>{question}</s><turn>", tokenizer)
    ids = form.around_question("quick")
    assert ids[0] == 1 and ids[-2:] == (2, turn) and user in ids
    assert text_of(tokenizer, ids) == " <|user|>quick"  # the first text, with the blank this model begins documents with
    spliced = PromptTemplate("<s>{context}</s>", tokenizer).around_context([70, 71])
    assert spliced == (1, 70, 71, 2)


def test_a_special_token_in_a_question_is_text(make_model):
    tokenizer = make_model()
    form = PromptTemplate("<s>{question}", tokenizer)
    ids = form.around_question("a</s>b")
    assert text_of(tokenizer, ids) == " a</s>b" and ids[0] == 1 and 2 not in ids


def test_the_end_of_document_of_bytes():
    form = PromptTemplate("<|eod|>{context}<think>", load_tokenizer("bytes"))
    assert form.around_context([97]) == (256, 97, *b"<think>")


@pytest.mark.parametrize("padded", [True, False])
def test_no_blank_is_put_before_what_follows_a_context(make_model, padded):
    tokenizer = make_model(add_dummy_prefix=padded)
    form = PromptTemplate("the {context}fox\n", tokenizer)
    ids = form.around_context(tokenizer.encode("x")[-1:])
    assert text_of(tokenizer, ids) == (" " if padded else "") + "the xfox\n"


def test_a_blank_that_is_meant_stays(make_model):
    tokenizer = make_model()
    form = PromptTemplate("{context} fox", tokenizer)
    assert text_of(tokenizer, form.around_context(tokenizer.encode("x")[-1:])) == "x fox"
