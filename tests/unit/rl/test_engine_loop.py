"""The thread that draws for many, over an engine whose tokens are known beforehand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from megarpt.errors import CheckpointError, RolloutError
from megarpt.rl.engine_loop import BusyError, EngineLoop, Event, Order, Progress
from megarpt.rl.rollout import Sampling
from megarpt.rl.structs import Completion, StopReason


class Countdown:
    """Draws the tokens 0, 1, 2, ... up to `max_new_tokens`, one of each completion at a step; steps wait for permission."""

    def __init__(self, *, is_free: bool = True) -> None:
        self.policy_version = 0
        self.running: dict[str, tuple[int, list[int]]] = {}
        self.cancelled: list[str] = []
        self.threads: set[int] = set()
        self.steps = threading.Semaphore(10**6 if is_free else 0)
        self.has_stepped = threading.Semaphore(0)

    @property
    def is_idle(self) -> bool:
        return not self.running

    def add(self, key: str, prompt: Sequence[int], sampling: Sampling, *, prompt_id: str, sample: int) -> None:
        self.threads.add(threading.get_ident())
        if prompt == (13,):
            raise RolloutError("an unlucky prompt")
        self.running[key] = (sampling.max_new_tokens, [])

    def step(self) -> list[tuple[str, Completion]]:
        assert self.steps.acquire(timeout=30)
        finished = []
        for key, (limit, tokens) in list(self.running.items()):
            if limit == 666:
                raise RolloutError("the logits are NaN")
            tokens.append(len(tokens))
            if len(tokens) == limit:
                del self.running[key]
                finished.append((key, self._completion(tokens)))
        self.has_stepped.release()
        return finished

    def cancel(self, key: str) -> None:
        self.running.pop(key, None)
        self.cancelled.append(key)

    def publish(self, version: int) -> None:
        assert self.is_idle
        self.policy_version = version

    def drawn_so_far(self, key: str) -> tuple[list[int], list[float]]:
        tokens = self.running[key][1] if key in self.running else []
        return tokens, [-1.0] * len(tokens)

    def _completion(self, tokens: list[int]) -> Completion:
        logprobs = (-1.0,) * len(tokens)
        return Completion(
            tokens=tuple(tokens),
            logprobs=logprobs,
            text=bytes(tokens),
            stop=StopReason.LENGTH,
            policy_version=self.policy_version,
        )


class Silent(Countdown):
    """Cannot be asked for what it has not finished."""

    drawn_so_far = None  # type: ignore[assignment]


class Heard:
    """What was reported, and a way to wait for it."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Event]] = []
        self._ends = threading.Semaphore(0)

    def __call__(self, index: int, event: Event) -> None:
        self.events.append((index, event))
        if not isinstance(event, Progress):
            self._ends.release()

    def wait(self, count: int = 1) -> list[tuple[int, Event]]:
        for _ in range(count):
            assert self._ends.acquire(timeout=30)
        return self.events


def orders(*lengths: int, prompt: tuple[int, ...] = (1,)) -> list[Order]:
    return [Order(prompt=prompt, sampling=Sampling(max_new_tokens=n), prompt_id="p", sample=i) for i, n in enumerate(lengths)]


Run = Callable[..., EngineLoop]


@pytest.fixture
def run() -> Iterator[Run]:
    """Starts loops in threads of their own, and stops them."""
    started: list[tuple[EngineLoop, threading.Thread]] = []

    def start(engine: Countdown, max_waiting: int = 8) -> EngineLoop:
        loop = EngineLoop(engine, max_waiting=max_waiting)

        def body() -> None:
            try:
                loop.run()
            except RolloutError as error:
                assert "NaN" in str(error)

        started.append((loop, threading.Thread(target=body)))
        started[-1][1].start()
        return loop

    yield start
    for loop, thread in started:
        loop.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_completions_come_back_to_who_asked(run: Run) -> None:
    engine = Countdown()
    loop = run(engine)
    first, second = Heard(), Heard()
    loop.submit(orders(3, 1), first)
    loop.submit(orders(2), second)
    ended = {index: event.tokens for index, event in first.wait(2) if isinstance(event, Completion)}
    assert ended == {0: (0, 1, 2), 1: (0,)}
    assert [(index, event.tokens) for index, event in second.wait() if isinstance(event, Completion)] == [(0, (0, 1))]
    assert threading.get_ident() not in engine.threads and len(engine.threads) == 1


