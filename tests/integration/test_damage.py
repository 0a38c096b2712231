"""What was damaged or does not belong ends a run with an error that names it, before a step is taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megarpt.config.schema import EvaluateOptions, PretrainConfig, ScoreOptions
from megarpt.data import contents
from megarpt.device.runtime import Runtime
from megarpt.errors import ConfigError, DataError, MegarptError
from megarpt.run import evaluate, pretrain, score
from megarpt.testing.tiny import byte_tokenizer, text_documents, write_corpus, write_sidecar, write_text_corpus

SELECTION = {"scorer": "excess_loss", "weighting": "top_fraction", "fraction": 0.6}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The prefix of a corpus that may be broken, with a sidecar that belongs to it at <prefix>_ref_nll."""
    prefix = tmp_path / "corpus"
    documents = write_text_corpus(prefix, text_documents(40, seed=3))
    values = [[1.0] * len(document) for document in documents]
    write_sidecar(f"{prefix}_ref_nll", prefix, values, seq_length=64, separate_documents=True)
    return prefix


def truncate_bin(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])


def foreign_idx(prefix: Path) -> None:
    other = prefix.with_name("other")
    write_text_corpus(other, text_documents(41, seed=4))
    shutil.copyfile(f"{other}.idx", f"{prefix}.idx")


def no_manifest(prefix: Path) -> None:
    Path(f"{prefix}.json").unlink()


def garbled_manifest(prefix: Path) -> None:
    Path(f"{prefix}.json").write_text("{")


def other_tokenizer(prefix: Path) -> None:
    write_corpus(prefix, [list(range(200))], vocab_size=300)


def too_little_text(prefix: Path) -> None:
    write_text_corpus(prefix, ["", ""])


