"""What everything here needs; `make test-gpu` builds the extension accordingly."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from megarpt.ops import _ext


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip(f"needs an NVIDIA GPU, and torch {torch.__version__} sees none")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def extension(cuda: torch.device) -> ModuleType:
    """megarpt._C with its CUDA kernels."""
    module = _ext.extension(cuda)
    if module is None:
        pytest.skip(f"needs the extension built with CUDA, as `make test-gpu` does; it is: {_ext.describe()}")
    return module
