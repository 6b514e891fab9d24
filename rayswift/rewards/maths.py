"""Answers to maths questions: found in a text, and compared by value.

Formulas are compared by `math-verify`, as SWIFT and TRL do; nothing of a text is ever executed.
"""

from __future__ import annotations

import functools
import re
import threading
from fractions import Fraction
from typing import Any

#: A longer answer is a text, not a formula.
_MOST_CHARACTERS = 300
#: Seconds for one formula. Some cost SymPy for ever.
_TIMEOUT = 3
#: How many boxes are tried, from the last: a text can have thousands that never close.
_MOST_BOXES = 8
_NUMBER = re.compile(r"(?<![\w.])[-+−]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?", re.ASCII)
_HASHES = re.compile(r"####[ \t]*(?P<answer>[^\n]+)")
# No two neighbours of it may share out the same blanks: an answer of 40,000 spaces would take seconds.
_PHRASES = re.compile(
    r"(?:answer\s*(?:is|:|=)|答案[是为：:]|^#+[ \t]*answer[ \t]*$)[\s:：]*(?P<answer>[^\n]+)",
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
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        inner = text[start + len("<answer>") : end].strip()
        return last_boxed(inner) or inner
    if found := list(_HASHES.finditer(text)):
        inner = found[-1]["answer"].strip()
        return last_boxed(inner) or inner
    if (boxed := last_boxed(text)) is not None:
        return boxed
    if found := list(_PHRASES.finditer(text)):
        return found[-1]["answer"].strip().rstrip(".。").strip() or None
    return None


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
    try:
        return Fraction(re.sub(r"[$,\s]", "", text).replace("−", "-"))
    except (ValueError, ZeroDivisionError):
        return None


# --- comparing --------------------------------------------------------------------------------------------------

_UNIT = re.compile(r"(?<=[\d)}])\s*(?!pi\b)[a-zA-Z][a-zA-Z]+(?:[ /][a-zA-Z]+)*(?:\^?\d)?\s*$")


_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")  # not LaTeX's \sqrt, not a variable


def compare_answers(text: str, reference: str) -> bool | None:
    """Whether a text ends in the answer that a reference ends in; None where that cannot be told: one of them has no
    answer, or has it in words where the other has a number, or words stand around it. An empty text is wrong."""
    if not text.strip():
        return False
    said, right = final_answer(text), final_answer(reference)
    if said is None or right is None:
        return None
    if same_answer(said, right):
        return True
    said_in_words, right_in_words = map(_in_words, (said, right))
    if said_in_words != right_in_words:
        return None
    is_sentence = said_in_words and len(said.split()) > len(right.split())
    return None if is_sentence and marked_answer(text) is None else False


def _in_words(answer: str) -> bool:
    return not any(map(str.isdigit, answer)) and _WORD.search(answer) is not None


def same_answer(said: str, right: str) -> bool:
    """Whether two answers, as :func:`final_answer` finds them, say the same: ``2\\sqrt{3}`` is ``\\sqrt{12}``."""
    said, right = " ".join(said.split()), " ".join(right.split())
    if said == right or max(len(said), len(right)) > _MOST_CHARACTERS:
        return bool(said) and said == right
    if _NUMBER.fullmatch(said) and _NUMBER.fullmatch(right):  # most are, and SymPy takes a thousand times as long
        number = to_number(said)
        return number is not None and number == to_number(right)
    from math_verify import verify

    return verify(parsed(right), parsed(said), timeout_seconds=timeout())


@functools.lru_cache(maxsize=1024)
def parsed(answer: str) -> list[Any]:
    """What `math-verify` reads in an answer: SymPy's expression, and the text."""
    from math_verify import LatexExtractionConfig, parse

    # As LaTeX only: what it takes for a plain expression goes through SymPy's parser, which evaluates Python.
    return parse(f"${_UNIT.sub('', answer)}$", [LatexExtractionConfig()], parsing_timeout=timeout())


def timeout() -> int | None:
    """Seconds that `math-verify` may take; it keeps time with a signal, which only the main thread has."""
    return _TIMEOUT if threading.current_thread() is threading.main_thread() else None
