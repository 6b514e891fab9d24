"""Writes docs/flags.md from the records of the flags; a test holds the two in step.

python tools/flags_doc.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayswift.arguments.commands import COMMANDS, flags_of
from rayswift.arguments.effects import sometimes, why_never
from rayswift.arguments.fields import Spec
from rayswift.arguments.swift import is_swifts, swift_defaults, swift_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
HEAD = """# Every flag

Made by `python tools/flags_doc.py` from the records that parsing and `--help` read. *effect* says where a flag changes
nothing; such a flag is taken, and the command says so in one line before anything starts. A value that is SWIFT's
default asks for nothing and is passed over without a word. `–`: none, or worked out from other settings.
"""


def shown(value: Any) -> str:
    """A default in a table."""
    if value is None or value == [] or value == {} or value == "":
        return "–"
    return f"`{' '.join(map(str, value)) if isinstance(value, list) else json.dumps(value).strip(chr(34))}`"


def effect(spec: Spec, commands: list[str]) -> str:
    """Where the flag changes nothing, by command where they differ."""
    found: dict[str, list[str]] = {}
    for command in commands:
        if never := why_never(spec, command):
            text = never if never.startswith("only ") else f"none: {never}"
        else:
            rules = sometimes(spec, command).items()
            text = "; ".join(why if why.startswith("only ") else f"not with {when}: {why}" for when, why in rules)
        found.setdefault(text or "yes", []).append(command)
    if len(found) == 1:
        return next(iter(found))
    return "<br>".join(f"{', '.join(names)}: {text}" for text, names in found.items())


def of_swift(name: str, commands: list[str]) -> str:
    """SWIFT's default: one, or one by command."""
    found: dict[str, list[str]] = {}
    for command in commands:
        if defaults := swift_defaults(name, command):
            found.setdefault(shown(defaults[0]), []).append(command)
    if len(found) <= 1:
        return next(iter(found), "not SWIFT's" if not is_swifts(name) else "–")
    return "<br>".join(f"{text} {', '.join(names)}" for text, names in found.items())


def page() -> str:
    """The page's text."""
    topics: dict[str, dict[str, dict[str, Spec]]] = {}
    for command in COMMANDS:
        for name, spec in flags_of(command).items():
            topics.setdefault(spec.topic, {}).setdefault(name, {})[command] = spec
    lines = [HEAD]
    for topic, flags in topics.items():
        lines += [f"## {topic}", "", "| flag | commands | effect | SWIFT's default | ours |", "|---|---|---|---|---|"]
        for name, specs in flags.items():
            commands, spec = list(specs), next(iter(specs.values()))
            ours: dict[str, list[str]] = {}
            for command, one in specs.items():
                ours.setdefault(one.shown or shown(one.default), []).append(command)
            default = next(iter(ours)) if len(ours) == 1 else "<br>".join(
                f"{text} {', '.join(names)}" for text, names in ours.items()
            )  # fmt: skip
            cells = [f"`--{name}`", ", ".join(commands), effect(spec, commands), of_swift(name, commands), default]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    lines += ["## SWIFT's flags that change nothing here", "", "| flag | why |", "|---|---|"]
    lines += [f"| `--{name}` | {why} |" for name, why in swift_table()["no_effect"].items()]
    lines += ["", "## SWIFT's flags that RaySwift does not have", "",
              "Refused unless the value is SWIFT's default. `→`: what does it here.", "", "| flag | default | → |",
              "|---|---|---|"]  # fmt: skip
    known = {
        alias for command in COMMANDS for spec in flags_of(command).values() for alias in (spec.name, *spec.aliases)
    }
    table = swift_table()
    for name in sorted({*table["defaults"], *table["earlier"], *table["instead"]} - known - set(table["no_effect"])):
        defaults = next((found for command in COMMANDS if (found := swift_defaults(name, command))), [None])
        lines.append(f"| `--{name}` | {shown(defaults[0])} | {table['instead'].get(name, '')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
