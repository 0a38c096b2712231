"""What the fork server of `distributed.spawn` imports once for all ranks."""

import torch

from megarpt.device import mcore_cpu

if not torch.cuda.is_available():
    mcore_cpu.install()

import megarpt.model.build  # noqa: E402, F401
import megarpt.train.checkpoint  # noqa: E402, F401
import megarpt.train.step  # noqa: E402, F401
