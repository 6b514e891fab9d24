"""Answers to maths questions: found in a text, and compared by value.

Nothing of a text is ever executed: formulas go through a small parser of our own. Two formulas are the same if they
have the same value, at a few points where they have variables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

Number = Fraction | float

#: A longer answer is a text, not a formula.
_MOST_CHARACTERS = 300
#: How many boxes are tried, from the last: a text can have thousands that never close.
_MOST_BOXES = 8
_NUMBER = re.compile(r"(?<![\w.])[-+−]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?", re.ASCII)
_HASHES = re.compile(r"####[ \t]*(?P<answer>[^\n]+)")
_PHRASES = re.compile(
    r"(?:(?:final|correct)?\s*answer\s*(?:is|:|=)|答案[是为：:]|^#+\s*answer\s*$)[\s:：]*(?P<answer>[^\n]+)",
    re.IGNORECASE | re.MULTILINE,
)
# Of bounded length: a text with thousands of openings and no end must not cost the square of it.
_FORMULA = re.compile(
    r"\$\$(?P<display>[^$]{1,300})\$\$|\\\[(?P<square>.{1,300}?)\\\]|\\\((?P<round>.{1,300}?)\\\)"
    r"|(?<!\\)\$(?P<inline>[^$\n]{1,300})\$",
    re.DOTALL,
)


# --- finding ----------------------------------------------------------------------------------------------------


def final_answer(text: str) -> str | None:
    """The answer that a text ends in: as it marks it, else its last formula or number, else its only line."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    formulas = [next(filter(None, found.groups())) for found in _FORMULA.finditer(text)]
    numbers = numbers_in(text)
    if formulas:
        return formulas[-1].strip()
    if numbers:
        return numbers[-1]
    lines = text.strip().splitlines()
    return lines[0].strip() if len(lines) == 1 else None


def final_number(text: str) -> Fraction | None:
    """The number that a text ends in, in its marked answer or anywhere."""
    for part in (marked_answer(text), text):
        if part is not None and (found := numbers_in(part)):
            return to_number(found[-1])
    return None


def marked_answer(text: str) -> str | None:
    """What a text says is its answer: a tag, ``####``, ``\\boxed{…}``, or "the answer is …"."""
    if (inner := last_tagged(text, "<answer>", "</answer>")) is not None:
        return last_boxed(inner) or inner
    if found := list(_HASHES.finditer(text)):
        inner = found[-1]["answer"].strip()
        return last_boxed(inner) or inner
    if (boxed := last_boxed(text)) is not None:
        return boxed
    if found := list(_PHRASES.finditer(text)):
        return found[-1]["answer"].strip().rstrip(".。").strip() or None
    return None


def last_tagged(text: str, opening: str, closing: str) -> str | None:
    """What stands in the last pair of tags."""
    end = text.rfind(closing)
    start = text.rfind(opening, 0, max(end, 0))
    return text[start + len(opening) : end].strip() if start >= 0 else None


def last_boxed(text: str) -> str | None:
    """The contents of the last ``\\boxed{…}`` whose braces close."""
    starts = [found.end() for found in re.finditer(r"\\f?boxed\s*\{", text)]
    for start in starts[: -_MOST_BOXES - 1 : -1]:
        depth = 1
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position].strip()
    return None


def numbers_in(text: str) -> list[str]:
    """The numbers of a text as they are written: ``1,234``, ``-0.5``, ``3/4``."""
    return [found.group().strip() for found in _NUMBER.finditer(text) if any(map(str.isdigit, found.group()))]


def to_number(text: str) -> Fraction | None:
    """The value of a number as :func:`numbers_in` finds it."""
    plain = re.sub(r"[$,\s]", "", text).replace("−", "-")
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


# --- comparing --------------------------------------------------------------------------------------------------


