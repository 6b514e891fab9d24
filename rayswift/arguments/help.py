"""The argparse parser of a command, and its help: every flag by topic, with its default and where it has no effect."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

from rayswift.arguments.commands import arguments_class, flags_of
from rayswift.arguments.effects import sometimes, why_never
from rayswift.arguments.fields import Spec
from rayswift.arguments.training_args import TOPIC
from rayswift.errors import UserError
from rayswift.redaction import REDACTED, is_secret, redact_text

MISSING = "\0missing"  # what argparse puts where a flag stands without its value


class Parser(argparse.ArgumentParser):
    """argparse's, with a mistake as a `UserError`."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; {self.prog} --help explains")


def make_parser(
    flags: Mapping[str, Spec], command: str, values: Mapping[str, Any] | None = None, **details: Any
) -> argparse.ArgumentParser:
    """An argparse parser that takes every value as text.

    With ``values`` it is made for printing help, where they replace the defaults.
    """
    parser = Parser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34), **details,
    )  # fmt: skip
    groups: dict[str, Any] = {"": parser.add_argument_group("General")}
    groups[""].add_argument("--config", nargs="?", const=MISSING, metavar="FILE",
                            help="YAML or JSON file of settings; may also stand first, without --config")  # fmt: skip
    groups[""].add_argument("--help", action="help", help="show this and exit")
    for spec in flags.values():
        if spec.topic not in groups:
            groups[spec.topic] = parser.add_argument_group(spec.topic)
        options: dict[str, Any] = {"nargs": "?", "const": "true" if spec.kind == "bool" else MISSING}
        if spec.is_list:
            options = {"nargs": "*"}
        if values is not None:
            options = {"metavar": _metavar(spec), "help": _help_line(spec, values, command)}
        groups[spec.topic].add_argument(spec.flag, **options)
    return parser


def _metavar(spec: Spec) -> str:
    names = {"bool": "true|false", "int": "INT", "float": "NUMBER", "int | float": "NUMBER", "dict[str, Any]": "JSON"}
    name = names.get(spec.item_kind, spec.name.rpartition("_")[2].upper())
    if spec.choices and len(", ".join(spec.choices)) < 100:
        name = f"{{{','.join(spec.choices)}}}"
    return f"{name} ..." if spec.is_list else name


def _help_line(spec: Spec, values: Mapping[str, Any], command: str) -> str:
    default = values.get(spec.name, spec.default)
    if spec.name not in values and (spec.shown or default is None or default == [] or default == {}):
        text = spec.shown or "unset"
    elif isinstance(default, bool):
        text = str(default).lower()
    else:
        text = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
    also = f"; also {', '.join(f'--{alias}' for alias in spec.aliases)}" if spec.aliases else ""
    text = REDACTED if is_secret(spec.name) and spec.name in values else redact_text(text)
    return f"{spec.help}{_effect(spec, command)} (default: {text}{also})".replace("%", "%%")


def _effect(spec: Spec, command: str) -> str:
    """What help adds where a flag changes nothing."""
    if never := why_never(spec, command):
        return f"; {never}" if never.startswith("only ") else f"; no effect here: {never}"
    rules = sometimes(spec, command).items()
    return "".join(f"; {why}" if why.startswith("only ") else f"; no effect with {when}: {why}" for when, why in rules)


def format_help(command: str, values: Mapping[str, Any] | None = None, prog: str | None = None) -> str:
    """The help of a command: every flag by topic, with a line and its default (or that of a script, ``values``)."""
    cls = arguments_class(command)
    flags = flags_of(command)
    topics = list(dict.fromkeys(spec.topic for spec in flags.values()))
    # The command's own topic first would surprise: model and dataset come first everywhere.
    order = ["Model", "Dataset", "Template"]
    topics.sort(key=lambda topic: (order.index(topic) if topic in order else len(order), topic == TOPIC))
    ordered = {name: spec for topic in topics for name, spec in flags.items() if spec.topic == topic}
    prog = prog or f"rayswift {command}"
    parser = make_parser(
        ordered, command, values or {}, prog=prog, usage=f"{prog} [CONFIG.yaml] [--flag value ...]",
        description=cls.__doc__,
        epilog="Booleans: true/false, or --flag and --no_flag. Lists: separated by spaces. null: as if not given.\n"
        "Flags may be written with - or _, and shortened as long as they stay unique.",
    )  # fmt: skip
    return parser.format_help()
