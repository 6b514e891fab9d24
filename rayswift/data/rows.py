"""Raw rows to standard rows: pure functions, one row in, one :class:`StandardRow` or :class:`Drop` out.

A standard row is ``{"messages": [{"role", "content", ...}], ...}``. The schemas and their precedence are SWIFT's
(query/response, alpaca, messages, sharegpt, plain text); where SWIFT loses a row in silence the reason is returned.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: SWIFT's table of source columns for each target, matched case-insensitively.
COLUMN_ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation", "conversations"),
    "system": ("system", "system_prompt"),
    "query": ("query", "prompt", "input", "instruction", "question", "problem"),
    "response": (
        "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "text",
        "completion", "content",
    ),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    "audios": ("audios", "audio"),
}  # fmt: skip
_TARGET_OF = {alias: target for target, aliases in COLUMN_ALIASES.items() for alias in aliases}

ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "function_call": "tool_call",
    "function-call": "tool_call",
    "function_response": "tool_response",
    "observation": "tool_response",
    "observations": "tool_response",
}
ROLES = frozenset({"system", "user", "assistant", "tool_call", "tool_response", "tool"})
#: Columns that travel beside ``messages`` (SWIFT 2.4, "Kept columns").
KEPT_COLUMNS = (
    "rejected_response", "rejected_messages", "positive_messages", "negative_messages", "label", "channel", "margin",
    "tools", "rejected_tools", "objects", "chat_template_kwargs",
)  # fmt: skip
#: Columns of files that ``<image>`` and its like stand for: lists of ``{"bytes", "path"}``, whatever was written.
MEDIA = ("images", "videos", "audios")
_MESSAGE_KEYS = ("loss", "loss_scale", "name")
_PLACEHOLDER = re.compile(r"\{\{(NAME|AUTHOR|name|author)\}\}")
_CJK = re.compile(r"[一-鿿]")

StandardRow = dict[str, Any]


@dataclass(frozen=True)
class Drop:
    """A row that cannot be trained on, and why, in words a user can act on."""

    reason: str


@dataclass(frozen=True)
class RowRules:
    """How the rows of one dataset become standard rows.

    Args:
        columns: renames applied before detection (``--columns`` and ``dataset_info.json``); ``"_"`` hides a column.
        model_name: values for ``{{NAME}}``: Chinese rows take the first, others the second; one value serves both.
        model_author: the same for ``{{AUTHOR}}``.
        strip_input_prefix: text removed from the front of alpaca's ``input`` (alpaca-gpt4-data-zh has ``输入：``).
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    model_name: tuple[str, ...] = ()
    model_author: tuple[str, ...] = ()
    strip_input_prefix: str = ""


def standardise_row(row: Any, rules: RowRules | None = None) -> StandardRow | Drop:
    """One raw row to a standard row, or the reason it is dropped."""
    rules = rules or RowRules()
    if not isinstance(row, Mapping):
        return Drop(f"the row is a JSON {type(row).__name__}, not an object with columns")
    row = {rules.columns.get(key, key): value for key, value in row.items()}
    row.pop("_", None)
    lowered = {key.lower(): key for key in row}
    if any(alias in lowered for alias in COLUMN_ALIASES["messages"]):
        standard = _from_messages(row, lowered)
    elif "instruction" in lowered and "input" in lowered:
        standard = _from_alpaca(row, lowered, rules)
    else:
        standard = _from_query_response(row)
    if isinstance(standard, Drop):
        return standard
    for key in KEPT_COLUMNS:
        if key in row and row[key] is not None and key not in standard:
            standard[key] = row[key]
    for target in MEDIA:
        value = next((row[lowered[alias]] for alias in COLUMN_ALIASES[target] if alias in lowered), None)
        if value is not None:
            standard[target] = [_media_file(item) for item in (value if isinstance(value, list) else [value])]
    return _fill_placeholders(standard, row.get("tag"), rules)


def _from_messages(row: dict[str, Any], lowered: dict[str, str]) -> StandardRow | Drop:
    source = next(lowered[alias] for alias in COLUMN_ALIASES["messages"] if alias in lowered)
    messages = parse_messages(row[source])
    if isinstance(messages, Drop):
        return messages
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def parse_messages(value: Any) -> list[dict[str, Any]] | Drop:
    """A messages value in any spelling (list, JSON text, sharegpt pairs, from/value keys) to role/content dicts."""
    if isinstance(value, str):
        value = _parse_literal(value)
    if not isinstance(value, list) or not value:
        return Drop("the messages column is empty or not a list")
    messages: list[dict[str, Any]] = []
    for item in value:
        if not isinstance(item, Mapping):
            return Drop("a message is not an object with role and content")
        message = _parse_message(item)
        if isinstance(message, Drop):
            return message
        messages.extend(message)
    return messages


