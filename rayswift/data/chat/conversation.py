"""A standard row as a conversation: one system text and rounds of (query, reply), ready for any template.

Reading a row merges consecutive messages of one side and turns tool messages into text. A row that cannot be a
conversation raises :class:`DropRow` with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rayswift.data.chat.agents import AgentFormat, BadTool, Span

Message = Mapping[str, Any]


class DropRow(Exception):
    """This row cannot be trained on; the message is the reason that the drop report counts."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


class ReplyPart(NamedTuple):
    """Text of an assistant turn and the `loss` and `loss_scale` of its message (None: the flag decides).

    `given`: a tool result inside the turn, which the model does not write. `literal`: special tokens in it count.
    """

    text: str
    loss: bool | None = None
    loss_scale: float | None = None
    given: bool = False
    literal: bool = False


@dataclass(slots=True)
class Round:
    """What the model reads and what it answers.

    `query` is None where the conversation starts with a reply; `reply` is None where a query is not answered (at the
    end, or a user who writes after a tool result). `follows_user` is False for a round that continues a tool call.
    `results`: tool results in a turn of their own, instead of a query. `calls`: the reply begins with a tool call.
    `beside`: its thoughts were given beside it (`reasoning_content`), without white space between.
    """

    query: str | None
    reply: list[ReplyPart] | None = None
    follows_user: bool = True
    results: list[Span] | None = None
    calls: bool = False
    beside: bool = False


@dataclass(slots=True)
class Conversation:
    """`system` None: not given (a template may have a default); "": given as empty, no system block.

    `tools`: the text that tells the model of its tools. `agent`: the format of tools and tool messages.
    """

    system: str | None = None
    rounds: list[Round] = field(default_factory=list)
    tools: list[Span] = field(default_factory=list)
    agent: AgentFormat | None = None

    @property
    def last_round(self) -> int:
        """Index of the round that the last user message opens: thoughts are kept from here on."""
        rounds = self.rounds
        index = len(rounds) - 1
        while index > 0 and not rounds[index].follows_user:
            index -= 1
        return max(index, 0)

    def with_last_answer_trained(self) -> Conversation:
        """With `loss` False, where it is not given, on all but the answer to the last query or tool result: what
        `--loss_scale last_round` of SWIFT 4.6 trains (thoughts go with :attr:`last_round`)."""

        def untrained(parts: list[ReplyPart]) -> list[ReplyPart]:
            return [part._replace(loss=False) if part.loss is None else part for part in parts]

        rounds = [replace(round_, reply=round_.reply and untrained(round_.reply)) for round_ in self.rounds]
        last = self.rounds[-1].reply or []
        start = max((number for number, part in enumerate(last, start=1) if part.given), default=0)
        rounds[-1].reply = [*untrained(last[:start]), *last[start:]] or None
        return replace(self, rounds=rounds)

    def without_trailing_query(self) -> Conversation:
        """The conversation up to its last reply: a query at the end teaches nothing."""
        end = len(self.rounds)
        while end and self.rounds[end - 1].reply is None:
            end -= 1
        return self if end == len(self.rounds) else Conversation(self.system, self.rounds[:end], self.tools, self.agent)


def read_conversation(
    messages: Sequence[Message], tools: Any = None, agent: AgentFormat | None = None, think: str | None = "<think>\n"
) -> Conversation:
    """Read `messages` of a standard row.

    Args:
        messages: roles system (first only), user, assistant, tool_call, tool_response, tool.
        tools: the row's tool definitions (list or JSON text), or None.
        agent: how tools and tool messages become text; None: they are not supported.
        think: what opens the think block that the `reasoning_content` of an answer becomes; None: the template knows
            no thoughts, those in a text are text like any other.

    Raises:
        DropRow: no messages, content that is not text, a system message in the middle, tools without an agent format,
            a tool or a call that cannot be read.
    """
    if not messages:
        raise DropRow("no messages")
    rounds: list[Round] = []
    conversation = Conversation(None, rounds, agent=agent)
    if tools and agent is None:
        raise DropRow("the template has no format for tools (--agent_template names one)")
    if tools and agent is not None:
        try:
            conversation.tools = agent.describe_tools(tools)
        except BadTool as bad:
            raise DropRow(str(bad)) from None
    for number, message in enumerate(messages):
        role, text = message["role"], message["content"]
        if not isinstance(text, str):
            raise DropRow("message content is not text")
        if role == "user":
            _add_query(rounds, text)
        elif role == "assistant":
            text = with_thoughts(message, think or "<think>\n") if "reasoning_content" in message else text
            _add_reply(rounds, ReplyPart(text, message.get("loss"), message.get("loss_scale")))
            rounds[-1].beside |= "reasoning_content" in message
        elif role == "system":
            if number:
                raise DropRow("a system message that is not the first message")
            conversation.system = text
        elif agent is None:
            raise DropRow("the template has no format for tool messages (--agent_template names one)")
        elif role == "tool_call":
            _add_call(rounds, messages, number, agent, think)
        else:
            _add_result(rounds, text, agent, first=not number or messages[number - 1]["role"] not in _RESULTS)
    return conversation


