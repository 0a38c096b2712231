"""The AdamW that megatron-core is given, against torch's own."""

from __future__ import annotations

import pytest
import torch

from megarpt.device.runtime import Runtime
from megarpt.device.without_te import GroupStepAdamW

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (3,), (1,))]


def train(optimizer: torch.optim.Optimizer, own: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in own:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        own[2].grad = None  # never trained
        optimizer.step()


def test_it_is_torchs_fused_adamw_bit_by_bit() -> None:
    ours, theirs = parameters(), parameters()
    train(GroupStepAdamW(ours, **OPTIONS), ours, range(5))
    train(torch.optim.AdamW(theirs, fused=True, **OPTIONS), theirs, range(5))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_its_count_is_in_the_group_and_survives_a_reload() -> None:
    straight, resumed = parameters(), parameters()
    train(GroupStepAdamW(straight, **OPTIONS), straight, range(6))
    first = GroupStepAdamW(resumed, **OPTIONS)
    train(first, resumed, range(3))
    assert first.state_dict()["param_groups"][0]["step"] == 3
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in first.state_dict()["state"].values())
    second = GroupStepAdamW(resumed, **OPTIONS)
    second.load_state_dict(first.state_dict())
    train(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_other_forms_of_decay_are_refused() -> None:
    with pytest.raises(ValueError, match="adam_w_mode"):
        GroupStepAdamW(parameters(), adam_w_mode=False)


def test_megatron_core_builds_it(cpu_runtime: Runtime) -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer.moe import moe_utils

    assert optimizer.Adam is GroupStepAdamW and not optimizer.USING_PYTORCH_OPTIMIZER
    assert distrib_optimizer.HAVE_APEX_OR_TE and moe_utils.te_general_gemm is None
