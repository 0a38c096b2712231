"""The HTTP side of `megarpt serve`: requests become orders for the engine, what it draws becomes answers.

What comes from outside is bounded: the size of a request, its completions, the tokens of a prompt with its completion, and the
completions that wait. A client that leaves takes its completions with it.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import MegarptError, RolloutError
from megarpt.rl.completions_api import (
    MAX_COMPLETIONS,
    Choice,
    CompletionAnswer,
    CompletionRequest,
    Model,
    ModelList,
    TokenLogprobs,
    UpdateWeightsAnswer,
    UpdateWeightsRequest,
    Usage,
    error_body,
    first_problem,
)
from megarpt.rl.engine_loop import BusyError, EngineLoop, Event, Order, Progress
from megarpt.rl.rollout import Sampling
from megarpt.rl.structs import Completion, StopReason

logger = logging.getLogger(__name__)

_CLIENT_LEFT = 499  # nobody reads it


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What is served, and its limits."""

    name: str  # of the model
    tokenizer: Tokenizer
    vocab_size: int  # rows of the model that stand for something
    max_sequence_length: int  # of a prompt with its completion
    load: Callable[[Path, int], None] | None  # takes over the weights of a folder under a version; None refuses all
    max_body_bytes: int = 8 << 20


class _RefusedError(Exception):
    """An answer that is an error."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "invalid_request_error", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind=kind, param=param)


class CompletionApp:
    """The routes. `app` is what a server of ASGI runs.

    Args:
        loop: draws.
        served: what it draws from.
    """

    def __init__(self, loop: EngineLoop, served: Served) -> None:
        self._loop, self._served = loop, served
        self._started = int(time.time())
        routes = [
            Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
            Route("/v1/models", self._guarded(self._models)),
            Route("/health", self._guarded(self._health)),
            Route("/update_weights_from_disk", self._guarded(self._update), methods=["POST"]),
            Route("/model_info", self._guarded(self._model_info)),
            Route("/get_weight_version", self._guarded(self._model_info)),
        ]
        self.app = Starlette(routes=routes, exception_handlers={404: _no_such_path, 405: _no_such_path})

    @staticmethod
    def _guarded(handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def guarded(request: Request) -> Response:
            try:
                response: Response = await handler(request)
            except _RefusedError as refused:
                return JSONResponse(refused.body, refused.status)
            except ClientDisconnect:
                return Response(status_code=_CLIENT_LEFT)
            return response

        return guarded

    async def _models(self, _: Request) -> Response:
        model = Model(
            id=self._served.name,
            created=self._started,
            owned_by="megarpt",
            max_model_len=self._served.max_sequence_length,
        )
        return JSONResponse(ModelList(data=[model]).model_dump())

    async def _health(self, _: Request) -> Response:
        return JSONResponse({}, 200 if self._loop.is_open else 503)

    async def _model_info(self, _: Request) -> Response:
        return JSONResponse({"model_path": self._served.name, "weight_version": str(self._loop.policy_version)})

    async def _update(self, request: Request) -> Response:
        load = self._served.load
        if load is None:
            raise _RefusedError("this server takes no weights: start it with --weights-dir FOLDER", status=403)
        try:
            asked = UpdateWeightsRequest.model_validate_json(await self._body(request))
        except ValidationError as error:
            raise _invalid(error) from error
        folder, version = Path(asked.model_path), int(asked.weight_version)
        try:
            await asyncio.wrap_future(self._loop.change(lambda: load(folder, version)))
        except MegarptError as error:
            logger.warning("weights %s were not taken over: %s", asked.weight_version, error)
            return JSONResponse(UpdateWeightsAnswer(success=False, message=str(error)).model_dump(), 400)
        logger.info("weights %s taken over from %s", asked.weight_version, folder)
        return JSONResponse(UpdateWeightsAnswer(success=True, message="taken over").model_dump())

    async def _complete(self, request: Request) -> Response:
        try:
            asked = CompletionRequest.model_validate_json(await self._body(request))
        except ValidationError as error:
            raise _invalid(error) from error
        if asked.model not in (None, self._served.name):
            message = f"model: got {asked.model!r}, expected {self._served.name!r}, the one that is served"
            raise _RefusedError(message, status=404, param="model")
        prompts = await asyncio.to_thread(self._prompts, asked)  # a long text takes its tokenizer a while
        work = _Work(asked, prompts, self._served)
        try:
            number = self._loop.submit(work.orders, work.report, wants_progress=asked.stream or bool(asked.stop_texts))
        except RolloutError as error:
            kind = "overloaded_error" if isinstance(error, BusyError) else "server_error"
            raise _RefusedError(str(error), status=503, kind=kind) from error
        if asked.stream:
            return StreamingResponse(self._stream(work, number), media_type="text/event-stream")
        try:
            return await _while_connected(request, self._whole_answer(work, number))
        finally:
            self._loop.cancel(number)

    async def _whole_answer(self, work: _Work, number: int) -> Response:
        async for _ in work.chunks(self._loop, number):
            pass
        if work.error is not None:
            raise _failed(work.error)
        answer = work.answer([done for done in work.done if done is not None])
        return JSONResponse(answer.model_dump())

    async def _stream(self, work: _Work, number: int) -> AsyncIterator[str]:
        try:
            async for choice in work.chunks(self._loop, number):
                yield _event(work.answer([choice]).model_copy(update={"usage": None}))
            if work.error is not None:
                yield f"data: {json.dumps(_failed(work.error).body)}\n\n"
            elif work.asked.stream_options is not None and work.asked.stream_options.include_usage:
                yield _event(work.answer([]))
            yield "data: [DONE]\n\n"
        finally:
            self._loop.cancel(number)

    async def _body(self, request: Request) -> bytes:
        limit, parts, size = self._served.max_body_bytes, [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _RefusedError(f"the request is larger than {limit:,} bytes", status=413)
            parts.append(part)
        return b"".join(parts)

    def _prompts(self, asked: CompletionRequest) -> list[tuple[int, ...]]:
        """Every prompt as ids, with room for a token behind each."""
        given: Any = asked.prompt  # a text, ids, or a list of either
        several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if len(several) * asked.n > MAX_COMPLETIONS:
            raise _RefusedError(
                f"{len(several)} prompts x n {asked.n}, expected at most {MAX_COMPLETIONS} completions", param="n"
            )
        if asked.prompt_id is not None and len(several) > 1:
            raise _RefusedError(f"prompt_id: got one with {len(several)} prompts, expected one prompt", param="prompt_id")
        prompts = []
        for each in several:
            ids = tuple(self._served.tokenizer.encode(each)) if isinstance(each, str) else tuple(each)
            self._check_prompt(ids, asked.max_tokens)
            prompts.append(ids)
        return prompts

    def _check_prompt(self, ids: tuple[int, ...], max_tokens: int) -> None:
        limit, vocab_size = self._served.max_sequence_length, self._served.vocab_size
        if not ids:
            raise _RefusedError("prompt: got no tokens, expected at least one; the model continues a text", param="prompt")
        if len(ids) + max_tokens > limit:
            raise _RefusedError(
                f"max_tokens: {len(ids)} tokens of prompt and {max_tokens} new ones exceed the model's {limit}; shorten the "
                f"prompt or ask for at most {max(0, limit - len(ids))}",
                param="max_tokens",
            )
        if max(ids) >= vocab_size:
            raise _RefusedError(f"prompt: got the token {max(ids)}, expected ids below {vocab_size}", param="prompt")


class _Work:
    """A request that is being drawn."""

    def __init__(self, asked: CompletionRequest, prompts: Sequence[tuple[int, ...]], served: Served) -> None:
        self.asked = asked
        self.error: RolloutError | None = None
        self.done: list[Choice | None] = [None] * (len(prompts) * asked.n)
        self._tokenizer, self._name = served.tokenizer, served.name
        self._prompt_tokens = sum(map(len, prompts))
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._version: int | None = None
        self._eod = None if asked.ignore_eos else served.tokenizer.eod
        self.orders = [order for i, prompt in enumerate(prompts) for order in self._orders(i, prompt)]
        self._texts = [_Text(asked.stop_texts, served.tokenizer, self._stops) for _ in self.orders]
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._http = asyncio.get_running_loop()

    def report(self, index: int, event: Event) -> None:
        """From the engine's thread."""
        if not self._http.is_closed():
            self._http.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def chunks(self, loop: EngineLoop, number: int) -> AsyncIterator[Choice]:
        """Pieces of the completions as they come; of those that are cut at a text, the rest is not drawn."""
        while any(done is None for done in self.done) and self.error is None:
            index, event = await self._events.get()
            if isinstance(event, RolloutError):
                self.error = event
            elif self.done[index] is None:
                choice = self._take(index, event)
                if self.done[index] is not None and isinstance(event, Progress):
                    loop.cancel(number, index)
                if choice is not None:
                    yield choice

    def answer(self, choices: Sequence[Choice]) -> CompletionAnswer:
        """The answer that holds these choices."""
        drawn = sum(len(text.tokens) for text in self._texts)
        usage = Usage(prompt_tokens=self._prompt_tokens, completion_tokens=drawn, total_tokens=self._prompt_tokens + drawn)
        version = None if self._version is None else str(self._version)
        return CompletionAnswer(
            id=self._id, created=self._created, model=self._name, choices=list(choices), usage=usage, weight_version=version
        )

    @property
    def _stops(self) -> frozenset[int]:
        return frozenset(self.asked.stop_token_ids) | (frozenset() if self._eod is None else {self._eod})

    def _orders(self, index: int, prompt: tuple[int, ...]) -> list[Order]:
        asked = self.asked
        sampling = Sampling(
            max_new_tokens=asked.max_tokens,
            temperature=asked.temperature,
            top_k=max(0, asked.top_k),
            top_p=asked.top_p,
            stop_tokens=tuple(sorted(self._stops)),
            seed=secrets.randbits(62) if asked.seed is None else asked.seed,
        )
        name = str(index) if asked.prompt_id is None else asked.prompt_id
        return [Order(prompt=prompt, sampling=sampling, prompt_id=name, sample=sample) for sample in range(asked.n)]

    def _take(self, index: int, event: Progress | Completion) -> Choice | None:
        """What is new of a completion, and the whole of it once it has ended."""
        text = self._texts[index]
        seen = len(text.tokens)
        is_last = isinstance(event, Completion)
        if isinstance(event, Completion):
            self._version = event.policy_version
        start = seen if is_last else 0
        new = text.add(event.tokens[start:], event.logprobs[start:], is_last=is_last)
        ended = isinstance(event, Completion) or text.stop_reason is not None
        if ended:
            was_cut = isinstance(event, Completion) and event.stop is StopReason.LENGTH and text.stop_reason is None
            self.done[index] = self._choice(index, text, 0, text.shown, "length" if was_cut else "stop")
        if not new and len(text.tokens) == seen and not ended:
            return None
        reason = self.done[index]
        return self._choice(index, text, seen, new, None if reason is None else reason.finish_reason)

    def _shown(self, token: int) -> str:
        return self._tokenizer.token_text(token) if token < self._tokenizer.vocab_size else ""

    def _choice(self, index: int, text: _Text, start: int, shown: str, reason: str | None) -> Choice:
        logprobs = None
        if self.asked.logprobs is not None:
            logprobs = TokenLogprobs(
                tokens=[self._shown(token) for token in text.tokens[start:]],
                token_logprobs=text.logprobs[start:],
                text_offset=text.offsets[start:],
            )
        return Choice(
            index=index,
            text=shown,
            finish_reason=reason,
            stop_reason=None if reason is None else text.stop_reason,
            logprobs=logprobs,
            token_ids=text.tokens[start:] if self.asked.return_token_ids else None,
        )


