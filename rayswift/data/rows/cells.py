"""A cell of a raw row in its standard form: a text, a history, grounding objects."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from rayswift.data.rows.media import Unusable
from rayswift.data.rows.messages import parse_text


def as_text(value: Any, what: str) -> str | None:
    """A cell as text: numbers are spelled, bytes are UTF-8, null and NaN are None; all else has no one spelling."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return str(value) if not isinstance(value, float) or math.isfinite(value) else None
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise Unusable(f"the {what} is bytes that are not UTF-8 text") from None
    kinds = {bool: "true or false", dict: "an object", list: "a list", tuple: "a list"}
    raise Unusable(f"the {what} is {kinds.get(type(value), type(value).__name__)}, not text")


def as_history(value: Any) -> list[dict[str, Any]]:
    """``[[user, assistant], ...]`` or its text as messages."""
    if isinstance(value, str) and value.strip():
        value = parse_text(value)
        value = "?" if value is None else value
    if value is None or value == "" or value == [] or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in value
    ):
        raise Unusable("history is not a list of [user, assistant] pairs")
    turns = [
        (role, as_text(text, "history"))
        for turn in value
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return [{"role": role, "content": text} for role, text in turns if text is not None]


def as_label(value: Any) -> Any:
    """A label; its text in a table of texts (``True``, ``3``, ``0.5``) is the truth value or number that it spells."""
    if not isinstance(value, str):
        return value
    spelled = {"true": True, "false": False}.get(value.strip().lower())
    if spelled is not None:
        return spelled
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(value)
    return value


def as_tools(value: Any) -> Any:
    """Tool definitions: one alone, or its JSON text, becomes a list of one."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_text(value)
        if value is None:
            raise Unusable("tools is not valid JSON")
    return [value] if isinstance(value, Mapping) else value


def as_objects(value: Any) -> dict[str, Any]:
    """Grounding objects; a box is [x, y] or [x1, y1, x2, y2] with the smaller corner first."""
    value = parse_text(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise Unusable("objects is not an object with ref and bbox")
    boxes = value.get("bbox") or []
    if not isinstance(boxes, (list, tuple)) or not all(
        isinstance(box, (list, tuple)) and len(box) in (2, 4) and all(type(number) in (int, float) for number in box)
        for box in boxes
    ):
        raise Unusable("objects.bbox holds a box that is not [x, y] or [x1, y1, x2, y2]")
    objects = {key: value[key] for key in ("ref", "bbox", "bbox_type", "image_id") if value.get(key) is not None}
    if "bbox" in objects:
        objects["bbox"] = [
            list(box) if len(box) == 2 else
            [min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])]
            for box in boxes
        ]  # fmt: skip
    return objects
