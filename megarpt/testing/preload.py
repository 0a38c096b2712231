"""What the fork server of `distributed.spawn` imports once for all ranks."""

from megarpt.device import mcore_cpu

mcore_cpu.install_without_cuda()

import megarpt.model.build
import megarpt.train.checkpoint
import megarpt.train.step  # noqa: F401
