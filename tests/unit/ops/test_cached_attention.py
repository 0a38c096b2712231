"""A step's attention to cached keys against a softmax spelled out in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megarpt.ops import _ext
from megarpt.ops.cached_attention import Sharing, attention_of_step
from megarpt.testing.oracle import assert_within_twice

CPU = torch.device("cpu")
NG, SCALE = 2, 0.17
ALONE = ([7, 1, 70], [3, 130, 1], [0, 1, 2])  # own lengths, those of the prompts, the prompt of each sequence
SHARED = ([1, 5, 64, 65, 2], [9, 64], [1, 0, 1, 1, 0])
EQUAL = ([33, 33, 33, 33], [20, 20], [0, 0, 1, 1])
UNUSED = ([4, 2], [5, 8, 6], [2, 2])


@dataclass
class Step:
    """Operands of a step as the decoder has them: views of larger tensors."""

    lengths: list[int]
    prompt_lengths: list[int]
    prompt_of: list[int]
    query: Tensor
    keys_values: Tensor
    own: Tensor
    prompts: Tensor

    def run(self) -> Tensor:
        sharing = Sharing(self.prompt_of, len(self.prompt_lengths), CPU)
        attend = attention_of_step(self.lengths, self.prompt_lengths, sharing, scale=SCALE, device=CPU)
        return attend(self.query, self.keys_values, self.own, self.prompts)

    def truth(self, dtype: torch.dtype = torch.float64) -> Tensor:
        rows = []
        for i, (length, prompt) in enumerate(zip(self.lengths, self.prompt_of, strict=True)):
            parts = self.prompts[prompt, :, :, : self.prompt_lengths[prompt]], self.own[i, :, :, : length - 1]
            key, value = torch.cat([*parts, self.keys_values[i].unsqueeze(2)], dim=2).to(dtype).unbind(1)
            rows.append((self.query[i].to(dtype) @ key.transpose(1, 2) * SCALE).softmax(-1) @ value)
        return torch.stack(rows)


def make_step(case: Any, g: int, hn: int, dtype: torch.dtype, *, size: float = 1.0, behind: float = torch.nan) -> Step:
    """`behind`: what lies in a row after its end; beyond the longest row it is NaN."""
    lengths, prompt_lengths, prompt_of = case
    generator = torch.Generator().manual_seed(g * hn + len(lengths))

    def store(rows: list[int], written: list[int]) -> Tensor:
        whole = torch.full((len(rows) + 1, NG, 2, max(rows) + 5, hn), torch.nan).to(dtype)  # a row and positions to spare
        used = whole[: len(rows), :, :, : max(rows)]
        used.fill_(behind)
        for row, length in enumerate(written):
            used[row, :, :, :length] = torch.randn(NG, 2, length, hn, generator=generator).to(dtype)
        return used

    mixed = (torch.randn(len(lengths), NG, g + 2, hn, generator=generator) * size).to(dtype)
    return Step(
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        prompt_of=prompt_of,
        query=mixed[:, :, :g],
        keys_values=mixed[:, :, g:],
        own=store(lengths, [length - 1 for length in lengths]),
        prompts=store(prompt_lengths, prompt_lengths),
    )


def finite_behind(implementation: str) -> float:
    return torch.nan if implementation == "compiled" else 3.0


@pytest.mark.parametrize("case", [ALONE, SHARED, EQUAL, UNUSED], ids=["alone", "shared", "equal", "unused"])
@pytest.mark.parametrize("hn", [8, 32, 64, 80])
@pytest.mark.parametrize("g", [1, 2, 3, 4, 7])
def test_fp32(implementation: str, case: Any, g: int, hn: int) -> None:
    step = make_step(case, g, hn, torch.float32, behind=finite_behind(implementation))
    torch.testing.assert_close(step.run().double(), step.truth(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("hn", [5, 64])
@pytest.mark.parametrize("g", [1, 4])
def test_other_types(implementation: str, dtype: torch.dtype, g: int, hn: int) -> None:
    step = make_step(SHARED, g, hn, dtype, behind=finite_behind(implementation))
    truth = step.truth()
    if implementation == "compiled":  # one rounding of the result
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(step.run().double(), truth, atol=max(1e-6 if eps > 1e-6 else 1e-14, eps * 1e-2), rtol=eps)
    else:
        floor = {torch.float64: 1e-14, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert_within_twice(step.run(), step.truth(dtype), truth, name="out", floor=floor)


def test_large_scores(implementation: str) -> None:
    step = make_step(SHARED, 2, 64, torch.float32, size=1e4, behind=finite_behind(implementation))
    out = step.run()
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), step.truth(), atol=0.0, rtol=1e-2)  # scores of 1e4 have an error of 1e-3


def test_minus_infinity_is_no_weight_and_nan_is_not_hidden() -> None:
    if _ext._C is None:
        pytest.skip(f"extension {_ext.describe()}")
    step = make_step(ALONE, 2, 32, torch.float32)
    step.query.abs_()
    step.prompts[1, :, 0, :64] = -torch.inf  # the whole first block
    torch.testing.assert_close(step.run().double(), step.truth(), atol=1e-6, rtol=1e-6)
    step.prompts[1, 0, 0, 70, 3] = torch.nan
    assert step.run()[1, 0].isnan().all() and step.run()[[0, 2]].isfinite().all()


@pytest.mark.parametrize("case", [ALONE, EQUAL])
def test_the_new_keys_and_values_are_cached_and_nothing_else_is_written(implementation: str, case: Any) -> None:
    step = make_step(case, 2, 32, torch.float32, behind=finite_behind(implementation))
    own, prompts = step.own.clone(), step.prompts.clone()
    step.run()
    for row, length in enumerate(step.lengths):
        own[row, :, :, length - 1] = step.keys_values[row]
    torch.testing.assert_close(step.own, own, atol=0.0, rtol=0.0, equal_nan=True)
    torch.testing.assert_close(step.prompts, prompts, atol=0.0, rtol=0.0, equal_nan=True)


def test_threads_do_not_matter() -> None:
    threads = torch.get_num_threads()
    step = make_step(SHARED, 2, 64, torch.float32, behind=0.0)
    try:
        torch.set_num_threads(1)
        alone = step.run()
        torch.set_num_threads(3)
        assert torch.equal(step.run(), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [7, 1, 71]}, r"lengths: got 71 at 2, expected 1 to 70"),
        ({"lengths": [7, 0, 70]}, r"lengths: got 0 at 1, expected 1 to 70"),
        ({"lengths": [7, 1]}, r"lengths: got int64 \[2\], expected int64 \[3\]"),
        ({"prompt_lengths": [3, 131, 1]}, r"prompt_lengths: got 131 at 1, expected 1 to 130"),
        ({"prompt_of": [0, 3, 1]}, r"prompt_of: got 3 at 1, expected 0 to 2"),
        (
            {"keys_values": torch.zeros(3, NG, 1, 32)},
            r"keys_values: got float32 \[3, 2, 1, 32\], expected .* \[3, 2, 2, 32\]",
        ),
        ({"own": torch.zeros(2, NG, 2, 70, 32)}, r"own: got float32 \[2, 2, 2, 70, 32\], expected float32 \[3, 2, 2, 70, 32\]"),
        ({"prompts": torch.zeros(3, 1, 2, 130, 32)}, r"prompts: got float32 \[3, 1, 2, 130, 32\], expected"),
        ({"prompts": torch.zeros(3, NG, 2, 130, 32).bfloat16()}, r"prompts: got bfloat16 .*, expected float32"),
        ({"query": torch.zeros(3, NG, 2, 32, dtype=torch.int64)}, r"query: got int64, expected float32, bfloat16"),
        ({"query": torch.zeros(3, NG, 2, 520)}, r"query: got heads of 520, expected 1 to 512"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    if _ext._C is None:
        pytest.skip(f"extension {_ext.describe()}")
    step = make_step(ALONE, 2, 32, torch.float32)
    for name, value in change.items():
        setattr(step, name, value)
    with pytest.raises(ValueError, match=r"cached_attention.attend_step: " + message):
        step.run()
