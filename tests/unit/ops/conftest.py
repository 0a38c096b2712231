"""Fixtures of the tests of the ops."""

from __future__ import annotations

import pytest

from megarpt.ops import head_tiles


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 columns and as many rows as 60 bytes hold: 3 in fp32."""
    monkeypatch.setitem(head_tiles.TILE_COLUMNS, "cpu", 5)
    monkeypatch.setitem(head_tiles.TILE_BYTES, "cpu", 60)
