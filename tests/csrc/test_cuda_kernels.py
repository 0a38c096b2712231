"""The CUDA kernels' own source, run on the CPU: against the CPU's implementation, and against float64.

The order in which a block's threads run is part of every case: a barrier that is missing gives wrong numbers in one of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ORDERS = ["ascending", "descending", "shuffled"]
# around packs of 2, 4 and 8 entries, a warp, what a warp loads at a time, and the step from a warp to a block for a row
COLUMNS = [1, 2, 7, 31, 32, 33, 255, 512, 1024, 1025, 2048, 2049, 5000]
LAYOUTS = [(0, 0), (1, 0), (3, 5), (0, 8), (5, 3)]  # entries before the first row, and between rows
GUARD = 77.0  # in memory around the rows


class State(NamedTuple):
    largest: Tensor  # [n]
    sum: Tensor
    weighted: Tensor | None
    target: Tensor
    best: Tensor


class Gradient(NamedTuple):
    largest: Tensor  # [n]
    log_sum: Tensor
    constant: Tensor
    slope: Tensor | None
    label: Tensor
    at_label: Tensor
    best: Tensor
    at_best: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def new_state(n: int, dtype: torch.dtype, entropy: bool) -> State:
    w = wide(dtype)
    return State(
        torch.full((n,), -torch.inf, dtype=w),
        torch.zeros(n, dtype=torch.float64),
        torch.zeros(n, dtype=torch.float64) if entropy else None,
        torch.full((n,), GUARD, dtype=w),
        torch.full((n,), -1),
    )


def laid_out(values: Tensor, before: int, between: int) -> tuple[Tensor, Tensor]:
    """The values as rows of a larger piece of memory, which is the second result."""
    n, cols = values.shape
    memory = torch.full((before + n * (cols + between) + 16,), GUARD, dtype=values.dtype)
    rows = memory.as_strided((n, cols), (cols + between, 1), before)
    rows.copy_(values)
    return rows, memory


def untouched(memory: Tensor, rows: Tensor) -> bool:
    """Whether the memory around rows is as `laid_out` left it."""
    outside = memory.clone()
    outside.as_strided(rows.shape, rows.stride(), rows.storage_offset()).fill_(GUARD)
    return bool((outside == GUARD).all())


def add_tiles(kernels, cuda: bool, logits: Tensor, labels: Tensor, cuts: list[int], temperature: float, entropy: bool) -> State:
    state = new_state(logits.shape[0], logits.dtype, entropy)
    for start, end in zip([0, *cuts], [*cuts, logits.shape[1]], strict=True):
        kernels.add_tile(cuda, logits[:, start:end], labels, start, 1 / temperature, state)
    return state


def exact_state(logits: Tensor, labels: Tensor, temperature: float) -> State:
    """In float64, from logits that are divided by the temperature in the precision the passes have."""
    z = (logits.to(wide(logits.dtype)) * (1 / temperature)).double()
    largest = z.max(dim=1).values
    below = z - largest[:, None]
    here = (labels >= 0) & (labels < z.shape[1])
    target = torch.where(here, z.gather(1, labels.clamp(0, z.shape[1] - 1)[:, None])[:, 0], GUARD)
    weighted = torch.where(below == -torch.inf, 0.0, below.exp() * below).sum(dim=1)
    return State(largest, below.exp().sum(dim=1), weighted, target, (z == largest[:, None]).int().argmax(dim=1))


def compare_states(actual: State, expected: State, cols: int, dtype: torch.dtype) -> None:
    """Sums within rounding; everything else to the last bit."""
    for name in ("largest", "target", "best"):
        left, right = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(
            left, right.to(left.dtype), rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    # exp is off by 2 units in the last place, for half precision by 1.2 more for each nat of entropy; a thread adds at most
    # cols / 32 numbers one after another
    eps = torch.finfo(wide(dtype)).eps
    tolerance = eps * (4 + 1.2 * math.log(cols) * (dtype.itemsize == 2) + cols / 64)
    torch.testing.assert_close(actual.sum, expected.sum, rtol=tolerance, atol=0, equal_nan=True)
    if actual.weighted is not None and expected.weighted is not None:
        atol = tolerance * float(expected.sum.nan_to_num().max())
        torch.testing.assert_close(actual.weighted, expected.weighted, rtol=tolerance, atol=atol, equal_nan=True)


def draw(n: int, cols: int, dtype: torch.dtype, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, cols, generator=generator, dtype=torch.float64)).to(dtype)


def leave_nan_in_shared_memory(kernels, dtype: torch.dtype, entropy: bool) -> None:
    logits = torch.full((1, 4096), torch.nan, dtype=dtype)
    kernels.add_tile(True, logits, torch.zeros(1, dtype=torch.int64), 0, 1.0, new_state(1, dtype, entropy))


def check_add_tile(kernels, n: int, cols: int, dtype: torch.dtype, entropy: bool, layout: tuple[int, int], seed: int) -> None:
    logits, memory = laid_out(draw(n, cols, dtype, seed), *layout)
    before = memory.clone()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-2, cols + 2, (n,), generator=generator)
    cuts = sorted({int(cut) for cut in torch.randint(1, max(2, cols), (seed % 3,), generator=generator) if cut < cols})
    temperature = (1.0, 0.7)[seed % 2]
    leave_nan_in_shared_memory(kernels, dtype, entropy)
    actual = add_tiles(kernels, True, logits, labels, cuts, temperature, entropy)
    assert torch.equal(memory, before)
    compare_states(actual, exact_state(logits, labels, temperature), cols, dtype)
    compare_states(actual, add_tiles(kernels, False, logits, labels, cuts, temperature, entropy), cols, dtype)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_tiles_are_merged_as_on_the_cpu_and_as_in_float64(kernels, order, dtype, entropy, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    for seed, cols in enumerate(COLUMNS):
        for shift, layout in enumerate(LAYOUTS):
            check_add_tile(kernels, 1 + (seed + shift) % 5, cols, dtype, entropy, layout, seed + shift)


@pytest.mark.parametrize("cols", [33, 3001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_logits_the_first_is_the_best(kernels, dtype, cols):
    logits = draw(4, cols, dtype, 0).clamp(max=2.0)
    logits[0] = 1.0
    for row in (1, 2, 3):
        logits[row, torch.randint(0, cols, (5,), generator=torch.Generator().manual_seed(row))] = 5.0
    labels = torch.zeros(4, dtype=torch.int64)
    for before in range(9):  # every split into edges and packs
        for cuts in ([], [cols // 2]):
            state = add_tiles(kernels, True, laid_out(logits, before, 1)[0], labels, cuts, 1.0, False)
            assert state.best.tolist() == (logits == logits.max(dim=1, keepdim=True).values).int().argmax(dim=1).tolist()
    later = new_state(4, dtype, False)
    kernels.add_tile(True, logits, labels, 100, 1.0, later)
    first = later.best.clone()
    kernels.add_tile(True, logits, labels, 100 + cols, 1.0, later)  # the same numbers once more: the earlier tile's stay
    assert torch.equal(later.best, first) and int(first.min()) >= 100


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("cols", [40, 3001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(kernels, dtype, cols, entropy):
    """What every implementation must agree on: -inf adds nothing, NaN and +inf make the sum NaN."""
    logits = draw(8, cols, dtype, 1)
    logits[0] = -torch.inf
    logits[1, : cols // 2] = -torch.inf
    logits[2, cols // 2 :] = -torch.inf
    logits[3, ::2] = -torch.inf
    logits[4, cols // 3] = torch.nan
    logits[5, cols - 1] = torch.inf
    logits[6] = torch.nan
    logits[7, 1:] = -torch.inf
    labels = torch.arange(8)
    for cuts in ([], [cols // 2], [1, cols - 1]):
        for cuda in (True, False):
            state = add_tiles(kernels, cuda, logits, labels, cuts, 1.0, entropy)
            for finite in (1, 2, 3, 7):
                rows = slice(finite, finite + 1)
                part = State(*(None if each is None else each[rows] for each in state))
                compare_states(part, exact_state(logits[rows], labels[rows], 1.0), cols, dtype)
            assert state.sum[4:7].isnan().all() and (state.weighted is None or state.weighted[4:7].isnan().all())
            assert state.largest[0] == -torch.inf and state.sum[0] == 0.0 and state.best[0] == -1
            assert state.weighted is None or state.weighted[0] == 0.0
            assert state.largest[4] == logits[4].nan_to_num(nan=-1e9).max() and state.largest[5] == torch.inf
            assert state.largest[6] == -torch.inf and state.best[6] == -1 and state.target[6].isnan()


def draw_gradient(n: int, cols: int, dtype: torch.dtype, entropy: bool, seed: int, first: int) -> Gradient:
    generator = torch.Generator().manual_seed(seed)
    w = wide(dtype)

    def numbers() -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64).to(w)

    def columns() -> Tensor:
        return torch.randint(first - 2, first + cols + 2, (n,), generator=generator)

    slope = numbers() if entropy else None
    label, best = columns(), columns()
    best[: n // 2] = label[: n // 2]  # the label's value is the one that stays
    return Gradient(10 + numbers(), 2 + numbers(), numbers(), slope, label, numbers(), best, numbers())


def exact_gradient(logits: Tensor, gradient: Gradient, first: int, temperature: float) -> Tensor:
    z = (logits.to(gradient.largest.dtype) * (1 / temperature)).double()
    log_p = (z - gradient.largest.double()[:, None]) - gradient.log_sum.double()[:, None]
    slope = 0.0 if gradient.slope is None else gradient.slope.double()[:, None]
    scale = gradient.constant.double()[:, None] + slope * log_p.clamp(min=-1000)
    out = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * scale)
    for columns, values in ((gradient.best, gradient.at_best), (gradient.label, gradient.at_label)):
        here = (columns >= first) & (columns < first + logits.shape[1])
        row = torch.arange(len(columns))[here]
        out[row, columns[here] - first] = values.double()[here]
    return out


def check_gradient(kernels, n, cols, types, entropy, source_layout, out_layout, chosen, seed) -> None:
    source_type, out_type = types
    first, temperature, num_rows = 1000, (1.0, 0.7)[seed % 2], 7 if chosen else n
    logits, _ = laid_out(draw(num_rows, cols, source_type, seed), *source_layout)
    if cols > 4:
        logits[:, 3] = -torch.inf
    rows = torch.randint(0, num_rows, (n,), generator=torch.Generator().manual_seed(seed)) if chosen else None
    gradient = draw_gradient(n, cols, source_type, entropy, seed, first)
    results = []
    for cuda in (True, False):
        if out_layout is None:
            out, memory = laid_out(logits, *source_layout)
            source = out
        else:
            out, memory = laid_out(torch.zeros(n, cols, dtype=out_type), *out_layout)
            source = logits
        kernels.write_gradient(cuda, source, rows, first, 1 / temperature, gradient, out)
        assert untouched(memory, out)
        results.append(out)
    # the same operations in the same order, rounded alike
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    expected = exact_gradient(logits if rows is None else logits[rows], gradient, first, temperature)
    # half a unit of `out` in the last place; and of the wide type 2 for exp, and 20 for log p, whose parts may be that large
    eps, tiny = torch.finfo(out_type).eps / 2 + 24 * torch.finfo(wide(source_type)).eps, torch.finfo(out_type).smallest_normal
    size = expected.abs().max(dim=1, keepdim=True).values.clamp(min=1.0) if entropy else expected.abs()
    difference = (results[0].double() - expected).abs()
    assert bool((difference <= eps * size + tiny).all()), f"{types} [{n}, {cols}]: off by {float(difference.max())}"


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    "types", [*((each, each) for each in DTYPES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_written_as_on_the_cpu_and_as_in_float64(kernels, order, types, entropy, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    for seed, cols in enumerate(COLUMNS):
        for shift, layout in enumerate(LAYOUTS):
            n, other = 1 + (seed + shift) % 5, LAYOUTS[(seed + 2 * shift) % len(LAYOUTS)]
            check_gradient(kernels, n, cols, types, entropy, layout, other, bool(shift % 2), seed + shift)
            if types[0] == types[1]:
                check_gradient(kernels, n, cols, types, entropy, layout, None, False, seed + shift)


@pytest.mark.parametrize("cols", [16384, 16389, 40000])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
def test_wide_rows_are_written_in_spans(kernels, cols, types):
    for seed in range(4):
        check_gradient(kernels, 3, cols, types, True, (seed, 1), (0, 3), False, seed)


def test_what_cannot_be_is_refused(kernels):
    gradient = draw_gradient(2, 8, torch.float32, False, 0, 0)
    float32, bfloat16 = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="got source's own memory, expected other memory when the type changes"):
        kernels.write_gradient(True, float32, None, 0, 1.0, gradient, float32.view(torch.bfloat16)[:, :8])
    with pytest.raises(ValueError, match="got source's own memory, expected other memory when rows are chosen"):
        kernels.write_gradient(True, float32, torch.tensor([1, 0]), 0, 1.0, gradient, float32)
    with pytest.raises(ValueError, match="got float32 with 8 columns, expected bfloat16 with 8"):
        kernels.write_gradient(True, bfloat16, None, 0, 1.0, gradient, float32)
    huge = torch.empty(2, 2**30, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="give smaller tiles"):
        kernels.add_tile(True, huge, torch.zeros(2, dtype=torch.int64), 0, 1.0, new_state(2, torch.bfloat16, False))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("__syncthreads();\n    value = shared[0];", "value = shared[0];"),
        ("part.sum *= factor;\n", "\n"),
        ("a < b ? a : b", "a < b ? b : a"),
        ("recount(before, after, old_sum, old_weighted);", ""),
        ("__syncwarp();", ""),
    ],
    ids=["no barrier in the merge", "sum not rescaled", "last of equals", "state not rescaled", "no barrier before the label"],
)
def test_these_tests_notice_a_broken_kernel(build_kernels, monkeypatch, old, new):
    broken = build_kernels(old, new)
    bfloat16 = torch.bfloat16

    def check() -> None:
        for order in ("ascending", "descending"):
            monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
            for cols in (255, 5000):
                check_add_tile(broken, 3, cols, bfloat16, True, (1, 0), 2)
                check_gradient(broken, 3, cols, (bfloat16, bfloat16), True, (1, 0), (1, 0), False, 2)

    with pytest.raises(AssertionError):
        check()
