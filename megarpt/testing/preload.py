"""What the fork server of `distributed.spawn` imports once for all ranks."""

import torch

from megarpt.device import mcore_cpu

if not torch.cuda.is_available():
    mcore_cpu.install()

import megarpt.model.build
import megarpt.train.checkpoint
import megarpt.train.step  # noqa: F401
