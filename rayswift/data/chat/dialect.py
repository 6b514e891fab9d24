"""What a model's own chat template takes, found by rendering small conversations: no list of models.

Templates differ in how they want thoughts, tool calls, their ids and arguments, and the content itself. Each way is
tried with marked texts; the first that shows them is the template's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any

from rayswift.data.chat.conversation import DropRow
from rayswift.data.chat.turns import Turn

#: Names under which templates look for thoughts beside the answer.
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_SWITCH = re.compile(r"((enable|use|with)_)?(think|reason)(ing)?")
#: The switch of templates that take an effort instead, of which one value is not to think.
_EFFORT = ("reasoning_effort",)

QUESTION, THOUGHT, ANSWER, NEXT, RESULT = "zqQuestion", "zqThought", "zqAnswer", "zqNext", "zqResult"
CALL = ("zqName", {"zqKey": "zqValue"})
_PARAMETERS = {"zqKey": {"type": "string", "description": "zqHow"}}
TOOLS = [{"type": "function", "function": {"name": "zqName", "description": "zqWhat", "parameters": {
    "type": "object", "properties": _PARAMETERS, "required": ["zqKey"]}}}]  # fmt: skip
ASKED = Turn("user", QUESTION)
ANSWERED = Turn("assistant", ANSWER)
CALLED = Turn("assistant", "", [CALL])


class ChatTemplate:
    """The tokenizer's chat template as a function from messages to text, on one fixed day."""

    def __init__(self, tokenizer: Any, day: date) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        self.source = "\n".join(template.values()) if isinstance(template, Mapping) else str(template)
        self._day = {"date_string": day.strftime("%d %b %Y"), "strftime_now": day.strftime}

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, **kwargs: Any) -> str:
        """What the chat template makes of messages.

        Raises:
            DropRow: the template refuses them. It is a program of the model's author and can fail as programs do.
        """
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **self._day, **kwargs)
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DropRow(f"the model's chat template refuses the conversation: {error}") from None
        return str(text)

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """The settings of the template that turn thinking on and off."""
        from jinja2 import Environment, TemplateError, meta

        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.source)
        try:
            names = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source))
        except TemplateError:
            names = set()
        found = tuple(sorted(name for name in names if _SWITCH.fullmatch(name)))
        return found or (_EFFORT if "no_think" in source and _EFFORT[0] in source else ())

    def thinking(self, on: bool | None) -> dict[str, Any]:
        """The settings for `--enable_thinking`; None leaves the template its own default."""
        if on is None or self.switches != _EFFORT:
            return {} if on is None else dict.fromkeys(self.switches, on)
        return {"reasoning_effort": "high" if on else "no_think"}


@dataclass(frozen=True)
class Dialect:
    """How a chat template wants its messages.

    `parts`: content as a list of typed parts. `thoughts`: `field` beside the content, `block` as a part of it, `text`
    in it as it stands; `call_thoughts`: the same beside calls. `arguments_text`: arguments of calls as JSON text.
    `random_ids`: ids of calls are nine letters and digits, as Mistral wants them, not `functions.NAME:NUMBER`.
    `no_content`: a call without text has no content.
    `tools`, `calls`, `results`: whether the template shows them.
    """

    parts: bool = False
    thoughts: str = "text"
    call_thoughts: str = "text"
    arguments_text: bool = False
    random_ids: bool = False
    no_content: bool = False
    tools: bool = False
    calls: bool = False
    results: bool = False

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """The turns as the template takes them."""
        written: list[dict[str, Any]] = []
        waiting: list[tuple[str, str]] = []  # name and id of the calls without a result
        number = 0
        for turn in turns:
            message: dict[str, Any] = {"role": turn.role, "content": self._content(turn.text)}
            if turn.role == "assistant":
                self._set_thoughts(message, turn.text, self.call_thoughts if turn.calls else self.thoughts)
                waiting = [(name, self._call_id(name, number + i)) for i, (name, _) in enumerate(turn.calls)]
                number += len(waiting)
                if turn.calls:
                    message["tool_calls"] = [
                        {"id": call_id, "type": "function", "function": {"name": name, "arguments": self._given(given)}}
                        for (name, given), (_, call_id) in zip(turn.calls, waiting, strict=True)
                    ]
                    if self.no_content and not message["content"]:
                        message["content"] = None
            elif turn.role == "tool":
                name, call_id = waiting.pop(0) if waiting else (turn.name or "tool", self._call_id("tool", number))
                message |= {"name": turn.name or name, "tool_call_id": call_id}
            written.append(message)
        return written

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.parts else text

    def _set_thoughts(self, message: dict[str, Any], text: str, place: str) -> None:
        thought, answer = split_thought(text) if place != "text" else ("", text)
        message["content"] = self._content(answer)
        if thought and place == "field":
            message |= dict.fromkeys(_THOUGHT_KEYS, thought)
        elif thought:
            blocks = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": answer}]
            message["content"] = blocks if answer else blocks[:1]

    def _given(self, arguments: Any) -> Any:
        return json.dumps(arguments, ensure_ascii=False) if self.arguments_text else arguments

    def _call_id(self, name: str, number: int) -> str:
        return f"call{number:05d}" if self.random_ids else f"functions.{name}:{number}"


