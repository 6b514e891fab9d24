"""Prompts that the trained layout has no place for, with the chat template in the model's folder, as vLLM renders them:
tools of a model without an agent format, documents, a conversation without the start of an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import one_line

_TEXTS = ("text", "input_text", "output_text", "refusal")


def rendered_prompt_ids(encoder: Encoder, request: Mapping[str, Any]) -> list[int]:
    """Token ids of a chat request. Raises ValueError for what the chat template or this engine cannot lay out."""
    tokenizer, settings = encoder.tokenizer, dict(request.get("chat_template_kwargs") or {})
    if request.get("chat_template") or settings.get("chat_template"):
        raise ValueError(
            "a chat template in the request is not taken: it is a program, and this server runs no client's"
        )
    if not tokenizer.chat_template:
        raise ValueError("the model has no chat template; --agent_template lays tools out without one")
    messages = [_plain(message) for message in request["messages"]]
    if encoder.system is not None and messages and messages[0].get("role") not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": encoder.system})
    if encoder.enable_thinking is not None:
        settings.setdefault("enable_thinking", encoder.enable_thinking)
    opens = request.get("add_generation_prompt") is not False and not request.get("continue_final_message")
    try:
        found = tokenizer.apply_chat_template(
            messages,
            tools=None if request.get("tool_choice") == "none" else request.get("tools") or None,
            documents=request.get("documents"),
            add_generation_prompt=opens,
            continue_final_message=bool(request.get("continue_final_message")),
            tokenize=True,
            return_dict=False,
            **settings,
        )
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the model's chat template refuses: {one_line(error)}") from None
    return list(found)


def _plain(message: Any) -> dict[str, Any]:
    """A message as chat templates read it: one text, arguments of calls as objects."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError("a message is an object with role and content")
    content = message.get("content")
    if isinstance(content, list):
        texts = [_text(part) for part in content]
        content = "\n".join(texts)
    elif not isinstance(content, str | None):
        raise ValueError("content is a text or a list of parts")
    plain = {**message, "content": content or ""}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_with_object(call) for call in calls]
    return plain


def _text(part: Any) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get("refusal" if kind == "refusal" else "text") if kind in _TEXTS else part
    if not isinstance(text, str):
        raise ValueError("this engine answers text: it takes no images or other files (--infer_backend vllm does)")
    return text


def _with_object(call: Any) -> Any:
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (TypeError, KeyError, ValueError):
        return call
