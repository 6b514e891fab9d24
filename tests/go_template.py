"""The part of Go's ``text/template`` that Modelfiles use, and what Ollama gives a template.

Fields, variables, ``if``/``else if``/``else``, ``range`` over a list with index and item, trim markers, constants,
parentheses, and the functions ``and or not eq ne lt le gt ge len index slice json``. What it does not know it refuses.
``tests/slow/test_ollama_go.py`` compares it with Go itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
_TOKEN = re.compile(r"""\s*("(?:\\.|[^"\\])*"|:=|[()=,|]|-?\d+|\$?\.?[A-Za-z_$][\w.]*|\$[\w.]*|\.[\w.]*)""")


class GoError(Exception):
    """The template is wrong, or more than this knows."""


class GoJson:
    """A value that prints as JSON, as Ollama's tools and arguments do; fields are those of the value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __str__(self) -> str:
        return go_json(self.value)


def go_json(value: Any) -> str:
    """JSON as Go writes it: no spaces, and three characters escaped that HTML knows."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def render(template: str, data: Mapping[str, Any]) -> str:
    """The template executed with ``data``."""
    nodes, rest = _parse(_lex(template), top=True)
    assert not rest
    return _execute(nodes, data, [{"$": data}])


def ollama_render(template: str, messages: Sequence[Mapping[str, Any]], tools: Any = (), **values: Any) -> str:
    """What Ollama sends to the model: its `template.Execute` for a template over ``.Messages``.

    ``messages``: role, content, thinking, tool_calls (name and arguments). ``values``: Think and IsThinkSet.
    """
    collated: list[dict[str, Any]] = []
    for message in messages:
        same = collated and collated[-1]["Role"] == message["role"] != "tool"
        if same:
            collated[-1]["Content"] += "\n\n" + message["content"]
            continue
        calls = [
            {"Function": {"Name": call["name"], "Arguments": GoJson(dict(sorted(call["arguments"].items())))}}
            for call in message.get("tool_calls") or ()
        ]
        collated.append({
            "Role": message["role"], "Content": message.get("content") or "",
            "Thinking": message.get("thinking") or "", "ToolCalls": calls,
        })  # fmt: skip
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    given = {"System": system, "Messages": collated, "Tools": [_tool(tool) for tool in tools], "Response": ""}
    return render(template, {**given, "Think": False, "IsThinkSet": False, **values})


class _Tool(dict[str, Any]):
    json: Any

    def __str__(self) -> str:
        return go_json(self.json)


def _tool(tool: Mapping[str, Any]) -> _Tool:
    function = tool["function"]
    named = _Tool(Name=function["name"], Description=function["description"], Parameters=GoJson(function["parameters"]))
    named.json = function
    found = _Tool(Type=tool["type"], Function=named)
    found.json = tool
    return found


# --- parsing ------------------------------------------------------------------------------------------------------


