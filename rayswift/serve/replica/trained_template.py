"""What was trained is what is served: prompts of chat requests with the token ids of training.

An engine renders messages with the chat template in the model's folder, and a ``<|im_end|>`` typed by a user then ends
the turn. Here the run's own template, default system text and agent format lay the conversation out, as in training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from rayswift import private
from rayswift.data.rows.media import Unusable
from rayswift.data.rows.messages import read_messages
from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError

EncoderOf = Callable[["str | None"], "Encoder | None"]

_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING = ("enable_thinking", "thinking")  # the switch's name with Qwen, with DeepSeek
#: What a chat template may be told that the layout follows too, or that changes nothing in it.
_UNDERSTOOD = {*_THINKING, "add_generation_prompt", "continue_final_message", "reasoning_effort", "tools", "tokenize"}
#: What asks for a rendering of another kind when set.
_NOT_LAID_OUT = ("chat_template", "documents", "add_special_tokens")


def chat_prompt_ids(encoder: Encoder, request: Mapping[str, Any]) -> list[int] | None:
    """Token ids of the prompt of an OpenAI chat request (``messages``, ``tools``, ``chat_template_kwargs`` …).

    They are those that training would put before the answer. A last assistant message is continued at its end, with
    or without ``continue_final_message``: to training, two assistant messages in a row are one. ``tool_choice`` "none"
    leaves the tools out.

    Returns:
        None for what the encoder has no layout for, so that the engine's own rendering is used: images and other files,
        a chat template or documents in the request, tools with a model whose agent format is not known, a conversation
        without the start of an answer, settings that only a chat template understands.

    Raises:
        ValueError: the messages are no conversation, or none of this template; says why.
    """
    settings = {**request, **(request.get("chat_template_kwargs") or {})}
    messages = request.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages: expected a list with at least one message")
    tools = None if request.get("tool_choice") == "none" else request.get("tools") or None
    if _needs_engine(encoder, request, settings, tools):
        return None
    encoder = _with_thinking(encoder, settings)
    try:
        return encoder.encode_prompt(read_messages(_with_one_system(messages)).messages, tools)
    except (Unusable, UserError) as refused:
        raise ValueError(f"messages: {refused}") from None


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


def _needs_engine(encoder: Encoder, request: Mapping[str, Any], settings: Mapping[str, Any], tools: Any) -> bool:
    """Whether only the engine's own rendering can give what is asked."""
    opens_answer = settings.get("add_generation_prompt", True) or settings.get("continue_final_message")
    given = {name for name, value in (request.get("chat_template_kwargs") or {}).items() if value is not None}
    if (
        not opens_answer
        or given - _UNDERSTOOD - set(_NOT_LAID_OUT)
        or any(settings.get(name) for name in _NOT_LAID_OUT)
    ):
        return True
    messages = [message for message in request["messages"] if isinstance(message, Mapping)]
    contents = (message.get("content") for message in messages)
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if any(isinstance(part, Mapping) and part.get("type", "text") not in _TEXT_PARTS for part in parts):
        return True
    told = any(message.get("role") in ("tool", "function") or message.get("tool_calls") for message in messages)
    return not encoder.takes_tools and bool(tools or told)


def _with_thinking(encoder: Encoder, settings: Mapping[str, Any]) -> Encoder:
    """The encoder with the thinking mode that the request asks for, if it does."""
    asked = next((settings[name] for name in _THINKING if settings.get(name) is not None), None)
    if asked is None and settings.get("reasoning_effort") is not None:
        asked = settings["reasoning_effort"] != "none"
    if asked is None or asked is encoder.enable_thinking:
        return encoder
    if not isinstance(asked, bool):
        raise ValueError("chat_template_kwargs: enable_thinking is true or false")
    return replace(encoder, enable_thinking=asked)


def _with_one_system(messages: Sequence[Any]) -> list[Any]:
    """The messages with those that a developer wrote before the conversation as one system message."""
    texts: list[Any] = []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ("system", "developer"):
            break
        texts.append(message.get("content"))
    rest = list(messages[len(texts) :])
    if not texts:
        return rest
    if len(texts) > 1 and all(isinstance(text, str) for text in texts):
        return [{"role": "system", "content": "\n".join(texts)}, *rest]
    return [*({"role": "system", "content": text} for text in texts), *rest]


# --- vLLM -------------------------------------------------------------------------------------------------------

#: The prompt that the renderer is to take for the messages it is given, in the task of one request.
_laid_out: ContextVar[list[int] | None] = ContextVar("laid_out", default=None)


def use_trained_templates(online_renderer: Any, encoder_of: EncoderOf) -> None:
    """Make vLLM's ``OnlineRenderer`` take the prompts of training for chat requests and ``/tokenize``.

    ``encoder_of`` gives the encoder of a requested model name (None: no name was given), or None to leave the request
    to vLLM. Only text becomes ids here: length checks, truncation, tool parsers and structured output stay vLLM's. A
    chat request that gets such a prompt also stops at the template's stop words.
    """
    config = online_renderer.model_config
    preprocess_chat, render_messages = private.rendering(online_renderer)
    listed = config.try_get_generation_config().get("eos_token_id")  # vLLM stops by itself at these
    engine_stops = {online_renderer.renderer.get_eos_token_id(), *(listed if isinstance(listed, list) else [listed])}

    async def preprocess(request: Any, messages: list[Any], **settings: Any) -> Any:
        encoder = encoder_of(request.model)
        asked = None if encoder is None else _as_mapping(request, messages, settings)
        if encoder is None or asked is None:
            return await preprocess_chat(request, messages, **settings)
        # In a thread: a long text takes a while, and so does the first one, which loads the tokenizer.
        ids = await asyncio.to_thread(chat_prompt_ids, encoder, asked)
        if ids is not None:
            _add_stops(request, encoder, bool(asked["tools"]), engine_stops)
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
        from vllm.renderers.chat_utils import parse_chat_messages_async

        conversation, _, _ = await parse_chat_messages_async(messages, config, content_format="string")
        return conversation, TokensPrompt(prompt_token_ids=ids)

    private.replace_rendering(online_renderer, preprocess, render)


def _as_mapping(request: Any, messages: list[Any], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What :func:`chat_prompt_ids` needs of a request that vLLM has read; None for messages of another format."""
    if not all(isinstance(message, dict) for message in messages):
        return None
    for message in messages:  # pydantic leaves iterators that can be read once
        for key in ("content", "tool_calls"):
            if not isinstance(message.get(key), str | list | None):
                message[key] = list(message[key])
    params = request.build_chat_params(
        settings.get("default_template"), settings.get("default_template_content_format")
    ).with_defaults(settings.get("default_template_kwargs"))
    # A template given to the server is the wish of who started it; one in the request is the client's.
    in_request = getattr(request, "chat_template", None)
    tools = getattr(request, "tools", None) if settings.get("tool_dicts") else None
    return {
        "messages": messages,
        "tools": [_as_sent(tool) for tool in tools or ()],
        "tool_choice": getattr(request, "tool_choice", None),
        "chat_template": in_request,
        "add_special_tokens": getattr(request, "add_special_tokens", False),
        "chat_template_kwargs": params.chat_template_kwargs,
    }


def _as_sent(value: Any) -> Any:
    """A pydantic object as the JSON that the client sent, without the defaults it was filled up with."""
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
