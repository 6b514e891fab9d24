"""How one setting is declared (``arg``), described (``Spec``) and read from text or Python values (``convert``)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayswift.files import parse_json
from rayswift.redaction import is_secret, redact_text

_TRUE = frozenset({"true", "1", "yes", "y", "t", "on"})
_FALSE = frozenset({"false", "0", "no", "n", "f", "off"})
_EXPECTED = {
    "bool": ("true or false", "true"),
    "int": ("a whole number", "8"),
    "float": ("a number", "0.1"),
    "int | float": ("a number", "100"),
    "str": ("one value", "VALUE"),
    "dict[str, Any]": ("JSON or the path of a .json file", "'{\"key\": 1}'"),
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One setting: what the parser, the help and the messages need to know about it."""

    name: str
    kind: str  # the annotation without "| None", e.g. "int", "list[str]", "dict[str, Any]"
    default: Any
    help: str
    topic: str = ""
    choices: tuple[str, ...] = ()
    # Values SWIFT has and RaySwift has not (yet), with what stands in for them where something does.
    swift_only: tuple[str, ...] | Mapping[str, str] = ()
    value_aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    shown: str | None = None  # how help shows the default where it is worked out later
    example: str | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    parse: Callable[[Any], Any] | None = None  # raises ValueError("expected ...")
    decides: str = ""  # what two runs must agree in to be the same run: "answers" or "scores"; else ""
    no_effect: str | Mapping[str, str] = ""  # where it changes nothing and why, see `rayswift.arguments.effects`

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def item_kind(self) -> str:
        """The kind of one value: that of the items for a list."""
        return self.kind[5:-1] if self.is_list else self.kind

    @property
    def is_list(self) -> bool:
        return self.kind.startswith("list[")

    @property
    def hint(self) -> str:
        """An example to end a message with."""
        fallback = self.choices[0] if self.choices else _EXPECTED.get(self.item_kind, ("", "VALUE"))[1]
        return f"for example {self.flag} {self.example or fallback}"


