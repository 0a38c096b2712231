"""Every test of an op runs with the compiled passes and with those in torch, over tiles that are smaller than the tensors."""

from __future__ import annotations

import pytest

from megarpt.ops import _ext, head_tiles


@pytest.fixture(params=["compiled", "torch"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation the op uses."""
    if request.param == "torch":
        monkeypatch.setattr(_ext, "_C", None)
    elif _ext._C is None:
        pytest.skip(f"extension {_ext.describe()}")
    return request.param


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 columns and as many rows as 60 bytes hold: 3 in fp32."""
    monkeypatch.setitem(head_tiles.TILE_COLUMNS, "cpu", 5)
    monkeypatch.setitem(head_tiles.TILE_BYTES, "cpu", 60)
