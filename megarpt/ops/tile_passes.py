"""The passes over one tile of logits, compiled or in plain torch: the softmax around the head's matrix products.

csrc/linear_logprob/api.hpp says what each pass does; the two classes here do the same, one through the extension, one with
torch operations where the extension is absent. megarpt/ops/head_tiles.py walks over the tiles.

Dims: n rows of a tile (tokens), v columns (vocabulary entries).
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megarpt.ops import _ext


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What exponentials are computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class RowState(NamedTuple):
    """What is known of the softmax of every row [n] after some of its columns."""

    largest: Tensor  # the largest logit so far, after division by the temperature; wide dtype
    sum: Tensor  # of exp(z - largest); fp64
    weighted: Tensor | None  # sum of (z - largest) exp(z - largest), for the entropy; fp64
    target: Tensor  # the label's logit once its column has passed, 0 before; wide dtype
    best: Tensor  # column of the largest logit, the first of equals; -1 before the first; int64

    @classmethod
    def start(cls, num_rows: int, like: Tensor, entropy: bool) -> RowState:
        """Before the first tile, on the device and in the wide dtype of `like`."""
        wide = wide_dtype(like.dtype)
        return cls(
            like.new_full((num_rows,), -torch.inf, dtype=wide),
            like.new_zeros(num_rows, dtype=torch.float64),
            like.new_zeros(num_rows, dtype=torch.float64) if entropy else None,
            like.new_zeros(num_rows, dtype=wide),
            like.new_full((num_rows,), -1, dtype=torch.int64),
        )

    def rows(self, span: slice) -> RowState:
        """Views of some rows."""
        return RowState(*(None if part is None else part[span] for part in self))  # type: ignore[arg-type]


class RowGradient(NamedTuple):
    """What turns a row of logits into its gradient: p * (constant + slope * log p), with two columns given outright."""

    largest: Tensor  # [n] log p = (z - largest) - log_sum
    log_sum: Tensor
    constant: Tensor
    slope: Tensor | None  # None: 0
    label: Tensor  # [n] int64 column, negative where it is not on this rank
    at_label: Tensor
    best: Tensor  # [n] int64
    at_best: Tensor

    def rows(self, at: Tensor | slice) -> RowGradient:
        """Some of the rows."""
        return RowGradient(*(None if part is None else part[at] for part in self))  # type: ignore[arg-type]


class TilePasses(Protocol):
    """Both implementations."""

    def add_tile(self, logits: Tensor, labels: Tensor, first_column: int, inverse_temperature: float, state: RowState) -> None:
        """Merge the tile [n, v] into the state, in place."""
        ...

    def write_gradient(
        self,
        source: Tensor,
        rows: Tensor | None,
        first_column: int,
        inverse_temperature: float,
        gradient: RowGradient,
        out: Tensor,
    ) -> None:
        """out [n, v] <- gradient of rows `rows` of source [m, v] (None: all); `out` may be `source` when rows is None."""
        ...

    def add_transposed(self, source: Tensor, out: Tensor, overwrite: bool) -> None:
        """out [c, r] += source [r, c] (fp32), or = when overwrite."""
        ...


def passes_for(device: torch.device) -> TilePasses:
    """The compiled passes where they can run, else those in torch."""
    module = _ext.extension(device)
    return TorchPasses() if module is None else CompiledPasses(module, device)


class CompiledPasses:
    """Through the extension."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        self.module = module.linear_logprob
        self.place = _ext.place(device)

    def add_tile(self, logits: Tensor, labels: Tensor, first_column: int, inverse_temperature: float, state: RowState) -> None:
        packed = self.module.RowState(*map(_ext.vector, state))
        self.module.add_tile(_ext.matrix(logits), _ext.vector(labels), first_column, inverse_temperature, packed, self.place)

    def write_gradient(
        self,
        source: Tensor,
        rows: Tensor | None,
        first_column: int,
        inverse_temperature: float,
        gradient: RowGradient,
        out: Tensor,
    ) -> None:
        packed = self.module.RowGradient(*map(_ext.vector, gradient))
        self.module.write_gradient(
            _ext.matrix(source), _ext.vector(rows), first_column, inverse_temperature, packed, _ext.matrix(out), self.place
        )

    def add_transposed(self, source: Tensor, out: Tensor, overwrite: bool) -> None:
        self.module.add_transposed(_ext.matrix(source), _ext.matrix(out), overwrite)


class TorchPasses:
    """In plain torch: several passes over the tile and a wide copy of it."""

    def add_tile(self, logits: Tensor, labels: Tensor, first_column: int, inverse_temperature: float, state: RowState) -> None:
        z = logits.to(state.largest.dtype) * inverse_temperature
        here, column = z.max(dim=-1)
        grows = here > state.largest
        largest = torch.where(grows, here, state.largest)
        shift = torch.where(grows & (state.sum != 0.0), state.largest.double() - largest.double(), 0.0)
        if state.weighted is not None:
            state.weighted.add_(shift * state.sum).mul_(shift.exp())
        state.sum.mul_(shift.exp())
        below = z.sub_(largest[:, None])
        e = below.exp()
        state.sum.add_(e.sum(dim=-1))
        if state.weighted is not None:
            state.weighted.add_((e * below).sum(dim=-1))
        state.largest.copy_(largest)
        state.best.copy_(torch.where(grows, column + first_column, state.best))
        local = labels - first_column
        found = (local >= 0) & (local < logits.shape[1])
        target = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0].to(z.dtype) * inverse_temperature
        state.target.copy_(torch.where(found, target, state.target))

    def write_gradient(
        self,
        source: Tensor,
        rows: Tensor | None,
        first_column: int,
        inverse_temperature: float,
        gradient: RowGradient,
        out: Tensor,
    ) -> None:
        z = source if rows is None else source.index_select(0, rows)
        log_p = (z.to(gradient.largest.dtype) * inverse_temperature).sub_(gradient.largest[:, None])
        log_p.sub_(gradient.log_sum[:, None])
        p = log_p.exp()
        factor = gradient.constant[:, None]
        out.copy_(p.mul_(factor if gradient.slope is None else log_p.mul_(gradient.slope[:, None]).add_(factor)))
        for columns, values in ((gradient.best, gradient.at_best), (gradient.label, gradient.at_label)):
            local = columns - first_column
            found = torch.nonzero((local >= 0) & (local < out.shape[1]))[:, 0]
            out[found, local[found]] = values[found].to(out.dtype)

    def add_transposed(self, source: Tensor, out: Tensor, overwrite: bool) -> None:
        if overwrite:
            out.copy_(source.t())
        else:
            out.add_(source.t())
