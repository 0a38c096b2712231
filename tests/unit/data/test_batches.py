import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from megarpt.data import order
from megarpt.data.batches import TokenBatches, assemble, evaluation_batches, to_device
from megarpt.data.fingerprint import OrderFingerprint
from megarpt.data.order import SampleOrder, SampleRefs
from megarpt.data.windows import WindowDataset
from megarpt.errors import ConfigError, DataError
from megarpt.structs import TokenBatch
from megarpt.testing.tiny import label_values, random_documents, write_corpus, write_sidecar

CPU = torch.device("cpu")
S = 7


@pytest.fixture
def datasets(tmp_path: Path) -> list[WindowDataset]:
    return [make_dataset(tmp_path, name, size) for name, size in (("a", 30), ("b", 5))]


def make_dataset(tmp_path: Path, name: str, num_documents: int, stream: bool = True, s: int = S) -> WindowDataset:
    documents = random_documents(num_documents, max_length=12, vocab_size=256, seed=len(name) + num_documents)
    prefix = str(tmp_path / name)
    write_corpus(prefix, documents, vocab_size=256)
    dataset = WindowDataset(prefix, seq_length=s, separate_documents=True, vocab_size=256)
    if stream:
        write_sidecar(f"{prefix}_nll", prefix, label_values(documents), seq_length=s, separate_documents=True)
        dataset.add_stream("ref_nll", f"{prefix}_nll")
    return dataset


@pytest.fixture
def make(datasets: list[WindowDataset]) -> Iterator[Callable[..., TokenBatches]]:
    made: list[TokenBatches] = []

    def make(**changes: object) -> TokenBatches:
        arguments: dict = {"global_batch_size": 8, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, "seed": 5, "device": CPU}
        arguments |= changes
        which = arguments.pop("datasets", datasets)
        weights = arguments.pop("weights", [3.0, 1.0][: len(which)])
        made.append(TokenBatches(which, weights, **arguments))
        return made[-1]

    yield make
    for batches in made:
        batches.close()


def assert_equal(one: TokenBatch, other: TokenBatch) -> None:
    for field in fields(TokenBatch):
        if field.name != "streams":
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name
    assert one.streams.keys() == other.streams.keys()
    for name, value in one.streams.items():
        assert torch.equal(value, other.streams[name]), name


def test_types_and_shapes(make: Callable[..., TokenBatches]) -> None:
    batch = make().next_step()[0]
    for name in ("tokens", "labels", "position_ids"):
        assert getattr(batch, name).dtype == torch.int64 and getattr(batch, name).shape == (2, S)
        assert getattr(batch, name).is_contiguous()
    assert batch.loss_mask.dtype == torch.bool and batch.loss_mask.shape == (2, S)
    assert batch.cu_seqlens.dtype == torch.int32
    for name in ("sample_id", "source_id", "sample_index"):
        assert getattr(batch, name).dtype == torch.int64 and getattr(batch, name).shape == (2,)
    assert batch.streams["ref_nll"].dtype == torch.float32 and batch.streams["ref_nll"].shape == (2, S)


