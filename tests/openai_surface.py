"""The table of OpenAI's surface, ``tests/serve/openai_surface.json``: its requests, and what their answers must be.

``bodies``: the fields that a path's requests have where a case says nothing else; ``null`` is sent as null, what stands
in ``without`` is not sent. A text ``$NAME`` is the part of that name. ``has``: path in the answer → its value, or
``{"matches"}``, ``{"type"}``, ``{"length"}``, ``{"most"}``. ``shape``: fields that must be there, with their types.
``gateway``: the gateway answers it, not the engine. ``differs``: what the two engines may do differently, and why.

Cases are added where a route is added; a route needs an entry in ``bodies`` and a shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "serve" / "openai_surface.json").read_text("utf-8"))
CASES: list[dict[str, Any]] = TABLE["cases"]
TYPES = {"str": str, "int": int, "float": (int, float), "list": list, "dict": dict, "bool": bool}


def name_of(case: dict[str, Any]) -> str:
    return f"{case.get('method', 'POST')} {case['path']}: {case['case']}"


def body_of(case: dict[str, Any]) -> bytes | None:
    """The body that a case sends; None for none."""
    if "raw" in case:
        return str(case["raw"]).encode()
    if case["body"] is None:
        return None
    fields = TABLE["bodies"].get(case["path"], {}) | case["body"]
    return json.dumps(
        {key: _filled(item) for key, item in fields.items() if key not in case.get("without", ())}
    ).encode()


def _filled(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("$") and value[1:] in TABLE["parts"]:
        part = _filled(TABLE["parts"][value[1:]])
        return part["repeat"] * part["times"] if isinstance(part, dict) and "repeat" in part else part
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items()}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def read(content_type: str, content: bytes) -> Any:
    """An answer as one value: JSON, the sum of a stream, or text."""
    if content_type.startswith("text/event-stream"):
        return _sum(content.decode())
    return json.loads(content) if "json" in content_type else content.decode()


def _sum(text: str) -> dict[str, Any]:
    """What the chunks of a stream add up to; it must end with its end mark."""
    *events, last = [line for line in text.split("\n\n") if line]
    assert last == "data: [DONE]", last
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    deltas = [choice.get("delta") or {} for choice in choices]
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for piece in delta.get("tool_calls") or ():
            call = calls.setdefault(piece["index"], {"function": {"name": "", "arguments": ""}})
            call |= {key: piece[key] for key in ("id", "type") if piece.get(key)}
            for key in ("name", "arguments"):
                call["function"][key] += (piece.get("function") or {}).get(key) or ""
    entries = [choice.get("logprobs") for choice in choices if choice.get("logprobs")]
    return {
        "chunks": chunks,
        "choices": sorted({choice["index"] for choice in choices}),
        "content": "".join(delta.get("content") or "" for delta in deltas)
        + "".join(c.get("text", "") for c in choices),
        "role": next((delta["role"] for delta in deltas if delta.get("role")), None),
        "tool_calls": list(calls.values()),
        "finish_reason": next((choice["finish_reason"] for choice in choices if choice.get("finish_reason")), None),
        "usage": next((chunk["usage"] for chunk in chunks if chunk.get("usage") and not chunk["choices"]), None),
        "logprobs": [entry for found in entries for entry in found.get("content") or found.get("tokens")],
        "token_ids": [one for choice in choices for one in choice.get("token_ids") or ()],
    }


def of_engine(case: dict[str, Any], engine: str) -> dict[str, Any]:
    """The case as this engine answers it; another status than the table's has a reason (``differs``)."""
    status = case.get("differs", {}).get(engine, case["status"])
    return case if status == case["status"] else {**case, "status": status, "shape": "error", "has": {}}


def problems(case: dict[str, Any], status: int, value: Any) -> list[str]:
    """What of an answer is not as the table has it."""
    if status != case["status"]:
        return [f"status {status} instead of {case['status']}: {json.dumps(value)[:300]}"]
    found = []
    for path, kind in TABLE["shapes"].get(case.get("shape"), {}).items():
        values = list(_at(value, path.split(".")))
        if not values and "*" not in path:
            found.append(f"{path} is missing")
        found += [f"{path} is {one!r}, no {kind}" for one in values if not _is(one, kind)]
    for path, wanted in case.get("has", {}).items():
        values = list(_at(value, path.split("."))) or ["nothing"]
        found += [f"{path} is {values[0]!r} instead of {wanted!r}"] if not _fits(values[0], _filled(wanted)) else []
    return found


def differences(case: dict[str, Any], vllm: tuple[int, Any], transformers: tuple[int, Any]) -> list[str]:
    """Fields of one engine's answer that the other's has not, and another status, unless the table says why."""
    statuses = [of_engine(case, engine)["status"] for engine in ("vllm", "transformers")]
    if [vllm[0], transformers[0]] != statuses or statuses[0] != statuses[1]:
        return [] if [vllm[0], transformers[0]] == statuses else [f"status {vllm[0]} and {transformers[0]}"]
    explained = {**TABLE["explained"], **case.get("differs", {})}
    return sorted((fields_of(vllm[1]) ^ fields_of(transformers[1])) - set(explained))


def _is(value: Any, kind: str) -> bool:
    return any(isinstance(value, TYPES[one]) if one != "null" else value is None for one in kind.split("|"))


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict) and len(wanted) == 1:
        ((rule, expected),) = wanted.items()
        checks: dict[str, Callable[[], bool]] = {
            "matches": lambda: isinstance(value, str) and re.search(expected, value) is not None,
            "type": lambda: _is(value, expected),
            "length": lambda: len(value) == expected,
            "most": lambda: bool(value <= expected),
        }
        if rule in checks:
            return checks[rule]()
    return bool(value == wanted)


def _at(value: Any, path: list[str]) -> Iterator[Any]:
    """The values at a path; ``*`` is every item of a list."""
    if not path:
        yield value
    elif isinstance(value, list):
        items = value if path[0] == "*" else value[int(path[0]) :][:1]
        for item in items:
            yield from _at(item, path[1:])
    elif isinstance(value, dict) and path[0] in value:
        yield from _at(value[path[0]], path[1:])


def fields_of(value: Any, path: str = "") -> set[str]:
    """The paths of an answer that hold something: its shape, without what is null, empty or the choice of a model."""
    if isinstance(value, dict):
        return {found for key, item in value.items() for found in fields_of(item, f"{path}.{_any(path, key)}")}
    if isinstance(value, list):
        return {found for item in value for found in fields_of(item, f"{path}.*")}
    return {path.lstrip(".")} if value is not None else set()


def _any(path: str, key: str) -> str:
    """A key that is a token or an id is as good as another."""
    return "*" if path.endswith(("top_logprobs.*", "prompt_logprobs.*")) else key
