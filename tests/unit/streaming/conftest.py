"""What every test of streaming needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker


@pytest.fixture(autouse=True)
def _no_layers_of_another_model() -> Iterator[None]:
    """megatron-core keeps balance losses by layer, with a place for each layer of the first model of the process."""
    get_moe_layer_wise_logging_tracker().clear()
    yield
    get_moe_layer_wise_logging_tracker().clear()
