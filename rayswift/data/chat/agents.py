"""Agent templates as records: how tools enter the prompt, and what tool calls and tool results look like.

The records are in `agents.json`; names and wording are SWIFT's (`--agent_template`). Where SWIFT prints
arguments as a Python literal or leaves out the row's own system text, here they are JSON and the system text stays.
"""

from __future__ import annotations

import ast
import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from rayswift.errors import UserError

_MARK = re.compile(r"\{\{([A-Z_]+)\}\}")
#: What special tokens of chat models begin with: record text that holds one is template text, the rest is content.
_SPECIAL = re.compile(r"<[|｜]")


#: SWIFT's names of formats that the chat templates of newer models write themselves, and a mark of each: the model's
#: own chat template stands for them.
OWN_AGENTS: Mapping[str, str] = {
    "qwen3_5": "<function=", "hunyuan_hermes": "<tool_calls>", "hy_v3_preview": "<tool_sep", "hy_v3": "<tool_sep",
    "glm4_5": "<arg_key>", "glm4_7": "<arg_key>", "glm5_1": "<arg_key>", "llama4": "<|header_start|>",
    "deepseek_v4": "DSML", "deepseek_v41": "DSML", "minimax_m2": "minimax:tool_call", "minimax_m3": "]<]minimax[>[",
    "seed_oss": "seed:tool_call", "spark2_5": "<arg_key>", "xing4_0": "<param_key>", "gemma4": "<|tool_call>",
    "mistral": "[TOOL_CALLS]", "youtu": "<|begin_of_tool_description|>", "kimi_k25": "<|tool_calls_section_begin|>",
    "kimi_k3": "<|open|>", "ling3": "<arg_key>", "minicpm5": "<param",
}  # fmt: skip


class Span(NamedTuple):
    """A text; `literal`: special tokens in it count."""

    text: str
    literal: bool


class BadTool(Exception):
    """A tool or a call that is not what it should be; the message says which and why."""


@dataclass(frozen=True, slots=True)
class AgentFormat:
    """One agent template.

    tools / tool / tool_separator: the text around `{{TOOLS}}`, each tool in it, and what stands between two.
    tools_place: `after_system` (a paragraph after the system text), `instead_of_default` (the same, and the template's
    default system text is left out), `own_block` (a system block of their own before that of the system text) or
    `before_query` (in front of the first user text). default_system: the system text where tools are given and neither
    row, flag nor template has one.
    calls_start / call / call_separator / calls_end: an assistant turn that calls tools; text_separator: between what it
    says and its calls, trims_text: without white space around what it says. argument: one argument of a call in
    `{{ARGUMENT_LIST}}`. call_ends_turn: the model stops at calls_end, and the tools answer without an end-of-turn token
    in between.
    result / result_separator / results_end: what the tools answer. result_place: `query` (a user turn), `reply` (the
    same assistant turn goes on, the result in it is not trained) or `turn` (a turn of its own with special tokens, up
    to where the reply starts). note: where the models' own chat templates are followed and not SWIFT.
    """

    name: str
    tools: str
    tool: str
    call: str
    result: str
    tool_separator: str = "\n"
    tools_place: str = "after_system"
    default_system: str | None = None
    text_separator: str = "\n"
    trims_text: bool = False
    argument: str = ""
    calls_start: str = ""
    call_separator: str = ""
    calls_end: str = ""
    call_ends_turn: bool = False
    result_place: str = "query"
    result_separator: str = ""
    results_end: str = ""
    note: str = ""

    def describe_tools(self, tools: Any) -> list[Span]:
        """The text that tells the model of its tools (a list of definitions, or JSON text); empty if there are none.

        Raises:
            BadTool: not a list of definitions with names.
        """
        listed = read_tools(tools)
        if not listed:
            return []
        marks = [_tool_marks(tool) for tool in listed]
        described = self.tool_separator.join("".join(part.text for part in _fill(self.tool, each)) for each in marks)
        return _fill(self.tools, {"TOOLS": described, "NAMES": ",".join(each["NAME"] for each in marks)})

    def write_call(self, text: str, *, first: bool, last: bool, after_text: bool = False) -> list[Span]:
        """One call (a JSON object with name and arguments) of a row of calls, as the model writes it; `after_text`: it
        said something first.

        Raises:
            BadTool: the text is no such object.
        """
        start = (self.text_separator if after_text else "") + self.calls_start if first else self.call_separator
        marks = {"CALL_TEXT": text} if "{{CALL_TEXT}}" in self.call else self._call_marks(text)
        return _fill(start + self.call + (self.calls_end if last else ""), marks)

    def write_result(self, text: str, *, first: bool) -> list[Span]:
        """One tool result of a row of results, without :attr:`results_end`."""
        if self.result.endswith("{{RESULT}}\n"):
            text = text.removesuffix("\n")
        marks = {"RESULT": text, "RESULT_JSON": _json(text)}
        return _fill(("" if first else self.result_separator) + self.result, marks)

    def _call_marks(self, text: str) -> dict[str, str]:
        name, arguments = read_call(text)
        listed = ""
        for key, value in arguments.items() if isinstance(arguments, dict) else ():
            # Chat templates print what is no object and no list with Jinja's `string`, or with `tojson`.
            plain = str(value) if not isinstance(value, (dict, list)) else _json(value)
            marks = {"KEY": key, "TEXT": plain, "VALUE": value if isinstance(value, str) else _json(value)}
            listed += "".join(part.text for part in _fill(self.argument, marks))
        return {
            "NAME": name,
            "NAME_JSON": _json(name),
            "ARGUMENTS": _json(arguments),
            "ARGUMENT_LIST": listed,
            "CALL_JSON": _json({"name": name, "arguments": arguments}),
        }

    @property
    def literals(self) -> tuple[str, ...]:
        """All texts of the record in which special tokens count."""
        texts = (self.tools, self.text_separator, self.calls_start, self.call, self.call_separator, self.calls_end,
                 self.result, self.result_separator, self.results_end)  # fmt: skip
        return tuple(text for text in texts if _SPECIAL.search(text))


