"""`megarpt`, in which something happens to one rank in its sixth step: `failing_run.py WHAT RANK VERB ARGUMENTS...`."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from megarpt import cli
from megarpt.device import mcore_cpu

mcore_cpu.install_without_cuda()

from megarpt.train.step import TrainStep  # noqa: E402

what, rank = sys.argv[1:3]
original = TrainStep.__call__


def failing(self: TrainStep, batches: Any, progress: Any) -> Any:
    if progress.step == 5 and os.environ["RANK"] == rank:
        sys.stderr.write(f"it happens at {time.time():.2f}\n")
        sys.stderr.flush()
        if what == "raise":
            raise ValueError("as planned")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "sleep":
            time.sleep(1000.0)
    return original(self, batches, progress)


TrainStep.__call__ = failing  # type: ignore[method-assign]
sys.argv = ["megarpt", *sys.argv[3:]]
cli.entry()
