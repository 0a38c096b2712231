"""Remedies for megatron-core 0.16 where neither Transformer Engine nor apex is installed, on a GPU or not.

- Its distributed optimizer looks for the step count of torch's AdamW where that does not keep it, so its own checkpoints
  cannot be loaded. It knows the fused Adam of the two libraries, which has one count per parameter group. So megatron-core is
  given an AdamW of that form.
- Its router asks whether a function of Transformer Engine is None without having defined the name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megarpt.device.libraries import has_apex, has_transformer_engine


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW with the step count in the parameter group, computed by torch's fused kernel.

    Error: none against torch.optim.AdamW(fused=True); a test compares them bit by bit.
    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("GroupStepAdamW: got adam_w_mode=False, expected decoupled weight decay")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "megatron-core passes none"
        for group in self.param_groups:
            own = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not own:
                continue
            done = int(group.get("step", 0))
            group["step"] = done + 1
            moments = [self._moments(parameter) for parameter in own]
            adamw(
                own,
                [parameter.grad for parameter in own],
                [first for first, _ in moments],
                [second for _, second in moments],
                [],
                list(torch.full((len(own),), float(done), device=own[0].device).unbind()),  # the kernel adds the 1
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state["exp_avg"], state["exp_avg_sq"]


def install() -> None:
    """Repair megatron-core where it needs it. Call before a model or an optimizer is built."""
    if not has_transformer_engine():
        from megatron.core.transformer.moe import moe_utils

        if not hasattr(moe_utils, "te_general_gemm"):
            moe_utils.te_general_gemm = None
    if not has_transformer_engine() and not has_apex():
        from megatron.core import optimizer
        from megatron.core.optimizer import distrib_optimizer

        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = GroupStepAdamW, False
        distrib_optimizer.Adam = GroupStepAdamW
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