def arg(default: Any, help: str, **details: Any) -> Any:
    """A dataclass field that is also a flag; ``details`` are the optional fields of `Spec`."""
    metadata = {"spec": {"help": help, "default": default, **details}}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=functools.partial(copy.copy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def arg_like(group: type, name: str, default: Any, **details: Any) -> Any:
    """The flag ``name`` of ``group`` again, with another default (and other ``details``) for one command."""
    inherited: dict[str, Any] = group.__dataclass_fields__[name].metadata["spec"]  # type: ignore[attr-defined]
    merged = {**inherited, **details, "default": default}
    if "shown" not in details:
        merged.pop("shown", None)
    return arg(merged.pop("default"), merged.pop("help"), **merged)


_SPECS: dict[type, dict[str, Spec]] = {}


def specs_of(cls: type) -> dict[str, Spec]:
    """The flags of an arguments class by name; topic and ``decides`` are those of the group, if not the flag's own, and
    the group's rules of ``no_effect`` hold beside the flag's (an empty reason takes one back)."""
    if cls in _SPECS:
        return _SPECS[cls]
    found = {}
    for field in dataclasses.fields(cls):
        if "spec" in field.metadata:
            owner = next(base for base in reversed(cls.__mro__) if field.name in inspect.get_annotations(base))
            kind = str(field.type).removesuffix(" | None")
            group = {name: getattr(owner, name) for name in ("topic", "decides", "no_effect")}  # see base.Arguments
            own = dict(field.metadata["spec"])
            if isinstance(rules := own.get("no_effect"), Mapping):
                own["no_effect"] = {**group["no_effect"], **rules}
            found[field.name] = Spec(name=field.name, kind=kind, **{**group, **own})
    _SPECS[cls] = found
    return found


def is_unset(spec: Spec, raw: Any) -> bool:
    """SWIFT's ``null``/``none`` (and YAML's null) mean "as if it were not given", unless none is itself a choice."""
    if raw is None:
        return True
    if isinstance(raw, (list, tuple)) and len(raw) == 1:
        raw = raw[0]
    return isinstance(raw, str) and raw.lower() in ("null", "none") and raw.lower() not in spec.choices


def convert(spec: Spec, raw: Any) -> Any:
    """``raw`` (command line text, or a value from YAML, JSON or Python) as the setting's type.

    Raises ValueError with one line that names the flag, the value, what was expected and an example.
    """
    try:
        if spec.parse is not None:
            return spec.parse(raw)
        if spec.is_list:
            items = list(raw) if isinstance(raw, (list, tuple)) else [raw]
            return [_scalar(spec, item) for item in items if item is not None]
        if isinstance(raw, (list, tuple)):
            raise TypeError("expected one value, got several")
        return _scalar(spec, raw)
    except (TypeError, ValueError) as error:
        text = " ".join(map(str, raw)) if isinstance(raw, (list, tuple)) else str(raw)
        text = " ".join(text.split())
        shown = "***" if is_secret(spec.name) else redact_text(text if len(text) <= 60 else f"{text[:57]}...")
        raise ValueError(f"{spec.flag} {shown}: {error}, {spec.hint}") from None


def _scalar(spec: Spec, raw: Any) -> Any:
    value = _READERS[spec.item_kind](raw)
    if isinstance(value, str):
        if isinstance(raw, bool) and not raw and "no" in spec.choices:
            value = "no"  # YAML reads a bare `no` as false
        value = spec.value_aliases.get(value, value)
        if value in spec.swift_only:
            if isinstance(spec.swift_only, Mapping):
                raise ValueError(f"SWIFT has it, RaySwift has not; {spec.swift_only[value]}")
            raise ValueError(f"SWIFT has it, RaySwift does not have it yet; choose from {', '.join(spec.choices)}")
        if spec.choices and value not in spec.choices:
            raise ValueError(f"choose from {', '.join(spec.choices)}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        bounds = ((spec.ge, "at least", lambda v, b: v >= b), (spec.gt, "above", lambda v, b: v > b),
                  (spec.le, "at most", lambda v, b: v <= b), (spec.lt, "below", lambda v, b: v < b))  # fmt: skip
        known = [(words, bound, holds) for bound, words, holds in bounds if bound is not None]
        if not all(holds(value, bound) for _, bound, holds in known):
            wanted = " and ".join(f"{words} {bound:g}" for words, bound, _ in known)
            raise ValueError(f"expected {_EXPECTED[spec.item_kind][0]} {wanted}")
    return value


def _expected(kind: str) -> ValueError:
    return ValueError(f"expected {_EXPECTED[kind][0]}")


def _bool(raw: Any) -> bool:
    text = str(raw).strip().lower()
    if text not in _TRUE | _FALSE:
        raise _expected("bool")
    return text in _TRUE


def read_auto(raw: Any) -> bool | None:
    """None for ``auto``, what a run decides by itself; else true or false."""
    return None if str(raw).strip().lower() == "auto" else _bool(raw)


def _number(raw: Any) -> int | float:
    if isinstance(raw, bool):
        raise _expected("float")
    try:
        value = float(raw)
    except (TypeError, ValueError):
        raise _expected("float") from None
    if not math.isfinite(value):
        raise _expected("float")
    return int(value) if value.is_integer() else value


def _int(raw: Any) -> int:
    try:
        value = _number(raw)
    except ValueError:
        raise _expected("int") from None
    if not isinstance(value, int):
        raise _expected("int")
    # Beyond 2**53 a float is no longer exact, and seeds may be that large.
    exact = isinstance(raw, int) or str(raw).lstrip("+-").isdigit()
    return int(raw) if exact else value


def _text(raw: Any) -> str:
    if isinstance(raw, (dict, list, tuple)):
        raise _expected("str")
    return str(raw).lower() if isinstance(raw, bool) else str(raw)


def read_json(raw: Any) -> dict[str, Any]:
    """A dict, a JSON object as text, or the path of a .json file holding one."""
    if isinstance(raw, Mapping):
        return dict(raw)
    text = str(raw).strip()
    if not text.startswith(("{", "[")):
        if not os.path.isfile(text):
            looks_like_path = text.endswith(".json") or os.sep in text
            raise ValueError("no such file" if looks_like_path else "expected JSON or the path of a .json file")
        with open(text, encoding="utf-8") as file:
            text = file.read()
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at line {error.lineno} column {error.colno})") from None
    if not isinstance(value, dict):
        raise TypeError("expected a JSON object in braces")
    return value


def read_text_file(raw: Any) -> str:
    """SWIFT's ``--system``: the text itself, with a literal ``\\n`` unescaped, or the path of a .txt file."""
    text = _text(raw)
    if text.endswith(".txt") and "\n" not in text and (os.path.isfile(text) or " " not in text):
        try:
            with open(text, encoding="utf-8") as file:
                return file.read().rstrip("\n")
        except OSError as error:
            raise ValueError(f"cannot read this file ({error.strerror})") from None
    return text.replace("\\n", "\n")


def read_lines(raw: Any) -> list[str]:
    """A list in which an item that names a .txt file stands for that file's lines."""
    items: Sequence[Any] = raw if isinstance(raw, (list, tuple)) else [raw]
    lines: list[str] = []
    for item in map(_text, items):
        lines.extend(filter(None, read_text_file(item).splitlines()) if item.endswith(".txt") else [item])
    return lines


_READERS: dict[str, Callable[[Any], Any]] = {
    "bool": _bool,
    "int": _int,
    "float": lambda raw: float(_number(raw)),
    "int | float": _number,
    "str": _text,
    "dict[str, Any]": read_json,
}
