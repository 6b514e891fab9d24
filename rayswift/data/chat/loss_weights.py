"""`--loss_scale`: which parts of a conversation are trained, and how strongly.

A value is a base (`default`, `last_round` or `all`) and any number of rules after `+`; rules alone mean
`default+rules`. The base decides which turns are trained; a rule multiplies the weight of parts of a trained reply.
Unlike SWIFT, rules never look outside replies: the example call in a system text is no tool call.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass

from rayswift.errors import UserError

BASES = ("default", "last_round", "all")
_REACT = {
    "Action:": (2.0, 2.0),
    "Action Input:": (2.0, 2.0),
    "Thought:": (1.0, 1.0),
    "Final Answer:": (1.0, 1.0),
    "Observation:": (2.0, 0.0),
}
#: Rules by keyword: the weight of the keyword itself, and of the text from there to the next one (SWIFT's tables).
_KEYWORDS: dict[str, dict[str, tuple[float, float]]] = {
    "react": _REACT,
    "alpha_umi": {**_REACT, "Next:": (2.0, 2.0)},
    "qwen": {
        "✿FUNCTION✿:": (2.0, 2.0),
        "✿ARGS✿:": (2.0, 2.0),
        "✿RETURN✿:": (1.0, 1.0),
        "✿RESULT✿:": (2.0, 0.0),
    },
    "agentflan": {
        **dict.fromkeys(
            ("Name:", "Action:", "ACTION:", "Tool:", "Command", "Arguments:", "action input", "ACTION_INPUT:",
             "Action Input:"), (1.0, 3.0)),
        "Thought:": (1.0, 1.0),
        "Final Answer:": (1.0, 1.0),
        "Observation:": (2.0, 0.0),
    },
}  # fmt: skip
#: Rules by pattern: the weight of what it matches. `^` is the start of the reply.
_PATTERNS: dict[str, tuple[str, float]] = {
    "hermes": (r"<tool_call>.+?</tool_call>", 2.0),
    "ignore_empty_think": (r"^(?:<think>\s*)?</think>\s*", 0.0),
    "ignore_think_prefix": (r"^<think>\n?", 0.0),
}
#: Agent-FLAN asks for the parts of a call one by one: the whole reply to such a question has this weight.
_AGENTFLAN_QUESTIONS = (
    "What is the tool you want to use",
    "What are the required parameter names",
    "What is the value of",
)
_AGENTFLAN_ANSWER = 3.0
RULES = (*_PATTERNS, *_KEYWORDS)


@dataclass(frozen=True, slots=True)
class LossScale:
    """A parsed `--loss_scale`: `base` (one of :data:`BASES`) and `rules` (names out of :data:`RULES`)."""

    base: str = "default"
    rules: tuple[str, ...] = ()

    def split(self, reply: str, query: str) -> list[tuple[str, float]]:
        """Cut a reply into (text, weight) where its weight changes; `query` is the text it answers. The texts add up to
        the reply."""
        parts = [(reply, 1.0)]
        for rule in self.rules:
            parts = [cut for text, weight in parts for cut in _apply(rule, text, weight, query)]
        # A cut between equal weights would only part tokens from one another.
        runs = itertools.groupby(parts, key=lambda part: part[1])
        return [("".join(text for text, _ in run), weight) for weight, run in runs]


@functools.cache
def read_loss_scale(text: str) -> LossScale:
    """Read a value of `--loss_scale`.

    Raises:
        UserError: a name in it is unknown.
    """
    names = text.replace("last_round_with_ignore_empty_think", "last_round+ignore_empty_think").split("+")
    base, rules = (names[0], names[1:]) if names[0] in BASES else ("default", names)
    if not set(rules) <= set(RULES):
        bases, listed = ", ".join(BASES), ", ".join(RULES)
        raise UserError(f"--loss_scale {text}: choose one of {bases}; after + may follow {listed}")
    return LossScale(base, tuple(dict.fromkeys(rules)))


def _apply(rule: str, text: str, weight: float, query: str) -> list[tuple[str, float]]:
    if rule == "agentflan" and any(question in query for question in _AGENTFLAN_QUESTIONS):
        return [(text, weight * _AGENTFLAN_ANSWER)]
    cuts: list[tuple[str, float]] = []
    position, factor = 0, 1.0
    for found in _matcher(rule).finditer(text):
        cuts.append((text[position : found.start()], weight * factor))
        own, factor = (_PATTERNS[rule][1], 1.0) if rule in _PATTERNS else _KEYWORDS[rule][found.group()]
        cuts.append((found.group(), weight * own))
        position = found.end()
    cuts.append((text[position:], weight * factor))
    return [cut for cut in cuts if cut[0]]


@functools.cache
def _matcher(rule: str) -> re.Pattern[str]:
    if rule in _PATTERNS:
        return re.compile(_PATTERNS[rule][0], re.DOTALL)
    longest_first = sorted(_KEYWORDS[rule], key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))
