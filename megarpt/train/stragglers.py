"""Which rank holds the others up.

A synchronous step lasts as long as its slowest rank needs, and every other rank sees only that it waits. So each rank counts
the seconds of its own work (`timers.OWN_WORK`), and now and then all of them compare. Stages of a pipeline do different work:
a rank is compared with the ranks of its own stage.
"""

from __future__ import annotations

import logging
import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megarpt.train.perf import PerfMeter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a rank runs and what it works on."""

    host: str
    stage: int  # of the pipeline


def rank_places(stage: int) -> list[RankPlace]:
    """The places of all ranks, by rank. Collectives: one all-gather over the world."""
    places: list[RankPlace] = [RankPlace("", 0)] * dist.get_world_size()
    dist.all_gather_object(places, RankPlace(socket.gethostname(), stage))
    return places


def ranks_by_host(places: Sequence[RankPlace]) -> dict[str, list[int]]:
    """host -> its ranks, for the records of a run."""
    table: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        table.setdefault(place.host, []).append(rank)
    return table


@dataclass(frozen=True, slots=True)
class Slowest:
    """The rank that is the furthest behind its peers."""

    rank: int
    seconds: float  # of its own work, per step
    median_s: float  # of the ranks that do the same work
    spread: float  # seconds / median_s

    def scalars(self) -> dict[str, float]:
        """The tags of a comparison."""
        return {
            "time/slowest_rank": float(self.rank),
            "time/slowest_rank_s": self.seconds,
            "time/rank_median_s": self.median_s,
            "time/rank_spread": self.spread,
        }


def slowest(seconds: Sequence[float], stages: Sequence[int]) -> Slowest:
    """The rank whose own work exceeds the median of its pipeline stage by the largest factor.

    Of an even number of ranks the lower middle one counts: of two ranks, the slower one is compared with the faster one.
    """
    medians = {
        stage: statistics.median_low([s for s, at in zip(seconds, stages, strict=True) if at == stage]) for stage in set(stages)
    }

    def spread(rank: int) -> float:
        median = medians[stages[rank]]
        return seconds[rank] / median if median > 0 else 1.0

    rank = max(range(len(seconds)), key=spread)
    return Slowest(rank, seconds[rank], medians[stages[rank]], spread(rank))


class StragglerWatch:
    """Compares the ranks every some steps and warns of one that stays behind.

    Collectives: one all-gather of a single number over the world every `interval_steps`; none in a world of one.
    """

    def __init__(
        self,
        perf: PerfMeter,
        places: Sequence[RankPlace],
        device: torch.device,
        *,
        interval_steps: int,
        ratio: float = 1.25,
        patience: int = 3,
    ) -> None:
        """Watch.

        Args:
            perf: what measures this rank.
            places: of all ranks.
            device: where tensors of the collective lie.
            interval_steps: steps between two comparisons; 0 never compares.
            ratio: a rank this many times slower than the median of its stage is behind.
            patience: comparisons in a row in which the same rank is behind before it is named in a warning.
        """
        self._perf, self._places, self._device, self._interval = perf, places, device, interval_steps
        self._ratio, self._patience = ratio, patience
        self._behind, self._times = -1, 0  # the rank that is behind, and for how many comparisons
        self._tags: dict[str, float] = {}

    def after_step(self, step: int) -> None:
        """Compare, when it is time; to be called on every rank."""
        if len(self._places) == 1 or self._interval == 0 or step % self._interval:
            return
        own = torch.tensor([self._perf.own_seconds()], dtype=torch.float64, device=self._device)
        gathered = own.new_empty(len(self._places))
        dist.all_gather_into_tensor(gathered, own)
        worst = slowest(gathered.tolist(), [place.stage for place in self._places])
        self._tags = worst.scalars()
        self.count(worst, step)

    def scalars(self) -> dict[str, float]:
        """`time/` tags of the last comparison, once."""
        tags, self._tags = self._tags, {}
        return tags

    def count(self, worst: Slowest, step: int) -> None:
        """Note who is behind, and warn when it has been the same rank for long enough."""
        if worst.spread < self._ratio:
            self._behind, self._times = -1, 0
            return
        self._times = self._times + 1 if worst.rank == self._behind else 1
        self._behind = worst.rank
        if self._times == self._patience and dist.get_rank() == 0:
            logger.warning(
                "rank %d on host %s holds the others up: its own work takes %.3g s a step, %.2f times the median of the ranks "
                "that do the same (%.3g s), in the last %d steps up to %d; look at that machine (clocks, temperature, other "
                "processes, its disk), or exclude it",
                worst.rank,
                self._places[worst.rank].host,
                worst.seconds,
                worst.spread,
                worst.median_s,
                self._patience * self._interval,
                step,
            )
