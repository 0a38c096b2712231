"""Choosing a device and naming what is missing."""

import inspect

import pytest
import torch

from megarpt.config.validate import COLLECTIVE_TIMEOUT_MINUTES
from megarpt.device import libraries, runtime
from megarpt.errors import ExtensionError


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what a machine without CUDA says")
def test_cuda_by_name_is_refused_without_cuda() -> None:
    with pytest.raises(ExtensionError, match="got 'cuda'"):
        runtime.start("cuda")


def test_rng_state_round_trip(cpu_runtime: runtime.Runtime) -> None:
    state = cpu_runtime.rng_state()
    first = torch.rand(4)
    cpu_runtime.set_rng_state(state)
    assert torch.equal(first, torch.rand(4))


def test_memory_is_reported(cpu_runtime: runtime.Runtime) -> None:
    assert 0 < cpu_runtime.memory_bytes() <= 2 * cpu_runtime.peak_memory_bytes()


def test_rules_know_how_long_a_collective_waits() -> None:
    assert inspect.signature(runtime.start).parameters["timeout_minutes"].default == COLLECTIVE_TIMEOUT_MINUTES


def test_an_absent_library_has_a_reason() -> None:
    assert "no_such_library" in str(libraries.why_absent("no_such_library"))
    assert libraries.why_absent("json") is None
