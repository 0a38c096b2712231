from itertools import pairwise

import numpy as np
import pytest
import torch

from megarpt.errors import ShapeError
from megarpt.rl.batching import PackedRollouts

CPU = torch.device("cpu")
ROLLOUTS = [((1, 2, 3), (4, 5)), ((6,), (7, 8, 9, 10)), ((11, 12), (13,)), ((14, 15, 16, 17), (18, 19, 20))]


def packed(rollouts=ROLLOUTS, *, seq_length=8, micro_batch_size=2):
    return PackedRollouts(rollouts, seq_length=seq_length, micro_batch_size=micro_batch_size, device=CPU)


def rows(batches, name):
    return torch.cat([getattr(batch, name) for batch in batches])


def test_labels_that_train_are_the_sampled_tokens_and_stand_behind_their_inputs():
    pack = packed()
    tokens, labels, mask = (rows(pack.batches, name) for name in ("tokens", "labels", "loss_mask"))
    for (prompt, completion), place in zip(ROLLOUTS, pack.places, strict=True):
        assert labels[place.row, place.first : place.last].tolist() == list(completion)
        whole = [*prompt, *completion]
        begin = place.first - (len(prompt) - 1)
        assert tokens[place.row, begin : place.last].tolist() == whole[:-1]
        assert labels[place.row, begin : place.last].tolist() == whole[1:]
    assert int(mask.sum()) == sum(len(completion) for _, completion in ROLLOUTS)


def test_segments_are_the_rollouts_and_positions_restart_with_each():
    pack = packed()
    for number, batch in enumerate(pack.batches):
        edges, positions = batch.cu_seqlens.tolist(), batch.position_ids.flatten()
        assert edges[0] == 0 and edges[-1] == batch.tokens.numel() and edges == sorted(set(edges))
        for first, end in pairwise(edges):
            assert positions[first:end].tolist() == list(range(end - first))
        begins = {
            (place.row - 2 * number) * 8 + place.first - (len(prompt) - 1)
            for (prompt, _), place in zip(ROLLOUTS, pack.places, strict=True)
            if 2 * number <= place.row < 2 * number + 2
        }
        assert begins <= set(edges)


def test_streams_stand_beside_the_tokens_they_are_of():
    pack = packed()
    pack.per_rollout("advantage", [1.0, -2.0, 3.0, 4.0])
    pack.per_token("rollout_logprob", [[-0.1 * (i + 1) * (j + 1) for j in range(len(c))] for i, (_, c) in enumerate(ROLLOUTS)])
    advantage = torch.cat([batch.streams["advantage"] for batch in pack.batches])
    for value, place in zip([1.0, -2.0, 3.0, 4.0], pack.places, strict=True):
        assert set(advantage[place.row, place.first : place.last].tolist()) == {value}
    assert torch.equal(advantage != 0, rows(pack.batches, "loss_mask"))
    np.testing.assert_allclose(pack.tokens_of("rollout_logprob")[1], [-0.2, -0.4, -0.6, -0.8], rtol=1e-6)


def test_what_a_model_computed_of_the_batches_is_read_back_by_rollout():
    pack = packed()
    pack.per_label("old_logprob", [batch.labels * -0.5 for batch in pack.batches])
    for (_, completion), values in zip(ROLLOUTS, pack.tokens_of("old_logprob"), strict=True):
        np.testing.assert_array_equal(values, -0.5 * np.array(completion))


def test_rollouts_that_do_not_train_leave_the_loss_and_are_not_counted():
    pack = packed()
    pack.train_only([True, False, True, False])
    mask, end, share = (
        rows(pack.batches, "loss_mask"),
        *(torch.cat([batch.streams[name] for batch in pack.batches]) for name in ("rollout_end", "rollout_share")),
    )
    assert int(mask.sum()) == 3 and float(end.sum()) == 2.0
    assert float(share.sum()) == pytest.approx(2.0)
    assert bool((end.bool() <= mask).all()) and bool(((share > 0) == mask).all())
    pack.train_only([True] * 4)
    assert int(rows(pack.batches, "loss_mask").sum()) == 10


def test_rows_of_padding_fill_the_last_micro_batch_and_train_nothing():
    pack = packed(ROLLOUTS[:1], micro_batch_size=4)
    (batch,) = pack.batches
    assert batch.tokens.shape == (4, 8) and pack.num_tokens == 32
    assert int(batch.loss_mask[1:].sum()) == 0
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 16, 24, 32]


def test_a_rank_without_rollouts_has_one_micro_batch_of_padding():
    (batch,) = packed([]).batches
    assert not bool(batch.loss_mask.any())


@pytest.mark.parametrize(
    "rollout", [((), (1,)), ((1,), ()), ((1,) * 5, (2,) * 5)], ids=["no prompt", "no completion", "longer than a row"]
)
def test_what_cannot_be_packed_is_refused(rollout):
    with pytest.raises(ShapeError, match="at most 9, "):
        packed([rollout])


def test_the_longest_rollout_that_fits_is_taken():
    pack = packed([((1,) * 5, (2,) * 4)])
    assert pack.places[0].last == 8
