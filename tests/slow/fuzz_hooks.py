"""Hooks of Schemathesis (``SCHEMATHESIS_HOOKS``): requests that reach the engine and end soon, and a record of each.

``RAYSWIFT_FUZZ_RECORD`` names the file that gets one line of JSON for each response.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import schemathesis

#: What a request may ask for when it asks for a number that would be taken: an answer this long is soon written.
FEW = 4
#: Fields that count tokens or answers, and so the time that a valid request takes.
COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "min_tokens", "best_of")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Most requests ask for the served model, which a random name never is; valid ones ask for short answers."""
    body = case.body
    if not isinstance(body, dict):
        return
    asked = body.get("model")
    # One in eight keeps its random name, as its text decides.
    if "model" in body and isinstance(asked, str) and zlib.crc32(repr(body).encode()) % 8:
        body["model"] = os.environ["RAYSWIFT_FUZZ_MODEL"]
    for name in COUNTS:
        count = body.get(name)
        if isinstance(count, int) and not isinstance(count, bool) and FEW < count < 2**16:
            body[name] = FEW
    if case.operation.path == "/v1/responses" and body.get("max_output_tokens") is None:
        body["max_output_tokens"] = FEW
    generates = "chat" in case.operation.path or "completions" in case.operation.path
    if generates and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = FEW


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Note the answer."""
    note(case, status=response.status_code, seconds=response.elapsed)


@schemathesis.hook
def after_network_error(context: Any, case: Any, request: Any) -> None:
    """Note that no answer came: a connection that broke, or a time-out."""
    note(case, status=0, seconds=None)


def note(case: Any, **fields: Any) -> None:
    """One line in the record; appended in one write, so that lines of several workers do not mix."""
    body = repr(case.body)[:400]
    line = json.dumps({"operation": f"{case.method} {case.operation.path}", "body": body, **fields})
    with Path(os.environ["RAYSWIFT_FUZZ_RECORD"]).open("a") as file:
        file.write(line + "\n")
