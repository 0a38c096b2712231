"""What an OpenAI-compatible completion server is asked, and what it answers.

`megarpt serve` and the engine that asks such servers share these records. What is not OpenAI's is vLLM's (`top_k`,
`stop_token_ids`, `ignore_eos`, `return_token_ids`, and `token_ids` of a choice), or SGLang's (`weight_version`, and how weights
are loaded); `prompt_id` is megarpt's.

Source: platform.openai.com/docs/api-reference/completions; vLLM's entrypoints/openai/completion/protocol.py; SGLang's
managers/io_struct.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]

MAX_COMPLETIONS = 1024  # of one request, over all its prompts
MAX_STOP_TEXTS = 16

# What OpenAI's clients may send and this server has no use for, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (False, None),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
}


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StreamOptions(_Asked):
    """What a stream of chunks carries besides them."""

    include_usage: bool = False


class CompletionRequest(_Asked):
    """POST /v1/completions. Fields that ask for what the server cannot do are refused by their name."""

    model: str | None = None
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] = 1
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0  # 0 and -1 are all
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] = []
    ignore_eos: bool = False  # go on behind the end of a document
    logprobs: Annotated[int, Field(ge=0)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    prompt_id: Annotated[str, Field(max_length=4096)] | None = None  # what seeds follow from besides `seed`; one prompt only
    user: str | None = None  # of no consequence
    echo: Any = None
    suffix: Any = None
    best_of: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None

    @field_validator(*_NEUTRAL)
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: Any) -> Any:
        if value not in _NEUTRAL[info.field_name]:
            raise ValueError("this server does not do that; leave it out")
        return value

    @field_validator("logprobs")
    @classmethod
    def _of_sampled_tokens(cls, value: int | None) -> int | None:
        if value:
            raise ValueError("only the log-probabilities of the tokens that were drawn are known; ask for 0 alternatives")
        return value

    @field_validator("stop")
    @classmethod
    def _few_texts(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > MAX_STOP_TEXTS or not all(0 < len(text) <= 1024 for text in texts):
            raise ValueError(f"expected at most {MAX_STOP_TEXTS} texts of 1 to 1024 characters")
        return value

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class UpdateWeightsRequest(BaseModel):
    """POST /update_weights_from_disk. SGLang has more fields, about how its own server goes about it."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    model_path: Annotated[str, Field(min_length=1, max_length=4096)]
    weight_version: Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]


class _Answered(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)  # servers may say more


class TokenLogprobs(_Answered):
    """The tokens of a choice, in nats."""

    tokens: list[str] = []
    token_logprobs: list[float]
    text_offset: list[int] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(_Answered):
    """One completion, or a piece of it."""

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token or text
    logprobs: TokenLogprobs | None = None
    token_ids: list[TokenId] | None = None


class Usage(_Answered):
    """Tokens of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class CompletionAnswer(_Answered):
    """The answer to a `CompletionRequest`, or a chunk of it."""

    id: str = ""
    object: Literal["text_completion"] = "text_completion"
    created: int = 0
    model: str = ""
    choices: list[Choice]
    usage: Usage | None = None
    weight_version: str | None = None


class Model(_Answered):
    """A model that a server offers."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = ""
    max_model_len: int | None = None


class ModelList(_Answered):
    """GET /v1/models."""

    object: str = "list"
    data: list[Model] = Field(min_length=1)


class UpdateWeightsAnswer(_Answered):
    """The answer to an `UpdateWeightsRequest`."""

    success: bool
    message: str = ""


class WeightVersion(_Answered):
    """What a server says of its weights."""

    weight_version: str


def error_body(message: str, *, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def first_problem(error: ValidationError) -> tuple[str, str | None]:
    """What is wrong with a request, and with which field of it."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(found["loc"][0]) if found["loc"] else None
    text = found["msg"].removeprefix("Value error, ")
    if param == "prompt" and len(found["loc"]) > 1:  # pydantic speaks of the first kind it tried
        text = "expected a text, a list of token ids, or a list of either"
    return (f"{param}: {text}" if param else text), param
