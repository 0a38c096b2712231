"""How servers of completions differ: what each is asked for tokens and for new weights, and how its answers are read.

megarpt  `megarpt serve`: completions as vLLM's, weights as SGLang's.
vllm     POST /v1/completions with `return_token_ids`. Start it with VLLM_SERVER_DEV_MODE=1, which opens /collective_rpc for
         `reload_weights` (of a version where that takes `weights_path`), and with `--logprobs-mode processed_logprobs`, since
         its default is the distribution before temperature, top-k and top-p. Versions without /update_weight_version cannot be
         asked which weights they have.
sglang   POST /generate, its own, because its /v1/completions gives texts and no ids. Start it with
         --enable-deterministic-inference, without which it ignores seeds, and leave SGLANG_RETURN_ORIGINAL_LOGPROB unset. Its
         log-probabilities are those before top-k and top-p, which are therefore refused.

Source: vLLM's entrypoints/openai/completion/protocol.py and entrypoints/serve/dev; SGLang's managers/io_struct.py,
layers/sampler.py and entrypoints/http_server.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megarpt.errors import RolloutError
from megarpt.rl.completions_api import (
    CompletionAnswer,
    TokenId,
    UpdateWeightsAnswer,
    WeightVersion,
    first_problem,
)
from megarpt.rl.rollout import Sampling
from megarpt.rl.structs import Prompt


class Call(NamedTuple):
    """A request."""

    path: str
    body: dict[str, Any]


class Drawn(NamedTuple):
    """What a server says of one completion, not yet trusted."""

    tokens: list[int]
    logprobs: list[float]
    was_cut: bool
    version: str | None  # of the weights, where the server says it


class Talk(Protocol):
    """A connection to a server; failures are RolloutErrors."""

    async def get(self, path: str, *, may_be_missing: bool = False) -> bytes | None:
        """The body of the answer; None where there is no such path and that is allowed."""
        ...

    async def post(self, path: str, body: dict[str, Any], *, may_be_missing: bool = False) -> bytes | None:
        """The body of the answer; None where there is no such path and that is allowed."""
        ...


class Dialect(Protocol):
    """A kind of server."""

    name: str
    draws_groups: bool  # whether one request is for all completions of a prompt

    def check(self, sampling: Sampling) -> None:
        """
        Raises:
            RolloutError: the server cannot draw like this, or cannot say with which probability.
        """
        ...

    def ask(self, model: str, prompt: Prompt, samples: range, sampling: Sampling) -> Call:
        """The request for these completions of a prompt."""
        ...

    def read(self, body: bytes) -> list[Drawn]:
        """
        Raises:
            ValidationError, ValueError: this is no such answer.
        """
        ...

    async def update(self, talk: Talk, folder: Path, version: int) -> None:
        """Have the server take over weights, and make sure that it has.

        Raises:
            RolloutError: it has not.
        """
        ...


class Megarpt:
    """`megarpt serve`."""

    name = "megarpt"
    draws_groups = True

    def check(self, sampling: Sampling) -> None:
        pass

    def ask(self, model: str, prompt: Prompt, samples: range, sampling: Sampling) -> Call:
        body = _completion_request(model, prompt, sampling)
        return Call("/v1/completions", {**body, "n": len(samples), "seed": sampling.seed, "prompt_id": prompt.id})

    def read(self, body: bytes) -> list[Drawn]:
        return _read_completions(body)

    async def update(self, talk: Talk, folder: Path, version: int) -> None:
        await _update_from_disk(talk, folder, version)


class Vllm:
    """vLLM's server."""

    name = "vllm"
    draws_groups = False

    def check(self, sampling: Sampling) -> None:
        pass

    def ask(self, model: str, prompt: Prompt, samples: range, sampling: Sampling) -> Call:
        body = _completion_request(model, prompt, sampling)
        return Call("/v1/completions", {**body, "n": 1, "seed": request_seed(sampling.seed, prompt.id, samples[0])})

    def read(self, body: bytes) -> list[Drawn]:
        return _read_completions(body)

    async def update(self, talk: Talk, folder: Path, version: int) -> None:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        if await talk.post("/collective_rpc", reload, may_be_missing=True) is None:
            raise RolloutError(
                "vLLM has no /collective_rpc, by which it takes over weights: start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment"
            )
        await talk.post("/reset_prefix_cache", {})
        if await talk.post("/update_weight_version", {"new_version": str(version)}, may_be_missing=True) is not None:
            await _expect_version(talk, version, ("/weight_info",))


