"""Texts of a dataset that are edited: what the rules of its rows remove, add and fill in."""

from __future__ import annotations

import re
from typing import Any

from rayswift.data.rows.media import Unusable

_PLACEHOLDER = re.compile(r"\{\{(NAME|AUTHOR|name|author)\}\}")
_CJK = re.compile(r"[一-鿿]")


def edit_texts(standard: dict[str, Any], remove_text: str, query_suffix: str, response_prefix: str) -> None:
    """Remove a text from a standard row wherever it stands, and end its last query and begin its last answer anew."""
    messages = standard["messages"]
    if remove_text:
        for message in messages:
            message["content"] = message["content"].replace(remove_text, "")
        if "rejected_response" in standard:
            standard["rejected_response"] = standard["rejected_response"].replace(remove_text, "")
    for role, before, after in (("user", "", query_suffix), ("assistant", response_prefix, "")):
        last = next((message for message in reversed(messages) if message["role"] == role), None)
        if last is not None:
            last["content"] = f"{before}{last['content']}{after}"


def fill_placeholders(
    messages: list[dict[str, Any]], tag: Any, model_name: tuple[str, ...], model_author: tuple[str, ...]
) -> None:
    """``{{NAME}}`` and ``{{AUTHOR}}`` of self-cognition rows (either case): the first value in Chinese rows, else the
    second."""
    found = {match for message in messages for match in _PLACEHOLDER.findall(message["content"])}
    if not found:
        return
    values = {"name": model_name, "author": model_author}
    missing = sorted({f"--model_{key.lower()}" for key in found if not values[key.lower()]})
    if missing:
        raise Unusable(f"the text holds {{{{NAME}}}} or {{{{AUTHOR}}}} and {' and '.join(missing)} is not given")
    chinese = tag == "zh" if tag else any(_CJK.search(message["content"]) for message in messages)

    def value(match: re.Match[str]) -> str:
        choices = values[match.group(1).lower()]
        return choices[0] if chinese else choices[-1]

    for message in messages:
        message["content"] = _PLACEHOLDER.sub(value, message["content"])
