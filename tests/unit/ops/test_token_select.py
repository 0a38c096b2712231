"""Exact selection against a sort, on one rank and on three."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist

from megarpt.errors import ShapeError
from megarpt.ops import reference
from megarpt.ops.token_select import num_kept, select_top_fraction, select_top_fraction_rows
from megarpt.ops.token_select_passes import ordered_key
from megarpt.testing.distributed import spawn

FRACTIONS = (0.01, 0.25, 0.5, 0.6, 0.99, 1.0)


def random_case(generator: random.Random, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(score, valid, order) with ties, both zeros, infinities and NaN in unpredictable amounts."""
    n = generator.randint(0, most)
    torch.manual_seed(generator.getrandbits(32))
    score = torch.randn(n) if generator.random() < 0.3 else torch.randint(-2, 3, (n,)).float() / 3
    for value in (-0.0, 0.0, float("inf"), -float("inf"), float("nan"), 1e-45):
        score[torch.rand(n) < generator.choice([0.0, 0.1, 0.4])] = value
    return score, torch.rand(n) < generator.choice([0.0, 0.5, 0.9, 1.1]), torch.randperm(n) + generator.choice([0, 2**40])


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_matches_a_sort(fraction: float) -> None:
    generator = random.Random(0)
    for case in range(100):
        score, valid, order = random_case(generator, 40)
        order = order if case % 2 else None
        mask, threshold, kept = select_top_fraction(score, valid, fraction, order=order)
        assert torch.equal(mask, reference.top_fraction_mask(score, valid, fraction, order)), (score, valid, order)
        assert int(kept) == int(mask.sum())
        if fraction < 1.0 and kept:
            lowest = min(score[mask].tolist(), key=lambda x: (x == x, x))
            assert float(threshold) == lowest or (threshold.isnan() and lowest != lowest)
        elif not kept:
            assert float(threshold) == float("inf")


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_rows_match_a_sort(fraction: float) -> None:
    generator = random.Random(1)
    for _ in range(30):
        cases = [random_case(generator, 20) for _ in range(3)]
        s = min(case[0].numel() for case in cases)
        score, valid = (torch.stack([case[i][:s] for case in cases]) for i in (0, 1))
        expected = torch.stack([reference.top_fraction_mask(score[i], valid[i], fraction) for i in range(3)])
        assert torch.equal(select_top_fraction_rows(score, valid, fraction), expected)


def test_keys_sort_as_scores() -> None:
    inf, nan = float("inf"), float("nan")
    score = torch.tensor([nan, -inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, inf])
    key = ordered_key(score).tolist()
    assert key[5] == key[6]
    assert all(low < high for i, (low, high) in enumerate(itertools.pairwise(key)) if i != 5)
    assert min(key) == 0 and max(key) < 2**32 and ordered_key(torch.tensor([-nan])).item() == 0


@pytest.mark.parametrize(
    ("fraction", "valid", "kept"),
    [
        (0.6, 0, 0),
        (0.001, 1, 1),
        (0.001, 100, 1),
        (0.6, 5, 3),
        (0.5, 5, 3),
        (0.5, 3, 2),
        (0.25, 10, 3),
        (0.24, 10, 2),
        (1.0, 7, 7),
    ],
)
def test_rounding_of_k(fraction: float, valid: int, kept: int) -> None:
    assert reference.num_kept(fraction, valid) == kept
    assert int(num_kept(fraction, torch.tensor(valid))) == kept


def test_inputs_are_not_changed() -> None:
    score, valid, order = random_case(random.Random(3), 40)
    copies = score.clone(), valid.clone(), order.clone()
    select_top_fraction(score, valid, 0.5, order=order)
    select_top_fraction(score, valid, 1.0)[0].fill_(False)
    for now, before in zip((score, valid, order), copies, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"score": torch.zeros(4, dtype=torch.bfloat16)}, "bfloat16"),
        ({"valid": torch.ones(4)}, "bool"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, r"\(3,\)"),
        ({"order": torch.arange(5)}, r"\(5,\)"),
        ({"order": torch.arange(4.0)}, "int64"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.01}, "fraction"),
    ],
)
def test_mistakes_are_refused(arguments: dict, match: str) -> None:
    good = {"score": torch.zeros(4), "valid": torch.ones(4, dtype=torch.bool), "fraction": 0.5}
    with pytest.raises(ShapeError, match=match):
        select_top_fraction(**(good | arguments))


def test_three_ranks_keep_what_one_would() -> None:
    """Ties, uneven and empty shards, all kept together; each rank checks its part against a sort of the whole."""
    spawn(3, check_rank)


def check_rank() -> None:
    """Every rank draws the same whole case, keeps its own tokens of it, and selects together with the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = random.Random(7)
    for case in range(150):
        score, valid, order = random_case(generator, 60)
        owner = torch.randint(0, generator.choice([1, 2, world]), score.shape)  # some ranks may hold nothing
        fraction, ordered = generator.choice(FRACTIONS), case % 3 > 0
        mine = owner == rank
        mask, _, kept = select_top_fraction(
            score[mine], valid[mine], fraction, dist.group.WORLD, order[mine] if ordered else None
        )
        whole = reference.top_fraction_mask(score, valid, fraction, order if ordered else owner)  # else by rank, then index
        if not torch.equal(mask, whole[mine]) or int(kept) != int(whole.sum()):
            raise AssertionError(f"case {case}, rank {rank}: {score} {valid} {owner} {fraction}")
