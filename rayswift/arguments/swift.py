"""What SWIFT's command lines say and RaySwift's do not: its flags, their defaults, and what stands in for them.

``swift_flags.json`` beside this file holds the facts: ``no_effect``: flags that change nothing here, and why;
``instead``: the flag that does it here; ``defaults``: SWIFT 4.6's, written by ``tools/swift_flags.py``; ``earlier``:
those of SWIFT 3 that are others, or whose flags are gone.
"""

from __future__ import annotations

import functools
import json
import os
from typing import Any

_FILE = os.path.join(os.path.dirname(__file__), "swift_flags.json")
#: What says "nothing" on a command line or in a saved ``args.json``.
_NOTHING = frozenset({"", "none", "null", "[]", "{}", "[none, none]"})


@functools.cache
def swift_table() -> dict[str, dict[str, Any]]:
    """The facts, as the file has them."""
    with open(_FILE, encoding="utf-8") as file:
        content: dict[str, dict[str, Any]] = json.load(file)
    return content


def is_swifts(name: str) -> bool:
    """Whether SWIFT has, or had, a flag of this name."""
    return any(name in part for part in swift_table().values())


def swift_defaults(name: str, command: str) -> list[Any]:
    """SWIFT's defaults of a flag for a command: today's, then that of SWIFT 3; empty for a flag that it has not."""
    table = swift_table()
    found = [part[name] for part in (table["defaults"], table["earlier"]) if name in part]
    if found and _is_by_command(found[0]):
        found[:1] = [found[0][command]] if command in found[0] else []
    return found


def _is_by_command(value: Any) -> bool:
    return isinstance(value, dict) and any(name in value for name in ("sft", "rlhf", "infer", "app", "sample", "eval",
                                                                      "export"))  # fmt: skip


def asks_for_nothing(name: str, raw: Any, command: str) -> bool:
    """Whether SWIFT does the same without the flag, so that passing it over changes nothing for its users."""
    asked = _text(raw)
    if asked in _NOTHING or asked == f"<{name}>":  # as Transformers masks a token in a saved file
        return True
    defaults = [_text(default) for default in swift_defaults(name, command)]
    return asked in defaults or (asked == "false" and "true" not in defaults)


def _text(value: Any) -> str:
    """Numbers, switches, lists and words as the one text that a command line and JSON have in common."""
    if isinstance(value, (list, tuple)):
        return _text(" ".join(map(str, value))) if len(value) == 1 else str(value).lower().replace("'", "")
    try:
        return str(value).lower() if isinstance(value, bool) else f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value).lower()