def test_progress_is_what_is_new(run: Run) -> None:
    heard = Heard()
    run(Countdown()).submit(orders(3), heard, wants_progress=True)
    *progress, (_, last) = heard.wait()
    assert [event for _, event in progress] == [Progress((0,), (-1.0,)), Progress((1,), (-1.0,))]
    assert isinstance(last, Completion) and last.tokens == (0, 1, 2)


@pytest.mark.parametrize("engine", [Silent(), Countdown()])
def test_no_progress_where_it_is_not_wanted_or_not_known(run: Run, engine: Countdown) -> None:
    heard = Heard()
    run(engine).submit(orders(3), heard, wants_progress=isinstance(engine, Silent))
    assert len(heard.wait()) == 1


def test_an_order_that_is_refused_ends_alone(run: Run) -> None:
    heard = Heard()
    run(Countdown()).submit([*orders(1), *orders(1, prompt=(13,))], heard)
    events = dict(heard.wait(2))
    assert isinstance(events[0], Completion) and "unlucky" in str(events[1])


def test_more_than_may_wait_is_refused_until_there_is_room(run: Run) -> None:
    engine = Countdown(is_free=False)
    loop, heard = run(engine, max_waiting=2), Heard()
    loop.submit(orders(1, 1), heard)
    with pytest.raises(BusyError, match="2 completions wait or run and 1 more"):
        loop.submit(orders(1), heard)
    engine.steps.release(10)
    heard.wait(2)
    loop.submit(orders(1, 1), heard)
    heard.wait(2)


def test_what_is_cancelled_is_neither_drawn_nor_reported_nor_counted(run: Run) -> None:
    engine = Countdown(is_free=False)
    loop, gone, stays = run(engine, max_waiting=3), Heard(), Heard()
    number = loop.submit(orders(5, 5), gone)
    engine.steps.release()
    assert engine.has_stepped.acquire(timeout=30)
    loop.cancel(number, 1)
    loop.cancel(number)
    loop.cancel(number)
    loop.cancel(99)
    engine.steps.release(10)
    done: Future[None] = loop.change(lambda: None)  # comes after the cancelling
    done.result(timeout=30)
    assert gone.events == [] and sorted(engine.cancelled) == ["1/0", "1/1"]
    loop.submit(orders(1, 1, 1), stays)
    stays.wait(3)


def test_a_change_waits_for_what_runs_and_what_comes_later_waits_for_it(run: Run) -> None:
    engine = Countdown(is_free=False)
    loop, before, after = run(engine), Heard(), Heard()
    loop.submit(orders(3), before)
    engine.steps.release()
    assert engine.has_stepped.acquire(timeout=30)
    done = loop.change(lambda: engine.publish(7))
    held = loop.submit(orders(9), Heard())
    loop.submit(orders(2), after)
    loop.cancel(held)
    assert not done.done()
    engine.steps.release(20)
    done.result(timeout=30)
    versions = [event.policy_version for heard in (before, after) for _, event in heard.wait() if isinstance(event, Completion)]
    assert versions == [0, 7] and loop.policy_version == 7


def test_a_change_that_fails_is_told_and_the_rest_goes_on(run: Run) -> None:
    def fail() -> None:
        raise CheckpointError("damaged")

    loop, heard = run(Countdown()), Heard()
    with pytest.raises(CheckpointError, match="damaged"):
        loop.change(fail).result(timeout=30)
    loop.submit(orders(1), heard)
    assert isinstance(heard.wait()[0][1], Completion)


@pytest.mark.parametrize("cause", ["stop", "failure"])
def test_the_end_is_told_to_all_who_wait_and_nothing_is_taken_after_it(run: Run, cause: str) -> None:
    engine = Countdown(is_free=False)
    loop, heard = run(engine), Heard()
    loop.submit(orders(666 if cause == "failure" else 5, 5), heard)
    done: Future[Any] = loop.change(lambda: None)
    if cause == "stop":
        loop.stop()
    engine.steps.release(1)
    assert all(isinstance(event, RolloutError) for _, event in heard.wait(2))
    with pytest.raises(RolloutError, match="ended before"):
        done.result(timeout=30)
    assert not loop.is_open
    with pytest.raises(RolloutError, match="is ending"):
        loop.submit(orders(1), heard)
    with pytest.raises(RolloutError, match="is ending"):
        loop.change(lambda: None)
