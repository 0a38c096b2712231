"""What the fork server of `distributed.spawn` imports once for all ranks."""

from megarpt.device import mcore_cpu

mcore_cpu.install_without_cuda()

import megarpt.run.pretrain  # noqa: E402
import megarpt.run.score  # noqa: E402, F401
