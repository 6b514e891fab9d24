"""Messages in any spelling to ``{"role", "content"}`` messages: key and role aliases, sharegpt pairs, JSON text,
OpenAI ``tool_calls``, and content written as parts (OpenAI, Anthropic, Hugging Face)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rayswift.data.json_text import has_half_surrogate, loads_literal
from rayswift.data.rows.media import MEDIA_PARTS, Unusable, file_of_part, first_of

ROLES = frozenset({"system", "user", "assistant", "tool_call", "tool_response", "tool"})
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "function_call": "tool_call",
    "function-call": "tool_call",
    "function_response": "tool_response",
    "function-response": "tool_response",
    "function": "tool_response",
    "observation": "tool_response",
    "observations": "tool_response",
    "developer": "system",
    "model": "assistant",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_RESULT_ROLES = ("tool_response", "tool")
#: Thoughts kept apart from the answer stay so, as ``reasoning_content``: templates differ in how they are spelled.
_THOUGHT_PARTS = ("thinking", "redacted_thinking")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
#: Where other tools say whether a message is trained (OpenAI and Mistral, axolotl, verl), as ``loss`` does; torchtune's
#: ``masked`` says the opposite.
_LOSS_MARKS = ("weight", "train", "training", "trainable", "loss_mask", "masked")
_OWN_KEYS = frozenset({"loss", "loss_scale", "tool_calls", "function_call", "id", *_LOSS_MARKS, *_THOUGHT_KEYS})
_RESULT_KEYS = frozenset({"name", "tool_call_id", "call_id"})
_BOOLEANS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}

HALF_SURROGATE = "a text holds half a surrogate pair (a broken emoji), which is not valid Unicode"
THOUGHTS_LEFT_OUT = "thoughts beside the answer that are no text (encrypted, or an object) are not trained"
NO_ANSWER_MARKED = "a mark to train a message that is no answer has no effect (--loss_scale all trains every token)"


@dataclass(frozen=True)
class MessageNames:
    """The ``messages`` settings of a ``dataset_info.json`` entry: names in use instead of (keys) or beside (roles)
    the usual ones. None: the usual ones alone."""

    role_key: str | None = None
    content_key: str | None = None
    user_role: str | None = None
    assistant_role: str | None = None
    system_role: str | None = None

    @cached_property
    def role_keys(self) -> tuple[str, ...]:
        """Where a message has its role, first choice first."""
        return (self.role_key,) if self.role_key else ("role", "from")

    @cached_property
    def content_keys(self) -> tuple[str, ...]:
        """Where a message has its content, first choice first."""
        return (self.content_key,) if self.content_key else ("content", "value")

    @cached_property
    def roles(self) -> dict[str, str]:
        """Role as written → standard role."""
        named = {self.user_role: "user", self.assistant_role: "assistant", self.system_role: "system"}
        usual = {role: role for role in ROLES} | ROLE_ALIASES
        return usual | {name: role for name, role in named.items() if name}


USUAL_NAMES = MessageNames()


@dataclass
class ParsedMessages:
    """What a messages value held: the messages, the files inside them by column, and what was left out.

    ``ids``: of each message that is a call or a result, what says which belong together.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)
    media: dict[str, list[Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, role: str, content: str, kept: Mapping[str, Any], identity: Any = None) -> None:
        """Append one message."""
        self.messages.append({"role": role, "content": content, **kept})
        self.ids.append(identity if isinstance(identity, (str, int)) else None)

    def warn(self, warning: str) -> None:
        """Note once what was left out."""
        if warning not in self.warnings:
            self.warnings.append(warning)


def plain_messages(value: Any, names: MessageNames = USUAL_NAMES) -> list[dict[str, Any]] | None:
    """The messages of a list in which each is a known role and a text and nothing else (nearly every row of nearly
    every dataset), fast; None for anything that :func:`read_messages` has to look at."""
    if type(value) is not list or not value:
        return None
    roles, role_key, content_key = names.roles, names.role_keys[0], names.content_keys[0]
    messages = []
    try:
        for item in value:
            content = item[content_key]
            if len(item) != 2 or type(content) is not str:
                return None
            messages.append({"role": roles[item[role_key]], "content": content})
    except (KeyError, TypeError):
        return None
    return messages


def read_messages(value: Any, names: MessageNames = USUAL_NAMES) -> ParsedMessages:
    """Read a messages value: a list of messages or pairs, or its JSON or Python text.

    Raises:
        Unusable: it is no such thing; the message says what is wrong with it.
    """
    if isinstance(value, str):
        value = parse_text(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise Unusable("the messages column is empty or not a list")
    parsed = ParsedMessages()
    for item in value:
        _read_message(item, names, parsed)
    if any(parsed.ids):
        _order_results(parsed)
    return parsed


def prompt_of(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages up to the last one of a user (without one, the system text): what an answer, with all its tool calls
    and their results, comes after."""
    end = max((number for number, message in enumerate(messages) if message["role"] in ("system", "user")), default=-1)
    return list(messages[: end + 1])


def parse_text(text: str) -> Any:
    """A value that a column holds as JSON or Python text; None if it is neither.

    Raises:
        Unusable: it holds text that cannot be stored.
    """
    value = loads_literal(text)
    if not text.isascii() or "\\u" in text or "\\U" in text:
        refuse_half_surrogates(value)
    return value


def refuse_half_surrogates(value: Any) -> None:
    """Raise Unusable for text that no encoding can store."""
    if has_half_surrogate(value):
        raise Unusable(HALF_SURROGATE)


def is_message(value: Any, names: MessageNames = USUAL_NAMES) -> bool:
    """Whether a value is an object with a role."""
    return isinstance(value, Mapping) and any(value.get(key) is not None for key in names.role_keys)


def _read_message(item: Any, names: MessageNames, parsed: ParsedMessages) -> None:
    """One message of any spelling; it may become several (text, tool calls, tool results)."""
    if isinstance(item, str):  # ms-swift writes its val_dataset.jsonl so
        item = parse_text(item)
    if not isinstance(item, Mapping):
        raise Unusable("a message is not an object with role and content")
    name = first_of(item, names.role_keys)
    if name is None:
        _read_pair(item, names, parsed)
        return
    role = names.roles.get(name) or names.roles.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise Unusable(f"unknown message role {str(name)[:40]!r}")
    kept = _flags(item)
    if role not in ("assistant", "tool_call"):
        if kept.pop("loss", False):
            parsed.warn(NO_ANSWER_MARKED)
        kept.clear()
    identity, tool = None, role in ("tool_call", *_RESULT_ROLES)
    _note_unknown(item, _OWN_KEYS.union(names.role_keys, names.content_keys, _RESULT_KEYS if tool else ()), parsed)
    if role in _RESULT_ROLES:
        identity = first_of(item, ("tool_call_id", "call_id"))
        kept |= {"name": item["name"]} if item.get("name") is not None else {}
    content = first_of(item, names.content_keys)
    if role == "tool_call" and content is None and item.get("name") is not None:
        content, identity = _call_text(item), item.get("id")
    # OpenAI's calls (a list or its JSON text), or its older single one.
    calls = item.get("tool_calls") or item.get("function_call") or []
    if isinstance(calls, str):
        calls = parse_text(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, (list, tuple)):
        raise Unusable("tool_calls is not a list of calls")
    thoughts = _thoughts(item, content, parsed) if role == "assistant" else {}
    if content is None and not calls and not thoughts:
        raise Unusable("a message has no content")
    if thoughts and not content:
        parsed.add(role, "", kept | thoughts)
    elif content is not None and not (calls and content in ("", [])):
        _read_content(content, role, kept | thoughts, parsed, identity)
    for call in calls:
        parsed.add("tool_call", _call_text(call), kept, call.get("id"))


def _note_unknown(item: Mapping[str, Any], known: Set[str], parsed: ParsedMessages) -> None:
    """Say which keys of a message are read past; empty values say nothing."""
    for key in item.keys() - known:
        if item[key] not in (None, "", [], {}):
            parsed.warn(f"the key {str(key)[:40]!r} of messages is not known, and not read")


def _flags(item: Mapping[str, Any]) -> dict[str, Any]:
    """``loss`` and ``loss_scale`` of a message, where they are given, or another tool's mark that says the same."""
    flags: dict[str, Any] = {}
    scale = item.get("loss_scale")
    own = ("loss",) if item.get("loss") is not None else _LOSS_MARKS
    for mark in [name for name in own if item.get(name) is not None]:
        value = _BOOLEANS.get(str(item[mark]).strip().lower())
        if value is not None:  # of several marks one that says no is enough
            flags["loss"] = flags.get("loss", True) and value is not (mark == "masked")
        elif mark == "weight":
            scale = item[mark] if scale is None else scale
        else:
            raise Unusable(f"the {mark} of a message is {str(item[mark])[:40]}, not true or false")
    if scale is not None:
        try:
            flags["loss_scale"] = float(scale) if isinstance(scale, str) else scale
            valid = not isinstance(scale, bool) and 0 <= flags["loss_scale"] < float("inf")
        except (TypeError, ValueError):
            valid = False
        if not valid:
            name = "weight" if item.get("loss_scale") is None else "loss_scale"
            raise Unusable(f"the {name} of a message is {str(scale)[:40]}, not a number from 0 on")
    return flags


def _thoughts(item: Mapping[str, Any], content: Any, parsed: ParsedMessages) -> dict[str, str]:
    """What an answer thought, where it is kept apart; a think block in its text comes first."""
    thoughts = next((item[key] for key in _THOUGHT_KEYS if item.get(key)), None)
    if thoughts is None or (isinstance(content, str) and "</think>" in content):
        return {}
    if isinstance(thoughts, str):
        return {"reasoning_content": thoughts}
    parsed.warn(THOUGHTS_LEFT_OUT)
    return {}


def _order_results(parsed: ParsedMessages) -> None:
    """Put the results of parallel calls in the order of the calls, where ids say which belongs to which."""
    messages, ids = parsed.messages, parsed.ids
    is_call = [message["role"] == "tool_call" for message in messages]
    is_result = [message["role"] in _RESULT_ROLES for message in messages]
    runs = itertools.groupby(range(len(messages)), key=lambda n: (is_call[n], is_result[n]))
    for (_, calls), (_, results) in itertools.pairwise([(kind, list(places)) for kind, places in runs]):
        order = {ids[place]: place for place in calls}
        named = None not in order and len(order) == len(calls) and all(ids[place] in order for place in results)
        if named and is_call[calls[0]] and is_result[results[0]]:
            ordered = [messages[place] for place in sorted(results, key=lambda place: order[ids[place]])]
            messages[results[0] : results[-1] + 1] = ordered


def _call_text(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call has no function name")
    arguments = first_of(function, ("arguments", "input", "parameters"))
    arguments = {} if arguments is None else arguments
    if isinstance(arguments, str):
        parsed = parse_text(arguments)
        arguments = arguments if parsed is None else parsed
    return _json({"name": function["name"], "arguments": arguments})


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        raise Unusable("a tool message is not valid JSON") from None


def _read_pair(item: Mapping[str, Any], names: MessageNames, parsed: ParsedMessages) -> None:
    """Sharegpt's ``{"human": …, "assistant": …}``: two messages in one object."""
    user = first_of(item, (*filter(None, [names.user_role]), "human", "user"))
    assistant = first_of(item, (*filter(None, [names.assistant_role]), "assistant", "gpt", "bot"))
    if user is None and assistant is None:
        raise Unusable("a message has no role")
    if not isinstance(user, str) or not isinstance(assistant, str):
        raise Unusable("a pair of messages has no text on one side")
    sides = (names.user_role, names.assistant_role, "human", "user", "assistant", "gpt", "bot")
    _note_unknown(item, _OWN_KEYS.union(filter(None, sides)), parsed)
    parsed.add("user", user, {})
    parsed.add("assistant", assistant, _flags(item))


def _read_content(
    content: Any, role: str, kept: Mapping[str, Any], parsed: ParsedMessages, identity: Any = None
) -> None:
    if isinstance(content, str):
        parsed.add(role, content, kept, identity)
        return
    listed = [content] if isinstance(content, Mapping) else content
    tool = role in ("tool_call", "tool_response", "tool")
    if isinstance(listed, (list, tuple)) and listed and all(_is_part(part, known_only=tool) for part in listed):
        _read_parts(list(listed), role, kept, parsed, identity)
    elif tool and isinstance(content, (Mapping, list)):
        # Tool messages are JSON text; datasets also write the value itself.
        refuse_half_surrogates(content)
        parsed.add(role, _json(content), kept, identity)
    else:
        raise Unusable("a message's content is neither text nor text parts")


def _is_part(part: Any, *, known_only: bool) -> bool:
    """What a tool answers may have a ``type`` of its own: ``known_only`` takes parts of text and files alone."""
    if isinstance(part, str):
        return not known_only
    kind = part.get("type") if isinstance(part, Mapping) else None
    known = isinstance(kind, str) and (kind in _TEXT_PARTS or kind in MEDIA_PARTS)
    return known or (not known_only and isinstance(part, Mapping) and ("type" in part or "text" in part))


def _read_parts(parts: list[Any], role: str, kept: Mapping[str, Any], parsed: ParsedMessages, identity: Any) -> None:
    """Parts in order: text and placeholders are joined, tool calls and results become messages of their own."""
    text: list[str] = []
    kept, before = dict(kept), len(parsed.messages)
    thoughts = [kept.pop("reasoning_content")] if "reasoning_content" in kept else []

    def flush() -> None:
        if text or thoughts:
            thought = {"reasoning_content": "".join(thoughts)} if thoughts else {}
            parsed.add(role, "".join(text), {**kept, **thought}, identity)
            text.clear()
            thoughts.clear()

    for part in parts:
        kind = "text" if isinstance(part, str) else part.get("type") or "text"
        words = part if isinstance(part, str) else part.get("text")
        if kind in _TEXT_PARTS and isinstance(words, str):
            text.append(words)
        elif isinstance(kind, str) and kind in MEDIA_PARTS:
            column, placeholder = MEDIA_PARTS[kind]
            text.append(placeholder)
            file = file_of_part(part, kind)
            if file is not None:
                parsed.media.setdefault(column, []).append(file)
        elif kind == "tool_use":
            flush()
            parsed.add("tool_call", _call_text(part), kept, part.get("id"))
        elif kind == "tool_result":
            flush()
            content = "" if part.get("content") is None else part["content"]
            _read_content(content, "tool_response", kept, parsed, part.get("tool_use_id"))
        elif kind in _THOUGHT_PARTS:
            if role == "assistant" and isinstance(part.get("thinking"), str):
                flush()
                thoughts.append(part["thinking"])
            else:
                parsed.warn(THOUGHTS_LEFT_OUT)
        else:
            raise Unusable(f"a message holds a part of type {str(kind)[:40]!r} that is not text, a file or a tool's")
    flush()
    if len(parsed.messages) == before:
        raise Unusable("a message has no content")
