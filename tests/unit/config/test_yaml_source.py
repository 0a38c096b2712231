import math

import pytest

from megarpt.config.yaml_source import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3e8", 3e8),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1_000_000", 1_000_000),
        ("-7", -7),
        ("0", 0),
        ("0x10", 16),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("~", None),
        (".inf", math.inf),
    ],
)
def test_scalars_people_mean(text, value):
    got = parse_yaml(text).data
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "12:30", "2026-01-01", "010", "1e", "e5", "fp32", "='x"])
def test_everything_else_stays_text(text):
    assert parse_yaml(f"{text}").data == text


def test_quoted_numbers_stay_text():
    assert parse_yaml("a: '8'").data == {"a": "8"}


def test_keys_are_text_whatever_they_look_like():
    assert parse_yaml("no: a\n1: b\n2.5: c").data == {"no": "a", "1": "b", "2.5": "c"}


def test_lines_of_keys_and_items():
    parsed = parse_yaml("a:\n  b: 1\n  c:\n    - x\n    - d: 2\n")
    assert parsed.lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", "0"): 4,
        ("a", "c", "1"): 5,
        ("a", "c", "1", "d"): 5,
    }


def test_duplicate_keys_are_all_found_and_the_first_is_kept():
    parsed = parse_yaml("a: 1\na: 2\nb:\n  c: 1\n  c: 2\n")
    assert parsed.data == {"a": 1, "b": {"c": 1}}
    assert [(path, line) for path, line, _ in parsed.problems] == [(("a",), 2), (("b", "c"), 5)]
    assert "first on line 1" in parsed.problems[0][2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("a: 1\n--- \nb: 2", "not valid YAML"),
        ("a: *nowhere", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\nb: !thing 3", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("&x a: &y [*y]", "contains itself"),
        ("base: &b {x: 1}\nother:\n  <<: *b", "merge keys"),
        ("? [1, 2]\n: 3", "not text"),
    ],
)
def test_what_is_refused(text, words):
    problems = parse_yaml(text).problems
    assert problems and words in problems[0][2]


def test_plain_aliases_work():
    assert parse_yaml("a: &x [1, 2]\nb: *x").data == {"a": [1, 2], "b": [1, 2]}
