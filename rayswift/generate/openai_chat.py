"""A conversation as OpenAI's interface has it: what is sent of a row, and what an answer is as a row's text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rayswift.data.chat.agents import BadTool, get_agent_format, read_call, read_tools, wrap_tool
from rayswift.errors import UserError
from rayswift.generate.types import JsonRow, Messages

#: How calls are written where ``--agent_template`` does not say: Qwen's way, which the most models have.
DEFAULT_AGENT = "hermes"
#: What servers take of a message; marks of training (``loss``, …) stay here.
_SENT = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")


def sent_messages(messages: Messages) -> list[JsonRow]:
    """The messages of a standard row with calls and results of tools as OpenAI writes them: ``tool_calls`` of the
    assistant, and ``tool`` messages that name the call which they answer.

    Raises:
        UserError: a call that cannot be read.
    """
    sent: list[JsonRow] = []
    unanswered: list[str] = []
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "tool_call":
            if number == 0 or messages[number - 1]["role"] not in ("tool_call", "assistant"):
                sent.append({"role": "assistant", "content": ""})
            name, arguments = _read(read_call, message["content"])
            unanswered.append(f"call_{number}")
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            sent[-1].setdefault("tool_calls", []).append(
                {"id": unanswered[-1], "type": "function", "function": function}
            )
        elif role in ("tool", "tool_response"):
            call = message.get("tool_call_id") or (unanswered.pop(0) if unanswered else f"call_{number}")
            sent.append({"role": "tool", "tool_call_id": call, "content": message["content"]})
        else:
            sent.append({name: message[name] for name in _SENT if message.get(name) is not None})
    return sent


def sent_tools(tools: Any) -> list[JsonRow] | None:
    """A row's tools (a list or JSON text; OpenAI's objects or bare functions) as OpenAI's objects; None without any.

    Raises:
        UserError: they cannot be read.
    """
    listed = _read(read_tools, tools) if tools else None
    return [{"type": "function", **_read(wrap_tool, tool)} for tool in listed] if listed else None


def _read(reader: Any, value: Any) -> Any:
    try:
        return reader(value)
    except BadTool as bad:
        raise UserError(str(bad)) from None


def text_of(content: Any) -> str:
    """The text of a message's content: text, parts of which some are text, or nothing."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content or ""


def with_calls(text: str, calls: Iterable[tuple[str, str]], agent_template: str) -> str:
    """An answer's text and its calls (name, arguments as JSON text) as the model of an agent template writes both.

    Raises:
        UserError: the arguments of a call are no JSON.
    """
    agent, named = get_agent_format(agent_template), list(calls)
    written = ""
    for number, (name, arguments) in enumerate(named):
        try:
            call = json.dumps({"name": name, "arguments": json.loads(arguments or "{}")}, ensure_ascii=False)
        except ValueError:
            raise UserError(f"the arguments of the call of {name} are no JSON: {arguments[:200]}") from None
        spans = agent.write_call(call, first=number == 0, last=number == len(named) - 1)
        written += "".join(span.text for span in spans)
    return f"{text}\n{written}" if text and written else text + written


def why_empty(finish_reason: str | None, thoughts: str, refusal: str | None) -> str:
    """Why an answer without text and calls is none."""
    if refusal:
        return f"the model refuses: {' '.join(refusal.split())[:300]}"
    if finish_reason == "length":
        more = " while it was thinking" if thoughts else ""
        return f"the answer is empty: the server stopped it at its longest length{more}; raise --max_new_tokens"
    return f"the answer is empty (finish_reason {finish_reason or 'unknown'})"
