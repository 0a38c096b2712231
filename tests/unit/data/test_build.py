import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from megarpt.config.schema import PretrainConfig
from megarpt.corpus.tokenizers import load_tokenizer
from megarpt.data.batches import TokenBatches
from megarpt.data.build import build_eval_sets, build_train_batches
from megarpt.errors import ConfigError, DataError
from megarpt.testing.tiny import label_values, text_documents, write_corpus, write_sidecar, write_text_corpus

S = 16


def configure(tmp_path: Path, train: list[dict[str, Any]], **changes: Any) -> PretrainConfig:
    raw: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"tokenizer": "bytes", "train": train, "seq_length": S} | changes.pop("data", {}),
        "batch": {"micro_batch_size": 2, "global_batch_size": 4},
        "train": {"train_tokens": 4096},
    }
    return PretrainConfig.model_validate(raw | changes)


def build(cfg: PretrainConfig, streams: tuple[str, ...] = ()) -> TokenBatches:
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    return build_train_batches(cfg, tokenizer, dp_rank=0, dp_size=1, device=torch.device("cpu"), streams=streams)


def text_corpus(tmp_path: Path, name: str, *, scored: bool = False) -> str:
    prefix = str(tmp_path / name)
    documents = write_text_corpus(prefix, text_documents(6, seed=len(name)))
    if scored:
        write_sidecar(f"{prefix}_nll", prefix, label_values(documents), seq_length=S, separate_documents=True)
    return prefix


def test_blend_with_streams(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = (text_corpus(tmp_path, name, scored=True) for name in ("one", "second"))
    train = [{"path": path, "weight": weight, "streams": {"ref_nll": f"{path}_nll"}} for path, weight in ((one, 3), (two, 1))]
    with caplog.at_level(logging.INFO, logger="megarpt.data.build"), build(configure(tmp_path, train), ("ref_nll",)) as batches:
        step = batches.next_step()
    assert [batch.tokens.shape for batch in step] == [(2, S), (2, S)]
    assert torch.cat([batch.source_id for batch in step]).sum() == 1
    assert all(set(batch.streams) == {"ref_nll"} for batch in step)
    assert [one in caplog.messages[0], two in caplog.messages[1]] == [True, True]
    assert "share 0.75" in caplog.messages[0]
    windows = batches.datasets[0].num_windows
    assert f"{256 * 0.75 / windows:.3g} epochs" in caplog.messages[0]


def test_streams_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    path = text_corpus(tmp_path, "one")
    with build(configure(tmp_path, [{"path": path, "streams": {"ref_nll": "absent"}}])) as batches:
        assert not batches.next_step()[0].streams


def test_every_source_without_a_needed_stream_is_named(tmp_path: Path) -> None:
    paths = [text_corpus(tmp_path, name) for name in ("one", "second")]
    cfg = configure(tmp_path, [{"path": path} for path in paths])
    with pytest.raises(ConfigError) as raised:
        build(cfg, ("ref_nll",))
    for number, path in enumerate(paths):
        assert f"data.train[{number}] ({path})" in str(raised.value)
        assert f"--corpus {path} --streams ref_nll --seq-length {S}`" in str(raised.value)
        assert f"streams: {{ref_nll: {path}_ref_nll}}" in str(raised.value)


def test_sidecar_file_that_is_missing(tmp_path: Path) -> None:
    path = text_corpus(tmp_path, "one")
    with pytest.raises(DataError, match="absent"):
        build(configure(tmp_path, [{"path": path, "streams": {"ref_nll": str(tmp_path / "absent")}}]), ("ref_nll",))


def test_corpus_of_another_tokenizer(tmp_path: Path) -> None:
    write_corpus(tmp_path / "one", [[1, 2, 3]], vocab_size=50)
    with pytest.raises(DataError, match=r"data\.train\[0\]\.path: corpus .*one was tokenized with"):
        build(configure(tmp_path, [{"path": str(tmp_path / "one")}]))
    cfg = configure(tmp_path, [{"path": "unused"}], data={"valid": {"held_out": str(tmp_path / "one")}})
    with pytest.raises(DataError, match=r"data\.valid\.held_out"):
        build_eval_sets(cfg, load_tokenizer("bytes"))


def test_model_with_too_few_rows(tmp_path: Path) -> None:
    path = text_corpus(tmp_path, "one")
    with pytest.raises(ConfigError, match=r"model\.vocab_size: got 100, expected at least"):
        build(configure(tmp_path, [{"path": path}], model={"vocab_size": 100}))


def test_evaluation_sets_by_name(tmp_path: Path) -> None:
    path = text_corpus(tmp_path, "held")
    cfg = configure(tmp_path, [{"path": path}], data={"valid": {"clean": path, "again": path}})
    sets = build_eval_sets(cfg, load_tokenizer("bytes"))
    assert list(sets) == ["clean", "again"] and sets["clean"].seq_length == S