def _parse_message(item: Mapping[str, Any]) -> list[dict[str, Any]] | Drop:
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if role is None:
        pair = _sharegpt_pair(item)
        return pair or Drop("a message has no role")
    role = ROLE_ALIASES.get(str(role), str(role))
    if role not in ROLES:
        return Drop(f"unknown message role {role!r}")
    if content is None:
        return Drop("a message has no content")
    if not isinstance(content, str):
        content = _text_of(content)
        if content is None:
            return Drop("a message's content is neither text nor text parts")
    return [{"role": role, "content": content, **{k: item[k] for k in _MESSAGE_KEYS if item.get(k) is not None}}]


def _sharegpt_pair(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    user = item.get("human", item.get("user"))
    assistant = next((item[key] for key in ("assistant", "gpt", "bot") if isinstance(item.get(key), str)), None)
    if not isinstance(user, str) or assistant is None:
        return []
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _media_file(item: Any) -> Any:
    return {"bytes": None, "path": item} if isinstance(item, str) else item


def _text_of(content: Any) -> str | None:
    """OpenAI's list of text parts as one text; None for anything else."""
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    return None


def _from_alpaca(row: dict[str, Any], lowered: dict[str, str], rules: RowRules) -> StandardRow | Drop:
    instruction = row[lowered["instruction"]]
    extra = row[lowered["input"]]
    if isinstance(extra, str) and rules.strip_input_prefix:
        extra = extra.removeprefix(rules.strip_input_prefix)
    parts = [part for part in (instruction, extra) if isinstance(part, str) and part]
    if not parts:
        return Drop("both instruction and input are empty")
    rest = {key: value for key, value in row.items() if key not in (lowered["instruction"], lowered["input"])}
    return _from_query_response({**rest, "query": "\n".join(parts)})


def _from_query_response(row: dict[str, Any]) -> StandardRow | Drop:
    mapped = _map_columns(row)
    if isinstance(mapped, Drop):
        return mapped
    messages: list[dict[str, Any]] = []
    if isinstance(mapped.get("system"), str):
        messages.append({"role": "system", "content": mapped["system"]})
    history = _history(row.get("history"))
    if isinstance(history, Drop):
        return history
    messages += history
    query, response = _first_text(mapped.get("query")), _first_text(mapped.get("response"))
    if query is None and response is None:
        return Drop(f"no column holds text (columns: {', '.join(sorted(map(str, row)))}); name it with --columns")
    if query is not None:
        messages.append({"role": "user", "content": query})
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return {"messages": messages}


def _map_columns(row: dict[str, Any]) -> dict[str, Any] | Drop:
    """Columns renamed to their targets; a column that already has the target's name wins over its aliases."""
    mapped: dict[str, Any] = {}
    sources: dict[str, list[str]] = {}
    for key in row:
        target = _TARGET_OF.get(key.lower())
        if target:
            sources.setdefault(target, []).append(key)
    for target, keys in sources.items():
        exact = [key for key in keys if key.lower() == target]
        filled = [key for key in keys if row[key] is not None]
        if len(keys) > 1 and not exact and len(filled) > 1:
            columns = ", ".join(sorted(keys))
            return Drop(f"several columns ({columns}) could be the {target}; choose with --columns")
        mapped[target] = row[exact[0] if exact else (filled or keys)[0]]
    return mapped


def _history(value: Any) -> list[dict[str, Any]] | Drop:
    if isinstance(value, str) and value.strip():
        value = _parse_literal(value)
    if value in (None, "", []):
        return []
    if not isinstance(value, list) or not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in value):
        return Drop("history is not a list of [user, assistant] pairs")
    roles = ("user", "assistant")
    return [{"role": r, "content": str(t)} for turn in value for r, t in zip(roles, turn, strict=True) if t is not None]


def _first_text(value: Any) -> str | None:
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return value if isinstance(value, str) else None


def _parse_literal(text: str) -> Any:
    """JSON text, else a Python literal, else None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _fill_placeholders(standard: StandardRow, tag: Any, rules: RowRules) -> StandardRow | Drop:
    """``{{NAME}}`` and ``{{AUTHOR}}`` of self-cognition rows (either case) from --model_name and --model_author."""
    messages = standard["messages"]
    found = {match for message in messages for match in _PLACEHOLDER.findall(message["content"])}
    if not found:
        return standard
    values = {"name": rules.model_name, "author": rules.model_author}
    missing = sorted({f"--model_{key.lower()}" for key in found if not values[key.lower()]})
    if missing:
        # Lower-case {{name}} is also ordinary template text (Jinja, Vue): only SWIFT's own spelling is a mistake.
        if not any(key.isupper() for key in found):
            return standard
        return Drop(f"the text holds {{{{NAME}}}} or {{{{AUTHOR}}}} and {' and '.join(missing)} is not given")
    chinese = tag == "zh" if tag else any(_CJK.search(message["content"]) for message in messages)

    def value(match: re.Match[str]) -> str:
        choices = values[match.group(1).lower()]
        return choices[0] if chinese else choices[-1]

    for message in messages:
        message["content"] = _PLACEHOLDER.sub(value, message["content"])
    return standard
