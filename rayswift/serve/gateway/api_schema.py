"""The OpenAPI schema of the public port: the engine's own for what is forwarded, plus the gateway's routes."""

from __future__ import annotations

from typing import Any

_ADAPTER = {
    "type": "object",
    "properties": {"lora_name": {"type": "string"}, "lora_path": {"type": "string"}, "model": {"type": "string"}},
    "required": ["lora_name"],
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}


def public_schema(engine: dict[str, Any], forwarded: tuple[str, ...]) -> dict[str, Any]:
    """The schema of all public routes.

    Args:
        engine: the schema of a replica's app; only the paths in ``forwarded`` are taken from it.
    """
    from rayswift import __version__

    paths = {path: _operations(engine["paths"][path]) for path in forwarded if path in engine.get("paths", {})}
    for path, summary in (
        ("/v1/models", "Models and adapters"),
        ("/v1/adapters", "Adapters that can be asked for"),
        ("/health", "Whether the server is up"),
        ("/metrics", "Prometheus metrics"),
    ):
        paths[path] = {"get": {"summary": summary, "responses": _responses()}}
    paths["/v1/models/{model}"] = {
        "get": {
            "summary": "One model",
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
            "responses": _responses(),
        }
    }
    for path, summary in (
        ("/v1/load_lora_adapter", "Load an adapter from below --adapter_root"),
        ("/v1/unload_lora_adapter", "Unload an adapter"),
    ):
        body = {"required": True, "content": {"application/json": {"schema": _ADAPTER}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _responses()}}
    return {
        "openapi": engine.get("openapi", "3.1.0"),
        "info": {"title": "RaySwift", "version": __version__},
        "paths": paths,
        "components": engine.get("components", {}),
    }


def _responses() -> dict[str, Any]:
    error = {"description": "The request cannot be served", "content": {"application/json": {"schema": _ERROR}}}
    return {"200": {"description": "OK"}, "4XX": error}


def _operations(item: dict[str, Any]) -> dict[str, Any]:
    """An engine's operations with the errors that the gateway adds."""
    error = _responses()["4XX"]
    return {
        method: {**operation, "responses": {**operation.get("responses", {}), "4XX": error, "503": error}}
        for method, operation in item.items()
    }
