"""Which ids a record becomes, and which of them are learned."""

from typing import get_args

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megarpt.config.schema import ChatConfig
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.data.chat import TEMPLATES, AnswerFormat
from megarpt.errors import ConfigError, DataError
from megarpt.rl.templates import PromptTemplate

LINES = ["the quick brown fox jumps over the lazy dog", "user asks\nassistant answers", "pack my box with five dozen jugs"] * 20
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "quick?"},
    {"role": "assistant", "content": "the fox"},
    {"role": "user", "content": "lazy?"},
    {"role": "assistant", "content": "the dog"},
]
DEFAULTS = {
    "vocab_size": 340,
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "minloglevel": 2,
    "num_threads": 1,
}
EOD = 256


@pytest.fixture(scope="module")
def make_json(tmp_path_factory):
    """Byte-level tokenizers with special tokens, of which the first ends documents."""

    def make(*special):
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=[*special], initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(LINES, trainer)
        path = tmp_path_factory.mktemp("json") / "tokenizer.json"
        backend.save(str(path))
        return load_tokenizer(str(path))

    return make


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """Sentencepiece models, which put a blank before every text."""

    def make(**settings):
        prefix = tmp_path_factory.mktemp("sp") / "tok"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_prefix=str(prefix),
            **DEFAULTS | settings,
        )
        return load_tokenizer(f"{prefix}.model")

    return make


def form_of(tokenizer, **chat):
    return AnswerFormat(tokenizer, ChatConfig(**chat))


def pair(form, prompt, completion):
    return form.pair({"prompt": prompt, "completion": completion}, where="here:1")


def conversation(form, messages=TURNS):
    return form.conversation({"messages": messages}, where="here:1")


def learned(answered):
    """The answers, each with what ends it."""
    runs, before = [], False
    for token, is_answer in zip(answered.tokens.tolist(), answered.is_answer.tolist(), strict=True):
        if is_answer and not before:
            runs.append([])
        if is_answer:
            runs[-1].append(token)
        before = is_answer
    return runs


def test_a_pair_is_taken_as_it_is_and_ends():
    answered = pair(form_of(load_tokenizer("bytes")), "2+2=", "é4")
    assert answered.tokens.tolist() == [*b"2+2=", 0xC3, 0xA9, ord("4"), EOD]
    assert answered.is_answer.tolist() == [False] * 4 + [True] * 4
    assert answered.answer_bytes == 3


def test_a_conversation_in_the_plain_template():
    answered = conversation(form_of(load_tokenizer("bytes")))
    first, second = b"be brief\n\nUser:\nquick?\n\nAssistant:\n", b"\n\nUser:\nlazy?\n\nAssistant:\n"
    assert answered.tokens.tolist() == [*first, *b"the fox", EOD, *second, *b"the dog", EOD]
    assert learned(answered) == [[*b"the fox", EOD], [*b"the dog", EOD]]
    assert answered.answer_bytes == 14


def test_a_conversation_in_chatml_is_made_of_the_ids_of_its_parts(make_json):
    tokenizer = make_json("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    end, start, stop = 0, 1, 2
    encode = tokenizer.encode
    answered = conversation(form_of(tokenizer, template="chatml"))
    tail = [*encode("\n"), start, *encode("assistant\n")]
    expected = [
        *(start, *encode("system\nbe brief"), stop, *encode("\n"), start, *encode("user\nquick?"), stop, *tail),
        *(*encode("the fox"), stop, *encode("\n"), start, *encode("user\nlazy?"), stop, *tail),
        *(*encode("the dog"), stop, end),
    ]
    assert answered.tokens.tolist() == expected
    assert learned(answered) == [[*encode("the fox"), stop], [*encode("the dog"), stop, end]]


def test_an_end_of_answers_that_is_the_end_of_documents_stands_once(make_json):
    tokenizer = make_json("<|im_end|>", "<|im_start|>")
    assert tokenizer.eod == 0
    answered = conversation(form_of(tokenizer, template="chatml"))
    assert learned(answered) == [[*tokenizer.encode(text), 0] for text in ("the fox", "the dog")]


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_templates_of_other_families(make_json, name):
    template = TEMPLATES[name]
    tokenizer = make_json("<eos>", *template.special)
    messages = [turn for turn in TURNS if turn["role"] in template.roles]
    answered = conversation(form_of(tokenizer, template=name), messages)
    expected = template.begin
    for each in messages:
        before, after = template.roles[each["role"]].split("{content}")
        expected += before + each["content"] + (template.answer_end if each["role"] == "assistant" else "") + after
    assert tokenizer.decode(answered.tokens) == expected.rstrip("\n") + "<eos>"
    (stop,) = tokenizer.encode(template.answer_end)
    assert learned(answered) == [[*tokenizer.encode("the fox"), stop], [*tokenizer.encode("the dog"), stop, 0]]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "json"])
