import re

import pytest

from megarpt.config import load
from megarpt.config.load import build_section, config_from_dict, config_hash, dump_resolved, load_config
from megarpt.config.schema import GenerateOptions, ParallelConfig, PretrainConfig, ScoreOptions
from megarpt.errors import EXIT_CONFIG, ConfigError

MINIMAL = """\
run:
  dir: runs/x
data:
  tokenizer: bytes
  train:
    - path: data/a
    - path: data/b
train:
  train_tokens: 3e8
"""


@pytest.fixture
def write(tmp_path):
    def write_text(text, name="config.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_text


def mistakes(path, *overrides, **kwargs):
    """The lines of the error, without the heading."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, **kwargs)
    return str(caught.value).split("\n  ")[1:]


def test_defaults_and_values(write):
    cfg = load_config(write(MINIMAL))
    assert cfg.run.dir == "runs/x" and cfg.run.seed == 1234
    assert [source.path for source in cfg.data.train] == ["data/a", "data/b"]
    assert cfg.train.train_tokens == 300_000_000 and isinstance(cfg.train.train_tokens, int)


def test_the_configuration_is_frozen(write):
    cfg = load_config(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        cfg.run.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-3", lambda cfg: cfg.optimizer.lr == 1e-3),
        ("optimizer.lr=1", lambda cfg: cfg.optimizer.lr == 1.0 and isinstance(cfg.optimizer.lr, float)),
        ("train.train_tokens=1e9", lambda cfg: cfg.train.train_tokens == 10**9),
        ("data.train.0.weight=2", lambda cfg: cfg.data.train[0].weight == 2.0 and cfg.data.train[1].weight == 1.0),
        ("data.train=[{path: c, weight: 0.5}]", lambda cfg: [s.path for s in cfg.data.train] == ["c"]),
        ("data.valid.wiki=data/w", lambda cfg: cfg.data.valid["wiki"].path == "data/w"),
        ("model.mcore.num_layers=3", lambda cfg: cfg.model.mcore == {"num_layers": 3}),
        ("checkpoint.resume=false", lambda cfg: cfg.checkpoint.resume is False),
        ("model.vocab_size=", lambda cfg: cfg.model.vocab_size is None),
        ("run.dir=a=b", lambda cfg: cfg.run.dir == "a=b"),
        ("run.dir='8'", lambda cfg: cfg.run.dir == "8"),
    ],
)
def test_overrides(write, override, value):
    assert value(load_config(write(MINIMAL), [override]))


def test_later_overrides_win(write):
    assert load_config(write(MINIMAL), ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_an_override_fills_a_section_that_was_null(write):
    text = MINIMAL + "objective: {reference: null, scorer: excess_loss, weighting: top_fraction, fraction: 0.5}\noptimizer:\n"
    cfg = load_config(write(text), ["objective.reference.checkpoint=runs/ref", "optimizer.lr=1e-3"])
    assert cfg.objective.reference.checkpoint == "runs/ref" and cfg.optimizer.lr == 1e-3


def test_everything_is_reported_at_once(write):
    path = write(
        """\
run:
  sed: 3
data:
  tokenizer: bytes
  train:
    - path: a
      weight: -1
    - pth: b
optimizr:
  lr: 1e-3
batch:
  micro_batch_size: 3
  global_batch_size: 8
  micro_batch_size: 4
train:
  precision: fp8
  train_tokens: 1000
objective:
  fraction: 0.6
checkpoint:
lr: 3
"""
    )
    found = mistakes(
        path, "optimizer.lr_warmup_tokens=2000", "train.lrr=3", "data.train.2.path=k", "run.dir.x=3", "foo", "parallel=2"
    )
    expected = [
        f"{path}:14: batch.micro_batch_size: given twice, first on line 12; keep one",
        "override data.train.2.path=k: data.train is a list of 2; got index '2', expected 0 to 1",
        "override foo: expected section.key=value, for example optimizer.lr=3e-4",
        f"{path}:2: run.sed: unknown key (got 3); did you mean run.seed?",
        "override run.dir.x=3: run.dir: got a section with the keys x, expected a valid string",
        f"{path}:7: data.train.0.weight: got -1, expected greater than 0",
        f"{path}:8: data.train.1.path: missing, expected text: Prefix of the `.bin`, `.idx` and `.json` files.",
        f"{path}:8: data.train.1.pth: unknown key (got 'b'); did you mean data.train.1.path?",
        f"{path}:16: train.precision: got 'fp8', expected 'fp32' or 'bf16'",
        "override train.lrr=3: train.lrr: unknown key (got 3); did you mean optimizer.lr?",
        f"override parallel=2: parallel: got 2, expected a section with the keys {', '.join(ParallelConfig.model_fields)}",
        f"{path}:20: checkpoint: got null, "
        "expected a section with the keys interval_steps, keep_last, keep_every_steps, async_save, resume",
        f"{path}:9: optimizr: unknown key (got a section with the keys lr); did you mean optimizer?",
        f"{path}:21: lr: unknown key (got 3); did you mean optimizer.lr?",
        f"{path}:13: batch.global_batch_size: got 8, expected a multiple of batch.micro_batch_size (3)",
        "override optimizer.lr_warmup_tokens=2000: optimizer.lr_warmup_tokens: got 2000, "
        "expected fewer than train.train_tokens (1000)",
        f"{path}:19: objective.fraction: got 0.6, which has no effect with objective.weighting uniform; "
        "set objective.weighting=top_fraction or remove it",
    ]
    assert sorted(found) == sorted(expected)


def test_the_heading_counts_and_the_exit_code_is_config(write):
    path = write(MINIMAL)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: 2 mistakes in the configuration")) as caught:
        load_config(path, ["run.seed=-1", "logging.tensorboard=maybe"])
    assert caught.value.exit_code == EXIT_CONFIG


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch.micro_batch_size='8'", "got '8', expected a valid integer"),
        ("batch.micro_batch_size=true", "got true, expected a valid integer"),
        ("batch.micro_batch_size=8.5", "got 8.5, expected a valid integer"),
        ("logging.tensorboard=yes", "got 'yes', expected a valid boolean"),
        ("logging.tensorboard=1", "got 1, expected a valid boolean"),
        ("optimizer.lr=fast", "got 'fast', expected a valid number"),
        ("optimizer.lr=.nan", "got nan, expected a finite number"),
        ("optimizer.weight_decay=.inf", "got inf, expected a finite number"),
        ("run.dir=", "got null, expected a valid string"),
        ("run.dir=''", "got empty text, expected at least one character"),
        ("data.train=[]", "got an empty list, expected at least 1 entry"),
        ("data.train=a", "got 'a', expected a valid list"),
        ("data.train=[a]", "data.train.0: got 'a', expected a section with the keys path, weight, streams"),
        ("data.valid.wiki=3", "data.valid.wiki: got 3, expected a prefix, or a section with the keys path and streams"),
        ("data.train.x.path=3", "data.train is a list of 2; got index 'x', expected 0 to 1"),
        ("run.seed.a=3", "run.seed: got a section with the keys a, expected a valid integer"),
        ("model.hidden_size=3", "unknown key (got 3); fields of megatron-core's own go under model.mcore"),
        ("optimizer.use_bananas=3", "unknown key (got 3); fields of megatron-core's own go under optimizer.mcore"),
        ("run.zzz=3", "unknown key (got 3); expected one of dir, seed, device"),
        ("batch.lr=3", "did you mean optimizer.lr?"),
        ("=3", "expected section.key=value"),
        ("run..seed=3", "expected section.key=value"),
        ("run.seed=[1", "not valid YAML"),
        ("run.dir=" + "x" * 300 + "\ny: {}", "override run.dir="),
    ],
)
def test_single_mistakes(write, override, words):
    (found,) = mistakes(write(MINIMAL), override)
    assert words in found


def test_missing_sections_say_what_belongs_in_them(write):
    found = mistakes(write(""))
    assert len(found) == 3
    assert any("data: missing, expected a section with the keys tokenizer, seq_length" in line for line in found)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n- b\n", "got a list of 2 at the top, expected sections"),
        ("just text", "expected sections"),
        (b"run: \xff\xfe", "byte 5 is not UTF-8"),
        ("run: {dir: [}", "config.yaml:1: not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(write, content, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(write(content))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_a_byte_order_mark_is_harmless(write):
    assert load_config(write(b"\xef\xbb\xbf" + MINIMAL.encode())).run.dir == "runs/x"


def test_world_size_is_checked_when_known(write):
    path = write(MINIMAL)
    load_config(path, ["batch.global_batch_size=24"], world_size=3)
    (found,) = mistakes(path, "batch.global_batch_size=24", world_size=2)
    assert "expected a multiple of 16: batch.micro_batch_size (8) x data-parallel size (2 = 2 ranks" in found
    (found,) = mistakes(path, "parallel.tensor_model_parallel_size=2", world_size=3)
    assert "tensor 2 x pipeline 1 x context 1 = 2 ranks hold one copy of the model, got a world of 3 ranks" in found


def test_the_resolved_dump_is_a_configuration_again(write):
    cfg = load_config(write(MINIMAL), ["optimizer.min_lr=1e-05", "model.mcore.layernorm_epsilon=1e-6", "run.dir='ü: #x'"])
    text = dump_resolved(cfg)
    again = load_config(write(text, "again.yaml"))
    assert again == cfg and dump_resolved(again) == text and config_hash(again) == config_hash(cfg)
    assert config_from_dict(cfg.model_dump()) == cfg


def test_the_hash_sees_values_and_nothing_else(write):
    cfg = load_config(write(MINIMAL))
    written_out = load_config(write("# a comment\n" + MINIMAL), ["run.seed=1234", "optimizer.lr=0.0003"])
    assert config_hash(cfg) == config_hash(written_out)
    assert config_hash(cfg) != config_hash(load_config(write(MINIMAL), ["run.seed=1235"]))


def test_building_in_python_is_checked_as_well():
    data = {"run": {"dir": "r"}, "data": {"tokenizer": "bytes", "train": [{"path": "a"}]}, "train": {"train_tokens": 10}}
    assert isinstance(config_from_dict(data), PretrainConfig)
    with pytest.raises(ConfigError, match=r"configuration: batch\.global_batch_size: got 9"):
        config_from_dict(data | {"batch": {"global_batch_size": 9}})


def test_options_of_small_commands_report_everything():
    with pytest.raises(ConfigError) as caught:
        build_section(GenerateOptions, {"checkpoint": "r", "prompt": "", "top_p": 3, "max_new_tokens": 0}, name="generate")
    assert "2 mistakes" in str(caught.value) and "top_p: got 3" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "prefixes"),
    [
        ({}, {"ref_nll": "c_ref_nll"}),
        ({"output_prefix": "o"}, {"ref_nll": "o"}),
        (
            {"output_prefix": "o", "streams": ("ref_nll", "ref_entropy")},
            {"ref_nll": "o_ref_nll", "ref_entropy": "o_ref_entropy"},
        ),
    ],
)
def test_where_scores_are_written(options, prefixes):
    assert build_section(ScoreOptions, {"reference": "r", "corpus": "c", **options}, name="score").prefixes() == prefixes


def test_rule_failures_in_a_whole_configuration_are_not_swallowed(write, monkeypatch):
    def broken(cfg):
        return cfg.no_such_section

    monkeypatch.setattr(load.validate, "RULES", {PretrainConfig: (broken,)})
    with pytest.raises(AttributeError):
        load_config(write(MINIMAL))
