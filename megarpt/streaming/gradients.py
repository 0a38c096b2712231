"""Gradients of parameters that a backward pass meets many times."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from megarpt.ops.linear_logprob import no_gradient


class ParameterGradients:
    """Adds up what arrives for each parameter, in megatron-core's `main_grad` where there is one and otherwise in fp32.

    Inside the `with` block every gradient of a parameter that `torch.autograd.grad` computes is added at once and given back,
    so at most one exists beside the sums. Nothing else learns of it: hooks of the parameter run when `results` reach it, once
    per backward pass.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = parameters
        self._sums: dict[Parameter, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for parameter in self.parameters:
            if hasattr(parameter, "grad_added_to_main_grad"):
                parameter.grad_added_to_main_grad = False
            self._handles.append(parameter.register_hook(lambda grad, parameter=parameter: self._add(parameter, grad)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def results(self) -> list[Tensor]:
        """What autograd is to be given, for each parameter: its gradient, 0 where nothing arrived, or a placeholder where it
        is in `main_grad`."""
        return [self._result(parameter) for parameter in self.parameters]

    def _add(self, parameter: Parameter, grad: Tensor) -> Tensor:
        if not getattr(parameter, "grad_added_to_main_grad", False):  # then a fused kernel has added it
            target = getattr(parameter, "main_grad", None)
            if target is None:
                target = self._sums.get(parameter)
            if target is None:
                self._sums[parameter] = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
            else:
                target.add_(grad)
        return torch.zeros((), dtype=grad.dtype, device=grad.device).expand(grad.shape)  # nobody looks at it

    def _result(self, parameter: Parameter) -> Tensor:
        if hasattr(parameter, "main_grad"):
            parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
            return no_gradient(parameter)
        total = self._sums.get(parameter)
        return torch.zeros_like(parameter) if total is None else total.to(parameter.dtype)
