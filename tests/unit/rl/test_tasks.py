"""Verifiers from their configuration."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from megarpt.config.schema import VerifierConfig
from megarpt.errors import ConfigError
from megarpt.rl.structs import Completion, Prompt, RolloutGroup, StopReason
from megarpt.rl.tasks import OPTIONS, VERIFIERS, build_verifier
from megarpt.rl.verifiers import Closeable, Exact, Format, Math, MultipleChoice, NextToken, WeightedSum

ANSWER = {"continuation": b" fox", "boundaries": (4,), "solution": "42", "choice": "B", "text": "a  b"}


def value(verifier, text):
    completion = Completion(tokens=(1,), logprobs=(0.0,), text=text, stop=StopReason.STOP, policy_version=0)
    ((reward,),) = verifier([RolloutGroup(Prompt(id="p", tokens=(1,), answer=ANSWER), [completion])])
    return reward.value


@pytest.mark.parametrize(
    ("fields", "kind", "right", "wrong"),
    [
        ({"kind": "next_token"}, NextToken, b"</think>\\boxed{ fox}", b"\\boxed{ fox}"),
        ({"kind": "next_token", "unescape": True}, NextToken, b"</think>\\boxed{\\ fox}", b"</think>\\boxed{fox}"),
        ({"kind": "next_token", "require_thinking": False}, NextToken, b"\\boxed{ fox}", b"\\boxed{fox}"),
        ({"kind": "next_token", "think_close": "<end>"}, NextToken, b"<end>\\boxed{ fox}", b"</think>\\boxed{ fox}"),
        ({"kind": "multiple_choice"}, MultipleChoice, b"</think>the answer is B", b"</think>the answer is A"),
        ({"kind": "multiple_choice", "require_box": True}, MultipleChoice, b"</think>\\boxed{B}", b"</think>answer is B"),
        ({"kind": "exact"}, Exact, b"</think>\\boxed{ a b}", b"</think>\\boxed{ab}"),
        ({"kind": "exact", "any_blanks": False}, Exact, b"</think>\\boxed{a  b}", b"</think>\\boxed{a b}"),
        ({"kind": "format", "pattern": "<t>.*</t>"}, Format, b"<t>x</t>", b"<t>x"),
    ],
)
def test_one_configuration_is_that_verifier(fields, kind, right, wrong):
    verifier = build_verifier([VerifierConfig(**fields)])
    assert type(verifier) is kind and verifier.name == fields["kind"]
    assert (value(verifier, right), value(verifier, wrong)) == (1.0, 0.0)


def test_mathematics_and_its_limits():
    verifier = build_verifier([VerifierConfig(kind="math", name="sums", limit_s=7.0, workers=1)])
    assert isinstance(verifier, Math) and verifier.name == "sums"
    with verifier:
        assert value(verifier, b"</think>\\boxed{42.0}") == 1.0


@pytest.mark.parametrize(("fields", "given"), [({}, {"workers": 2}), ({"limit_s": 7.0}, {"workers": 2, "limit_s": 7.0})])
def test_limits_of_mathematics(monkeypatch, fields, given):
    """Without one the verifier's own is taken."""
    seen = []
    monkeypatch.setitem(VERIFIERS, "math", lambda **options: seen.append(options))
    build_verifier([VerifierConfig(kind="math", **fields)])
    answer = {"name": "math", "think_close": b"</think>", "require_thinking": True, "require_box": False}
    assert seen == [answer | given]


def test_several_are_their_weighted_sum():
    configs = [
        VerifierConfig(kind="next_token"),
        VerifierConfig(kind="format", pattern="(?s).*box.*", weight=0.25),
        VerifierConfig(kind="exact", weight=0.0),
    ]
    verifier = build_verifier(configs)
    assert isinstance(verifier, WeightedSum)
    assert value(verifier, b"</think>\\boxed{ fox}") == 1.25 and value(verifier, b"</think>\\boxed{x}") == 0.25


def test_a_weight_of_one_verifier_counts():
    assert value(build_verifier([VerifierConfig(kind="next_token", weight=3.0)]), b"</think>\\boxed{ fox}") == 3.0


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "verifiers: got none"),
        ([{"kind": "format"}], r"verifiers\.0\.pattern: got null"),
        ([{"kind": "next_token"}, {"kind": "exact", "pattern": "x"}], r"verifiers\.1\.pattern: got 'x' with kind exact"),
        ([{"kind": "format", "pattern": "x", "require_thinking": False}], r"verifiers\.0\.require_thinking: got False"),
        ([{"kind": "math", "first_token_only": True}], r"verifiers\.0\.first_token_only"),
        ([{"kind": "next_token", "limit_s": 1.0}], r"verifiers\.0\.limit_s"),
        ([{"kind": "exact"}, {"kind": "exact"}], "different ones"),
        ([{"kind": "exact", "weight": 0.0}], "not all of them zero"),
        ([{"kind": "format", "pattern": "("}], "no regular expression"),
    ],
)
def test_configurations_that_are_refused(configs, message):
    with pytest.raises(ConfigError, match=message):
        build_verifier([VerifierConfig(**each) for each in configs])


def test_what_was_built_is_closed_when_the_rest_cannot_be(monkeypatch):
    closed = []
    monkeypatch.setattr(Math, "close", lambda self: closed.append(self.name))
    with pytest.raises(ConfigError, match="no regular expression"):
        build_verifier([VerifierConfig(kind="math"), VerifierConfig(kind="format", pattern="(")])
    assert closed == ["math"]
    assert isinstance(build_verifier([VerifierConfig(kind="math")]), Closeable) and closed == ["math"]


def test_the_configuration_knows_the_kinds_and_their_options():
    assert set(get_args(VerifierConfig.model_fields["kind"].annotation)) == set(VERIFIERS) == set(OPTIONS)
    fields = set(VerifierConfig.model_fields) - {"kind", "weight", "name"}
    assert set().union(*OPTIONS.values()) == fields
    for kind, options in OPTIONS.items():
        assert options <= set(inspect.signature(VERIFIERS[kind]).parameters)
