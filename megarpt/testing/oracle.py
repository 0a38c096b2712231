"""The tolerance rule of every op: no more than twice the error of plain torch, both against a higher-precision oracle.

A fixed tolerance has to be guessed and then hides regressions; this one follows dtype, shape and data by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference in fp64; infinite when either side is not finite where the other is."""
    actual, oracle = actual.detach().double(), oracle.detach().double()
    if actual.numel() == 0:
        return 0.0
    difference = (actual - oracle).abs()
    difference = torch.where(actual == oracle, 0.0, difference)  # equal infinities
    return float(torch.where(difference.isnan(), torch.inf, difference).max())


def assert_within_twice(actual: Tensor, plain: Tensor, oracle: Tensor, *, floor: float = 0.0, name: str = "tensor") -> None:
    """Fail unless error(actual) <= 2 * error(plain) + floor.

    Args:
        actual: what the op returned.
        plain: what plain torch returned for the same inputs in the same dtype.
        oracle: the truth, from the same inputs in fp64.
        floor: absolute error that is always allowed; give it where plain torch may be exact by luck.
        name: what is compared, for the message.
    Raises:
        AssertionError: with both errors and the shape.
    """
    if actual.shape != oracle.shape or plain.shape != oracle.shape:
        raise AssertionError(f"{name}: shapes {tuple(actual.shape)}, {tuple(plain.shape)}, {tuple(oracle.shape)} differ")
    error, allowed = max_error(actual, oracle), 2.0 * max_error(plain, oracle) + floor
    if not error <= allowed:
        raise AssertionError(
            f"{name} {tuple(actual.shape)} {actual.dtype}: error {error:.3e} > 2 x plain torch's {max_error(plain, oracle):.3e}"
            f" + floor {floor:.1e}"
        )
