"""Calls of tools in an agent's format, read out of an answer while it comes; and the grammar of one that must come.

Both follow from the record that training writes calls with (`AgentFormat`), so what a run was taught is what is read:
formats that vLLM has no parser for (ReAct) as well as Hermes'. vLLM's parsers are not used: importing them takes 15 s
and 500 MB.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rayswift.data.chat.agents import AgentFormat, get_agent_format
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.template_choice import load_template
from rayswift.generate.constraints import SCHEMA_RULES, quoted
from rayswift.generate.text_stream import longest_start_at_end

_MARK = re.compile(r"\{\{([A-Z_]+)\}\}")
#: The beginning of a call that is one JSON object, up to its arguments.
_JSON_CALL = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_XML_ARGUMENT = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_XML_END = "\n</parameter>\n"
#: A name that is longer is none: the text only looked like a call.
_LONGEST_NAME = 256


def agent_of(encoder: Encoder) -> AgentFormat:
    """The format in which the answers of an encoder's model call tools; Hermes' where it has none (vLLM's default)."""
    return load_template(encoder).agent or get_agent_format("hermes")


class NoCall(Exception):
    """A text that looked like a call goes on otherwise."""


@dataclass(frozen=True)
class Call:
    """A call as far as it has come: ``arguments`` is JSON text, ``end`` where it ends in the text."""

    name: str | None = None
    arguments: str = ""
    end: int | None = None


class CallReader:
    """Parts the text of one answer into content and calls, while it comes.

    ``tools``: the definitions of the request. ``most``: how many calls there may be. What comes after the first call
    and is no call is dropped, as vLLM does.
    """

    def __init__(self, agent: AgentFormat, tools: Iterable[Mapping[str, Any]], most: int = 128) -> None:
        functions = [tool["function"] for tool in tools]
        self._types = {function["name"]: _types_of(function.get("parameters")) for function in functions}
        self._first, self._next = _MARK.split(agent.calls_start + agent.call), _MARK.split(agent.call)
        self._start = (self._first[0].split() or [""])[0]
        self._between = [text for text in (agent.call_separator.strip(), agent.calls_end.strip()) if text]
        self._held, self._most = "", most
        self._sent = Call()  # of the call that is being read
        self._rest = ""  # what becomes of all further text: content, nothing
        self.count = 0

    @property
    def called(self) -> bool:
        """Whether a call has come, or the beginning of one."""
        return self.count > 0 or self._sent.name is not None

    def feed(self, text: str, *, final: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """More text of the answer (``final``: the last); gives what is certain of content and calls, the latter as the
        ``tool_calls`` of a delta."""
        if self._rest:
            return (text if self._rest == "content" else ""), []
        self._held += text
        content, deltas = "", []
        while self._held:
            if not self.count:
                before, self._held = self._split(final)
                content += before
            try:
                call = self._read()
            except NoCall:
                content += self._pass_over()
                continue
            if call is None:
                break
            if call.end is None:
                if not final or self._sent.name is not None:
                    deltas += self._delta(call)
                elif not self.count:
                    content += self._held  # half of a call, cut off
                break
            deltas += self._delta(call)
            self.count, self._sent, self._held = self.count + 1, Call(), self._held[call.end :]
        return content, deltas

    def _pass_over(self) -> str:
        """What is held is no call; gives what of it is content."""
        if self.count or self._sent.name is not None:
            self._rest, self._held = "nothing", ""
            return ""
        if not self._start:
            self._rest = "content"
        size = len(self._start) or len(self._held)
        passed, self._held = self._held[:size], self._held[size:]
        return passed

    def _split(self, final: bool) -> tuple[str, str]:
        """Content at the beginning of what is held, and the rest, which is or may become a call."""
        if not self._start:  # calls have no mark of their own: they are the whole answer
            return "", self._held
        place = self._held.find(self._start)
        if place < 0:
            place = len(self._held) - (0 if final else longest_start_at_end(self._held, [self._start]))
        return self._held[:place], self._held[place:]

    def _read(self) -> Call | None:
        """The call at the beginning of what is held; None for none yet."""
        held, skipped = self._held, 0
        if self.count:
            skipped = _after_any(held, self._between)
            held = held[skipped:]
            if any(text.startswith(held) for text in self._between):
                return None
        if not held.strip() or self.count >= self._most:
            return None
        if not self._start and not any(_may_begin(held, name) for name in (*self._types, "{")):
            raise NoCall
        call = read_call(self._next if self.count else self._first, held, self._types)
        return call if call.end is None else Call(call.name, call.arguments, call.end + skipped)

    def _delta(self, call: Call) -> list[dict[str, Any]]:
        """What of a call has not been sent."""
        if call.name is None or not call.arguments:  # a name alone may be prose
            return []
        more = call.arguments[len(self._sent.arguments) :]
        delta: dict[str, Any] = {"index": self.count, "function": {"arguments": more}}
        if self._sent.name is None:
            delta |= {"id": f"chatcmpl-tool-{uuid.uuid4().hex}", "type": "function"}
            delta["function"] = {"name": call.name, "arguments": more}
        elif not more:
            return []
        self._sent = call
        return [delta]


def read_call(record: list[str], text: str, types: Mapping[str, Mapping[str, str]]) -> Call:
    """A call at the beginning of ``text``, as far as it has come.

    ``record``: texts of a call's template and, between them, its marks. White space is as the model likes it.

    Raises:
        NoCall: the text is something else.
    """
    place, call = 0, Call()
    for number, part in enumerate(record):
        place = _skip_space(text, place)
        if number % 2 == 0:
            found = _after(text, place, part)
            if found is None:
                return call
            place = found
        elif part == "NAME":
            end = text.find(record[number + 1][0], place)
            if end < 0:
                if len(text) - place > _LONGEST_NAME:
                    raise NoCall
                return call
            call, place = Call(text[place:end].strip()), end
        elif part == "ARGUMENT_LIST":
            end = text.find(record[number + 1].split()[0], place)
            if end < 0:
                return call
            known = types.get(call.name or "", {})
            values = {name: _typed(value, known.get(name)) for name, value in _XML_ARGUMENT.findall(text[place:end])}
            call, place = Call(call.name, json.dumps(values, ensure_ascii=False)), end
        else:
            if place == len(text):
                return call
            value, whole = _json_at(text, place)
            call = _with_json(call, part, text[place:whole], value)
            if whole is None:
                return call
            place = whole
    return Call(call.name, call.arguments, place)


def _with_json(call: Call, mark: str, text: str, value: Any) -> Call:
    """The call with what a JSON mark of its record holds; ``value`` is None while ``text`` is half of it."""
    if mark == "NAME_JSON":
        return Call(value) if isinstance(value, str) else call
    if text[:1] != "{":
        raise NoCall
    if mark == "ARGUMENTS":
        return Call(call.name, text)
    begin = _JSON_CALL.match(text)
    if begin is not None:
        _, end = _json_at(text, begin.end())
        return Call(json.loads(begin[1]), text[begin.end() : end])
    if value is None:
        return call
    if not isinstance(value.get("name"), str):
        raise NoCall
    arguments = value.get("arguments", value.get("parameters", {}))
    return Call(value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def _json_at(text: str, place: int) -> tuple[Any, int | None]:
    """The JSON value at a place of the text and its end; None and None while it is not whole."""
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except ValueError:
        return None, None


def _skip_space(text: str, place: int) -> int:
    return len(text) - len(text[place:].lstrip())


def _after(text: str, place: int, literal: str) -> int | None:
    """Where the text goes on after a literal, white space apart; None where it ends before. Raises NoCall."""
    for letter in "".join(literal.split()):
        place = _skip_space(text, place)
        if place == len(text):
            return None
        if text[place] != letter:
            raise NoCall
        place += 1
    return place


def _after_any(text: str, literals: Iterable[str]) -> int:
    """Where the text goes on after those of the literals that it begins with."""
    place = _skip_space(text, 0)
    for literal in literals:
        if text.startswith(literal, place):
            place = _skip_space(text, place + len(literal))
    return place


def _may_begin(text: str, start: str) -> bool:
    text = text.lstrip()
    return text.startswith(start) or start.startswith(text)


def _types_of(schema: Any) -> dict[str, str]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    listed = properties.items() if isinstance(properties, dict) else ()
    return {name: str(one.get("type", "")) for name, one in listed if isinstance(one, dict)}


def _typed(text: str, kind: str | None) -> Any:
    """An argument that stands between tags, as its schema has it."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)  # as Jinja writes them


# --- grammar ----------------------------------------------------------------------------------------------------


def call_grammar(encoder: Encoder, tools: list[dict[str, Any]], *, many: bool) -> str:
    """A Lark grammar of a call of one of the tools (``many``: or of several), as the model was taught to write it."""
    agent, split = agent_of(encoder), load_template(encoder).segments.split_literal

    def literal(text: str) -> Iterator[str]:
        return (quoted(part) if isinstance(part, str) else f"<[{part}]>" for part in split(text))

    def written(record: str, function: dict[str, Any]) -> str:
        parts = _MARK.split(record)
        texts = (_mark(part, function) if number % 2 else literal(part) for number, part in enumerate(parts))
        return " ".join(piece for pieces in texts for piece in pieces)

    functions = [tool["function"] for tool in tools]
    rules = [f"call{number}: {written(agent.call, function)}" for number, function in enumerate(functions)]
    rules.append("call: " + " | ".join(f"call{number}" for number in range(len(functions))))
    more = " ".join((*literal(agent.call_separator), "call"))
    start = " ".join((*literal(agent.calls_start), "call", *([f"({more})*"] if many else [])))
    return "\n".join([f"start: {start}", *rules, f"xml_text[suffix={quoted(_XML_END)}]: /(.|\\n)*/"])


def _mark(mark: str, function: dict[str, Any]) -> Iterator[str]:
    """What stands in place of a mark, as Lark."""
    name, schema = function["name"], function.get("parameters") or {"type": "object"}
    if mark == "NAME":
        yield quoted(name)
    elif mark == "NAME_JSON":
        yield quoted(json.dumps(name, ensure_ascii=False))
    elif mark == "ARGUMENTS":
        yield _json_rule(schema)
    elif mark == "ARGUMENT_LIST":
        for key, wanted in (schema.get("properties") or {}).items():
            texts = wanted.get("enum") or ()
            if texts and all(isinstance(text, str) for text in texts):
                value = f"({' | '.join(map(quoted, texts))}) {quoted(_XML_END)}"
            else:
                plain = '("True" | "False")' if wanted.get("type") == "boolean" else _json_rule(wanted)
                value = "xml_text" if wanted.get("type") == "string" else f"{plain} {quoted(_XML_END)}"
            whole = f"{quoted(f'<parameter={key}>' + chr(10))} {value}"
            yield whole if key in schema.get("required", ()) else f"({whole})?"
    else:
        yield from (quoted(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '), _json_rule(schema))
        yield quoted("}")


def _json_rule(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': SCHEMA_RULES})}"
