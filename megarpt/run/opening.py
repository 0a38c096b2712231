"""What every training command opens in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarpt.config.schema import TrainingConfig
from megarpt.device.runtime import Runtime
from megarpt.model.parameters import ParameterCount
from megarpt.train.checkpoint_files import latest_checkpoint
from megarpt.train.perf import PerfMeter, flops_per_token, host_memory, peak_flops
from megarpt.train.rundir import RunDir
from megarpt.train.timers import StepTimers


def open_run(cfg: TrainingConfig, runtime: Runtime, hosts: Mapping[str, Any]) -> RunDir:
    """The run folder, locked; as `RunDir.open`."""
    has_checkpoint = latest_checkpoint(f"{cfg.run.dir}/checkpoints") is not None
    facts = {"device": runtime.device_name, "world_size": runtime.world_size, "backend": runtime.backend, "hosts": hosts}
    return RunDir.open(cfg, has_checkpoint=has_checkpoint, facts=facts, is_writer=runtime.rank == 0)


def perf_meter(
    cfg: TrainingConfig, runtime: Runtime, parameters: ParameterCount, folder: RunDir, timers: StepTimers
) -> PerfMeter:
    """What measures the steps of a run on this machine."""
    return PerfMeter(
        world_size=runtime.world_size,
        flops_per_token=flops_per_token(
            parameters.multiplying, parameters.num_layers, parameters.attention_width, cfg.data.seq_length
        ),
        peak_flops=peak_flops(runtime.device_name, cfg.train.precision),
        memory=lambda: {"mem/peak_bytes": float(runtime.peak_memory_bytes()), **host_memory(folder.path)},
        timers=timers,
    )