def split_thought(text: str) -> tuple[str, str]:
    """Thought and answer of an assistant text; no thought where it has none."""
    found = _THOUGHT.match(text)
    return (found[1].strip(), text[found.end() :]) if found else ("", text)


def find_dialect(template: ChatTemplate) -> Dialect:
    """How this chat template wants its messages."""

    def shows(dialect: Dialect, turns: list[Turn], marks: list[str], tools: Any = None, wrong: str = "(?!)") -> bool:
        """Whether the template shows the marked texts behind the question, in one of its modes, and nothing wrong."""
        for mode in (None, True, False):
            try:
                text = template.render(dialect.messages(turns), tools, **template.thinking(mode))
            except DropRow:
                continue
            reply = text[text.rfind(QUESTION) :]
            if all(mark in reply for mark in marks) and not re.search(wrong, reply):
                return True
        return False

    ways = [Dialect(), Dialect(parts=True)]
    dialect = next((way for way in ways if shows(way, [ASKED, ANSWERED], [QUESTION, ANSWER])), Dialect())
    ways = [replace(dialect, thoughts=place) for place in ("field", "block", "text")]
    thinking = [ASKED, Turn("assistant", f"<think>{THOUGHT}</think>{ANSWER}")]
    dialect = next((way for way in ways if shows(way, thinking, [THOUGHT, ANSWER], None, "'type'")), dialect)
    try:
        asked = template.render(dialect.messages([ASKED]), TOOLS, add_generation_prompt=True)
    except DropRow:
        asked = ""
    ways = [
        replace(dialect, calls=True, arguments_text=as_text, random_ids=random_ids, no_content=no_content)
        for no_content in (False, True) for as_text in (False, True) for random_ids in (False, True)
    ]  # fmt: skip
    # Arguments in the wrong form come out as a Python literal, or as JSON text in JSON text.
    wrong = r"""'zqKey'|\\+"zqKey|None|"\{"""
    called = [ASKED, CALLED]
    dialect = next((way for way in ways if shows(way, called, ["zqName", "zqKey", "zqValue"], TOOLS, wrong)), dialect)
    thinking = [ASKED, Turn("assistant", f"<think>{THOUGHT}</think>", [CALL])]
    ways = [replace(dialect, call_thoughts=place) for place in ("field", "block", "text")]
    dialect = next((way for way in ways if shows(way, thinking, [THOUGHT, "zqValue"], TOOLS, "'type'")), dialect)
    answered = [*called, Turn("tool", RESULT), ANSWERED]
    results = dialect.calls and shows(dialect, answered, [RESULT, ANSWER], TOOLS)
    return replace(dialect, tools="zqName" in asked and "zqKey" in asked, results=results)
