"""Outcome rewards by rule: 1.0 for a right answer, 0.0 for a wrong one, None where the rule cannot tell."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from rayswift.rewards.maths import compare_answers, final_number

# Each of them looks at a text once: a longer pattern tries every end of one part with every end of the next.
_THOUGHT = "<think>"
_ANSWER_AFTER_THOUGHT = re.compile(r"</think>\s*<answer>")
_ACTION_AFTER_THOUGHT = re.compile(r"</think>\s*Action:")
_ACTION = re.compile(r"Action:(?P<name>[^\n]*)")
_INPUT = re.compile(r"Action Input:(?P<input>.*?)(?:Observation:|<\||\Z)", re.DOTALL)


def math(completions: Sequence[str], solution: Sequence[str | None], **_: Any) -> list[float | None]:
    """The answers are the same number, expression, tuple, set or word. SWIFT's ``math`` and ``accuracy``.

    The answer of a text is what it marks as such (``<answer>``, ``\\boxed``, ``####``, "the answer is"), else the last
    formula or number in it. One in words is not wrong beside a number: nobody knows (None).
    """
    pairs = zip(completions, solution, strict=True)
    verdicts = [compare_answers(said, right or "") for said, right in pairs]
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def gsm8k(completions: Sequence[str], solution: Sequence[str | None], **_: Any) -> list[float | None]:
    """The final numbers are the same: that of the dataset follows ``####``, that of an answer is marked or the last.
    None for a text without a number."""
    pairs = ((final_number(said), final_number(right or "")) for said, right in zip(completions, solution, strict=True))
    return [
        None if text.strip() and None in (said, right) else float(said is not None and said == right)
        for text, (said, right) in zip(completions, pairs, strict=True)
    ]


def format_reward(completions: Sequence[str], **_: Any) -> list[float]:
    """``<think>…</think><answer>…</answer>`` and nothing else. SWIFT's ``format``."""
    return [
        float(
            text.startswith(_THOUGHT)
            and text.endswith("</answer>")
            and _ANSWER_AFTER_THOUGHT.search(text, len(_THOUGHT), len(text) - len("</answer>")) is not None
        )
        for text in map(str.strip, completions)
    ]


def react_format(completions: Sequence[str], **_: Any) -> list[float]:
    """``<think>…</think>`` and then an action with its input. SWIFT's ``react_format``."""
    verdicts = []
    for text in map(str.strip, completions):
        action = _ACTION_AFTER_THOUGHT.search(text, len(_THOUGHT)) if text.startswith(_THOUGHT) else None
        verdicts.append(float(action is not None and "Action Input:" in text[action.end() :]))
    return verdicts


def toolbench(completions: Sequence[str], solution: Sequence[str | None], **_: Any) -> list[float]:
    """The same action with the same input (compared as JSON where both are). SWIFT's ``toolbench``."""
    return [
        float(read_action(said) == read_action(right or "")) for said, right in zip(completions, solution, strict=True)
    ]


def read_action(text: str) -> tuple[str, Any]:
    """The last ``Action:`` of a ReAct text and its ``Action Input:``."""
    actions, inputs = list(_ACTION.finditer(text)), list(_INPUT.finditer(text))
    given = inputs[-1]["input"].strip() if inputs else "{}"
    with contextlib.suppress(ValueError):
        given = json.loads(given)
    return (actions[-1]["name"].strip(" \t") if actions else "none"), given


NAMES = {
    "math": math,
    "accuracy": math,
    "gsm8k": gsm8k,
    "format": format_reward,
    "react_format": react_format,
    "toolbench": toolbench,
}
