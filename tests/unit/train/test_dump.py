"""The batch of a step that was not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarpt.structs import StepReport
from megarpt.train import dump
from megarpt.train.dump import BatchDumper

BAD = StepReport(loss_nats=math.nan, grad_norm=2.0, learning_rate=1e-3, num_tokens=6, skipped=True, metrics={})


def test_a_dump_says_what_where_and_in_which_text(tmp_path: Path, token_work: Any, decode_bytes: Any) -> None:
    batch, output = token_work
    output.token_loss[1, 2] = math.inf
    output.token_loss[1, 5] = math.nan  # no label: not reported
    batch.streams["ref_nll"][0, 1] = math.nan
    path = BatchDumper(tmp_path / "dumps", 3, decode_bytes, source_names=["clean", "noise"]).dump(
        42, [token_work, token_work], BAD
    )
    assert path == tmp_path / "dumps" / "step_00000042_rank3.json"
    content = json.loads(path.read_text())
    assert (content["step"], content["rank"], content["not_finite"], content["loss_nats"]) == (42, 3, ["loss_nats"], "nan")
    assert content["on_this_rank"] is True
    first = content["micro_batches"][0]
    assert first["num_not_finite"] == 1 and first["streams_not_finite"] == {"ref_nll": 1}
    assert first["not_finite"] == [{"row": 1, "position": 2, "label": ord("b"), "text": "b", "loss_nats": "inf"}]
    assert first["rows"][1] == {"sample_index": 41, "sample_id": 9, "source": "noise", "text": "a <b>*"}

    arrays = np.load(path.with_suffix(".npz"))
    assert content["arrays"] == path.with_suffix(".npz").name
    np.testing.assert_array_equal(arrays["1.labels"], batch.labels.numpy())
    assert np.isinf(arrays["0.token_loss"][1, 2]) and "1.stream.ref_nll" in arrays and "0.weight" in arrays


def test_a_gradient_found_elsewhere_is_told_apart(tmp_path: Path, token_work: Any, decode_bytes: Any) -> None:
    report = StepReport(loss_nats=1.0, grad_norm=math.inf, learning_rate=1e-3, num_tokens=6, skipped=True, metrics={})
    path = BatchDumper(tmp_path, 0, decode_bytes).dump(1, [token_work], report)
    assert path is not None
    content = json.loads(path.read_text())
    assert content["not_finite"] == ["grad_norm"] and content["on_this_rank"] is False
    assert content["micro_batches"][0]["rows"][0]["source"] == 0


def test_ranks_with_finite_losses_leave_the_dump_to_rank_0(tmp_path: Path, token_work: Any, decode_bytes: Any) -> None:
    assert BatchDumper(tmp_path, 1, decode_bytes, always=False).dump(1, [token_work], BAD) is None
    token_work[1].token_loss[0, 5] = math.nan  # no label
    assert BatchDumper(tmp_path, 1, decode_bytes, always=False).dump(1, [token_work], BAD) is None
    assert list(tmp_path.iterdir()) == []
    assert BatchDumper(tmp_path, 0, decode_bytes).dump(1, [token_work], BAD) is not None


def test_dumps_are_limited_per_rank_and_a_repeated_step_replaces_its_own(
    tmp_path: Path, token_work: Any, decode_bytes: Any
) -> None:
    token_work[1].token_loss[0, 0] = math.nan
    dumper = BatchDumper(tmp_path, 0, decode_bytes, limit=2)
    assert dumper.dump(1, [token_work], BAD) and dumper.dump(2, [token_work], BAD)
    assert dumper.dump(3, [token_work], BAD) is None
    assert dumper.dump(2, [token_work], BAD) is not None
    assert BatchDumper(tmp_path, 1, decode_bytes, limit=2).dump(3, [token_work], BAD) is not None
    assert sorted(p.name for p in tmp_path.glob("*.json")) == [
        "step_00000001_rank0.json",
        "step_00000002_rank0.json",
        "step_00000003_rank1.json",
    ]


def test_a_dump_that_cannot_be_written_is_logged_and_does_not_stop_the_run(
    tmp_path: Path, token_work: Any, decode_bytes: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "dumps").touch()
    assert BatchDumper(tmp_path / "dumps", 0, decode_bytes).dump(1, [token_work], BAD) is None
    assert "could not be dumped" in caplog.text


def test_a_json_file_never_lacks_its_arrays(
    tmp_path: Path, token_work: Any, decode_bytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dump, "atomic_write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        BatchDumper(tmp_path, 0, decode_bytes).dump(1, [token_work], BAD)
    assert [p.suffix for p in tmp_path.iterdir()] == [".npz"]
