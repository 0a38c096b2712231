"""Both passes on a GPU against the CPU's implementation; tests/csrc/test_cuda_kernels.py has the edge cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from megarpt.ops._ext import matrix, place, vector

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (5, 33), (300, 255), (7, 2048), (64, 5001), (130, 16384), (3, 50257), (1024, 1024)]
CPU = torch.device("cpu")


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rows_in_memory(values: Tensor, device: torch.device, before: int) -> Tensor:
    """The values on a device, `before` entries behind an aligned address and three between rows."""
    n, cols = values.shape
    memory = torch.zeros(before + n * (cols + 3), dtype=values.dtype, device=device)
    return memory.as_strided((n, cols), (cols + 3, 1), before).copy_(values)


def draw(n: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + cols)
    logits = 3.0 * torch.randn(n, cols, generator=generator)
    logits[n // 2, cols // 2] = torch.nan if n > 4 else 0.0
    logits[:, cols // 3] = -torch.inf if cols > 1 else 0.0
    return logits.to(dtype), torch.randint(-1, cols + 1, (n,), generator=generator)


def states(extension, device: torch.device, logits: Tensor, labels: Tensor, entropy: bool) -> list[Tensor]:
    n, cols = logits.shape
    w, float64 = wide(logits.dtype), torch.float64
    state = [torch.full((n,), -torch.inf, dtype=w), torch.zeros(n, dtype=float64), torch.zeros(n, dtype=float64)]
    state += [torch.zeros(n, dtype=w), torch.full((n,), -1)]
    state, on_device = [each.to(device) for each in state], labels.to(device)
    parts = [None if index == 2 and not entropy else each for index, each in enumerate(state)]
    rows = extension.linear_logprob.RowState(*map(vector, parts))
    for start, end in itertools.pairwise(sorted({0, cols // 3, cols})):
        tile = logits[:, start:end]
        extension.linear_logprob.add_tile(matrix(tile), vector(on_device), start, 1 / 0.7, rows, place(device))
    return [each.cpu() for each in state]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [0, 1, 4])
def test_the_gpu_adds_tiles_as_the_cpu_does(cuda, extension, before, dtype, entropy):
    for n, cols in SHAPES:
        logits, labels = draw(n, cols, dtype)
        actual, expected = (
            states(extension, device, rows_in_memory(logits, device, before), labels, entropy) for device in (cuda, CPU)
        )
        for index in (0, 3, 4):
            torch.testing.assert_close(actual[index], expected[index], rtol=0, atol=0, equal_nan=True)
        tolerance = torch.finfo(wide(dtype)).eps * (8 + 2 * math.log(cols) + cols / 32)
        torch.testing.assert_close(actual[1], expected[1], rtol=tolerance, atol=0, equal_nan=True)
        atol = tolerance * float(expected[1].nan_to_num().max())
        torch.testing.assert_close(actual[2], expected[2], rtol=tolerance, atol=atol, equal_nan=True)


def gradient(
    extension, device: torch.device, logits: Tensor, out_type: torch.dtype, entropy: bool, rows: Tensor | None, before: int
) -> Tensor:
    n, cols = logits.shape if rows is None else (rows.shape[0], logits.shape[1])
    generator = torch.Generator().manual_seed(n * cols)
    w = wide(logits.dtype)
    largest, log_sum, constant, slope, at_label, at_best = torch.randn(6, n, generator=generator, dtype=torch.float64).to(w)
    label, best = torch.randint(99, 101 + cols, (2, n), generator=generator)
    parts = [10 + largest, 2 + log_sum, constant, slope if entropy else None, label, at_label, best, at_best]
    parts = [None if each is None else each.contiguous().to(device) for each in parts]
    of_rows = extension.linear_logprob.RowGradient(*map(vector, parts))
    source = rows_in_memory(logits, device, before)
    in_place = rows is None and out_type == logits.dtype
    out = source if in_place else rows_in_memory(torch.zeros(n, cols, dtype=out_type), device, 2)
    chosen = None if rows is None else rows.to(device)
    extension.linear_logprob.write_gradient(matrix(source), vector(chosen), 100, 1 / 0.7, of_rows, matrix(out), place(device))
    return out.cpu()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    "types", [*((each, each) for each in DTYPES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
)
def test_the_gpu_writes_gradients_as_the_cpu_does(cuda, extension, types, entropy):
    for (n, cols), before, chosen in itertools.product(SHAPES, (0, 1), (False, True)):
        logits = draw(n, cols, types[0])[0].nan_to_num(nan=0.0, neginf=-torch.inf)
        rows = torch.randint(0, n, (n + 2,), generator=torch.Generator().manual_seed(0)) if chosen else None
        actual, expected = (
            gradient(extension, device, logits, types[1], entropy, rows, before).double() for device in (cuda, CPU)
        )
        # one unit of `out` in the last place, as a value may lie where rounding turns; 48 of the wide type, see tests/csrc
        eps = torch.finfo(types[1]).eps + 48 * torch.finfo(wide(types[0])).eps
        size = expected.abs().max(dim=1, keepdim=True).values.clamp(min=1.0) if entropy else expected.abs()
        difference, tiny = (actual - expected).abs(), torch.finfo(types[1]).smallest_normal
        assert bool((difference <= eps * size + tiny).all()), f"[{n}, {cols}]: off by {float(difference.max())}"


def test_a_result_does_not_depend_on_the_run(cuda, extension):
    logits, labels = draw(64, 16384, torch.bfloat16)
    on_device = rows_in_memory(logits, cuda, 0)
    first, second = (states(extension, cuda, on_device, labels, True) for _ in range(2))
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_work_is_queued_on_the_current_stream(cuda, extension):
    """The tile is written on a side stream after a long wait there: a kernel on any other stream would read what was before."""
    logits, labels = draw(2, 4096, torch.float32)
    side = torch.cuda.Stream(cuda)
    tile = torch.zeros(2, 4096, device=cuda)
    filled = logits.to(cuda)
    torch.cuda.synchronize(cuda)
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        tile.copy_(filled)
        actual = states(extension, cuda, tile, labels, False)
    expected = states(extension, CPU, logits, labels, False)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)


def test_a_tile_too_wide_for_a_launch_is_refused(cuda, extension):
    logits, labels = draw(2, 64, torch.float32)
    on_device, of = logits.to(cuda), labels.to(cuda)
    parts = [torch.zeros(2, device=cuda), torch.zeros(2, device=cuda, dtype=torch.float64), None]
    parts += [torch.zeros(2, device=cuda), torch.zeros(2, device=cuda, dtype=torch.int64)]
    state = extension.linear_logprob.RowState(*map(vector, parts))
    huge = extension.Matrix(on_device.data_ptr(), 2, 2**31, 64, extension.DType.float32)
    with pytest.raises(ValueError, match=r"linear_logprob\.add_tile: .*give smaller tiles"):
        extension.linear_logprob.add_tile(huge, vector(of), 0, 1.0, state, place(cuda))
