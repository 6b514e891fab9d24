"""SWIFT's flags with their defaults, into ``rayswift/arguments/swift_flags.json``: run it where ms-swift is installed.

    ENVIRONMENT/bin/python tools/swift_flags.py

Only ``defaults`` is written anew, from SWIFT's dataclasses (names and values: facts); the rest of the file is kept,
also ``earlier``: the defaults of SWIFT 3 that are others, or whose flags are gone.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parent.parent / "rayswift" / "arguments" / "swift_flags.json"
CLASSES = {
    "pt": "PretrainArguments", "sft": "SftArguments", "rlhf": "RLHFArguments", "infer": "InferArguments",
    "deploy": "DeployArguments", "app": "AppArguments", "sample": "SamplingArguments", "eval": "EvalArguments",
    "export": "ExportArguments",
}  # fmt: skip


def plain(value: Any) -> Any:
    """A default as JSON has it."""
    return value.value if isinstance(value, enum.Enum) else value


def defaults() -> dict[str, Any]:
    """Name to default; where the commands differ, or few have the flag, to a default by command."""
    import swift.arguments

    found: dict[str, dict[str, Any]] = {}
    for command, name in CLASSES.items():
        for field in dataclasses.fields(getattr(swift.arguments, name)):
            made = field.default_factory
            default = made() if made is not dataclasses.MISSING else field.default
            found.setdefault(field.name, {})[command] = None if default is dataclasses.MISSING else plain(default)
    return {
        name: values["sft"] if values == dict.fromkeys(values, values.get("sft", ...)) else values
        for name, values in sorted(found.items())
    }


def write(table: dict[str, Any]) -> None:
    """The table with one flag a line."""
    parts = []
    for part, entries in table.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in entries.items()]
        parts.append(f" {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write({**json.loads(TABLE.read_text(encoding="utf-8")), "defaults": defaults()})