def id_beyond_the_vocabulary(prefix: Path) -> None:
    from megarpt.corpus.manifest import TokenizerRecord

    write_corpus(prefix, [[5, 6, 4000, 7] * 50], tokenizer=TokenizerRecord.of(byte_tokenizer()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_bin, "corpus.bin.*cut short"),
        (foreign_idx, "corpus.idx.*of another corpus"),
        (no_manifest, "corpus.*manifest corpus.json"),
        (garbled_manifest, "corpus.json"),
        (other_tokenizer, "data.train.0..path.*tokenized with"),
        (too_little_text, "expected at least 2"),
        (id_beyond_the_vocabulary, "token id 4000 at position [0-9]+"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_corpus(
    make_config, cpu_runtime: Runtime, corpus: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(corpus)
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        pretrain.run(make_config(**{"data.train": [{"path": str(corpus)}]}), cpu_runtime)
    assert caught.value.exit_code == 79


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train.bin", "train_ref_nll.bin", "held.bin", "train.idx", "train_ref_nll.idx"])
def test_a_flipped_bit_anywhere_in_the_data_is_named(make_config, cpu_runtime: Runtime, tmp_path: Path, name: str) -> None:
    cfg = selection_on_own_data(make_config, tmp_path)
    flip_a_bit(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: "):
        pretrain.run(cfg, cpu_runtime)


def test_data_that_were_read_once_are_read_again_only_when_they_changed(
    make_config, train, cpu_runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = contents.verify_values

    def counted(prefix: str, *arguments: object, **options: object) -> None:
        read.append(Path(prefix).name)
        original(prefix, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(contents, "verify_values", counted)
    cfg = selection_on_own_data(make_config, tmp_path)
    train(cfg)
    assert sorted(read) == ["held", "train", "train_ref_nll"]
    train(cfg)
    assert len(read) == 3
    flip_a_bit(tmp_path / "held.bin")
    with pytest.raises(DataError, match=r"held.bin: got sha256"):
        pretrain.run(cfg, cpu_runtime)
    assert read[3:] == ["held"]


def test_scoring_and_evaluation_read_all_values_first(make_config, train, cpu_runtime: Runtime, tmp_path: Path) -> None:
    cfg = selection_on_own_data(make_config, tmp_path)
    train(cfg)
    flip_a_bit(tmp_path / "train.bin")
    flip_a_bit(tmp_path / "held.bin")
    with pytest.raises(DataError, match=r"train.bin: got sha256"):
        score.run(
            ScoreOptions(reference=cfg.run.dir, corpus=str(tmp_path / "train"), output_prefix=f"{tmp_path}/x"), cpu_runtime
        )
    with pytest.raises(DataError, match=r"held.bin: got sha256"):
        evaluate.run(EvaluateOptions(checkpoint=cfg.run.dir), cpu_runtime)


def selection_on_own_data(make_config, tmp_path: Path) -> PretrainConfig:
    """A run on files that a test may break."""
    documents = write_text_corpus(tmp_path / "train", text_documents(40, seed=3))
    write_text_corpus(tmp_path / "held", text_documents(6, seed=4))
    values = [[1.0] * len(document) for document in documents]
    write_sidecar(tmp_path / "train_ref_nll", tmp_path / "train", values, seq_length=64, separate_documents=True)
    source = {"path": str(tmp_path / "train"), "streams": {"ref_nll": str(tmp_path / "train_ref_nll")}}
    return make_config(**{"data.train": [source], "data.valid": {"held": str(tmp_path / "held")}, "objective": SELECTION})


def sidecar_of_another_length(prefix: Path) -> None:
    shutil.copyfile(f"{prefix}.idx", f"{prefix}_ref_nll.idx")


def truncated_sidecar(prefix: Path) -> None:
    truncate_bin(Path(f"{prefix}_ref_nll"))


def sidecar_of_another_corpus(prefix: Path) -> None:
    write_text_corpus(prefix, text_documents(40, seed=5))


def sidecar_with_holes(prefix: Path) -> None:
    path = Path(f"{prefix}_ref_nll.bin")
    path.write_bytes(b"\xff\xff\xff\xff" * (path.stat().st_size // 4))  # NaN


@pytest.mark.parametrize(
    ("damage", "overrides", "error", "message"),
    [
        (sidecar_of_another_length, {}, DataError, "corpus_ref_nll.idx"),
        (truncated_sidecar, {}, DataError, "corpus_ref_nll.bin"),
        (sidecar_of_another_corpus, {}, DataError, "does not belong.*corpus_bin_sha256"),
        (sidecar_with_holes, {}, DataError, "corpus_ref_nll.bin: got sha256"),
        (sidecar_with_holes, {"data.verify": "index"}, DataError, "corpus_ref_nll.bin.*nan"),
        (lambda _: None, {"data.seq_length": 32}, DataError, "does not belong.*seq_length: got 64, expected 32"),
        (lambda _: None, {"data.separate_documents": False}, DataError, "separate_documents"),
        (lambda _: None, {"objective": SELECTION | {"scorer": "reference_entropy"}}, ConfigError, "megarpt score"),
    ],
)
def test_a_sidecar_that_does_not_belong(
    make_config,
    cpu_runtime: Runtime,
    corpus: Path,
    damage: Callable[[Path], None],
    overrides: dict,
    error: type[MegarptError],
    message: str,
) -> None:
    damage(corpus)
    source = {"path": str(corpus), "streams": {"ref_nll": f"{corpus}_ref_nll"}}
    with pytest.raises(error, match=f"(?s){message}"):
        pretrain.run(make_config(**{"data.train": [source], "objective": SELECTION} | overrides), cpu_runtime)


def test_scoring_refuses_a_corpus_of_another_tokenizer(make_config, train, cpu_runtime: Runtime, corpus: Path) -> None:
    cfg = make_config()
    train(cfg)
    other_tokenizer(corpus)
    with pytest.raises(DataError, match="tokenized with"):
        score.run(ScoreOptions(reference=cfg.run.dir, corpus=str(corpus)), cpu_runtime)


def test_a_damaged_reference_model_is_named(make_config, train, cpu_runtime: Runtime, tmp_path: Path) -> None:
    from megarpt.train.checkpoint_files import latest_checkpoint

    cfg = make_config()
    train(cfg)
    checkpoint = latest_checkpoint(Path(cfg.run.dir) / "checkpoints")
    assert checkpoint is not None
    shard = next((checkpoint / "model").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    online = {"run.dir": str(tmp_path / "b"), "objective": SELECTION | {"reference": {"checkpoint": cfg.run.dir}}}
    with pytest.raises(MegarptError, match=shard.name):
        pretrain.run(make_config(**online), cpu_runtime)


def test_a_run_cannot_be_continued_with_another_configuration(make_config, train, cpu_runtime: Runtime) -> None:
    train(make_config())
    with pytest.raises(ConfigError, match=r"(?s)cannot continue the run.*optimizer\.lr: was 0\.003, now 0\.001"):
        pretrain.run(make_config(**{"optimizer.lr": 1e-3}), cpu_runtime)
