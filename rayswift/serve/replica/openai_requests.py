"""The requests of OpenAI's interface that the Transformers engine answers, with the limits of their fields: vLLM's.

What OpenAI or vLLM know beyond that is either without effect on the answer and ignored, or refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from rayswift.serve.openai_errors import ApiError

MAX_CHOICES, MAX_LOGPROBS = 128, 20

_Finite = Field(allow_inf_nan=False)
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_TokenIds = Annotated[list[_TokenId], Field(min_length=1, max_length=2**20)]
_StopText = Annotated[str, Field(min_length=1, max_length=1000)]
_BadWord = Annotated[str, Field(min_length=1, max_length=1000)]

#: What changes the answer and cannot be done here → what to do instead.
_USE_VLLM = "is not available with --infer_backend transformers; deploy with --infer_backend vllm"
_UNAVAILABLE = (
    "use_beam_search", "suffix", "prompt_embeds", "chat_template", "logprob_token_ids", "mm_processor_kwargs",
    "media_io_kwargs", "repetition_detection", "thinking_token_budget",
)  # fmt: skip


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(_Body):
    """The schema of ``response_format``."""

    name: str
    wanted: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(_Body):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Body):
    """vLLM's ``structured_outputs``: one of these."""

    schema_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None


class Function(_Body):
    """What a tool is."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Body):
    """A tool that the model may call."""

    type: Literal["function"] = "function"
    function: Function


def _as_sent(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool that is one, with its fields in the order in which the model shall read them."""
    Tool.model_validate(tool)
    return tool


Tools = list[Annotated[dict[str, Any], AfterValidator(_as_sent)]]


class ToolName(_Body):
    """Of a tool that must be called."""

    name: Annotated[str, Field(min_length=1)]


class ToolChoice(_Body):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: ToolName


class GenerationRequest(_Body):
    """What chat and plain completions share."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _StopText | Annotated[list[_StopText], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, _Finite] | None = Field(None, ge=0, le=2)
    top_p: Annotated[float, _Finite] | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: Annotated[float, _Finite] | None = Field(None, ge=0, le=1)
    repetition_penalty: Annotated[float, _Finite] | None = Field(None, gt=0)
    presence_penalty: Annotated[float, _Finite] | None = Field(None, ge=-2, le=2)
    frequency_penalty: Annotated[float, _Finite] | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, _Finite]], Field(max_length=1024)] | None = None
    min_tokens: int | None = Field(None, ge=0)
    allowed_token_ids: Annotated[list[_TokenId], Field(min_length=1)] | None = None
    bad_words: Annotated[list[_BadWord], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=2**63)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None

    @property
    def token_limit(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_tokens

    @property
    def _fewest_tokens(self) -> int:
        return 1

    @property
    def alternatives(self) -> int | None:
        """Alternatives per token to return with log probabilities; None for none of either."""
        raise NotImplementedError

    @property
    def constraint(self) -> tuple[str, Any] | None:
        """What the answer must be, as `GrammarCompiler` takes it; raises ApiError (400) for more or less than one."""
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_object":
            return "json", {"type": "object"}
        if wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None or wanted.json_schema.wanted is None:
                raise ApiError(400, "response_format: json_schema needs a schema", param="response_format")
            return "json", wanted.json_schema.wanted
        asked = self.structured_outputs
        if asked is None:
            return None
        kinds = {"json": asked.schema_, "regex": asked.regex, "choice": asked.choice, "grammar": asked.grammar,
                 "json_object": asked.json_object, "structural_tag": asked.structural_tag}  # fmt: skip
        given = [(kind, value) for kind, value in kinds.items() if value is not None]
        if len(given) != 1:
            what = f"give one of {', '.join(kinds)}, not {len(given)}"
            raise ApiError(400, f"structured_outputs: {what}", param="structured_outputs")
        ((kind, value),) = given
        if kind == "structural_tag":
            raise ApiError(400, f"structured_outputs: structural_tag {_USE_VLLM}", param="structured_outputs")
        if not value:
            raise ApiError(400, f"structured_outputs: {kind} is empty", param="structured_outputs")
        return ("json", {"type": "object"}) if kind == "json_object" else (kind, value)

    def check(self) -> None:
        """Raises ApiError (400) for what this engine cannot do, and for fields that do not go together."""
        for name in _UNAVAILABLE:
            if (self.model_extra or {}).get(name):
                raise ApiError(400, f"{name} {_USE_VLLM}", param=name)
        if self.stream_options is not None and self.stream_options.model_fields_set and not self.stream:
            raise ApiError(400, "stream_options is only for streams: set stream to true", param="stream_options")
        if self.prompt_logprobs and self.stream:
            raise ApiError(400, "prompt_logprobs is not for streams", param="prompt_logprobs")
        if self.token_limit is not None and self.token_limit < self._fewest_tokens:
            raise ApiError(400, f"max_tokens must be at least {self._fewest_tokens}", param="max_tokens")


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``. ``messages`` are read as training reads them (`trained_template`)."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wants_calls(self) -> bool:
        """Whether the answer may be a call of a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def forced_tools(self) -> list[dict[str, Any]]:
        """The tools of which one must be called; empty where the model is free."""
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool["function"]["name"] == name]
        return list(self.tools or ()) if self.tool_choice == "required" else []

    def check(self) -> None:
        super().check()
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        if isinstance(self.tool_choice, ToolChoice) and not self.forced_tools:
            name = self.tool_choice.function.name[:100]
            raise ApiError(400, f"tool_choice: there is no tool {name}", param="tool_choice")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            what = "continue_final_message and add_generation_prompt exclude each other"
            raise ApiError(400, what, param="continue_final_message")


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``: texts or token ids as they are, without a template."""

    prompt: str | _TokenIds | Annotated[list[str | _TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    max_tokens: Annotated[int, BeforeValidator(lambda given: 16 if given is None else given)] | None = 16  # OpenAI's
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None

    @property
    def _fewest_tokens(self) -> int:
        return 0 if self.echo else 1  # the prompt alone: lm-eval asks so for its log probabilities

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


class TokenizeRequest(_Body):
    """``POST /tokenize``: a text, or messages as a chat request has them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeRequest(_Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[_TokenId], Field(max_length=2**20)]
