"""From a command line, a configuration file and Python keywords to checked arguments."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayswift.arguments.base import Arguments
from rayswift.arguments.commands import COMMANDS, arguments_class, flags_of
from rayswift.arguments.effects import no_effect_lines
from rayswift.arguments.fields import Spec, convert, is_unset, specs_of
from rayswift.arguments.help import MISSING, format_help, make_parser
from rayswift.arguments.swift import asks_for_nothing, is_swifts, swift_table
from rayswift.errors import UserError
from rayswift.files import parse_json, parse_yaml
from rayswift.redaction import REDACTED, SECRET_FLAGS, redact_text

logger = logging.getLogger("rayswift.arguments")

_CONFIG_ENDINGS = (".yaml", ".yml", ".json")
# Keys of a saved args.json that are no flags.
_NO_FLAGS = frozenset({"command", "rayswift_version"})
_MAX_PROBLEMS = 15


@dataclass
class _Reader:
    """Collects values by canonical name, and problems, from one source after the other; later ones win."""

    command: str
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    config_file: str | None = None

    def __post_init__(self) -> None:
        self.flags = flags_of(self.command)
        self.names = {name: name for name in self.flags} | {
            alias: spec.name for spec in self.flags.values() for alias in spec.aliases
        }

    def take(self, key: str, raw: Any) -> None:
        """A value from Python or a configuration file."""
        name = key.replace("-", "_")
        if name == "training_args" and isinstance(raw, Mapping):
            for inner, value in raw.items():
                self.take(str(inner), value)
        elif name in self.names:
            self.put(self.names[name], raw)
        elif name not in _NO_FLAGS:
            self.unknown(name, raw)

    def put(self, name: str, raw: Any) -> None:
        self.values.pop(name, None)
        if not is_unset(self.flags[name], raw) and raw not in (REDACTED, f"<{name.upper()}>"):
            self.values[name] = raw

    def find(self, name: str) -> tuple[str | None, bool]:
        """The canonical name, and whether it was negated (``no_name``); a unique beginning is enough.

        (None, False) for an unknown flag; (None, True) for an ambiguous one, which is now among the problems.
        """
        if name in self.names:
            return self.names[name], False
        positive = self.names.get(name.removeprefix("no_"))
        if name.startswith("no_") and positive and self.flags[positive].kind == "bool":
            return positive, True
        if is_swifts(name):
            return None, False
        matches = {self.names[known] for known in self.names if known.startswith(name)}
        if len(matches) > 1:
            self.problems.append(f"--{name} is short for several flags: {', '.join(f'--{m}' for m in sorted(matches))}")
        return (next(iter(matches)), False) if len(matches) == 1 else (None, len(matches) > 1)

    def unknown(self, name: str, raw: Any = None) -> None:
        """A flag this command does not have: passed over where it asks for what happens anyway, said where it changes
        nothing here, else a problem that says why."""
        if is_swifts(name) and asks_for_nothing(name, raw, self.command):
            logger.debug("--%s %s is SWIFT's default", name, raw)
        elif why := swift_table()["no_effect"].get(name):
            logger.warning("--%s has no effect here: %s", name, why)
        else:
            self.problems.append(self._why_unknown(name))

    def _why_unknown(self, name: str) -> str:
        instead = swift_table()["instead"].get(name)
        if instead:
            return f"--{name} is SWIFT's; in RaySwift use {instead}"
        others = [other for other in COMMANDS if name in flags_of(other)]
        if others and name not in self.names:
            return (
                f"--{name} is no flag of rayswift {self.command}, but of {', '.join(f'rayswift {o}' for o in others)}"
            )
        if is_swifts(name):
            return f"--{name} is SWIFT's; RaySwift does not have it yet"
        import difflib

        close = difflib.get_close_matches(name, [*self.names, "help", "config"], n=1, cutoff=0.6)
        hint = f"; did you mean --{close[0]}?" if close else f"; rayswift {self.command} --help lists the flags"
        return f"unknown flag --{name}{hint}"

    def take_config(self, path: str) -> None:
        """The settings of a YAML or JSON file; its ``ENV`` sets environment variables that are not set yet."""
        if self.config_file:
            raise UserError(f"--config {path}: {self.config_file} is already the configuration file; give one")
        self.config_file = path
        content = read_config(path)
        environment = content.pop("ENV", None) or {}
        if not isinstance(environment, dict):
            raise UserError(f"{path}: ENV: expected `NAME: value` lines")
        for name, value in environment.items():
            current = os.environ.setdefault(str(name), str(value))
            if current != str(value):
                logger.warning("%s: ENV %s keeps the value it already has", path, name)
        before = len(self.problems)
        for key, raw in content.items():
            self.take(str(key), raw)
        self.problems[before:] = [f"{path}: {problem}" for problem in self.problems[before:]]

    def take_argv(self, argv: Sequence[str]) -> None:
        """A command line: an optional configuration file, then flags."""
        words = _without_strays(argv)
        if words and words[0].lower().endswith(_CONFIG_ENDINGS) and not words[0].startswith("-"):
            self.take_config(words.pop(0))
        tokens = list(self._normalised(words))
        flags = [word.partition("=")[0] for word in tokens if _is_flag(word)]
        for flag in sorted({flag for flag in flags if flags.count(flag) > 1}):
            logger.warning("%s is given more than once: the last one counts", flag)
        parsed, extra = make_parser(self.flags, self.command, prog=f"rayswift {self.command}").parse_known_args(tokens)
        values = vars(parsed)
        if config := values.pop("config", None):
            if config == MISSING:
                self.problems.append("--config needs a value, for example --config sft.yaml")
            else:
                self.take_config(config)
        for name, raw in values.items():
            if raw == MISSING or raw == []:
                self.problems.append(f"--{name} needs a value, {self.flags[name].hint}")
            else:
                self.put(name, raw)
        for word in extra:
            self.problems.append(f"unexpected {redact_text(word)!r}: a value with spaces needs quotes")

    def _normalised(self, words: Sequence[str]) -> Iterator[str]:
        """The words with every flag in its canonical form; unknown flags become problems, their values are dropped."""
        position = 0
        while position < len(words):
            word = self._with_two_hyphens(words[position])
            position += 1
            if not _is_flag(word):
                yield word
                continue
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            end = position
            while not equals and end < len(words) and not _is_flag(words[end]):
                end += 1
            name, negated = ("config", False) if key == "config" else self.find(key)
            if name is None:
                if not negated:
                    self.unknown(key, value if equals else " ".join(words[position:end]))
                position = end
            elif negated:
                yield f"--{name}=false"
            elif equals:
                yield f"--{name}={value}"
            elif end > position and _is_negative_number(words[position]):
                yield f"--{name}={words[position]}"  # argparse takes -1e-4 for a flag
                position += 1
            else:
                yield f"--{name}"

    def _with_two_hyphens(self, word: str) -> str:
        """Read ``-model``, or a flag with the long dash of a web page, as what was meant, and count it as a problem."""
        name, equals, value = word.lstrip("-\u2013\u2014").partition("=")
        known = name.replace("-", "_") in self.names
        if word.startswith("--") or word == f"{name}{equals}{value}" or not known:
            return word
        self.problems.append(f"{word.partition('=')[0]}: flags start with two hyphens, --{name}")
        return f"--{name}{equals}{value}"

    def build(self) -> Arguments:
        """Convert and check everything that was taken. Raises UserError with a line per problem."""
        cls = arguments_class(self.command)
        for name in set(SECRET_FLAGS) & set(self.flags) - set(self.values):
            if value := os.environ.get(f"RAYSWIFT_{name.upper()}"):
                self.values[name] = value.splitlines() if self.flags[name].is_list else value  # a key may hold spaces
        typed: dict[str, Any] = {"training_args": {}}
        failed: list[str] = []
        declared = specs_of(cls)
        for name, raw in self.values.items():
            try:
                value = convert(self.flags[name], raw)
            except ValueError as error:
                self.problems.append(str(error))
                failed.append(name)
                continue
            (typed if name in declared else typed["training_args"])[name] = value
        arguments = cls(**typed, given=frozenset(self.values), config_file=self.config_file)
        if not self.problems:
            arguments.finish()
            given = arguments.given & set(self.values)
            asked = (spec for name, spec in self.flags.items() if name in given and not self._at_default(spec))
            for line in no_effect_lines(arguments, asked):
                logger.warning(line)
            return arguments
        if not any("did you mean --help?" in problem for problem in self.problems):
            # A setting that could not be read stands at its default here: what that contradicts is no news.
            self.problems += [p for p in arguments.problem_lines() if not any(f"--{name} " in p for name in failed)]
        more = len(self.problems) - _MAX_PROBLEMS
        raise UserError("\n".join(self.problems[:_MAX_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])))

    def _at_default(self, spec: Spec) -> bool:
        """Whether the value is the one that stands without the flag, here or in SWIFT."""
        raw = self.values[spec.name]
        return convert(spec, raw) == spec.default or asks_for_nothing(spec.name, raw, self.command)


def take_over(command: str, args: Arguments) -> Arguments:
    """The arguments of another command: what both have, with what was given and restored. Raises UserError."""
    known = specs_of(arguments_class(command))
    given = args.given & frozenset(known)
    values = {name: getattr(args, name) for name in given}
    typed = {name: convert(known[name], value) for name, value in values.items() if value is not None}
    taken = arguments_class(command)(**typed, given=given)
    if problems := taken.problem_lines():
        raise UserError("\n".join(problems))
    return taken.resolved()


def _is_negative_number(word: str) -> bool:
    try:
        return word.startswith("-") and float(word) <= 0
    except ValueError:
        return False


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2 and " " not in word.partition("=")[0]


def _without_strays(argv: Sequence[str]) -> list[str]:
    """The words without what copied command lines carry along: blank words, ``...``, a comment after ``\\ ``."""
    words: list[str] = []
    in_comment = False
    for word in argv:
        text = word.strip()
        in_comment = (in_comment and not _is_flag(word)) or (word[:1].isspace() and text.startswith("#"))
        if in_comment:
            logger.warning("ignored a comment: %s", redact_text(text))
        elif not text and word:
            logger.warning("ignored a blank word: a backslash must be the last character of its line")
        elif text in ("...", "\u2026"):
            logger.warning("ignored %s", text)
        else:
            words.append(word)
    return words


def read_config(path: str) -> dict[str, Any]:
    """A YAML or JSON file of settings as a dict. Raises UserError with file and line."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read this configuration file ({error.strerror})") from None
    if path.lower().endswith(".json"):
        try:
            content = parse_json(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    else:
        import yaml

        try:
            content = parse_yaml(text)
        except ValueError as error:
            raise UserError(f"{path}: not valid YAML ({error})") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected settings, one `flag: value` per line")
    return content


def parse_arguments(
    command: str, argv: Sequence[str], *, defaults: Mapping[str, Any] | None = None, prog: str | None = None
) -> Arguments:
    """Read a command line (without the command itself) into checked arguments.

    Args:
        command: one of the nine commands, e.g. ``"sft"``, or ``"data preview"``.
        argv: the words after the command: an optional configuration file, then flags.
        defaults: settings by name that a configuration file and the command line may override.
        prog: how help calls the program, ``rayswift <command>`` by default.

    Raises:
        UserError: with one line per problem.
        SystemExit: 0, after printing help for ``--help``.
    """
    if {"-h", "--help"} & set(argv):
        print(format_help(command, defaults, prog), end="")
        sys.exit(0)
    reader = _Reader(command)
    for key, raw in (defaults or {}).items():
        reader.take(key, raw)
    reader.take_argv(argv)
    return reader.build()


def make_arguments(command: str, **settings: Any) -> Arguments:
    """Checked arguments from Python keywords (typed, or as text like on the command line). Raises UserError."""
    return parse_arguments(command, [], defaults=settings)
