"""Where a flag has no effect: the rules at its record (`Spec.no_effect`), which parsing, help, docs and tests read.

A rule is a condition and why the flag then changes nothing: ``{"packing=false": "only with --packing true"}``; a text
alone holds everywhere. A condition is words that must all hold, each ``NAME=VALUE|VALUE`` or ``NAME!=VALUE``. A name is
that of a setting (its value as text, ``none`` where it is empty), ``command``, or ``engine``: what generates; ``@NAME``
as a value is that of another setting.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rayswift.arguments.commands import flags_of
from rayswift.arguments.fields import Spec


def rules_of(spec: Spec) -> Mapping[str, str]:
    """Condition to reason; the empty condition always holds."""
    if isinstance(spec.no_effect, str):
        return {"": spec.no_effect} if spec.no_effect else {}
    return {condition: why for condition, why in spec.no_effect.items() if why}


def why_no_effect(spec: Spec, args: Any) -> str:
    """Why the flag changes nothing beside these settings; empty where it has an effect."""
    return next((why for condition, why in rules_of(spec).items() if _holds(condition, args)), "")


def why_never(spec: Spec, command: str) -> str:
    """Why the flag changes nothing in this command whatever else is set; empty where it can have an effect."""
    alone = _Command(command)
    rules = rules_of(spec).items()
    return next((why for when, why in rules if _names(when) <= {"command"} and _holds(when, alone)), "")


def sometimes(spec: Spec, command: str) -> dict[str, str]:
    """The rules that depend on other settings of this command: what must be set, as flags, to why."""
    found, open_names = {}, {"engine", *flags_of(command)}
    for condition, why in rules_of(spec).items():
        words = condition.split()
        # What the command has no flag for is decided: it is empty.
        decided = [word for word in words if not _names(word) <= open_names]
        if all(_holds(word, _Command(command)) for word in decided):
            found[" ".join(_as_flag(word) for word in words if word not in decided)] = why
    return {when: why for when, why in found.items() if when}


def no_effect_lines(args: Any, asked: Iterable[Spec]) -> Iterator[str]:
    """One line for all flags of the same reason."""
    reasons: dict[str, list[str]] = {}
    for spec in asked:
        if why := why_no_effect(spec, args):
            reasons.setdefault(why, []).append(spec.flag)
    for why, flags in reasons.items():
        yield f"{', '.join(sorted(flags))} {'has' if len(flags) == 1 else 'have'} no effect here: {why}"


class _Command:
    """Arguments of which only the command is known."""

    def __init__(self, command: str) -> None:
        self.command = command


def _names(condition: str) -> set[str]:
    return {word.partition("=")[0].rstrip("!") for word in condition.split()}


def _holds(condition: str, args: Any) -> bool:
    for word in condition.split():
        name, _, wanted = word.partition("=")
        values = _texts(wanted[1:], args) if wanted.startswith("@") else set(wanted.split("|"))
        is_one = bool(_texts(name.rstrip("!"), args) & values)
        if is_one == name.endswith("!"):
            return False
    return True


def _texts(name: str, args: Any) -> set[str]:
    """A setting as texts: the items of a list, ``none`` where there is nothing."""
    if name == "engine":
        return {_engine(args)}
    value = getattr(args, name, getattr(args, "training_args", {}).get(name))
    if name == "address":
        value = value or os.environ.get("RAY_ADDRESS")
    if value is None or value == [] or value == {} or value == "":
        return {"none"}
    if isinstance(value, (list, tuple)):
        return {str(item).lower() for item in value}
    return {f"{value:g}" if isinstance(value, float) else str(value).lower()}


def _engine(args: Any) -> str:
    if hasattr(args, "use_vllm"):
        return "vllm" if args.use_vllm else "transformers"
    return str(getattr(args, "sampler_engine", None) or getattr(args, "infer_backend", "none"))


def _as_flag(word: str) -> str:
    name, _, value = word.partition("=")
    if name == "engine":
        return f"engine {value}"
    if name.endswith("!"):
        return f"--{name[:-1]}" if value == "none" else f"--{name[:-1]} other than {value.replace('|', ', ')}"
    value = f"as --{value[1:]}" if value.startswith("@") else value.replace("|", " or ")
    return f"no --{name}" if value == "none" else f"--{name} {value}"