def _lex(template: str) -> list[tuple[str, Any]]:
    """Texts and actions; trim markers are carried out."""
    found: list[tuple[str, Any]] = []
    end, trim = 0, False
    for action in _ACTION.finditer(template):
        text = template[end : action.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        found.append(("text", text.rstrip(" \t\r\n") if action[1] else text))
        found.append(("action", action[2].strip()))
        end, trim = action.end(), bool(action[3])
    text = template[end:]
    return [*found, ("text", text.lstrip(" \t\r\n") if trim else text)]


def _parse(items: list[tuple[str, Any]], *, top: bool = False) -> tuple[list[Any], list[tuple[str, Any]]]:
    """Nodes up to the ``else`` or ``end`` that closes them, and what follows from there."""
    nodes: list[Any] = []
    while items:
        (kind, text), *items = items
        word = text.split(None, 1)[0] if kind == "action" and text else ""
        if kind == "text":
            nodes.append(("text", text))
        elif word in ("else", "end"):
            if top:
                raise GoError(f"unexpected {{{{{text}}}}}")
            return nodes, [(kind, text), *items]
        elif word in ("if", "range"):
            node, items = _branch(word, text[len(word) :], items)
            nodes.append(node)
        else:
            nodes.append(("action", _tokens(text)))
    if not top:
        raise GoError("unexpected EOF")
    return nodes, items


def _branch(word: str, pipe: str, items: list[tuple[str, Any]]) -> tuple[Any, list[tuple[str, Any]]]:
    then, ((_, closing), *items) = _parse(items)
    otherwise: list[Any] = []
    if closing.startswith("else"):
        rest = closing[4:].strip()
        if rest.startswith("if"):
            node, items = _branch("if", rest[2:], items)
            return (word, _tokens(pipe), then, [node]), items
        otherwise, ((_, closing), *items) = _parse(items)
    if closing != "end":
        raise GoError(f"expected end, found {closing}")
    return (word, _tokens(pipe), then, otherwise), items


def _tokens(text: str) -> list[str]:
    found, end = [], 0
    while text[end:].strip():
        token = _TOKEN.match(text, end)
        if token is None:
            raise GoError(f"cannot read {text[end:]!r}")
        found.append(token[1])
        end = token.end()
    return found


# --- execution ----------------------------------------------------------------------------------------------------

Scopes = list[dict[str, Any]]


def _execute(nodes: list[Any], dot: Any, scopes: Scopes) -> str:
    out = ""
    for kind, *parts in nodes:
        if kind == "text":
            out += parts[0]
        elif kind == "action":
            value = _statement(parts[0], dot, scopes)
            out += "" if value is None else _printed(value)
        elif kind == "if":
            pipe, then, otherwise = parts
            out += _execute(then if _true(_value(pipe, dot, scopes)) else otherwise, dot, [*scopes, {}])
        else:
            out += _range(*parts, dot, scopes)
    return out


def _range(pipe: list[str], then: list[Any], otherwise: list[Any], dot: Any, scopes: Scopes) -> str:
    names: list[str] = []
    if ":=" in pipe:
        at = pipe.index(":=")
        names, pipe = [name for name in pipe[:at] if name != ","], pipe[at + 1 :]
    items = _value(pipe, dot, scopes) or []
    if not items:
        return _execute(otherwise, dot, [*scopes, {}])
    out = ""
    for number, item in enumerate(items):
        pair = (number, item) if len(names) == 2 else (item,)
        out += _execute(then, item, [*scopes, dict(zip(names, pair, strict=False))])
    return out


def _statement(tokens: list[str], dot: Any, scopes: Scopes) -> Any:
    """The value to print; None for an assignment."""
    if len(tokens) > 1 and tokens[1] in (":=", "="):
        value = _value(tokens[2:], dot, scopes)
        if tokens[1] == ":=":
            scopes[-1][tokens[0]] = value
        else:
            next(scope for scope in reversed(scopes) if tokens[0] in scope)[tokens[0]] = value
        return None
    return _value(tokens, dot, scopes)


def _value(tokens: list[str], dot: Any, scopes: Scopes) -> Any:
    value, rest = _command(tokens, dot, scopes)
    if rest:
        raise GoError(f"unexpected {rest}")
    return value


def _command(tokens: list[str], dot: Any, scopes: Scopes) -> tuple[Any, list[str]]:
    """The value of a call or an operand, and what follows it."""
    name = tokens[0]
    if name not in _FUNCTIONS:
        return _operand(tokens, dot, scopes)
    arguments, rest = [], tokens[1:]
    while rest and rest[0] != ")":
        argument, rest = _operand(rest, dot, scopes)
        arguments.append(argument)
    return _FUNCTIONS[name](*arguments), rest


def _operand(tokens: list[str], dot: Any, scopes: Scopes) -> tuple[Any, list[str]]:
    token, *rest = tokens
    if token == "(":
        value, rest = _command(rest, dot, scopes)
        if not rest or rest[0] != ")":
            raise GoError("unclosed left paren")
        rest = rest[1:]
        while rest and rest[0].startswith(".") and len(rest[0]) > 1:  # (index …).Role
            value, rest = _fields(value, rest[0][1:]), rest[1:]
        return value, rest
    if token.startswith('"'):
        return json.loads(token), rest
    if re.fullmatch(r"-?\d+", token):
        return int(token), rest
    if token in ("true", "false"):
        return token == "true", rest
    if token.startswith("$"):
        name, _, path = token.partition(".")
        scope = next((scope for scope in reversed(scopes) if name in scope), None)
        if scope is None:
            raise GoError(f"undefined variable {name}")
        return _fields(scope[name], path), rest
    if token.startswith("."):
        return _fields(dot, token[1:]), rest
    raise GoError(f"function {token!r} not defined")


def _fields(value: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        if not isinstance(value, Mapping) or name not in value:
            raise GoError(f"can't evaluate field {name} in {type(value).__name__}")
        value = value[name]
    return value


def _true(value: Any) -> bool:
    return bool(value.value) if isinstance(value, GoJson) else bool(value)


def _printed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _compare(test: Callable[[Any, Any], bool]) -> Callable[..., bool]:
    def compared(first: Any, *others: Any) -> bool:
        if any(type(first) is not type(other) for other in others):
            raise GoError("incompatible types for comparison")
        return any(test(first, other) for other in others)

    return compared


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": lambda *values: next((value for value in values if not _true(value)), values[-1]),
    "or": lambda *values: next((value for value in values if _true(value)), values[-1]),
    "not": lambda value: not _true(value),
    "eq": _compare(lambda one, other: one == other),
    "ne": _compare(lambda one, other: one != other),
    "lt": _compare(lambda one, other: one < other),
    "le": _compare(lambda one, other: one <= other),
    "gt": _compare(lambda one, other: one > other),
    "ge": _compare(lambda one, other: one >= other),
    "len": len,
    "index": lambda value, *keys: _fields_of(value, keys),
    "slice": lambda value, start=0, end=None: value[start:end],
    "json": lambda value: go_json(value.json if isinstance(value, _Tool) else getattr(value, "value", value)),
}  # fmt: skip


def _fields_of(value: Any, keys: Sequence[Any]) -> Any:
    for key in keys:
        value = value[key]
    return value
