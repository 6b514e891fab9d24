"""``/openapi.json``: the gateway's own paths and what they take, and the engine's schema of those that it forwards."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel


class AdapterRequest(BaseModel):
    """What vLLM takes to load and unload an adapter."""

    lora_name: str
    lora_path: str | None = None
    load_inplace: bool = False
    model: str | None = None


def public_schema(own: dict[str, Any], engine: dict[str, Any] | None, forwarded: Iterable[str]) -> dict[str, Any]:
    """The schema that clients get. ``engine``: its own, which has more paths than it shows; None without a replica."""
    schema = copy.deepcopy(own)
    if engine is None:
        unknown = {"description": "Its schema comes with the first replica."}
        engine = {"paths": {path: {"post": dict(unknown)} for path in forwarded}}
    refused = schema["paths"]["/health"]["get"]["responses"]["4XX"]
    public = {path: engine["paths"][path] for path in forwarded if path in engine["paths"]}
    for operation in (one for operations in public.values() for one in operations.values()):
        operation["responses"] = {**operation.get("responses", {}), "4XX": refused, "503": refused}
    schema["paths"] |= public
    schema["components"]["schemas"] |= engine.get("components", {}).get("schemas", {})
    return schema
