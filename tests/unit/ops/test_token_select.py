"""Exact selection against a sort, on one rank and on up to four, compiled and in plain torch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarpt.errors import ShapeError
from megarpt.ops import _ext, reference, token_select
from megarpt.ops import token_select_passes as passes
from megarpt.ops.token_select import (
    SelectionSums,
    global_threshold,
    num_kept,
    select_excess,
    select_top_fraction,
    select_top_fraction_rows,
    selection_sums,
)
from megarpt.testing.distributed import spawn

FRACTIONS = (0.01, 0.25, 0.5, 0.6, 0.99, 1.0)
INF, NAN = float("inf"), float("nan")
SIZES = (1, 2, passes.CHUNK - 1, passes.CHUNK, passes.CHUNK + 1, 3 * passes.CHUNK + 17)


def use(path: str) -> None:
    """Lets the passes run compiled or in plain torch, in this process."""
    if path == "torch":
        _ext.extension = lambda device: None
    elif _ext._C is None:
        pytest.skip(f"needs the compiled extension: {_ext.describe()}")


def random_case(generator: random.Random, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(score, valid, order) with ties, both zeros, infinities and NaN in unpredictable amounts."""
    n = generator.randint(0, most)
    torch.manual_seed(generator.getrandbits(32))
    score = torch.randn(n) if generator.random() < 0.3 else torch.randint(-2, 3, (n,)).float() / 3
    for value in (-0.0, 0.0, INF, -INF, NAN, -NAN, 1e-45, -1e-45):
        score[torch.rand(n) < generator.choice([0.0, 0.1, 0.4])] = value
    return score, torch.rand(n) < generator.choice([0.0, 0.5, 0.9, 1.1]), torch.randperm(n) + generator.choice([0, 2**40])


def adversarial_scores(n: int) -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(n)
    yield "all equal", torch.full((n,), 0.25)
    yield "signed zeros", torch.where(torch.rand(n) < 0.5, 0.0, -0.0)
    yield "denormals", torch.randint(-3, 4, (n,), dtype=torch.int32).abs().view(torch.float32) * torch.randn(n).sign()
    yield "NaN of both signs", torch.where(torch.rand(n) < 0.5, NAN, -NAN)
    yield "infinities", torch.where(torch.rand(n) < 0.5, INF, -INF)
    yield "neighbours", (torch.randint(0, 5, (n,), dtype=torch.int32) + 0x3F7FFFFE).view(torch.float32)
    yield "any bits", torch.randint(-(2**31), 2**31, (n,)).to(torch.int32).view(torch.float32)
    yield "normal", torch.randn(n)


def check_selection(score: Tensor, valid: Tensor, fraction: float, order: Tensor | None) -> None:
    """Mask, threshold and number against a sort."""
    mask, threshold, kept = select_top_fraction(score, valid, fraction, order=order)
    assert torch.equal(mask, reference.top_fraction_mask(score, valid, fraction, order))
    assert int(kept) == int(mask.sum())
    assert same(threshold, global_threshold(score, valid, fraction))
    if not kept:
        assert float(threshold) == INF
    elif fraction == 1.0:
        assert float(threshold) == -INF
    else:
        lowest = min(score[mask].tolist(), key=lambda x: (x == x, x))
        assert float(threshold) == lowest or (threshold.isnan() and lowest != lowest)


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left, right) or bool(left.isnan() and right.isnan())


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_matches_a_sort(implementation: str, fraction: float) -> None:
    generator = random.Random(0)
    for case in range(60):
        score, valid, order = random_case(generator, 40)
        check_selection(score, valid, fraction, order if case % 2 else None)


@pytest.mark.parametrize("n", SIZES)
def test_adversarial_scores_match_a_sort(implementation: str, n: int) -> None:
    for case, (_, score) in enumerate(adversarial_scores(n)):
        valid = torch.rand(n) < (0.9 if case % 2 else 1.1)
        check_selection(score, valid, 0.6, torch.randperm(n) + 2**45)
        check_selection(score, valid, 0.3, None)
    check_selection(torch.randn(n), torch.zeros(n, dtype=torch.bool), 0.6, None)


