"""A standard row as a conversation: one system text and rounds of (query, reply), ready for any template.

Reading a row merges consecutive messages of one side, puts an empty query before a reply that has none, and turns
tool messages into text. A row that cannot be a conversation raises :class:`DropRow` with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Message = Mapping[str, Any]


class DropRow(Exception):
    """This row cannot be trained on; the message is the reason that the drop report counts."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


class ReplyPart(NamedTuple):
    """Text of an assistant turn and the `loss` flag of its message (None: the loss scale decides)."""

    text: str
    loss: bool | None = None


@dataclass(slots=True)
class Round:
    """What the model reads and what it answers. `reply` is None where the conversation ends with a query.

    `follows_user` is False for a round that continues a tool call: the "last round" of SWIFT starts at the last
    query that a user wrote.
    """

    query: str
    reply: list[ReplyPart] | None = None
    follows_user: bool = True


@dataclass(slots=True)
class Conversation:
    """`system` None: not given (a template may have a default); "": given as empty, no system block."""

    system: str | None = None
    rounds: list[Round] = field(default_factory=list)
    tools_text: str = ""

    @property
    def last_round(self) -> int:
        """Index of the round that the last user message opens."""
        return max((i for i, round_ in enumerate(self.rounds) if round_.follows_user), default=0)

    def without_trailing_query(self) -> Conversation:
        """The conversation up to its last reply: a query at the end teaches nothing."""
        if self.rounds and self.rounds[-1].reply is None:
            return Conversation(self.system, self.rounds[:-1], self.tools_text)
        return self


def read_conversation(messages: Sequence[Message], tools: Any = None, agent: str | None = None) -> Conversation:
    """Read `messages` of a standard row.

    Args:
        messages: roles system (first only), user, assistant, tool_call, tool_response, tool.
        tools: the row's tool definitions (list or JSON text), or None.
        agent: how tools and tool messages become text: `hermes` (Qwen), `raw` (as they are), None (not supported).

    Raises:
        DropRow: no messages, content that is not text, a system message in the middle, tools without an agent format.
    """
    if not messages:
        raise DropRow("no messages")
    conversation = Conversation(tools_text=_tools_text(tools, agent))
    for number, message in enumerate(messages):
        role, text = message["role"], message["content"]
        if not isinstance(text, str):
            raise DropRow("message content is not text")
        if role == "user":
            _add_query(conversation, text)
        elif role == "assistant":
            _add_reply(conversation, ReplyPart(text, message.get("loss")))
        elif role == "system":
            if number:
                raise DropRow("a system message that is not the first message")
            conversation.system = text
        elif agent is None:
            raise DropRow("tool messages need the agent templates")
        elif role == "tool_call":
            call = text if agent == "raw" else _hermes_call(text)
            _add_reply(conversation, ReplyPart(call, message.get("loss")), separator="\n")
        else:
            answer = text if agent == "raw" else f"<tool_response>\n{text}\n</tool_response>"
            _add_query(conversation, answer, follows_user=False, separator="\n")
    return conversation


def _add_query(conversation: Conversation, text: str, *, follows_user: bool = True, separator: str = "") -> None:
    rounds = conversation.rounds
    if rounds and rounds[-1].reply is None:
        open_round = rounds[-1]
        open_round.query += (separator if open_round.query else "") + text
        open_round.follows_user |= follows_user
    else:
        rounds.append(Round(text, None, follows_user))


def _add_reply(conversation: Conversation, part: ReplyPart, *, separator: str = "") -> None:
    """Append to the reply of the open round; parts stay apart only where their loss flags differ."""
    rounds = conversation.rounds
    if not rounds:
        rounds.append(Round(""))
    reply = rounds[-1].reply
    if reply is None:
        rounds[-1].reply = [part]
        return
    text = (separator if reply[-1].text else "") + part.text
    if reply[-1].loss == part.loss:
        reply[-1] = ReplyPart(reply[-1].text + text, part.loss)
    else:
        reply.append(ReplyPart(text, part.loss))


# The wording of the models' own chat templates (Qwen2.5, Qwen3), after Nous Hermes.
_HERMES_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def _tools_text(tools: Any, agent: str | None) -> str:
    if not tools:
        return ""
    if agent is None:
        raise DropRow("tools need the agent templates")
    listed = _json(tools) if isinstance(tools, str) else tools
    if not isinstance(listed, list):
        raise DropRow("tools is not a list of tool definitions")
    lines = [json.dumps(_json(tool) if isinstance(tool, str) else tool, ensure_ascii=False) for tool in listed]
    if not lines:
        return ""
    return "\n".join(lines) if agent == "raw" else _HERMES_TOOLS.format(tools="\n".join(lines))


def _hermes_call(text: str) -> str:
    call = _json(text)
    if not isinstance(call, dict) or "name" not in call:
        raise DropRow("a tool_call is not a JSON object with name and arguments")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments)
    spelled = json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{spelled}\n</tool_call>"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise DropRow("tools or a tool_call is not valid JSON") from None
