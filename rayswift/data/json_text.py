"""JSON as users write it: orjson's speed, with the json module for the few texts that orjson refuses or changes.

orjson refuses NaN, half surrogate pairs and byte order marks, and turns integers beyond 64 bits into floats.
"""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

import orjson

#: An object of a line of a JSON file, as it was written.
JsonRow = dict[str, Any]
#: From here on a float may be an integer that orjson could not hold.
_BIG = 2.0**63


class BadJson(ValueError):
    """A text that is not JSON; ``line`` and ``column`` count from 1 within the text (None: not known)."""

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(reason)
        self.line = line
        self.column = column


def loads(text: bytes | str) -> Any:
    """The value of a JSON text (bytes are UTF-8), as the json module reads it, NaN and infinities as null.

    Raises:
        UnicodeDecodeError: bytes that are not UTF-8.
        BadJson: broken JSON, nesting beyond the interpreter's limit, or an integer of more than 4300 digits.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _loads_slowly(text)
    return _loads_slowly(text) if _may_have_lost_digits(value) else value


def loads_literal(text: str) -> Any:
    """A JSON text, else a Python literal such as ``[('a', 'b')]``, else None."""
    try:
        return loads(text)
    except ValueError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd backslash in a row is no concern of the user's terminal
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def dumps(value: Any) -> bytes:
    """A value as JSON in UTF-8; what JSON has no word for (dates, bytes) as its text."""
    try:
        return orjson.dumps(value, default=str)
    except TypeError:  # integers beyond 64 bits, keys that are no texts
        return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def has_half_surrogate(value: Any) -> bool:
    r"""Whether any text in a value holds one half of a surrogate pair (``"\ud83d"``), which no encoding can store."""
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, dict):
        return any(has_half_surrogate(part) for item in value.items() for part in item)
    return isinstance(value, (list, tuple)) and any(has_half_surrogate(item) for item in value)


def _loads_slowly(text: bytes | str) -> Any:
    decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        # Stripped: an error at the end is in the last line, not behind it.
        return json.loads(decoded.rstrip(), parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise BadJson(error.msg, error.lineno, error.colno) from None
    except RecursionError:
        raise BadJson("nested too deeply") from None
    except ValueError:
        raise BadJson("a number of more than 4300 digits") from None


def _may_have_lost_digits(value: Any) -> bool:
    for item in value.values() if type(value) is dict else value if type(value) is list else (value,):
        kind = type(item)
        if kind is str:
            continue  # first, because nearly everything is
        if (kind is dict or kind is list) and _may_have_lost_digits(item):
            return True
        if kind is float and not -_BIG < item < _BIG:
            return True
    return False