def test_rows_are_the_windows_they_name(make: Callable[..., TokenBatches], datasets: list[WindowDataset]) -> None:
    batches = make()
    for batch in batches.next_step() + batches.next_step():
        edges = [0]
        for row in range(2):
            window = datasets[batch.source_id[row]][int(batch.sample_id[row])]
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                assert getattr(batch, name)[row].tolist() == getattr(window, name).tolist()
            assert batch.streams["ref_nll"][row].tolist() == window.streams["ref_nll"].tolist()
            edges += (row * S + np.cumsum(window.segment_lengths)).tolist()
        assert batch.cu_seqlens.tolist() == edges


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 8), (2, 4)])
def test_ranks_share_the_same_samples(make: Callable[..., TokenBatches], micro_batch_size: int, dp_size: int) -> None:
    whole, ranks = make(), [make(micro_batch_size=micro_batch_size, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
    for step in range(4):
        expected = torch.cat([batch.tokens for batch in whole.next_step()])
        by_rank = [rank.next_step() for rank in ranks]
        order = [batch for micro in zip(*by_rank, strict=True) for batch in micro]
        assert torch.equal(torch.cat([batch.tokens for batch in order]), expected)
        assert torch.cat([batch.sample_index for batch in order]).tolist() == list(range(step * 8, step * 8 + 8))


def test_order_does_not_depend_on_the_batch_size(make: Callable[..., TokenBatches]) -> None:
    one, other = make(global_batch_size=4), make(global_batch_size=12)
    first = torch.cat([batch.tokens for _ in range(6) for batch in one.next_step()])
    assert torch.equal(first, torch.cat([batch.tokens for _ in range(2) for batch in other.next_step()]))


def test_corpus_smaller_than_a_batch_rolls_over(make: Callable[..., TokenBatches], datasets: list[WindowDataset]) -> None:
    small = datasets[1]
    batches = make(datasets=[small], global_batch_size=64, micro_batch_size=64)
    ids = batches.next_step()[0].sample_id
    counts = torch.bincount(ids[: 64 // len(small) * len(small)], minlength=len(small))
    assert counts.tolist() == [64 // len(small)] * len(small)


def test_resuming_is_the_same_as_going_on(make: Callable[..., TokenBatches]) -> None:
    straight, stopped, resumed = make(), make(), make()
    for _ in range(3):
        straight.next_step()
        stopped.next_step()
    resumed.next_step()  # a position to be forgotten
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.consumed_samples == 24
    for _ in range(5):
        for one, other in zip(straight.next_step(), resumed.next_step(), strict=True):
            assert_equal(one, other)


def test_resuming_under_another_layout(make: Callable[..., TokenBatches]) -> None:
    straight = make()
    state = make().state_dict() | {"consumed_samples": 8}
    resumed = [make(micro_batch_size=1, dp_rank=r, dp_size=4) for r in range(4)]
    straight.next_step()
    expected = torch.cat([batch.tokens for batch in straight.next_step()])
    got = torch.empty_like(expected)
    for rank in resumed:
        rank.load_state_dict(state)
        for batch in rank.next_step():
            got[batch.sample_index - 8] = batch.tokens
    assert torch.equal(got, expected)


def test_reading_ahead_is_not_part_of_the_state(make: Callable[..., TokenBatches]) -> None:
    batches = make(steps_ahead=4)
    assert batches.state_dict()["consumed_samples"] == 0
    batches.next_step()
    assert batches.state_dict()["consumed_samples"] == 8


def test_moving_on_reads_what_comes_next_and_nothing_between(make: Callable[..., TokenBatches]) -> None:
    batches, other = make(), make()
    batches.next_step()
    batches.move_to(24)
    for _ in range(3):
        other.next_step()
    for one, two in zip(batches.next_step(), other.next_step(), strict=True):
        assert_equal(one, two)
    assert batches.state_dict()["consumed_samples"] == 32


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"seed": 6}, "data.seed: got 6, expected 5"),
        ({"weights": [3.0, 2.0]}, r"data.sources\[1\].weight: got 2.0, expected 1.0"),
        ({"weights": [1.0], "one_source": True}, r"data.sources \(number of entries\): got 1, expected 2"),
        ({"other_corpus": True}, r"data.sources\[1\].corpus"),
        ({"no_stream": True}, r"data.sources\[1\].streams.ref_nll: got None"),
        ({"other_length": True}, "data.seq_length: got 9, expected 7"),
    ],
)
def test_resuming_with_other_data_is_refused(
    make: Callable[..., TokenBatches], datasets: list[WindowDataset], tmp_path: Path, changes: dict, where: str
) -> None:
    state = make().state_dict()
    if changes.pop("one_source", False):
        changes["datasets"] = datasets[:1]
    if changes.pop("other_corpus", False):
        changes["datasets"] = [datasets[0], make_dataset(tmp_path, "other", 6)]
    if changes.pop("no_stream", False):
        changes["datasets"] = [datasets[0], make_dataset(tmp_path, "b", 5, stream=False)]
    if changes.pop("other_length", False):
        changes["datasets"] = [make_dataset(tmp_path, name, size, s=9) for name, size in (("a", 30), ("b", 5))]
    other = make(**changes)
    with pytest.raises(DataError, match=where):
        other.load_state_dict(state)
    assert other.consumed_samples == 0


def read_on(batches: TokenBatches, steps: int) -> str:
    for _ in range(steps):
        batches.next_step()
    return batches.data_order


def test_the_fingerprint_is_that_of_what_was_read(make: Callable[..., TokenBatches]) -> None:
    whole = make()
    values = [whole.data_order, *(read_on(whole, 1) for _ in range(6))]
    assert len(set(values)) == 7 and {len(value) for value in values} == {64}
    for dp_size, micro_batch_size in ((2, 2), (4, 1), (8, 1)):
        for rank in range(dp_size):
            assert read_on(make(micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size), 6) == values[6]
    assert read_on(make(global_batch_size=12), 4) == values[6]  # 4 x 12 samples are 6 x 8
    assert read_on(make(steps_ahead=5), 6) == values[6]


def test_the_fingerprint_goes_on_after_a_resume(make: Callable[..., TokenBatches]) -> None:
    straight, stopped, resumed = make(), make(), make(micro_batch_size=1, dp_rank=1, dp_size=2)
    read_on(resumed, 1)  # to be forgotten
    read_on(stopped, 3)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.data_order == stopped.data_order
    assert read_on(resumed, 4) == read_on(straight, 7)


@pytest.mark.parametrize("changes", [{"seed": 6}, {"weights": [1.0, 3.0]}, {"other_corpus": True}, {"other_length": True}])
def test_other_data_have_another_fingerprint(
    make: Callable[..., TokenBatches], datasets: list[WindowDataset], tmp_path: Path, changes: dict
) -> None:
    if changes.pop("other_corpus", False):
        changes["datasets"] = [datasets[0], make_dataset(tmp_path, "other", 5)]
    if changes.pop("other_length", False):
        changes["datasets"] = [make_dataset(tmp_path, name, size, s=9) for name, size in (("a", 30), ("b", 5))]
    assert read_on(make(**changes), 2) != read_on(make(), 2)


def test_streams_and_the_scale_of_the_weights_are_not_part_of_the_fingerprint(
    make: Callable[..., TokenBatches], tmp_path: Path
) -> None:
    bare = [make_dataset(tmp_path, name, size, stream=False) for name, size in (("a", 30), ("b", 5))]
    assert read_on(make(datasets=bare, weights=[6.0, 2.0]), 2) == read_on(make(), 2)


def test_a_changed_order_is_refused(make: Callable[..., TokenBatches], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an upgrade that orders the same data in another way: nothing in the configuration shows it."""
    straight = make()
    read_on(straight, 3)
    state, following = straight.state_dict(), straight.next_step()[0].sample_id
    monkeypatch.setattr(order, "_ORDER_VERSION", b"megarpt-order-2")
    with pytest.raises(DataError, match=r"samples 0 to 4119 have the hash [0-9a-f]{64}, expected " + state["order"]["sha256"]):
        make().load_state_dict(state)
    with monkeypatch.context() as without_the_check:  # what would happen else
        without_the_check.setattr(OrderFingerprint, "load_state_dict", lambda *_: None)
        going_on = make()
        going_on.load_state_dict(state)
        assert not torch.equal(going_on.next_step()[0].sample_id, following)


@pytest.mark.parametrize("where", ["behind", "ahead"])
def test_the_order_is_checked_on_both_sides_of_the_position(
    make: Callable[..., TokenBatches], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    stopped = make()
    stopped.move_to(5000)
    state = stopped.state_dict()
    locate = SampleOrder.locate
    changed = range(905, 906) if where == "behind" else range(9094, 9095)

    def other(self: SampleOrder, first: int, count: int) -> SampleRefs:
        refs = locate(self, first, count)
        number = np.arange(first, first + count)
        return SampleRefs(refs.source, np.where(np.isin(number, list(changed)), refs.window + 1, refs.window))

    monkeypatch.setattr(SampleOrder, "locate", other)
    with pytest.raises(DataError, match="samples 904 to 9095"):
        make().load_state_dict(state)


def test_samples_that_are_passed_over_are_not_part_of_the_fingerprint(make: Callable[..., TokenBatches]) -> None:
    batches = make()
    read_on(batches, 1)
    batches.move_to(16)
    assert torch.cat([batch.sample_index for batch in batches.next_step()]).tolist() == list(range(16, 24))
    assert batches.data_order not in (read_on(make(), 2), read_on(make(), 3))
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(batches.state_dict())))
    assert (resumed.data_order, resumed.state_dict()) == (batches.data_order, batches.state_dict())
    assert read_on(resumed, 1) == read_on(batches, 1)


def test_moved_data_may_go_on(make: Callable[..., TokenBatches], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = [make_dataset(tmp_path / "elsewhere", name, size) for name, size in (("a", 30), ("b", 5))]
    make(datasets=moved).load_state_dict(make().state_dict())


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(3, 1), (8, 2), (16, 1)])
def test_batch_sizes_that_do_not_fit(make: Callable[..., TokenBatches], micro_batch_size: int, dp_size: int) -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_batch_size: got 8"):
        make(micro_batch_size=micro_batch_size, dp_size=dp_size)


def test_damage_found_while_reading_ahead_reaches_the_caller(tmp_path: Path, make: Callable[..., TokenBatches]) -> None:
    write_corpus(tmp_path / "bad", [[1, 2, 3, 4], [5, 99, 6]], vocab_size=256)
    dataset = WindowDataset(str(tmp_path / "bad"), seq_length=3, separate_documents=True, vocab_size=99)
    batches = make(datasets=[dataset])
    for _ in range(2):  # and again: the position has not moved
        with pytest.raises(DataError, match="token id 99"):
            batches.next_step()
    assert batches.consumed_samples == 0


def test_close_ends_the_reader(make: Callable[..., TokenBatches]) -> None:
    before = threading.active_count()
    with make() as batches:
        batches.next_step()
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_every_tensor_goes_to_the_device(make: Callable[..., TokenBatches]) -> None:
    batch = to_device(make().next_step()[0], torch.device("meta"))
    tensors = [getattr(batch, field.name) for field in fields(TokenBatch) if field.name != "streams"]
    assert {tensor.device.type for tensor in [*tensors, *batch.streams.values()]} == {"meta"}


def test_padding_rows_train_nothing(datasets: list[WindowDataset]) -> None:
    batch = assemble(datasets, np.array([0, 0]), np.array([2, -1]), np.array([2, -1]))
    assert not batch.loss_mask[1].any() and not batch.streams["ref_nll"][1].any()
    assert batch.sample_id.tolist() == [2, -1] and batch.sample_index.tolist() == [2, -1]
    assert batch.position_ids[1].tolist() == list(range(S))
    assert batch.cu_seqlens[-2:].tolist() == [S, 2 * S]


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (3, 1), (2, 3), (64, 2), (1, 4)])
@pytest.mark.parametrize("max_tokens", [None, 1, 2 * S, 2 * S + 1, 10**6])
def test_evaluation_sees_each_window_once(
    datasets: list[WindowDataset], micro_batch_size: int, dp_size: int, max_tokens: int | None
) -> None:
    dataset = datasets[0]
    ranks = [
        list(
            evaluation_batches(
                dataset, micro_batch_size=micro_batch_size, dp_rank=r, dp_size=dp_size, device=CPU, max_tokens=max_tokens
            )
        )
        for r in range(dp_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    rows = [
        (int(n), batch.tokens[j], batch.loss_mask[j]) for rank in ranks for batch in rank for j, n in enumerate(batch.sample_id)
    ]
    expected = len(dataset) if max_tokens is None else min(len(dataset), -(-max_tokens // S))
    real = sorted((row for row in rows if row[0] >= 0), key=lambda row: row[0])
    assert [row[0] for row in real] == list(range(expected))
    for number, tokens, mask in real:
        assert tokens.tolist() == dataset[number].tokens.tolist() and mask.tolist() == dataset[number].loss_mask.tolist()
    assert not any(mask.any() for number, _, mask in rows if number < 0)


@pytest.mark.parametrize("first_window", [0, 4, 5, 10**6])
def test_evaluation_goes_on_where_it_stopped(datasets: list[WindowDataset], first_window: int) -> None:
    rest = evaluation_batches(datasets[0], micro_batch_size=4, dp_rank=0, dp_size=1, device=CPU, first_window=first_window)
    ids = [int(number) for batch in rest for number in batch.sample_id if number >= 0]
    assert ids == list(range(first_window, len(datasets[0])))
