"""What every test of streaming needs."""

from __future__ import annotations

import pytest
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker


@pytest.fixture(autouse=True)
def _no_experts_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core keeps two things of the first model of experts in a process: how many layers it had, and the shape of the
    scale of its balance loss."""
    get_moe_layer_wise_logging_tracker().clear()
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