def same_number(one: Number, other: Number) -> bool:
    """Equal; if one is not exact, to nine digits."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    return math.isclose(float(one), float(other), rel_tol=1e-9, abs_tol=1e-12)


def same_answer(one: str, other: str) -> bool:
    """Whether two answers say the same."""
    if max(len(one), len(other)) > _MOST_CHARACTERS:
        return " ".join(one.split()) == " ".join(other.split())
    first, second = plain_latex(one), plain_latex(other)
    if first == second:
        return bool(first)
    parts, others = list_parts(first), list_parts(second)
    if parts is not None and others is not None:
        (kind, members), (other_kind, other_members) = parts, others
        if kind != other_kind or len(members) != len(other_members):
            return False
        if kind == "{}":
            return all(any(same_answer(a, b) for b in other_members) for a in members)
        return all(map(same_answer, members, other_members))
    return same_value(first, second)


def same_value(one: str, other: str) -> bool:
    """Whether two formulas have the same value, at every one of a few points."""
    try:
        first, second = parse(one), parse(other)
        names = first.names() | second.names()
        for shift in range(3 if names else 1):
            point = {name: Fraction(ord(name[0]) % 13 + 2 + 5 * shift, 7) for name in names}
            if not same_number(first.value(point), second.value(point)):
                return False
    except (NotAFormula, ArithmeticError, ValueError, RecursionError):
        return False
    return True


def list_parts(text: str) -> tuple[str, list[str]] | None:
    """``(1, 2)`` as its brackets and members; None for anything else. Members without brackets are ``()``."""
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        return None
    kind = text[:1] + text[-1:]
    inner = text[1:-1] if kind in ("()", "[]", "(]", "[)", "{}") else text
    depth, members = 0, [""]
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
        if character == "," and depth == 0:
            members.append("")
        else:
            members[-1] += character
    if len(members) < 2:
        return None
    return (kind if inner != text else "()"), [member.strip() for member in members]


_SPELLINGS = (
    (r"\\(?:left|right|displaystyle|mathrm\{~\}|!|,|;|:|quad|qquad| )(?![a-zA-Z])", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(?:cdot|times)(?![a-zA-Z])|[×·]", "*"),
    (r"\\div(?![a-zA-Z])|÷", "/"),
    (r"\^\{?\\circ\}?|\\degree(?![a-zA-Z])|°", ""),
    (r"\\(?:text|mathrm|mbox|textbf|mathbf|operatorname)\{([^{}]*)\}", r" \1 "),
    (r"\\\{", "{"), (r"\\\}", "}"),
    (r"\\?%|\\?\$|[€£¥￥]", ""),
    (r"[−–]", "-"), (r"\*\*", "^"),
    (r"\\pi(?![a-zA-Z])|π", " pi "), (r"√", r"\\sqrt"), (r"\\infty(?![a-zA-Z])|∞", " infinity "),
)  # fmt: skip
_UNIT = re.compile(r"(?<=[\d)}])\s*(?!pi\b|infinity\b)[a-zA-Z][a-zA-Z]+(?:[ /][a-zA-Z]+)*(?:\^?\d)?\s*$")


def plain_latex(text: str) -> str:
    """A formula in one of its spellings: without layout, units, currency and "x =", thousands joined."""
    text = text.strip().strip("*`_ ").strip("$").strip()
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    text = re.sub(r"^\s*[a-zA-Z]\s*(?:=|\\in)\s*", "", text)
    text = _UNIT.sub("", text.strip().rstrip(".,;。"))
    if re.fullmatch(r"\s*-?\d{1,3}(,\d{3})+(\.\d+)?\s*", text):
        text = text.replace(",", "")
    if not re.search(r"[\d\\^+*/=()]", text):
        return " ".join(text.split()).lower()  # a word, such as yes or Tuesday
    return re.sub(r"\s+", " ", text).strip()


# --- formulas ---------------------------------------------------------------------------------------------------


class NotAFormula(Exception):
    """The text is no formula that this parser knows."""


@dataclass(frozen=True)
class Node:
    """A formula: a number, a name, or an operation on others."""

    operation: str
    operands: tuple[Node, ...] = ()
    number: Fraction = Fraction(0)

    def names(self) -> set[str]:
        """The variables in it."""
        own = {self.operation} if not self.operands and self.operation not in ("number", "pi") else set()
        return own.union(*(operand.names() for operand in self.operands))

    def value(self, point: Mapping[str, Number]) -> Number:
        """Its value where the variables have those values. ArithmeticError where it has none."""
        if self.operation == "number":
            return self.number
        if self.operation == "pi":
            return math.pi
        if not self.operands:
            return point[self.operation]
        values = [operand.value(point) for operand in self.operands]
        return _OPERATIONS[self.operation](*values)


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) > 64 or max(abs(base.numerator), base.denominator).bit_length() > 256:
            raise ArithmeticError("too large")
        return base ** int(exponent)
    if base < 0:
        raise ArithmeticError("not real")
    return float(base) ** float(exponent)


def _root(radicand: Number, degree: Number) -> Number:
    if radicand < 0 or degree <= 0:
        raise ArithmeticError("not real")
    root = float(radicand) ** (1 / float(degree))
    exact = Fraction(round(root)) if math.isfinite(root) else None
    is_exact = exact is not None and isinstance(radicand, Fraction) and degree == int(degree) <= 8
    return exact if exact is not None and is_exact and exact ** int(degree) == radicand else root


_OPERATIONS: dict[str, Callable[..., Number]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": _power,
    "root": _root,
    "negative": lambda a: -a,
}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<name>\\[a-zA-Z]+|pi\b|[a-zA-Z])|(?P<sign>[-+*/^(){}\[\]]))"
)


def parse(text: str) -> Node:
    """A formula of numbers, one-letter variables, π, ``+ - * / ^``, brackets, ``\\frac``, ``\\sqrt``.

    Raises:
        NotAFormula: it is something else.
    """
    if len(text) > _MOST_CHARACTERS:
        raise NotAFormula
    tokens: list[str] = []
    position = 0
    while position < len(text.rstrip()):
        found = _TOKEN.match(text, position)
        if not found:
            raise NotAFormula
        tokens.append(found.group().strip())
        position = found.end()
    parser = _Parser(tokens)
    node = parser.sum()
    if parser.tokens:
        raise NotAFormula
    return node


class _Parser:
    """Recursive descent over the tokens, the next one last."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens[::-1]

    def next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, expected: str | None = None) -> str:
        if not self.tokens or (expected is not None and self.tokens[-1] != expected):
            raise NotAFormula
        return self.tokens.pop()

    def sum(self) -> Node:
        node = self.product()
        while self.next() in ("+", "-"):
            node = Node(self.take(), (node, self.product()))
        return node

    def product(self) -> Node:
        if self.next() in ("-", "+"):
            sign = self.take()
            node = self.product()
            return Node("negative", (node,)) if sign == "-" else node
        node = self.power()
        while self.next() and self.next() not in ("+", "-", ")", "}", "]"):
            sign = self.take() if self.next() in ("*", "/") else "*"  # nothing between two factors multiplies
            node = Node(sign, (node, self.signed_power()))
        return node

    def signed_power(self) -> Node:
        if self.next() == "-":
            self.take()
            return Node("negative", (self.power(),))
        return self.power()

    def power(self) -> Node:
        base = self.atom()
        if self.next() == "^":
            self.take()
            return Node("^", (base, self.argument()))
        return base

    def argument(self) -> Node:
        """What follows ``^``, ``\\frac`` or ``\\sqrt``: a group, or one token (one digit of a number)."""
        if self.next() == "{":
            return self.group("{", "}")
        if self.next() == "-":
            self.take()
            return Node("negative", (self.argument(),))
        return self.atom()

    def digit(self) -> Node:
        """As :meth:`argument`, but ``\\frac12`` is one half."""
        if self.next().isdigit() and len(self.next()) > 1:
            digits = self.take()
            self.tokens.append(digits[1:])
            return Node("number", number=Fraction(digits[0]))
        return self.argument()

    def group(self, opening: str, closing: str) -> Node:
        self.take(opening)
        node = self.sum()
        self.take(closing)
        return node

    def atom(self) -> Node:
        token = self.next()
        for opening, closing in ("()", "{}", "[]"):
            if token == opening:
                return self.group(opening, closing)
        token = self.take()
        if token == "\\frac":
            return Node("/", (self.digit(), self.digit()))
        if token == "\\sqrt":
            degree = self.group("[", "]") if self.next() == "[" else Node("number", number=Fraction(2))
            return Node("root", (self.digit(), degree))
        if token == "pi" or (len(token) == 1 and token.isalpha()):
            return Node(token)
        if token[0].isdigit() or token[0] == ".":
            return Node("number", number=Fraction(token))
        raise NotAFormula
