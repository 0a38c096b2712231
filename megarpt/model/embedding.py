"""Embeddings whose gradient is never as large as they are.

Autograd makes the gradient of an embedding as a matrix of the whole vocabulary, most of whose rows are zero, and adds it to the
parameter's `main_grad`. Here the rows of the tokens that were looked up are added to `main_grad` and nothing else is made.

Dims: t tokens, v rows, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from megarpt.ops.linear_logprob import no_gradient


class RowGradients(TorchFunctionMode):
    """While it is active, lookups in a parameter that has a `main_grad` add their gradient there, in its precision.

    megatron-core builds its embedding itself and knows no other gradient than the whole one.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding and len(args) == 2 and _is_plain(kwargs) and hasattr(args[1], "main_grad"):
            return _Lookup.apply(*args)
        return func(*args, **kwargs)


def _is_plain(options: Mapping[str, Any]) -> bool:
    return options.get("padding_idx") is options.get("max_norm") is None and not options.get("scale_grad_by_freq")


class _Lookup(torch.autograd.Function):
    """Shapes: [...], [v, h] -> [..., h]. Cost: backward, in half precision, [t, h] in fp32. Deterministic."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.parameter = weight
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        main_grad = ctx.parameter.main_grad
        rows = grad.reshape(-1, grad.shape[-1]).to(main_grad.dtype)
        main_grad.index_put_((tokens.flatten(),), rows, accumulate=True)
        ctx.parameter.grad_added_to_main_grad = True
        return None, no_gradient(ctx.parameter)
