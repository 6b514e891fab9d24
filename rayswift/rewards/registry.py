"""The names of rewards, and one way to call them all.

SWIFT has two manners of calling a reward: sampling gives ``infer_requests`` and ``ground_truths``, GRPO gives
``completions`` and the dataset's columns. A reward here gets those of both that it has parameters for.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayswift.errors import UserError

RewardFunction = Callable[..., Sequence[Any]]


class ORM:
    """Base of outcome rewards, as in SWIFT: called with lists, returns a number for each answer, above 0 if right; None
    for one that it cannot judge."""

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        self.args = args

    def __call__(self, **kwargs: Any) -> list[float]:
        raise NotImplementedError


class PRM(ORM):
    """Base of process rewards: a number for each answer, or a list of one per step, of which the least counts."""


#: Names of ``--orm_model``: a class without required arguments, an object or a function.
orms: dict[str, Any] = {}
#: Names of ``--prm_model``.
prms: dict[str, Any] = {}


class InferRequest(dict[str, Any]):
    """A row whose last message is the answer to score; ``r.messages`` is ``r["messages"]``, as plugins of SWIFT say."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Reward:
    """A reward by name. ``flag``: what named it, for messages."""

    flag: str
    name: str
    function: RewardFunction

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the dataset's answer."""
        return bool({"ground_truths", "solution"} & set(inspect.signature(self.function).parameters))

    def scores(self, requests: Sequence[InferRequest], references: Sequence[str | None]) -> list[float | None]:
        """One number for each request; None where the reward cannot tell.

        Raises:
            UserError: the function failed, or gave something else than one number for each.
        """
        available = {
            "infer_requests": list(requests),
            "request_config": None,
            "ground_truths": list(references),
            "solution": [
                request.get("solution") or reference for request, reference in zip(requests, references, strict=True)
            ],
            "completions": [request["messages"][-1]["content"] for request in requests],
        }
        for column in requests[0] if requests else ():
            available.setdefault(column, [request.get(column) for request in requests])
        try:
            parameters = inspect.signature(self.function).parameters
            if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):  # else it takes them all
                available = {name: available[name] for name in parameters if name in available}
            found = self.function(**available)
        except UserError:
            raise
        except Exception as error:  # whatever a user's function raises
            raise UserError(f"{self.flag} {self.name}: {type(error).__name__}: {error} ({last_place(error)})") from None
        try:
            scores = [
                one if one is None else float(min(one) if isinstance(one, (list, tuple)) else one) for one in found
            ]
        except (TypeError, ValueError):
            raise UserError(f"{self.flag} {self.name}: returned {found!r:.80}, expected a list of numbers") from None
        if len(scores) != len(requests):
            raise UserError(f"{self.flag} {self.name}: returned {len(scores)} numbers for {len(requests)} answers")
        if not all(score is None or math.isfinite(score) for score in scores):
            raise UserError(f"{self.flag} {self.name}: returned a number that is not finite")
        return scores


def make_reward(flag: str, name: str, known: Mapping[str, Any]) -> Reward:
    """The reward of that name, ready to be called.

    Raises:
        UserError: making it failed.
    """
    made = known[name]
    if inspect.isclass(made):
        try:
            made = made()
        except Exception as error:
            raise UserError(f"{flag} {name}: {type(error).__name__}: {error} ({last_place(error)})") from None
    return Reward(flag, name, made)


def last_place(error: BaseException) -> str:
    """``file:line`` where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
