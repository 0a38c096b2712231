"""What the fork server of `distributed.spawn` imports once for all ranks."""

from megarpt.device import mcore_cpu

mcore_cpu.install_without_cuda()

import megarpt.model.build  # noqa: E402
import megarpt.train.checkpoint  # noqa: E402
import megarpt.train.step  # noqa: E402, F401
