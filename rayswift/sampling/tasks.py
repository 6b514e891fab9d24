"""What is scored, and what scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayswift.rewards import InferRequest


@dataclass(frozen=True)
class Task:
    """The answers to one prompt, each as a conversation; the last is the dataset's own where there is one."""

    index: int
    requests: list[InferRequest]
    reference: str | None


class Scorer(Protocol):
    """Gives every answer of a task a number."""

    @property
    def needs_reference(self) -> bool:
        """Whether prompts need the dataset's own answer."""

    def sources(self) -> dict[str, str]:
        """Marks of what lies behind the paths and endpoints that score (for `rayswift.journal`)."""

    def score(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Sequence[float | None]]]:
        """Numbers of tasks with the scores of their answers, in any order. UserError when scoring cannot go on."""
