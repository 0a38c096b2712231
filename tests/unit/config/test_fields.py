import pytest

from megarpt.config.fields import iter_fields, section_at
from megarpt.config.schema import (
    CorpusSource,
    EvaluateAnswersOptions,
    EvaluateOptions,
    GenerateOptions,
    PretrainConfig,
    ReferenceConfig,
    RLConfig,
    ScoreOptions,
    ServeOptions,
    SftConfig,
)


@pytest.mark.parametrize(
    "model",
    [
        PretrainConfig,
        SftConfig,
        RLConfig,
        ScoreOptions,
        EvaluateOptions,
        EvaluateAnswersOptions,
        GenerateOptions,
        ServeOptions,
    ],
)
def test_every_field_is_documented(model):
    undocumented = [field.key for field in iter_fields(model) if len(field.doc) < 10]
    assert undocumented == []


def test_keys_types_and_defaults():
    fields = {field.key: field for field in iter_fields(PretrainConfig)}
    assert fields["run.dir"].default == "required" and fields["run.dir"].type == "text"
    assert fields["data.train.N.path"].default == "required"
    assert fields["objective.reference"].default == "null"
    assert fields["objective.reference.checkpoint"].type == "text"
    assert fields["train.precision"].type == "fp32 | bf16"
    assert fields["optimizer.lr_decay_tokens"].type == "integer or null"
    assert fields["parallel.sequence_parallel"].default == "false"


@pytest.mark.parametrize(
    ("path", "section"),
    [
        ((), PretrainConfig),
        (("data", "train", "0"), CorpusSource),
        (("objective", "reference"), ReferenceConfig),
        (("data", "valid"), None),
        (("nowhere",), None),
    ],
)
def test_section_at(path, section):
    assert section_at(PretrainConfig, path) is section
