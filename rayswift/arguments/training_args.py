"""The fields of ``transformers.TrainingArguments``, readable without importing Transformers.

``training_args.json`` beside this file is generated from the installed Transformers by
``python -m rayswift.arguments.training_args``; a test holds the two in step.
"""

from __future__ import annotations

import functools
import json
import os
import re
from typing import Any

from rayswift.arguments.fields import Spec

DATA_FILE = os.path.join(os.path.dirname(__file__), "training_args.json")
TOPIC = "Further fields of transformers.TrainingArguments"
# Ray decides these.
_NOT_FLAGS = frozenset({"local_rank", "do_train", "do_eval", "do_predict", "parallelism_config"})


@functools.cache
def _load() -> dict[str, Any]:
    with open(DATA_FILE, encoding="utf-8") as file:
        fields: dict[str, Any] = json.load(file)["fields"]
    return fields


def choices_of(name: str) -> tuple[str, ...]:
    """The values Transformers lists for a field, empty where any will do."""
    return tuple(_load().get(name, {}).get("choices", ()))


def passthrough_specs(declared: set[str]) -> dict[str, Spec]:
    """A flag for every field that the arguments class does not declare itself; they land in ``training_args``."""
    return {
        name: Spec(
            name=name, kind=field["type"], default=field["default"], help="as in Transformers", topic=TOPIC,
            choices=choices_of(name),
        )
        for name, field in _load().items()
        if name not in declared and name not in _NOT_FLAGS
    }  # fmt: skip


def generate() -> dict[str, Any]:
    """Describe the installed ``transformers.TrainingArguments``: name, type, default and choices of each field."""
    import dataclasses
    import enum
    import typing

    import transformers

    hints = typing.get_type_hints(transformers.TrainingArguments)
    fields: dict[str, Any] = {}
    for declared in dataclasses.fields(transformers.TrainingArguments):
        default = declared.default
        if default is dataclasses.MISSING:
            default = declared.default_factory() if declared.default_factory is not dataclasses.MISSING else None
        entry: dict[str, Any] = {"type": _kind(hints[declared.name]), "default": default}
        for option in typing.get_args(hints[declared.name]) or (hints[declared.name],):
            if isinstance(option, type) and issubclass(option, enum.Enum) and entry["type"] == "str":
                entry["choices"] = [member.value for member in option]
        fields[declared.name] = entry
    return {"transformers_version": transformers.__version__, "fields": fields}


def _kind(hint: Any) -> str:
    """The kind of `Spec` that can hold a type hint; the widest one where there are several."""
    text = re.sub(r"\btyping\.", "", str(hint))
    for pattern, kind in (
        (r"\bdict\b", "dict[str, Any]"),
        (r"\blist\[str\]", "list[str]"),
        (r"\bstr\b", "str"),
        (r"\blist\[", "list[str]"),
        (r"\bfloat\b", "int | float"),
        (r"\bint\b", "int"),
        (r"\bbool\b", "bool"),
    ):
        if re.search(pattern, text):
            return kind
    return "str"


def main() -> None:
    """Write ``training_args.json`` anew."""
    content = generate()
    lines = [f"  {json.dumps(name)}: {json.dumps(field)}" for name, field in content["fields"].items()]
    with open(DATA_FILE, "w", encoding="utf-8") as file:
        file.write(f'{{\n "transformers_version": "{content["transformers_version"]}",\n "fields": {{\n')
        file.write(",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    main()