class Sglang:
    """SGLang's server."""

    name = "sglang"
    draws_groups = False

    def check(self, sampling: Sampling) -> None:
        if sampling.top_k or sampling.top_p < 1.0:
            raise RolloutError(
                f"rollout.top_k {sampling.top_k} and rollout.top_p {sampling.top_p} with SGLang, expected 0 and 1: it gives "
                "log-probabilities from before that cut, which are not those of the tokens it draws"
            )

    def ask(self, model: str, prompt: Prompt, samples: range, sampling: Sampling) -> Call:
        settings = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": list(sampling.stop_tokens),
            "sampling_seed": request_seed(sampling.seed, prompt.id, samples[0]),
            "skip_special_tokens": False,
        }
        return Call("/generate", {"input_ids": list(prompt.tokens), "sampling_params": settings, "return_logprob": True})

    def read(self, body: bytes) -> list[Drawn]:
        said = _Generated.model_validate_json(body).meta_info
        tokens, logprobs = (
            [entry[1] for entry in said.output_token_logprobs],
            [entry[0] for entry in said.output_token_logprobs],
        )
        return [Drawn(tokens, logprobs, said.finish_reason.type == "length", said.weight_version)]

    async def update(self, talk: Talk, folder: Path, version: int) -> None:
        await _update_from_disk(talk, folder, version)


DIALECTS: dict[str, type[Megarpt] | type[Vllm] | type[Sglang]] = {each.name: each for each in (Megarpt, Vllm, Sglang)}
"""By what a server says in /v1/models: `owned_by`."""


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """The seed of one completion, for servers that take one number."""
    digest = hashlib.sha256(f"{seed}/{sample}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1  # some keep it in 32 bits with a sign


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _FinishReason(_Lenient):
    type: str


class _MetaInfo(_Lenient):
    finish_reason: _FinishReason
    output_token_logprobs: list[tuple[float, TokenId, Any]] = Field(min_length=1)
    weight_version: str | None = None


class _Generated(_Lenient):
    """SGLang's answer to /generate."""

    meta_info: _MetaInfo


def _completion_request(model: str, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt.tokens),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_token_ids": list(sampling.stop_tokens),
        "ignore_eos": True,  # what ends a completion is said above, and nothing else does
        "logprobs": 0,
        "return_token_ids": True,
    }


def _read_completions(body: bytes) -> list[Drawn]:
    answer = CompletionAnswer.model_validate_json(body)
    drawn = []
    for place, choice in enumerate(sorted(answer.choices, key=lambda choice: choice.index)):
        if choice.index != place:
            raise ValueError(f"choices are numbered {[each.index for each in answer.choices]}, expected 0 and on")
        if choice.token_ids is None or choice.logprobs is None:
            raise ValueError("a choice without token_ids or logprobs; a server that knows return_token_ids is needed")
        was_cut = choice.finish_reason == "length"
        drawn.append(Drawn(choice.token_ids, choice.logprobs.token_logprobs, was_cut, answer.weight_version))
    return drawn


async def _update_from_disk(talk: Talk, folder: Path, version: int) -> None:
    body = await talk.post("/update_weights_from_disk", {"model_path": str(folder), "weight_version": str(version)})
    try:
        answer = UpdateWeightsAnswer.model_validate_json(body or b"")
    except ValidationError as error:
        raise RolloutError(
            f"/update_weights_from_disk: the answer is none: {first_problem(error)[0]}; got {body!r:.200}"
        ) from error
    if not answer.success:
        raise RolloutError(f"the server did not take over {folder}: {answer.message}")
    await _expect_version(talk, version, ("/model_info", "/get_weight_version"))


async def _expect_version(talk: Talk, version: int, paths: tuple[str, ...]) -> None:
    """Newer servers have the first of the paths, older ones the last."""
    for path in paths:
        body = await talk.get(path, may_be_missing=path != paths[-1])
        if body is None:
            continue
        try:
            got = WeightVersion.model_validate_json(body).weight_version
        except ValidationError as error:
            raise RolloutError(f"{path}: the answer has no weight_version; got {body!r:.200}") from error
        if got != str(version):
            raise RolloutError(
                f"{path}: the server has weights {got!r} after it was given {str(version)!r}; give every run its own server"
            )
        return