@pytest.mark.parametrize(
    "broken",
    [
        lambda patch: patch.setattr(passes, "order_key", lambda order: order),
        lambda patch: patch.setattr(passes, "score_of_key", lambda key: key.float()),
        lambda patch: patch.setattr(token_select, "num_kept", lambda fraction, n: (n * fraction).long()),
        lambda patch: patch.setattr(passes, "ordered_key", lambda score: score.view(torch.int32).long() + 2**31),
    ],
)
def test_a_broken_selection_is_noticed(broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "extension", lambda device: None)
    torch.manual_seed(0)
    score, valid, order = torch.randint(-2, 3, (101,)).float(), torch.ones(101, dtype=torch.bool), torch.randperm(101)
    check_selection(score, valid, 0.9, order)
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check_selection(score, valid, 0.9, order)


def excess_case(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, reference, valid, order); NaN where it must not matter, and as unknown references; ties among the scores."""
    torch.manual_seed(seed)
    logprob, ref = -torch.randint(0, 40, (n,)) / 8, torch.randint(0, 40, (n,)) / 8
    valid = torch.rand(n) < 0.8
    logprob, ref = torch.where(valid, logprob, NAN), torch.where(torch.rand(n) < 0.1, NAN, ref)
    return logprob + 1e-3 * torch.randn(n) * (torch.rand(n) < 0.5), ref, valid, torch.randperm(n)


def exact_sums(nll: Tensor, score: Tensor, ref: Tensor, valid: Tensor, mask: Tensor, previous: float) -> dict[str, float]:
    """Token by token."""
    names = SelectionSums._fields
    sums = dict.fromkeys(names, 0.0)
    columns = (nll.double(), score, ref.double(), valid, mask)
    for loss, value, known, is_valid, is_kept in zip(*(column.tolist() for column in columns), strict=True):
        if not is_valid:
            continue
        sums["num_valid"] += 1
        sums["num_kept"] += is_kept
        sums["nll_valid"] += loss
        sums["nll_kept" if is_kept else "nll_dropped"] += loss
        sums["num_nan_scores"] += value != value
        sums["num_agreeing"] += (value >= previous) == is_kept
        if known == known:
            sums["reference_nll"] += known
            sums["num_known"] += 1
            sums["excess"] += loss - known
    return sums


@pytest.mark.parametrize("fraction", [0.3, 1.0])
@pytest.mark.parametrize("n", [0, *SIZES])
def test_excess_selection_and_its_sums(implementation: str, n: int, fraction: float) -> None:
    logprob, ref, valid, order = excess_case(n, n)
    previous = torch.tensor(0.2)
    chosen = select_excess(logprob, ref, valid, fraction, order=order, previous_threshold=previous)
    torch.testing.assert_close(chosen.score, -logprob - ref, rtol=0, atol=0, equal_nan=True)
    plain = select_top_fraction(chosen.score, valid, fraction, order=order)
    assert torch.equal(chosen.mask, plain.mask) and int(chosen.num_kept) == int(plain.num_kept)
    assert same(chosen.threshold, plain.threshold)
    expected = exact_sums(-logprob, chosen.score, ref, valid, chosen.mask, float(previous))
    again = selection_sums(-logprob, chosen.score, ref, valid, chosen.mask, previous)
    for name, exact in expected.items():
        for sums in (chosen.sums, again):
            value = getattr(sums, name)
            assert value.dtype == torch.float64 and value.shape == ()
            assert float(value) == (exact if name.startswith("num") else pytest.approx(exact, rel=1e-13, abs=1e-9)), name
    assert [float(a) for a in again] == [float(b) for b in chosen.sums]


def test_sums_of_what_is_not_given_are_zero(implementation: str) -> None:
    logprob, _, valid, _ = excess_case(100, 0)
    sums = selection_sums(-logprob, None, None, valid, valid)
    assert float(sums.nll_kept) == float(sums.nll_valid) > 0 and int(sums.num_kept) == int(valid.sum())
    assert not any(map(float, (sums.num_nan_scores, sums.reference_nll, sums.num_known, sums.excess, sums.num_agreeing)))
    assert float(selection_sums(-logprob, -logprob, None, valid, valid).num_agreeing) == 0


def test_infinite_and_nan_losses_reach_the_sums_they_belong_to(implementation: str) -> None:
    nll = torch.tensor([1.0, INF, NAN, 2.0, NAN])
    valid, mask = torch.tensor([True] * 4 + [False]), torch.tensor([True, True, False, False, False])
    sums = selection_sums(nll, nll, torch.ones(5), valid, mask)
    assert float(sums.nll_kept) == INF and sums.nll_dropped.isnan() and sums.nll_valid.isnan() and sums.excess.isnan()
    assert float(sums.num_nan_scores) == 1 and float(sums.reference_nll) == 4


def test_shapes_and_strides_of_the_callers(implementation: str) -> None:
    logprob, ref, valid, order = (each.view(20, 30) for each in excess_case(600, 1))
    flat = select_excess(logprob.flatten(), ref.flatten(), valid.flatten(), 0.6, order=order.flatten())
    for form in (lambda x: x, lambda x: x.t().contiguous().t()):
        chosen = select_excess(form(logprob), form(ref), form(valid), 0.6, order=form(order))
        assert chosen.mask.shape == (20, 30) and torch.equal(chosen.mask.flatten(), flat.mask)
        mask = select_top_fraction(form(chosen.score), form(valid), 0.6, order=form(order)).mask
        assert torch.equal(mask.flatten(), flat.mask)


def test_nothing_is_differentiated(implementation: str) -> None:
    logprob, ref, valid, order = excess_case(50, 2)
    chosen = select_excess(logprob.requires_grad_(), ref, valid, 0.6, order=order)
    assert not chosen.score.requires_grad and not chosen.sums.nll_kept.requires_grad


def both_paths(monkeypatch: pytest.MonkeyPatch, function):
    if _ext._C is None:
        pytest.skip(f"needs the compiled extension: {_ext.describe()}")
    compiled = function()
    with monkeypatch.context() as patch:
        patch.setattr(_ext, "extension", lambda device: None)
        return compiled, function()


@pytest.mark.parametrize("ordered", [False, True])
def test_compiled_and_torch_agree_bit_for_bit(ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, score in adversarial_scores(2 * passes.CHUNK + 5):
        valid, order = torch.rand(score.numel()) < 0.9, torch.randperm(score.numel()) if ordered else None

        def run(score=score, valid=valid, order=order):
            return select_excess(score, torch.zeros_like(score), valid, 0.4, order=order)

        left, right = both_paths(monkeypatch, run)
        assert torch.equal(left.mask, right.mask) and int(left.num_kept) == int(right.num_kept)
        assert same(left.threshold, right.threshold)
        assert torch.equal(left.score.nan_to_num().view(torch.int32), right.score.nan_to_num().view(torch.int32))


def test_the_number_of_threads_changes_no_bit() -> None:
    n, threads = 400_000, torch.get_num_threads()
    logprob, ref, valid, order = excess_case(n, 3)
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(select_excess(logprob, ref, valid, 0.6, order=order, previous_threshold=torch.tensor(0.1)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].mask, results[1].mask) and same(results[0].threshold, results[1].threshold)
    assert [float(a) for a in results[0].sums] == [float(b) for b in results[1].sums]


def test_five_million_scores() -> None:
    use("compiled")
    n, fraction = 5_000_000, 0.6
    torch.manual_seed(0)
    score, valid = torch.randn(n), torch.ones(n, dtype=torch.bool)
    mask, threshold, kept = select_top_fraction(score, valid, fraction)
    assert int(kept) == int(mask.sum()) == 3_000_000
    assert float(threshold) == float(score.kthvalue(n - 3_000_000 + 1).values)
    assert torch.equal(score > threshold, mask & (score != threshold))
    kept_zeros = select_top_fraction(torch.zeros(n), valid, fraction, order=torch.arange(n) + 2**50).mask
    assert bool(kept_zeros[:3_000_000].all()) and not bool(kept_zeros[3_000_000:].any())


def operator_calls() -> Iterator[tuple[object, tuple]]:
    logprob, ref, valid, order = excess_case(300, 4)
    logprob, ref = logprob.nan_to_num(), ref.nan_to_num()  # opcheck takes NaN for a difference
    score, histogram = passes.score_excess(logprob, ref, valid)
    search = passes.choose_digit(histogram, torch.tensor([0, 100, 0]), passes.DIGIT_BITS)
    starts = passes.count_equals(score, valid, search, order, search)
    yield passes.score_excess, (logprob, ref, valid)
    yield passes.count_digits, (score, valid, search, 10, 11)
    yield passes.count_order_digits, (score, valid, search, order, search, 10, 11)
    yield passes.choose_digit, (histogram, search, 11)
    yield passes.count_equals, (score, valid, search, None, None)
    yield passes.count_equals, (score, valid, search, order, search)
    yield passes.write_mask, (score, valid, search, None, None, starts)
    yield passes.write_mask_and_sums, (score, valid, search, order, search, None, logprob, ref, torch.tensor(0.1))
    yield passes.sum_selected, (logprob, score, ref, valid, valid, torch.tensor(0.1))
    yield passes.sum_selected, (logprob, None, None, valid, valid, None)


def test_operators_are_what_torch_expects_of_them(implementation: str) -> None:
    for operator, arguments in operator_calls():
        torch.library.opcheck(operator, arguments)


def test_the_extension_refuses_what_does_not_fit() -> None:
    use("compiled")
    score, valid, search = torch.zeros(10), torch.ones(10, dtype=torch.bool), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"write_mask: starts: got int64 \[2\], expected int64 \[1\]"):
        passes.write_mask(score, valid, search, None, None, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="count_digits: digit: got 12 bits at 0"):
        passes.count_digits(score, valid, search, 0, 12)
    with pytest.raises(ValueError, match=r"choose_digit: histogram: got int64 \[8\]"):
        passes.choose_digit(torch.zeros(8, dtype=torch.int64), search, 8)
    with pytest.raises(ValueError, match="add_up: reference: got float32"):
        passes.sum_selected(score, None, torch.zeros(9), valid, valid, None)


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
    score = torch.tensor([NAN, -INF, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, INF])
    key = passes.ordered_key(score).tolist()
    assert key[5] == key[6]
    assert all(low < high for i, (low, high) in enumerate(itertools.pairwise(key)) if i != 5)
    assert min(key) == 0 and max(key) < 2**32 and passes.ordered_key(torch.tensor([-NAN])).item() == 0


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


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"reference_nll": torch.zeros(3)}, r"reference_nll .* \(3,\)"),
        ({"reference_nll": torch.zeros(4, dtype=torch.float16)}, "float16"),
        ({"logprob": torch.zeros(4, dtype=torch.float64)}, "float64"),
    ],
)
def test_mistakes_in_an_excess_selection_are_refused(arguments: dict, match: str) -> None:
    good = {"logprob": torch.zeros(4), "reference_nll": torch.zeros(4), "valid": torch.ones(4).bool(), "fraction": 0.5}
    with pytest.raises(ShapeError, match=match):
        select_excess(**(good | arguments))


def test_a_mask_that_does_not_fit_is_refused() -> None:
    valid = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ShapeError, match="mask"):
        selection_sums(torch.zeros(4), None, None, valid, valid[:3])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_keep_what_one_would(world_size: int) -> None:
    """Ties, uneven and empty shards, all kept together; each rank checks its part against a sort of the whole."""
    spawn(world_size, check_rank)


def check_rank() -> None:
    """Every rank draws the same whole case, keeps its own tokens of it, and selects together with the others.

    All compiled, all in torch, and a mixture, which has to agree on every collective and every bit.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    generator, compiled = random.Random(7), _ext.extension
    for case in range(60):
        in_torch = (False, True, rank % 2 == 1)[case % 3]
        _ext.extension = (lambda device: None) if in_torch else compiled
        score, valid, order = random_case(generator, 60)
        owner = torch.randint(0, generator.choice([1, 2, world]), score.shape)  # some ranks may hold nothing
        owner = owner % world
        fraction, ordered = generator.choice(FRACTIONS), generator.random() < 0.7
        mine, group = owner == rank, dist.group.WORLD
        its_order = order[mine] if ordered else None
        mask, threshold, kept = select_top_fraction(score[mine], valid[mine], fraction, group, its_order)
        whole = reference.top_fraction_mask(score, valid, fraction, order if ordered else owner)  # else by rank, then index
        excess = select_excess(-score[mine], torch.zeros_like(score[mine]), valid[mine], fraction, group, its_order)
        same_threshold = same(threshold, global_threshold(score[mine], valid[mine], fraction, group))
        good = torch.equal(mask, whole[mine]) and torch.equal(excess.mask, mask) and same(threshold, excess.threshold)
        if not good or not same_threshold or int(kept) != int(whole.sum()) or int(excess.num_kept) != int(kept):
            raise AssertionError(f"case {case}, rank {rank}: {score} {valid} {owner} {fraction}")
