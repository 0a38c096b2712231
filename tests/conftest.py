"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator

# The models of the tests are too small to share among threads, and this must be said before torch is loaded. Child
# processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from megarpt.device import mcore_cpu, runtime
from megarpt.ops import _ext

# Test modules import megatron-core when they are collected, so the CPU layer goes in before any of them.
mcore_cpu.install_without_cuda()


# The sanitizers look at compiled code only.
IMPLEMENTATIONS = ["compiled"] if os.environ.get("MEGARPT_SANITIZE") == "1" else ["compiled", "torch"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which passes the ops take: those of the compiled extension, or those in plain torch."""
    if request.param == "torch":
        monkeypatch.setattr(_ext, "_C", None)
    elif _ext._C is None:
        pytest.skip(f"extension {_ext.describe()}")
    return request.param


@pytest.fixture(autouse=True)
def _no_experts_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core keeps two things of the first model of experts in a process: how many layers it had, and the shape of the
    scale of its balance loss."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker

    get_moe_layer_wise_logging_tracker().clear()
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)


@pytest.fixture(scope="session")
def cpu_runtime() -> Iterator[runtime.Runtime]:
    """This process as a world of one rank on the CPU."""
    started = runtime.start("cpu")
    yield started
    started.close()


@pytest.fixture(scope="session")
def one_rank(cpu_runtime: runtime.Runtime):  # type: ignore[no-untyped-def]
    """megatron-core's process groups for a world of one rank."""
    from megarpt.parallel.layout import ParallelLayout

    return ParallelLayout().initialize(seed=1)


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """Undo what `setup_logging` does to the process."""
    root, package = logging.getLogger(), logging.getLogger("megarpt")
    handlers, level = list(root.handlers), package.level
    with warnings.catch_warnings():
        yield
    for handler in [each for each in root.handlers if each not in handlers]:
        root.removeHandler(handler)
        handler.close()
    package.setLevel(level)
    logging.captureWarnings(False)
