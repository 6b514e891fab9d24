"""What was trained is what is served: prompts of chat requests with the token ids of training.

An engine renders messages with the chat template in the model's folder, and a ``<|im_end|>`` typed by a user then ends
the turn. Here the run's own template, default system text and agent format lay the conversation out, as in training.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayswift import private
from rayswift.data.rows.media import Unusable
from rayswift.data.rows.messages import read_messages
from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.serve.replica.prompt_length import characters_of, check_characters

logger = logging.getLogger("rayswift.serve.replica.trained_template")

EncoderOf = Callable[["str | None"], "Encoder | None"]

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
#: What the types of parts that hold an image or another file have in their names.
_FILES = ("image", "video", "audio", "file", "embeds")
_THINKING = ("enable_thinking", "thinking")  # the switch's name with Qwen, with DeepSeek
_SWITCHES = ("enable_thinking", "reasoning_effort")  # those that a request may have outside of chat_template_kwargs
#: What asks for a rendering of another kind when set. Nothing else that a chat template may be told does: the layout
#: is the trained one, whatever a server's defaults or a client add.
_NOT_LAID_OUT = ("chat_template", "documents", "add_special_tokens")


def chat_prompt_ids(encoder: Encoder, request: Mapping[str, Any]) -> list[int] | None:
    """Token ids of the prompt of an OpenAI chat request (``messages``, ``tools``, ``chat_template_kwargs`` …).

    They are those that training would put before the answer. A last assistant message is continued at its end, with
    or without ``continue_final_message``: to training, two assistant messages in a row are one. ``tool_choice`` "none"
    leaves the tools out. What training has no layout for is brought into one: all ``system`` and ``developer`` messages
    are the system text; they, the text parts of a message, and user messages in a row are joined with a newline.

    Returns:
        None for what the encoder has no layout for (:func:`needs_engine`), so that the engine's own rendering is used.

    Raises:
        ValueError: the messages are no conversation, or none of this template; says why.
    """
    messages = request.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages: expected a list with at least one message")
    if needs_engine(encoder, request):
        return None
    encoder = _with_thinking(encoder, request)
    try:
        read = read_messages(_joined(messages)).messages
        for message in read if not encoder.thinks else ():
            message.pop("reasoning_content", None)
        return encoder.encode_prompt(read, _tools(request))
    except (Unusable, UserError) as refused:
        raise ValueError(f"messages: {refused}") from None


def needs_engine(encoder: Encoder, request: Mapping[str, Any]) -> str:
    """What in a chat request only the engine's own rendering can give; empty when the trained layout has it all."""
    for name in _NOT_LAID_OUT:
        if request.get(name) or _template_settings(request).get(name):
            return name
    if not request.get("add_generation_prompt", True) and not request.get("continue_final_message"):
        return "add_generation_prompt: false"
    messages = [message for message in request["messages"] if isinstance(message, Mapping)]
    contents = (message.get("content") for message in messages)
    if any(_is_file(part) for content in contents if isinstance(content, list) for part in content):
        return "images or other files"
    told = any(message.get("role") in ("tool", "function") or message.get("tool_calls") for message in messages)
    if (told or _tools(request)) and not encoder.takes_tools:
        return "tools without an agent format (--agent_template)"
    return ""


def stop_token_ids(encoder: Encoder) -> list[int]:
    """Token ids that end an answer of this template: the tokenizer's eos and the stop words that are one token."""
    return encoder.eos_token_ids


def stop_strings(encoder: Encoder, *, tools: bool = False) -> list[str]:
    """Texts that end an answer of this template and are not one token.

    ``tools``: the request has tools; with formats such as ReAct a call then ends where its result would stand, or the
    model would make the result up.
    """
    call_ends = [encoder.call_end] if tools and encoder.call_end else []
    return [*encoder.stop_strings, *call_ends]


# --- what a request asks for ------------------------------------------------------------------------------------


def _template_settings(request: Mapping[str, Any]) -> Mapping[str, Any]:
    return request.get("chat_template_kwargs") or {}


def _tools(request: Mapping[str, Any]) -> Any:
    return None if request.get("tool_choice") == "none" else request.get("tools") or None


