"""Which optional accelerator libraries work here. Each is tried once, and the reason for a failure is kept."""

from __future__ import annotations

import importlib
from functools import cache


@cache
def why_absent(module: str) -> str | None:
    """None when `module` imports, otherwise the reason it does not.

    A library that is installed but broken (a CUDA library that cannot be loaded, a missing symbol) counts as absent: it must
    never stop a run that does not need it, and `megarpt doctor` shows the reason.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    except (OSError, RuntimeError, AttributeError) as error:
        return f"installed but broken: {error}"
    return None


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's torch modules import."""
    return why_absent("transformer_engine.pytorch") is None


def has_apex() -> bool:
    """Whether apex's fused optimizers import."""
    return why_absent("apex.optimizers") is None
