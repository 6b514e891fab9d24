"""Texts of a dataset that are edited: what its :class:`~rayswift.data.rows.standard.RowRules` remove, add, fill in."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rayswift.data.rows.media import Unusable

if TYPE_CHECKING:
    from rayswift.data.rows.standard import RowRules, StandardRow

_PLACEHOLDER = re.compile(r"\{\{(NAME|AUTHOR|name|author)\}\}")
_CJK = re.compile(r"[一-鿿]")


def edit_texts(standard: StandardRow, rules: RowRules) -> None:
    """Apply ``remove_text``, ``query_suffix`` and ``response_prefix``."""
    messages = standard["messages"]
    if rules.remove_text:
        for message in messages:
            message["content"] = message["content"].replace(rules.remove_text, "")
        if "rejected_response" in standard:
            standard["rejected_response"] = standard["rejected_response"].replace(rules.remove_text, "")
    for role, before, after in (("user", "", rules.query_suffix), ("assistant", rules.response_prefix, "")):
        last = next((message for message in reversed(messages) if message["role"] == role), None)
        if last is not None:
            last["content"] = f"{before}{last['content']}{after}"


def fill_placeholders(standard: StandardRow, tag: Any, rules: RowRules) -> None:
    """``{{NAME}}`` and ``{{AUTHOR}}`` of self-cognition rows (either case) from --model_name and --model_author."""
    messages = standard["messages"]
    found = {match for message in messages for match in _PLACEHOLDER.findall(message["content"])}
    if not found:
        return
    values = {"name": rules.model_name, "author": rules.model_author}
    missing = sorted({f"--model_{key.lower()}" for key in found if not values[key.lower()]})
    if missing:
        raise Unusable(f"the text holds {{{{NAME}}}} or {{{{AUTHOR}}}} and {' and '.join(missing)} is not given")
    chinese = tag == "zh" if tag else any(_CJK.search(message["content"]) for message in messages)

    def value(match: re.Match[str]) -> str:
        choices = values[match.group(1).lower()]
        return choices[0] if chinese else choices[-1]

    for message in messages:
        message["content"] = _PLACEHOLDER.sub(value, message["content"])