def with_thoughts(message: Message, think: str = "<think>\n") -> str:
    """The text of an answer, its `reasoning_content` in the think block that `think` opens."""
    thoughts, text = message.get("reasoning_content"), str(message["content"])
    if not thoughts:
        return text
    end = "\n</think>\n\n" if think.endswith("\n") else "</think>"
    return think + thoughts.strip("\n") + end + text.lstrip("\n")


_RESULTS = ("tool_response", "tool")


def _add_query(rounds: list[Round], text: str) -> None:
    last = rounds[-1] if rounds else None
    if last is not None and last.reply is None and last.follows_user:
        last.query = (last.query or "") + text
    else:
        rounds.append(Round(text))


def _add_reply(rounds: list[Round], part: ReplyPart) -> None:
    """Append to the reply of the open round; parts stay apart only where their flags differ."""
    if not rounds:
        rounds.append(Round(None))
    reply = rounds[-1].reply
    if reply is None:
        rounds[-1].reply = [part]
        return
    last = reply[-1]
    if last[1:] == part[1:]:
        reply[-1] = part._replace(text=last.text + part.text)
    else:
        reply.append(part)


def _add_call(
    rounds: list[Round], messages: Sequence[Message], number: int, agent: AgentFormat, think: str | None
) -> None:
    """Append a call; of consecutive calls the first one's flags count, as in SWIFT."""
    first = number == 0 or messages[number - 1]["role"] != "tool_call"
    last = number + 1 == len(messages) or messages[number + 1]["role"] != "tool_call"
    flagged = number
    while flagged and messages[flagged - 1]["role"] == "tool_call":
        flagged -= 1
    loss, loss_scale = messages[flagged].get("loss"), messages[flagged].get("loss_scale")
    after_text = first and bool(rounds) and _close_text(rounds[-1], agent, think)
    try:
        spans = agent.write_call(messages[number]["content"], first=first, last=last, after_text=after_text)
    except BadTool as bad:
        raise DropRow(str(bad)) from None
    for text, literal in spans:
        _add_reply(rounds, ReplyPart(text, loss, loss_scale, literal=literal))


def _close_text(round_: Round, agent: AgentFormat, think: str | None) -> bool:
    """Whether the turn that goes on with calls says something first, which is made ready for them; a thought alone is
    nothing said, and ends as the think block does."""
    said = round_.reply[-1] if round_.reply else None
    if said is None or not said.text:
        round_.calls = True
        return False
    if said.given:
        return False
    thought, end, answer = said.text.rpartition("</think>") if think else ("", "", said.text)
    if end and not answer.strip():
        answer = "\n\n" if think and think.endswith("\n") else ""
    elif agent.trims_text:
        answer = answer.strip()
    round_.reply = [*(round_.reply or ())[:-1], said._replace(text=thought + end + answer)]
    return bool(answer.strip())


def _add_result(rounds: list[Round], text: str, agent: AgentFormat, *, first: bool) -> None:
    spans = agent.write_result(text, first=first)
    if agent.result_place == "reply":
        for text, literal in spans:
            _add_reply(rounds, ReplyPart(text, given=True, literal=literal))
    elif agent.result_place == "turn":
        if first:
            rounds.append(Round(None, None, False, spans))
        else:
            rounds[-1].results = [*(rounds[-1].results or ()), *spans]
    else:
        joined = "".join(span.text for span in spans)
        last = rounds[-1] if rounds else None
        if last is not None and last.reply is None:
            last.query = (last.query or "") + (agent.result_separator if first and last.query else "") + joined
        else:
            rounds.append(Round(joined, None, False))
