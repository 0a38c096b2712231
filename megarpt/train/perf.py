"""How fast a run is and what it occupies.

Time is split by what it was spent on: steps, the parts of a step (see `timers.py`), and what lies around steps (evaluation,
saving). Rates count steps only, so an evaluation does not look like a slow step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import psutil

from megarpt.train.phases import OWN_WORK
from megarpt.train.timers import StepTimers

Interlude = Literal["evaluation", "save_stall", "save"]

# Dense bf16 FLOP/s from the vendor's data sheets, by a part of the device's name; the first match counts.
_PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
)


class PerfMeter:
    """Rates and times since the last time they were asked for."""

    def __init__(
        self,
        *,
        world_size: int = 1,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        memory: Callable[[], Mapping[str, float]] | None = None,
        timers: StepTimers | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start measuring.

        Args:
            world_size: number of devices that share the work.
            flops_per_token: floating-point operations of forward and backward pass, for TFLOP/s; see `flops_per_token`.
            peak_flops: what one device can do in the precision of the run, for MFU; see `peak_flops`.
            memory: `mem/` tags to add whenever the rates are asked for.
            timers: what megatron-core and the training step report their parts to.
            clock: seconds, monotonic.
        """
        self._world_size, self._flops_per_token, self._peak_flops = world_size, flops_per_token, peak_flops
        self._memory, self._clock = memory, clock
        self._timers = timers or StepTimers()
        self._started = clock()
        self._step_s_total = 0.0
        self._own_s, self._own_steps = 0.0, 0
        self._reset()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimizer step, including the wait for its data."""
        start = self._clock()
        with self._timers.step():
            yield
        self._step_s += self._clock() - start
        self._steps += 1
        for parts in self._timers.finished():
            self._timed_steps += 1
            self._own_steps += 1
            for name, seconds in parts.items():
                self._parts[name] = self._parts.get(name, 0.0) + seconds
                self._own_s += seconds if name in OWN_WORK else 0.0

    def data_wait(self) -> AbstractContextManager[None]:
        """Around fetching the next batches, inside `step`."""
        return self._timers.phase("data_wait")

    @contextmanager
    def phase(self, name: Interlude) -> Iterator[None]:
        """Around an evaluation, outside `step`."""
        start = self._clock()
        yield
        self.add(name, self._clock() - start)

    def add(self, name: Interlude, seconds: float) -> None:
        """Count time that passed elsewhere, such as on a thread that writes a checkpoint."""
        self._phases[name] = self._phases.get(name, 0.0) + seconds

    def count_tokens(self, num_tokens: int) -> None:
        """Add the tokens a step fed through the model, over all ranks."""
        self._tokens += num_tokens

    def scalars(self) -> dict[str, float]:
        """`time/`, `perf/`, `mem/` and `sys/` tags since the last call, and begin anew."""
        tags: dict[str, float] = {}
        self._step_s_total += self._step_s
        if self._steps:
            tags["time/step_s"] = self._step_s / self._steps
        tags |= {f"time/{name}_s": seconds / self._timed_steps for name, seconds in self._parts.items()}
        tags |= {f"time/{name}_s": seconds for name, seconds in self._phases.items()}
        if self._step_s > 0:
            rate = self._tokens / self._step_s
            tags["perf/tokens_per_s"] = rate
            tags["perf/tokens_per_s_per_device"] = rate / self._world_size
            if self._flops_per_token is not None:
                flops = rate * self._flops_per_token / self._world_size
                tags["perf/tflops_per_device"] = flops / 1e12
                if self._peak_flops is not None:
                    tags["perf/mfu"] = flops / self._peak_flops
        elapsed = self._clock() - self._started
        if elapsed > 0:
            tags["sys/goodput_share"] = self._step_s_total / elapsed
        if self._memory is not None:
            tags |= self._memory()
        self._reset()
        return tags

    def own_seconds(self) -> float:
        """What this rank itself needed for a step, without the waits for its peers; the mean since the last call."""
        mean = self._own_s / self._own_steps if self._own_steps else 0.0
        self._own_s, self._own_steps = 0.0, 0
        return mean

    def _reset(self) -> None:
        self._steps, self._tokens, self._timed_steps = 0, 0, 0
        self._step_s = 0.0
        self._parts: dict[str, float] = {}
        self._phases: dict[Interlude, float] = {}


def flops_per_token(num_parameters: float, num_layers: int, attention_width: int, seq_length: int) -> float:
    """Multiply-adds counted as two, forward plus backward, without recomputation.

    6 for each parameter that multiplies (embeddings that are only looked up left out), and causal attention, whose queries see
    half of the sequence on average: 6 * num_layers * attention_width * seq_length, with attention_width = heads * head size.
    Documents kept apart see less, so the figure is an upper bound then.
    """
    return 6.0 * num_parameters + 6.0 * num_layers * attention_width * seq_length


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense FLOP/s of a known device in bf16; None for other devices and precisions, where no MFU is reported."""
    if precision != "bf16":
        return None
    return next((peak for part, peak in _PEAK_BF16_FLOPS if part in device_name), None)


def host_memory(folder: Path) -> dict[str, float]:
    """Resident memory of this process and, on hosts that have the run folder, free space where the run is written; bytes."""
    tags = {"mem/host_rss_bytes": float(psutil.Process().memory_info().rss)}
    if folder.exists():
        tags["mem/disk_free_bytes"] = float(shutil.disk_usage(folder).free)
    return tags