def test_what_a_policy_is_asked_is_what_was_trained(kind, make_model, make_json):
    """The prompt of a conversation is that of the same template of `megarpt rl`, and an answer begins where it ends."""
    tokenizer = {"bytes": lambda: load_tokenizer("bytes"), "sentencepiece": make_model, "json": lambda: make_json("</s>")}[
        kind
    ]()
    asked = PromptTemplate("User:\n{question}\n\nAssistant:\n", tokenizer).around_question("the quick?")
    messages = [{"role": "user", "content": "the quick?"}, {"role": "assistant", "content": "fox"}]
    for answered in (
        conversation(form_of(tokenizer), messages),
        pair(form_of(tokenizer), "User:\nthe quick?\n\nAssistant:\n", "fox"),
    ):
        assert tuple(answered.tokens[: len(asked)].tolist()) == asked
        assert answered.is_answer.tolist() == [False] * len(asked) + [True] * (len(answered.tokens) - len(asked))
        (answer,) = learned(answered)
        assert b"".join(tokenizer.token_bytes(each) for each in answer[:-1]) == b"fox" and answer[-1] == tokenizer.eod


def test_the_boundary_is_the_end_of_a_token(make_json):
    tokenizer = make_json("</s>")
    answered = pair(form_of(tokenizer), "the qui", "ck")
    assert answered.tokens.tolist() == [*tokenizer.encode("the qui"), *tokenizer.encode("ck"), 0]
    assert answered.tokens.tolist() != [*tokenizer.encode("the quick"), 0]


def test_special_tokens_by_name_in_a_template_of_ones_own(make_model):
    tokenizer = make_model(control_symbols=["<turn>"])
    turn = tokenizer.processor.piece_to_id("<turn>")
    roles = {"user": "<turn>{content}", "assistant": "<turn>{content}", "tool": "<turn>the {content}"}
    form = form_of(tokenizer, roles=roles, begin="<s>", answer_end="<turn></s>")
    messages = [{"role": "user", "content": "a<turn>"}, {"role": "tool", "content": "box"}, TURNS[2]]
    ids = conversation(form, messages).tokens.tolist()
    assert ids[:2] == [1, turn] and ids.count(turn) == 4  # that of the text is none
    assert ids[-2:] == [turn, 2]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ({"template": "chatml"}, r"data\.chat\.template: chatml needs the special token <\|im_start\|>, which bytes lacks"),
        ({"roles": {"tool": "nothing"}}, r"data\.chat\.roles\.tool: got 'nothing', expected a text with \{content\}"),
        ({"roles": {"user": "{content}{content}"}}, r"data\.chat\.roles\.user: .* once"),
    ],
)
def test_templates_that_cannot_be(chat, message):
    with pytest.raises(ConfigError, match=message):
        form_of(load_tokenizer("bytes"), **chat)


def test_a_tokenizer_without_an_end_is_refused(make_model):
    with pytest.raises(ConfigError, match=r"data\.tokenizer: tok\.model has no token that ends a document"):
        form_of(make_model(eos_id=-1))


def message(**changes):
    return [TURNS[1] | changes, TURNS[2]]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "messages: got 'hello', expected a list"),
        ([], r"messages: got \[\], expected a list"),
        (["hello"], r"messages\[0\]: got 'hello', expected an object"),
        ([{"content": "x"}], r"messages\[0\]: got .* expected an object with role"),
        (message(role="critic"), r"messages\[0\]\.role: got 'critic', expected one of system, user, assistant"),
        (message(content=None), r"messages\[0\]\.content: got None, expected a text that is not empty"),
        ([{"role": "user"}], r"messages\[0\]\.content: missing, got the keys \['role'\]"),
        ([TURNS[1], TURNS[2] | {"content": ""}], r"messages\[1\]\.content: got '', expected a text that is not empty"),
        ([TURNS[1], TURNS[2] | {"content": "a\ud800"}], r"messages\[1\]\.content: half of a surrogate pair at character 1"),
        (TURNS[:4], "messages: the last one is of role 'user', expected 'assistant'"),
    ],
)
def test_wrong_messages_say_where_and_what(messages, problem):
    with pytest.raises(DataError, match="^here:1: " + problem):
        conversation(form_of(load_tokenizer("bytes")), messages)


def test_an_answer_to_nothing_is_refused():
    form = form_of(load_tokenizer("bytes"), roles={"assistant": "{content}"})
    with pytest.raises(DataError, match="here:1: nothing comes before the answer"):
        conversation(form, [TURNS[2]])


def test_the_schema_names_the_templates():
    assert set(get_args(ChatConfig.model_fields["template"].annotation)) == set(TEMPLATES)