def _fill(record: str, marks: Mapping[str, str]) -> list[Span]:
    """A record text with its `{{MARKS}}` filled; what needs no special token is joined into one span of content."""
    spans: list[Span] = []
    for number, part in enumerate(_parts(record)):
        text, literal = (marks[part], False) if number % 2 else (part, bool(_SPECIAL.search(part)))
        if spans and not literal and not spans[-1].literal:
            spans[-1] = Span(spans[-1].text + text, False)
        elif text:
            spans.append(Span(text, literal))
    return spans


_parts = functools.cache(_MARK.split)


def read_tools(tools: Any) -> list[Any]:
    """The tool definitions of a row (a list, or JSON text).

    Raises:
        BadTool: it is no list.
    """
    listed = _parse(tools) if isinstance(tools, str) else tools
    if not isinstance(listed, list):
        raise BadTool("tools is not a list of tool definitions")
    return [_parse(tool) if isinstance(tool, str) else tool for tool in listed]


def wrap_tool(tool: Any) -> dict[str, Any]:
    """A tool definition as OpenAI writes it.

    Raises:
        BadTool: it is no object.
    """
    if not isinstance(tool, dict):
        raise BadTool("a tool definition is not a JSON object")
    return tool if "type" in tool or "function" in tool else {"type": "function", "function": tool}


def read_call(text: str) -> tuple[str, Any]:
    """Name and arguments of a call (a JSON object).

    Raises:
        BadTool: the text is no such object.
    """
    call = _parse(text)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise BadTool("a tool_call is not a JSON object with name and arguments")
    arguments = call.get("arguments", call.get("parameters", {}))
    return call["name"], _parse(arguments) if isinstance(arguments, str) else arguments


def _tool_marks(tool: Any) -> dict[str, str]:
    wrapped = wrap_tool(tool)
    function = tool["function"] if isinstance(tool.get("function"), dict) else tool
    name = function.get("name_for_model") or function.get("name")
    if not isinstance(name, str):
        raise BadTool("a tool definition has no name")
    description = function.get("description", function.get("description_for_model"))
    parameters = function.get("parameters") or {}
    return {
        "NAME": name,
        "HUMAN_NAME": str(function.get("name_for_human") or name),
        "DESCRIPTION": "" if description is None else str(description),
        "PARAMETERS": parameters if isinstance(parameters, str) else _json(parameters),
        "TOOL_JSON": _json(wrapped),
        "TOOL_JSON_INDENTED": _json(tool, 4),
        "FUNCTION_JSON": _json(function),
        "FUNCTION_JSON_INDENTED": _json(function, 4),
        "FUNCTION_XML": _function_xml(function),
    }


def _function_xml(function: dict[str, Any]) -> str:
    """A tool as Qwen3-Coder reads it."""
    parameters = function.get("parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    properties = parameters.get("properties")
    lines = ["<function>", f"<name>{function.get('name')}</name>"]
    if "description" in function:
        lines.append(f"<description>{str(function['description']).strip()}</description>")
    lines.append("<parameters>")
    for name, fields in properties.items() if isinstance(properties, dict) else ():
        fields = fields if isinstance(fields, dict) else {}
        lines += ["<parameter>", f"<name>{name}</name>"]
        lines += [f"<{key}>{str(fields[key]).strip()}</{key}>" for key in ("type", "description") if key in fields]
        lines += [*_other_xml(fields, ("name", "type", "description")), "</parameter>"]
    lines += [*_other_xml(parameters, ("type", "properties")), "</parameters>"]
    return "\n".join([*lines, *_other_xml(function, ("type", "name", "description", "parameters")), "</function>"])


def _other_xml(record: dict[str, Any], written: tuple[str, ...]) -> list[str]:
    texts = {key: _json(value) if isinstance(value, (dict, list)) else str(value) for key, value in record.items()}
    return [f"<{key}>{text}</{key}>" for key, text in texts.items() if key not in written]


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise BadTool("tools or a tool_call is not valid JSON") from None


@functools.cache
def load_agent_formats() -> Mapping[str, AgentFormat]:
    """All agent templates by name."""
    return {name: AgentFormat(name, **record) for name, record in read_records("agents.json").items()}


def get_agent_format(name: str) -> AgentFormat:
    """The agent template of this name.

    Raises:
        UserError: there is none; the message lists the names.
    """
    try:
        return load_agent_formats()[name]
    except KeyError:
        names = [*load_agent_formats(), *OWN_AGENTS]
        near = ", ".join(difflib.get_close_matches(name, names))
        listed = ", ".join(names) + (f"; nearest: {near}" if near else "")
        raise UserError(f"--agent_template {name}: unknown; choose one of {listed}") from None


def read_records(file: str) -> dict[str, dict[str, Any]]:
    """The records of a JSON file of this package, by name; what a record `extends` fills what it leaves out."""
    records: dict[str, Any] = json.loads(
        resources.files("rayswift.data.chat").joinpath(file).read_text(encoding="utf-8")
    )
    return {name: _extended(records, record) for name, record in records.items()}


def _extended(records: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    base: Iterable[tuple[str, Any]] = ()
    if "extends" in record:
        base = _extended(records, records[record["extends"]]).items()
    return {**dict(base), **{key: value for key, value in record.items() if key != "extends"}}
