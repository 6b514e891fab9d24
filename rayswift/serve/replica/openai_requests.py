"""The requests of OpenAI's interface that the Transformers engine answers, with the limits of their fields.

What OpenAI or vLLM know beyond that is either without effect on the answer and ignored, or refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from rayswift.serve.openai_errors import ApiError

MAX_CHOICES, MAX_LOGPROBS = 128, 20

_Finite = Field(allow_inf_nan=False)
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_TokenIds = Annotated[list[_TokenId], Field(min_length=1, max_length=2**20)]
_StopText = Annotated[str, Field(min_length=1, max_length=1000)]

#: What changes the answer and cannot be done here → what to do instead.
_USE_VLLM = "is not available with --infer_backend transformers; deploy with --infer_backend vllm"
_UNAVAILABLE = (
    "functions", "function_call", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar", "use_beam_search", "prompt_logprobs", "min_tokens", "suffix", "truncate_prompt_tokens",
    "bad_words", "allowed_token_ids", "audio", "prompt_embeds",
)  # fmt: skip


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool | None = None


class GenerationRequest(_Body):
    """What chat and plain completions share."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _StopText | Annotated[list[_StopText], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, _Finite] | None = Field(None, ge=0, le=100)
    top_p: Annotated[float, _Finite] | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: Annotated[float, _Finite] | None = Field(None, ge=0, le=1)
    repetition_penalty: Annotated[float, _Finite] | None = Field(None, gt=0, le=100)
    presence_penalty: Annotated[float, _Finite] | None = Field(None, ge=-2, le=2)
    frequency_penalty: Annotated[float, _Finite] | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]], Field(max_length=1024)
    ] | None = None  # fmt: skip
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    @property
    def token_limit(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Alternatives per token to return with log probabilities; None for none of either."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ApiError (400) for what this engine cannot do."""
        for name in _UNAVAILABLE:
            if (self.model_extra or {}).get(name):
                raise ApiError(400, f"{name} {_USE_VLLM}", param=name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only for streams: set stream to true", param="stream_options")


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``. ``messages`` are read as training reads them (`trained_template`)."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.tools and self.tool_choice != "none":
            raise ApiError(400, f"tools: reading tool calls {_USE_VLLM}, or set tool_choice to none", param="tools")
        if (self.response_format or {}).get("type", "text") != "text":
            raise ApiError(400, f"response_format {_USE_VLLM}", param="response_format")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``: texts or token ids as they are, without a template."""

    prompt: str | _TokenIds | Annotated[list[str | _TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    max_tokens: int | None = Field(16, ge=1)  # OpenAI's default
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(item, int) for item in self.prompt):
            return [self.prompt]  # type: ignore[list-item]  # one prompt of token ids
        return list(self.prompt)  # type: ignore[arg-type]

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            raise ApiError(400, f"echo with logprobs {_USE_VLLM}", param="echo")
        if (self.best_of or 1) > (self.n or 1):
            raise ApiError(400, f"best_of above n {_USE_VLLM}", param="best_of")


class TokenizeRequest(_Body):
    """``POST /tokenize``: a text, or messages as a chat request has them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeRequest(_Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: _TokenIds