def _is_file(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return isinstance(kind, str) and any(word in kind for word in _FILES)


def _with_thinking(encoder: Encoder, request: Mapping[str, Any]) -> Encoder:
    """The encoder with the thinking mode that the request asks for, if it does."""
    settings = _template_settings(request)
    switches = [*(settings.get(name) for name in _THINKING), request.get("enable_thinking")]
    asked = next((switch for switch in switches if switch is not None), None)
    effort = request.get("reasoning_effort") or settings.get("reasoning_effort")
    if asked is None and effort is not None:
        asked = effort != "none"
    if asked is None or asked is encoder.enable_thinking:
        return encoder
    if not isinstance(asked, bool):
        raise ValueError("chat_template_kwargs: enable_thinking is true or false")
    return replace(encoder, enable_thinking=asked)


def _joined(messages: Sequence[Any]) -> list[Any]:
    """The messages with one system message, each content one text, and no two user messages in a row."""
    systems: list[Any] = []
    rest: list[Any] = []
    for message in messages:
        if isinstance(message, Mapping):
            message = {**message, "content": _text(message.get("content"))}
        role, content = _side(message)
        if role == "system":
            systems.append(content)
        elif role == "user" and rest and _side(rest[-1])[0] == "user":
            rest[-1] = {**message, "content": _text([_side(rest[-1])[1], content])}
        else:
            rest.append(message)
    if systems and all(isinstance(text, str) for text in systems):
        systems = ["\n".join(filter(None, systems))]
    return [*({"role": "system", "content": text} for text in systems), *rest]


def _side(message: Any) -> tuple[Any, Any]:
    """Role and content of a message; ``developer`` is ``system`` under its newer name."""
    if not isinstance(message, Mapping):
        return None, None
    role = message.get("role")
    return "system" if role == "developer" else role, message.get("content")


def _text(content: Any) -> Any:
    """A content of text parts as one text; any other as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part if isinstance(part, str) else _text_of_part(part) for part in content]
    known = [text for text in texts if text is not None]
    return "\n".join(known) if len(known) == len(texts) else content


def _text_of_part(part: Any) -> str | None:
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get("refusal" if kind == "refusal" else "text") if kind in _TEXT_PARTS else None
    return text if isinstance(text, str) else None


# --- vLLM -------------------------------------------------------------------------------------------------------

#: The prompt that the renderer is to take for the messages it is given, in the task of one request.
_laid_out: ContextVar[list[int] | None] = ContextVar("laid_out", default=None)
#: The tools of the request that is answered, as its client wrote them: vLLM puts their fields into another order.
_sent_tools: ContextVar[Any] = ContextVar("sent_tools", default=None)


def use_trained_templates(online_renderer: Any, encoder_of: EncoderOf) -> None:
    """Make vLLM's ``OnlineRenderer`` take the prompts of training for chat requests and ``/tokenize``.

    ``encoder_of`` gives the encoder of a requested model name (None: no name was given), or None to leave the request
    to vLLM. Only text becomes ids here: length checks, truncation, tool parsers and structured output stay vLLM's. A
    chat request that gets such a prompt also stops at the template's stop words. One that only vLLM can render
    (:func:`needs_engine`) keeps the run's system text and thinking mode; the log says once why it is vLLM's.
    """
    config = online_renderer.model_config
    preprocess_chat, render_messages = private.rendering(online_renderer)
    listed = config.try_get_generation_config().get("eos_token_id")  # vLLM stops by itself at these
    engine_stops = {online_renderer.renderer.get_eos_token_id(), *(listed if isinstance(listed, list) else [listed])}

    def lay_out(encoder: Encoder, asked: Mapping[str, Any]) -> list[int] | None:
        if reason := needs_engine(encoder, asked):
            _say_engine_renders(reason)
        else:
            check_characters(encoder.tokenizer, config.max_model_len, characters_of(asked["messages"]))
        return chat_prompt_ids(encoder, asked)

    async def preprocess(request: Any, messages: list[Any], **settings: Any) -> Any:
        encoder = encoder_of(request.model)
        if encoder is None or not all(isinstance(message, dict) for message in messages):
            return await preprocess_chat(request, messages, **settings)
        _say_thinking(request, encoder)
        asked = _as_mapping(request, messages, settings)
        # In a thread: a long text takes a while, and so does the first one, which loads the tokenizer.
        ids = await asyncio.to_thread(lay_out, encoder, asked)
        if ids is not None:
            _add_stops(request, encoder, bool(asked["tools"]), engine_stops)
        elif encoder.system and not any(_side(message)[0] == "system" for message in messages):
            messages = [{"role": "system", "content": encoder.system}, *messages]
        token = _laid_out.set(ids)
        try:
            return await preprocess_chat(request, messages, **settings)
        finally:
            _laid_out.reset(token)

    async def render(messages: list[Any], params: Any) -> tuple[Any, Any]:
        ids = _laid_out.get()
        if ids is None:
            return await render_messages(messages, params)
        from vllm.inputs import TokensPrompt

        # What `echo` repeats: the last text.
        texts = [(message.get("role"), _text(message.get("content"))) for message in messages]
        conversation = [{"role": role, "content": text if isinstance(text, str) else ""} for role, text in texts]
        return conversation, TokensPrompt(prompt_token_ids=ids)

    private.replace_rendering(online_renderer, preprocess, render)


def keeping_tools(app: ASGIApp) -> ASGIApp:
    """``app``, for whose requests the prompt has the tools as they were sent."""

    async def keeping(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        raw = await Request(scope, receive).body()
        sent = None
        if b'"tools"' in raw:
            with contextlib.suppress(ValueError, AttributeError):  # vLLM says what is wrong with it
                sent = json.loads(raw).get("tools")
        _sent_tools.set(sent)
        read: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

        async def reading() -> Message:
            return read.pop() if read else await receive()

        await app(scope, reading, send)

    return keeping


@functools.cache
def _say_engine_renders(reason: str) -> None:
    logger.warning("%s: no trained layout has that; the engine's own chat template renders such requests", reason)


def _say_thinking(request: Any, encoder: Encoder) -> None:
    """Tell vLLM, whose parsers look at it, the thinking mode of the run where the client asks for none."""
    asked = request.chat_template_kwargs or {}
    if encoder.enable_thinking is None or any(name in asked for name in ("reasoning_effort", *_THINKING)):
        return
    if getattr(request, "reasoning_effort", None) is None and getattr(request, "reasoning", None) is None:
        request.chat_template_kwargs = {**dict.fromkeys(_THINKING, encoder.enable_thinking), **asked}


def _as_mapping(request: Any, messages: list[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`chat_prompt_ids` needs of a request that vLLM has read."""
    for message in messages:  # pydantic leaves iterators that can be read once
        for key in ("content", "tool_calls"):
            if not isinstance(message.get(key), str | list | None):
                message[key] = list(message[key])
    # Without what the server adds by itself (`cohere_format`); whether the model thinks is a person's setting.
    of_server = settings.get("default_template_kwargs") or {}
    of_request = request.build_chat_params(None, "auto").chat_template_kwargs
    tools = (getattr(request, "tools", None) or ()) if settings.get("tool_dicts") else ()
    return {
        "messages": messages,
        "tools": _tools_as_sent(tools),
        "add_generation_prompt": of_request.get("add_generation_prompt", True),
        "continue_final_message": of_request.get("continue_final_message"),
        **{name: getattr(request, name, None) for name in (*_NOT_LAID_OUT, *_SWITCHES, "tool_choice")},
        "chat_template_kwargs": {name: of_server[name] for name in _THINKING if name in of_server} | of_request,
    }


def _tools_as_sent(tools: Sequence[Any]) -> list[Any]:
    """The tools of a request in the fields and their order that the client chose."""
    sent = _sent_tools.get()
    told = [as_function(tool) for tool in sent] if isinstance(sent, list) and len(sent) == len(tools) else [None]
    return [as_function(_as_sent(tool)) for tool in tools] if None in told else told


def as_function(tool: Any) -> dict[str, Any] | None:
    """A tool as a chat request has it, its fields in the order they came in; None for what is none.

    In Responses a function's fields stand beside its type; in Messages its parameters are called ``input_schema``.
    """
    if not isinstance(tool, dict) or isinstance(tool.get("function"), dict):
        return tool if isinstance(tool, dict) else None
    fields = {"input_schema": "parameters"} | {name: name for name in ("name", "description", "parameters", "strict")}
    function = {fields[name]: value for name, value in tool.items() if name in fields and value is not None}
    if not isinstance(function.get("name"), str):
        return None
    if isinstance(schema := tool.get("input_schema"), dict) and "type" not in schema:
        function["parameters"] = {**schema, "type": "object"}
    return {"type": "function", "function": function}


def _as_sent(value: Any) -> Any:
    """A pydantic object as JSON, without the defaults it was filled up with."""
    if not hasattr(value, "model_fields_set"):
        return value
    return {name: _as_sent(item) for name, item in value if name in value.model_fields_set}


def _add_stops(request: Any, encoder: Encoder, tools: bool, engine_stops: set[int]) -> None:
    if getattr(request, "ignore_eos", True):  # a benchmark; or a request that only counts tokens and has no such field
        return
    ids = [token for token in stop_token_ids(encoder) if token not in engine_stops]
    words = [request.stop] if isinstance(request.stop, str) else request.stop or []
    request.stop_token_ids = list(dict.fromkeys([*(request.stop_token_ids or ()), *ids]))
    request.stop = list(dict.fromkeys([*words, *stop_strings(encoder, tools=tools)]))
