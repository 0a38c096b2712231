"""A step that one tensor-parallel rank reads arrives whole on the others, and so does its failure."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from megarpt.data.batches import TokenBatches
from megarpt.data.windows import WindowDataset
from megarpt.errors import DataError
from megarpt.testing.distributed import spawn
from megarpt.testing.tiny import label_values, random_documents, write_corpus, write_sidecar

B, S = 2, 24


def batches_of(folder: str, group: Any) -> TokenBatches:
    dataset = WindowDataset(f"{folder}/corpus", seq_length=S, separate_documents=True, vocab_size=50)
    dataset.add_stream("ref_nll", f"{folder}/corpus_ref_nll")
    sizes = {"global_batch_size": 6, "micro_batch_size": B, "dp_rank": 0, "dp_size": 1}
    return TokenBatches([dataset], [1.0], seed=3, **sizes, device=torch.device("cpu"), share_over=group)


def read(folder: str, breaks: bool) -> list[Any]:
    """Three steps as a list of plain values, and what reading the files costs this rank; or the message of the error."""
    group = torch.distributed.group.WORLD
    with batches_of(folder, group if torch.distributed.get_world_size() > 1 else None) as batches:
        touched: list[int] = []
        original = batches._read_step

        def counted(first: int) -> Any:
            touched.append(first)
            if breaks and first >= 6:
                raise DataError(f"sample {first} is broken")
            return original(first)

        batches._read_step = counted  # type: ignore[method-assign]
        seen = []
        try:
            for _ in range(3):
                for batch in batches.next_step():
                    values = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "streams"} | dict(
                        batch.streams
                    )
                    seen.append({name: (value.dtype, value.tolist()) for name, value in values.items()})
        except DataError as error:
            return [str(error), batches.consumed_samples]
        return [seen, bool(touched), batches.state_dict()]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    documents = random_documents(30, max_length=40, vocab_size=50, seed=1)
    write_corpus(tmp_path / "corpus", documents, vocab_size=50)
    write_sidecar(
        tmp_path / "corpus_ref_nll", tmp_path / "corpus", label_values(documents), seq_length=S, separate_documents=True
    )
    return str(tmp_path)


def test_every_rank_has_what_one_would_read_and_one_reads(folder: str) -> None:
    ((alone, _, state),) = spawn(1, read, folder, False)
    first, second = spawn(2, read, folder, False)
    assert first[0] == second[0] == alone
    assert (first[1], second[1]) == (True, False)
    assert first[2] == second[2] == state


def test_a_failure_to_read_is_everybodys(folder: str) -> None:
    first, second = spawn(2, read, folder, True)
    assert first == ["sample 6 is broken", 6]
    assert second == ["rank 0, which reads for this one, failed: sample 6 is broken", 6]
