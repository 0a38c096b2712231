"""Completions drawn by a server that speaks OpenAI's protocol: vLLM, SGLang, or `megarpt serve`.

The first rank of each copy of the model asks for the prompts of that copy, many at a time, and tells the others. New weights go
through a folder that both sides can read: a Hugging Face folder of safetensors, named after its version, which appears whole;
then rank 0 has the server read it and asks which version it has.

A request is repeated when the connection fails or the server says 5xx; as its seed is in it, the answer is the same.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import shutil
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from pydantic import ValidationError

from megarpt.corpus.atomic import write_errors
from megarpt.corpus.tokenizers import Tokenizer
from megarpt.errors import ConfigError, ExtensionError, RolloutError
from megarpt.parallel.collectives import from_first_of_copy
from megarpt.parallel.layout import ProcessGroups
from megarpt.rl.completions_api import ModelList, first_problem
from megarpt.rl.rollout import Sampling
from megarpt.rl.server_dialects import DIALECTS, Call, Dialect, Drawn
from megarpt.rl.structs import Completion, Prompt, RolloutGroup, StopReason
from megarpt.train.sharded import first_error, on_rank_0

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KEPT_VERSIONS = 2  # the one in use, and the one before, which a server that reads slowly may still have open
_FOLDER = re.compile(r"version-\d{8,}")
_LONGEST_WAIT_S = 60.0
_ROUNDING_NATS = 1e-3  # by which a log-probability may be above zero


class ServerEngine:
    """A rollout engine over HTTP.

    Args:
        url: where the server listens.
        weights_dir: a folder that the server can read under the same path; used for nothing else.
        tokenizer: for the bytes of completions.
        groups: of the layout.
        export: makes a folder with the policy's weights as Hugging Face publishes them. Every rank calls it, and it returns
            when the folder is whole.
        concurrency: requests at the same time, of this rank.
        limit_s: of one `generate`, and of one `publish`.
        attempts: of a request, the first one included. As many as there are give a server five minutes to start.
        first_wait_s: before the second attempt; doubles with each, up to a minute.

    Collectives: of objects, one broadcast over each kind of model parallelism in `generate`, two gathers over the world in
        `publish` besides those of `export`.

    Raises:
        ConfigError: the url is none.
        ExtensionError: httpx2 is not installed.
    """

    def __init__(
        self,
        url: str,
        weights_dir: Path,
        tokenizer: Tokenizer,
        groups: ProcessGroups,
        *,
        export: Callable[[Path], None],
        concurrency: int = 64,
        limit_s: float = 3600.0,
        attempts: int = 12,
        first_wait_s: float = 0.5,
    ) -> None:
        self.policy_version = -1  # none: whatever the server has is not known to be the policy
        self.weights_dir = weights_dir.absolute()
        self.limit_s = limit_s
        self._export, self._tokenizer, self._groups = export, tokenizer, groups
        self._http = _Http(url, concurrency=concurrency, attempts=attempts, first_wait_s=first_wait_s)
        self._server: tuple[Dialect, str] | None = None

    def publish(self, version: int) -> None:
        """Write the weights, have the server read them, and remove all but the newest two versions.

        Raises:
            RolloutError: the server did not take them over.
            DataError: the folder cannot be written.
        """
        folder = self.weights_dir / f"version-{version:08}"

        def make_room() -> None:
            with write_errors(folder):
                self.weights_dir.mkdir(parents=True, exist_ok=True)
                if folder.exists():
                    shutil.rmtree(folder)  # of a run that was taken up again at an earlier step

        on_rank_0(make_room)
        self._export(folder)
        problem = None
        if dist.get_rank() == 0:
            try:
                self._within_limit(lambda: self._update(folder, version), f"publishing weights {version}")
            except RolloutError as error:
                problem = str(error)
        problem = first_error(problem)
        if problem is not None:
            raise RolloutError(problem)
        on_rank_0(self._remove_old)
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling) -> list[RolloutGroup]:
        """See `RolloutEngine`.

        Raises:
            RolloutError: nothing was published yet, the server cannot be reached, refuses, took too long, or answers what
                cannot be true.
        """
        if self.policy_version < 0:
            raise RolloutError("generate was called before publish: the server's weights are not known to be the policy's")
        said: list[list[Completion]] | str = []
        if self._groups.is_first_of_copy and prompts:
            try:
                said = self._within_limit(
                    lambda: self._draw(prompts, group_size, sampling), f"drawing {len(prompts)} x {group_size} completions"
                )
            except RolloutError as error:
                said = str(error)
        said = from_first_of_copy(said, self._groups)
        if isinstance(said, str):
            raise RolloutError(said)
        return [RolloutGroup(prompt, completions) for prompt, completions in zip(prompts, said, strict=True)]

    def _within_limit(self, work: Callable[[], Coroutine[Any, Any, T]], what: str) -> T:
        async def limited() -> T:
            try:
                async with asyncio.timeout(self.limit_s), self._http.open():
                    return await work()
            except TimeoutError as error:
                raise RolloutError(
                    f"{what}: {self._http.url} took longer than {self.limit_s:g} s; see the server's log whether it works, or "
                    "ask for fewer or shorter completions"
                ) from error

        return asyncio.run(limited())

    async def _update(self, folder: Path, version: int) -> None:
        dialect, _ = await self._known_server()
        await dialect.update(self._http, folder, version)

    async def _draw(self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling) -> list[list[Completion]]:
        dialect, model = await self._known_server()
        dialect.check(sampling)
        size = group_size if dialect.draws_groups else 1
        asked = [(prompt, range(first, first + size)) for prompt in prompts for first in range(0, group_size, size)]
        drawn = await _all_or_none(
            [self._ask(dialect, prompt, dialect.ask(model, prompt, samples, sampling), sampling) for prompt, samples in asked]
        )
        completions = [each for answer in drawn for each in answer]
        return [completions[i : i + group_size] for i in range(0, len(completions), group_size)]

    async def _known_server(self) -> tuple[Dialect, str]:
        """What kind of server it is, and the name of its model."""
        if self._server is None:
            body = await self._http.get("/v1/models")
            try:
                model = ModelList.model_validate_json(body or b"").data[0]
            except ValidationError as error:
                raise RolloutError(f"{self._http.url}/v1/models: {first_problem(error)[0]}; got {_start(body)}") from error
            if model.owned_by not in DIALECTS:
                raise RolloutError(
                    f"{self._http.url}/v1/models: the server is by {model.owned_by!r}, expected one of {', '.join(DIALECTS)}; "
                    "start one of those"
                )
            self._server = DIALECTS[model.owned_by](), model.id
            logger.info("%s is a server of kind %s with the model %s", self._http.url, *(self._server[0].name, model.id))
        return self._server

    async def _ask(self, dialect: Dialect, prompt: Prompt, call: Call, sampling: Sampling) -> list[Completion]:
        body = await self._http.post(call.path, call.body)
        try:
            drawn = dialect.read(body or b"")
            expected = call.body.get("n", 1)
            if len(drawn) != expected:
                raise ValueError(f"got {len(drawn)} completions, expected {expected}")
            return [self._completion(each, sampling) for each in drawn]
        except ValidationError as error:
            problem = first_problem(error)[0]
        except ValueError as error:
            problem = str(error)
        raise RolloutError(
            f"{self._http.url}{call.path}, prompt {prompt.id}: the answer cannot be used: {problem}; got {_start(body)}. See "
            "megarpt/rl/server_dialects.py for how the server has to be started"
        )

    def _completion(self, drawn: Drawn, sampling: Sampling) -> Completion:
        """What a server said, if it can be true; a ValueError otherwise."""
        tokens, logprobs, limit = drawn.tokens, drawn.logprobs, sampling.max_new_tokens
        if len(tokens) != len(logprobs) or not 0 < len(tokens) <= limit:
            raise ValueError(f"{len(tokens)} tokens and {len(logprobs)} log-probabilities, expected as many, from 1 to {limit}")
        if sampling.temperature == 0:
            logprobs = [0.0] * len(tokens)  # what was drawn was certain, whatever the server gives here
        wrong = next((each for each in logprobs if not (math.isfinite(each) and each <= _ROUNDING_NATS)), None)
        if wrong is not None:
            raise ValueError(f"the log-probability of a token is {wrong}, expected a finite number of at most 0")
        stop_at = next((i for i, token in enumerate(tokens) if token in sampling.stop_tokens), None)
        if stop_at is not None and stop_at != len(tokens) - 1:
            raise ValueError(f"token {tokens[stop_at]} was to end the completion, and {len(tokens) - 1 - stop_at} follow it")
        if stop_at is None and not (drawn.was_cut or len(tokens) == limit):
            raise ValueError(
                f"the completion ended at token {tokens[-1]}, which is not one of the stop tokens {sampling.stop_tokens}; add "
                "its text to rollout.stop if it is to end completions"
            )
        if drawn.version is not None and drawn.version != str(self.policy_version):
            raise ValueError(
                f"it was drawn with weights {drawn.version!r}, expected {str(self.policy_version)!r}: was the server started "
                "again, or does another run use it?"
            )
        return Completion(
            tokens=tuple(tokens),
            logprobs=tuple(min(each, 0.0) for each in logprobs),
            text=b"".join(self._bytes_of(token) for token in tokens),
            stop=StopReason.LENGTH if stop_at is None else StopReason.STOP,
            policy_version=self.policy_version,
        )

    def _bytes_of(self, token: int) -> bytes:
        known = token < self._tokenizer.vocab_size  # a model may have more rows than its tokenizer has entries
        return (self._tokenizer.token_bytes(token) if known else None) or b""

    def _remove_old(self) -> None:
        with write_errors(self.weights_dir):
            folders = [path for path in self.weights_dir.iterdir() if _FOLDER.fullmatch(path.name)]
            for path in sorted(folders, key=lambda path: path.stat().st_mtime_ns)[:-_KEPT_VERSIONS]:
                shutil.rmtree(path)


class _Http:
    """Requests to one server, a bounded number at a time, repeated where that may help."""

    def __init__(self, url: str, *, concurrency: int, attempts: int, first_wait_s: float) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise ExtensionError("rollout.engine server needs the library httpx2: pip install -e '.[serve]'") from error
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"rollout.url: got {url!r}, expected an address such as http://localhost:8000")
        self._library = httpx2
        self.url = url.rstrip("/").removesuffix("/v1")
        self._concurrency, self._attempts, self._first_wait_s = concurrency, attempts, first_wait_s
        self._client: Any = None
        self._free: asyncio.Semaphore | None = None

    def open(self) -> AsyncExitStack:
        """A context in which requests can be made: connections belong to one event loop."""
        limits = self._library.Limits(max_connections=self._concurrency)
        timeout = self._library.Timeout(None, connect=10.0)  # how long all may take is limited elsewhere
        needs_certificates = self.url.startswith("https:")  # reading them takes longer than many requests
        self._client = self._library.AsyncClient(limits=limits, timeout=timeout, trust_env=False, verify=needs_certificates)
        self._free = asyncio.Semaphore(self._concurrency)
        stack = AsyncExitStack()
        stack.push_async_callback(self._client.aclose)
        return stack

    async def get(self, path: str, *, may_be_missing: bool = False) -> bytes | None:
        """See `Talk`."""
        return await self._request("GET", path, None, may_be_missing)

    async def post(self, path: str, body: dict[str, Any], *, may_be_missing: bool = False) -> bytes | None:
        """See `Talk`."""
        return await self._request("POST", path, body, may_be_missing)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, may_be_missing: bool) -> bytes | None:
        assert self._free is not None, "open() comes first"
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                wait_s = min(self._first_wait_s * 2 ** (attempt - 1), _LONGEST_WAIT_S)
                logger.warning("%s %s%s: %s; again in %g s", method, self.url, path, problem, wait_s)
                await asyncio.sleep(wait_s)
            try:
                async with self._free:
                    answer = await self._client.request(method, f"{self.url}{path}", json=body)
            except self._library.TransportError as error:
                problem = f"no answer ({type(error).__name__}: {str(error) or 'the connection was closed'})"
                continue
            if answer.status_code == 404 and may_be_missing:
                return None
            if answer.status_code < 300:
                return bytes(answer.content)
            problem = f"status {answer.status_code}, {_start(answer.content)}"
            if answer.status_code < 500:
                raise RolloutError(f"{method} {self.url}{path}: the server refuses: {problem}")
        raise RolloutError(
            f"{method} {self.url}{path}: {problem}, {self._attempts} times; is the server running, and is rollout.url right?"
        )


async def _all_or_none(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; where one fails the others end, which also closes their connections."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _start(body: bytes | None) -> str:
    return repr((body or b"")[:300].decode(errors="replace"))
