"""The rank that holds the others up is named, and even ranks are left in peace."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarpt.testing.distributed import spawn
from megarpt.train.perf import PerfMeter
from megarpt.train.stragglers import RankPlace, StragglerWatch, rank_places, ranks_by_host, slowest
from megarpt.train.timers import StepTimers

STEPS, INTERVAL, PATIENCE = 16, 4, 3


@pytest.mark.parametrize(
    ("seconds", "stages", "rank", "spread"),
    [
        ([1.0, 1.0, 1.5, 1.0], [0, 0, 0, 0], 2, 1.5),
        ([1.0, 3.0], [0, 0], 1, 3.0),
        ([1.0, 1.2, 4.0, 4.0], [0, 0, 1, 1], 1, 1.2),  # the second stage has more to do, and is even
        ([1.0, 4.0], [0, 1], 0, 1.0),  # nobody to compare with
        ([0.0, 0.0], [0, 0], 0, 1.0),
    ],
)
def test_the_slowest_is_far_from_the_median_of_its_stage(
    seconds: list[float], stages: list[int], rank: int, spread: float
) -> None:
    worst = slowest(seconds, stages)
    assert (worst.rank, worst.spread) == (rank, pytest.approx(spread))
    assert worst.seconds == seconds[rank]


def watch_run(slow_rank: int | None) -> dict[str, Any]:
    """Steps in which every rank works 40 ms, the slow one six times as much, and waits for the others like a gradient
    reduction does; what rank 0 was told."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("megarpt.train.stragglers").addHandler(handler)
    rank, timers = dist.get_rank(), StepTimers()
    meter = PerfMeter(timers=timers)
    places = rank_places(stage=0)
    watch = StragglerWatch(meter, places, torch.device("cpu"), interval_steps=INTERVAL, ratio=2.0, patience=PATIENCE)
    tags = []
    for step in range(1, STEPS + 1):
        with meter.step():
            timers("forward-compute", log_level=2).start()
            time.sleep(0.04 * (6 if rank == slow_rank else 1))
            timers("forward-compute").stop()
            timers("all-grads-sync", log_level=1).start(barrier=False)
            dist.barrier()
            timers("all-grads-sync").stop()
        watch.after_step(step)
        tags.append(watch.scalars())
    parts = meter.scalars()
    return {"tags": tags, "warnings": [record.getMessage() for record in records], "hosts": ranks_by_host(places), **parts}


def test_a_slow_rank_is_named_with_its_host() -> None:
    ranks = spawn(4, watch_run, 2)
    for rank in ranks:
        due = [i + 1 for i, tags in enumerate(rank["tags"]) if tags]
        assert due == [4, 8, 12, 16]
        assert rank["tags"] == ranks[0]["tags"]
        last = rank["tags"][-1]
        assert last["time/slowest_rank"] == 2.0 and last["time/rank_spread"] > 2.0
        assert last["time/slowest_rank_s"] >= 0.24 and last["time/rank_median_s"] < last["time/slowest_rank_s"]
    ((host, on_it),) = ranks[0]["hosts"].items()
    assert on_it == [0, 1, 2, 3]
    (warning,) = ranks[0]["warnings"]  # once, although it stays slow
    assert f"rank 2 on host {host} holds the others up" in warning and "12 steps up to 12" in warning
    assert all(rank["warnings"] == [] for rank in ranks[1:])
    # Without the split every rank would look the same: the others wait where the slow one works.
    assert ranks[0]["time/grad_reduce_s"] > 2 * ranks[2]["time/grad_reduce_s"]
    assert ranks[0]["time/step_s"] == pytest.approx(ranks[2]["time/step_s"], rel=0.5)


def test_even_ranks_are_left_in_peace() -> None:
    for rank in spawn(4, watch_run, None):
        assert rank["warnings"] == []
        assert len([tags for tags in rank["tags"] if tags]) == 4


@pytest.mark.parametrize(
    ("spreads", "warned"),
    [
        ([1.5, 1.5], []),
        ([1.5, 1.5, 1.5, 1.5], [3]),
        ([1.5, 1.5, 1.1, 1.5, 1.5], []),
        ([1.5, 1.5, None, 1.5, 1.5], []),
        ([1.5, 1.5, 1.5, 1.0, 1.5, 1.5, 1.5], [3, 7]),
    ],
)
def test_only_a_rank_that_stays_behind_is_named(
    one_rank: Any, caplog: pytest.LogCaptureFixture, spreads: list[float | None], warned: list[int]
) -> None:
    """Rank 1 is behind rank 0 by these factors; None stands for rank 0 behind rank 1."""
    watch, told = StragglerWatch(PerfMeter(), [RankPlace("a", 0)] * 2, torch.device("cpu"), interval_steps=1), []
    for step, spread in enumerate(spreads, 1):
        caplog.clear()
        watch.count(slowest([2.0, 1.0] if spread is None else [1.0, spread], [0, 0]), step)
        told += [step] * len(caplog.records)
    assert told == warned
