"""A row as turns: the messages that a model's own chat template takes, before they are written in its dialect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rayswift.data.chat.agents import BadTool, read_call
from rayswift.data.chat.conversation import Conversation, DropRow, Message, ReplyPart, with_thoughts
from rayswift.data.chat.families import choose_system


@dataclass
class Turn:
    """One message for a chat template. `calls`: (name, arguments) of the tools that an assistant turn calls. `name`:
    of the tool that a result comes from. `parts`: what an assistant turn was written as, with the flags."""

    role: str
    text: str
    calls: list[tuple[str, Any]] = field(default_factory=list)
    name: str | None = None
    parts: list[ReplyPart] = field(default_factory=list)


def turns_of_messages(messages: Sequence[Message], system: str | None) -> list[Turn]:
    """The messages of a standard row; those of one side that follow each other are one turn.

    Raises:
        DropRow: no messages, content that is not text, a system message in the middle, a call that cannot be read.
    """
    if not messages:
        raise DropRow("no messages")
    turns: list[Turn] = []
    given: str | None = None
    calls_open = False
    for number, message in enumerate(messages):
        role, text = message["role"], message["content"]
        if not isinstance(text, str):
            raise DropRow("message content is not text")
        if role == "assistant":
            text = with_thoughts(message)
        last = turns[-1] if turns else None
        if role == "system":
            if number:
                raise DropRow("a system message that is not the first message")
            given = text
        elif role == "user":
            if last is not None and last.role == "user":
                last.text += text
            else:
                turns.append(Turn("user", text))
        elif role in ("assistant", "tool_call"):
            part = ReplyPart(text, message.get("loss"), message.get("loss_scale"))
            if last is None or last.role != "assistant":
                turns.append(last := Turn("assistant", ""))
            if role == "tool_call":
                try:
                    last.calls.append(read_call(text))
                except BadTool as bad:
                    raise DropRow(str(bad)) from None
            elif last.calls:
                raise DropRow("an assistant turn goes on behind its tool calls, before their results")
            else:
                last.text += text
            if not calls_open:  # of consecutive calls the first one's flags count, as in SWIFT
                last.parts.append(part)
        else:
            turns.append(Turn("tool", text, name=message.get("name")))
        calls_open = role == "tool_call"
    return _with_system(turns, choose_system(given, system, None))


def turns_of_conversation(conversation: Conversation, system: str | None) -> list[Turn]:
    """A conversation whose tools an agent template has written as text, in the system text or the first query.

    Raises:
        DropRow: the agent template writes special tokens or turns of its own, which need a family.
    """
    agent, tools = conversation.agent, "".join(span.text for span in conversation.tools)
    literal = any(part.literal for round_ in conversation.rounds for part in round_.reply or ())
    own_turns = any(round_.results is not None for round_ in conversation.rounds)
    if literal or own_turns or any(span.literal for span in conversation.tools):
        raise DropRow(f"agent template {agent.name if agent else ''} needs a template family (--template)")
    turns = []
    for round_ in conversation.rounds:
        if round_.query is not None:
            turns.append(Turn("user", round_.query))
        if round_.reply is not None:
            turns.append(Turn("assistant", "".join(part.text for part in round_.reply), parts=round_.reply))
    chosen = choose_system(conversation.system, system, None)
    if tools and agent is not None and agent.tools_place != "before_query":
        chosen = f"{chosen}\n\n{tools}" if chosen else tools
    elif tools and turns:
        asked = next((turn for turn in turns if turn.role == "user"), turns[0])
        asked.text = tools + asked.text
    return _with_system(turns, chosen)


def _with_system(turns: list[Turn], system: str | None) -> list[Turn]:
    return [Turn("system", system), *turns] if system else turns


def protect(value: Any, special: re.Pattern[str]) -> Any:
    """Turns or tools in which every special-token text is a stand-in, so that those in a rendering are the template's
    own: `\\ue000`, the code points joined by commas, `\\ue001`."""
    if isinstance(value, str):
        return special.sub(lambda found: f"\ue000{','.join(str(ord(char)) for char in found[0])}\ue001", value)
    if isinstance(value, list):
        return [protect(item, special) for item in value]
    if isinstance(value, tuple):
        return tuple(protect(item, special) for item in value)
    if isinstance(value, dict):
        return {protect(key, special): protect(item, special) for key, item in value.items()}
    if isinstance(value, Turn):
        return replace(value, text=protect(value.text, special), calls=protect(value.calls, special),
                       name=protect(value.name, special))  # fmt: skip
    return value


def unprotect(stand_in: str) -> str:
    """The special-token text that a stand-in (without its two marks) is for."""
    return "".join(chr(int(code)) for code in stand_in.split(","))
