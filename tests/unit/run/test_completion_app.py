"""Texts of completions as they grow, and streams of them, over an engine whose text is known beforehand."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from megarpt.rl.engine_loop import EngineLoop
from megarpt.rl.rollout import Sampling
from megarpt.rl.structs import Completion, StopReason
from megarpt.run.completion_app import CompletionApp, Served, _Text
from megarpt.testing.tiny import byte_tokenizer


def grown(text: bytes, *stops: str, eod: bool = False, step: int = 1, is_last: bool = True) -> tuple[_Text, list[str]]:
    """A text that comes in pieces of `step` bytes, and what each piece added."""
    made = _Text(stops, byte_tokenizer(), frozenset({256}))
    tokens = [*text, *([256] if eod else [])]
    pieces = [tokens[i : i + step] for i in range(0, len(tokens), step)]
    return made, [
        made.add(piece, [-1.0] * len(piece), is_last=is_last and i == len(pieces) - 1) for i, piece in enumerate(pieces)
    ]


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "shown", "tokens", "reason"),
    [
        (b"hello", (), "hello", 5, None),
        (b"hello", ("l",), "he", 3, "l"),
        (b"hello", ("lo", "ll"), "he", 4, "ll"),
        (b"hello", ("x",), "hello", 5, None),
        (b"hello", ("lol",), "hello", 5, None),  # what may be its beginning is shown in the end
        (b"aaab", ("aab",), "a", 4, "aab"),
        ("h\u00e9\u20ac!".encode(), ("\u20ac",), "h\u00e9", 6, "\u20ac"),
        (b"a\xff\xffb", (), "a\ufffd\ufffdb", 4, None),
        (b"a\xe2\x82", (), "a\ufffd", 3, None),  # a character that is cut
    ],
)
def test_a_text_ends_before_what_ends_it_however_it_comes(
    text: bytes, stops: tuple[str, ...], shown: str, tokens: int, reason: str | None, step: int
) -> None:
    made, added = grown(text, *stops, step=step)
    assert made.shown == "".join(added) == shown
    assert (len(made.tokens), len(made.logprobs), made.stop_reason) == (tokens, tokens, reason)


def test_a_stop_token_is_counted_and_not_shown() -> None:
    made, added = grown(b"oval", "lx", eod=True)
    assert added == ["o", "v", "a", "", "l"] and made.tokens[-1] == 256 and made.stop_reason == 256


def test_what_may_begin_a_stop_is_held_back_until_it_is_known() -> None:
    _, added = grown(b"a<b<|end", "<|end|>", is_last=False)
    assert added == ["a", "", "<b", "", "", "", "", ""]


def test_offsets_are_where_tokens_begin_in_the_text() -> None:
    made, _ = grown("a\u00e9b".encode())
    assert made.offsets == [0, 1, 1, 2]


class Typist:
    """Draws the bytes of one text, one at a step, and can be asked for what it has so far."""

    policy_version = 3

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.drawn: dict[str, int] = {}
        self.cancelled: list[str] = []

    @property
    def is_idle(self) -> bool:
        return not self.drawn

    def add(self, key: str, prompt: Sequence[int], sampling: Sampling, *, prompt_id: str, sample: int) -> None:
        self.drawn[key] = 0

    def step(self) -> list[tuple[str, Completion]]:
        for key in self.drawn:
            self.drawn[key] += 1
        ended = [key for key, count in self.drawn.items() if count == len(self.text)]
        tokens, logprobs = self.drawn_so_far(ended[0]) if ended else ((), ())
        completion = Completion(
            tokens=tokens, logprobs=logprobs, text=self.text, stop=StopReason.LENGTH, policy_version=self.policy_version
        )
        return [(key, completion) for key in ended if self.drawn.pop(key)]

    def cancel(self, key: str) -> None:
        if self.drawn.pop(key, None) is not None:
            self.cancelled.append(key)

    def publish(self, version: int) -> None:
        raise AssertionError("nothing is published here")

    def drawn_so_far(self, key: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
        tokens = tuple(self.text[: self.drawn.get(key, 0)])
        return tokens, (-0.5,) * len(tokens)


def ask(engine: Typist, **body: Any) -> httpx2.Response:
    """One request to an app over the engine."""
    loop = EngineLoop(engine, max_waiting=8)
    served = Served(name="t", tokenizer=byte_tokenizer(), vocab_size=257, max_sequence_length=10_000, load=None)
    app = CompletionApp(loop, served).app
    thread = threading.Thread(target=loop.run)
    thread.start()

    async def send() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://t", verify=False) as client:
            return await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 9000} | body)

    try:
        return asyncio.run(send())
    finally:
        loop.stop()
        thread.join(timeout=30)


def chunks(answer: httpx2.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines]


def test_a_stream_has_tokens_as_they_are_drawn() -> None:
    pieces = chunks(ask(Typist("h\u00e9y".encode()), stream=True, return_token_ids=True))
    assert [(piece["text"], piece["token_ids"], piece["finish_reason"]) for piece in pieces] == [
        ("h", [104], None),
        ("", [0xC3], None),
        ("\u00e9", [0xA9], None),
        ("y", [121], "length"),
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_what_follows_a_text_that_ends_it_is_not_drawn(stream: bool) -> None:
    engine = Typist(b"one. two" + b"." * 8000)
    answer = ask(engine, stream=stream, stop=["."], logprobs=0)
    choices = chunks(answer) if stream else answer.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "one"
    assert choices[-1]["finish_reason"] == "stop" and choices[-1]["stop_reason"] == "."
    assert sum(len(choice["logprobs"]["token_logprobs"]) for choice in choices) == 4
    assert engine.cancelled == ["1/0"]


def test_a_full_queue_is_said_so() -> None:
    answer = ask(Typist(b"a"), n=9)
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_completions_along(stream: bool) -> None:
    class Slow(Typist):
        def step(self) -> list[tuple[str, Completion]]:
            time.sleep(0.002)
            return super().step()

    engine = Slow(b"." * 8000)
    loop = EngineLoop(engine, max_waiting=8)
    served = Served(name="t", tokenizer=byte_tokenizer(), vocab_size=257, max_sequence_length=10_000, load=None)
    app = CompletionApp(loop, served).app
    body = json.dumps({"prompt": "a", "max_tokens": 9000, "n": 2, "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

    async def leave() -> None:
        async def receive() -> dict[str, Any]:
            while not engine.drawn and len(messages) == 1:
                await asyncio.sleep(0.001)  # until it is being drawn
            return messages.pop(0)

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [],
            "query_string": b"",
            "root_path": "",
        }
        await app(scope, receive, send)

    thread = threading.Thread(target=loop.run)
    thread.start()
    asyncio.run(leave())
    loop.change(lambda: None).result(timeout=30)  # comes after the cancelling
    loop.stop()
    thread.join(timeout=30)
    assert sorted(engine.cancelled) == ["1/0", "1/1"]