class _Text:
    """The text of a completion as it grows, cut before the first of the texts that end it."""

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer, stop_tokens: frozenset[int]) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.offsets: list[int] = []  # where the text of each token begins, in characters
        self.shown = ""
        self.stop_reason: int | str | None = None
        self._stops, self._tokenizer, self._stop_tokens = stops, tokenizer, stop_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # not shown, since it may be the beginning of a text that ends the completion

    def add(self, tokens: Sequence[int], logprobs: Sequence[float], *, is_last: bool) -> str:
        """What these tokens add to what is shown."""
        before = len(self.shown)
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.stop_reason is not None:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.offsets.append(len(self.shown) + len(self._held))
            if token in self._stop_tokens:
                self.stop_reason = token
            else:
                self._grow(self._decoder.decode(self._bytes_of(token)))
        if is_last and self.stop_reason is None:
            self._grow(self._decoder.decode(b"", final=True))
        if (is_last or self.stop_reason is not None) and not isinstance(self.stop_reason, str):
            self.shown, self._held = self.shown + self._held, ""
        return self.shown[before:]

    def _grow(self, text: str) -> None:
        self._held += text
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            place, self.stop_reason = min(found)
            self.shown, self._held = self.shown + self._held[:place], ""
            return
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        end = len(self._held) - keep
        self.shown, self._held = self.shown + self._held[:end], self._held[end:]

    def _bytes_of(self, token: int) -> bytes:
        known = token < self._tokenizer.vocab_size
        return (self._tokenizer.token_bytes(token) if known else None) or b""


async def _while_connected(request: Request, work: Any) -> Response:
    """The result of `work`, which is given up when the client leaves."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_until_left(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else Response(status_code=_CLIENT_LEFT)
    finally:
        task.cancel()
        left.cancel()


async def _until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _no_such_path(request: Request, _: Exception) -> Response:
    return JSONResponse(error_body(f"{request.method} {request.url.path} is not served"), 404)


def _invalid(error: ValidationError) -> _RefusedError:
    message, param = first_problem(error)
    return _RefusedError(message, param=param)


def _failed(error: RolloutError) -> _RefusedError:
    return _RefusedError(str(error), status=500, kind="server_error")


def _event(answer: CompletionAnswer) -> str:
    return f"data: {answer.model_dump_json()}\n\n"
