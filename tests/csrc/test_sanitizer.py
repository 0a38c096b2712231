"""That `make sanitize` would see a kernel write where it must not: the guard, broken on purpose in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WRITES_PAST_THE_END = """
import torch
from megarpt.ops import _ext
from megarpt.ops.tile_passes import RowState

logits, labels = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
state = RowState.start(4, logits, entropy=False)
lie = [_ext._C.Vector(x.data_ptr(), 4, getattr(_ext._C.DType, str(x.dtype)[6:])) for x in state if x is not None]
lie[1] = _ext._C.Vector(torch.zeros(1, dtype=torch.float64).data_ptr(), 4, _ext._C.DType.float64)  # holds one, says four
packed = _ext._C.linear_logprob.RowState(lie[0], lie[1], _ext._C.Vector(), lie[2], lie[3])
_ext._C.linear_logprob.add_tile(_ext.matrix(logits), _ext.vector(labels), 0, 1.0, packed, _ext.place(logits.device))
"""


@pytest.mark.skipif(os.environ.get("MEGARPT_SANITIZE") != "1", reason="the extension is not a sanitized one; `make sanitize`")
def test_a_write_past_the_end_is_caught() -> None:
    result = subprocess.run([sys.executable, "-P", "-c", WRITES_PAST_THE_END], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "AddressSanitizer: heap-" in result.stderr, result.stderr[-2000:]
