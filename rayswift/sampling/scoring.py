"""Scores of answers: by a rule of ``rayswift.rewards`` or a plugin, by a judge, or by a reward model."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayswift.errors import UserError
from rayswift.inference.run import progress_bar
from rayswift.rewards import InferRequest, Reward, make_reward, orms, prms
from rayswift.sampling.judge import JUDGES, Judge
from rayswift.sampling.reward_model import RewardModel
from rayswift.sampling.tasks import Scorer, Task

if TYPE_CHECKING:
    from rayswift.arguments import SampleArguments
    from rayswift.journal import Journal
    from rayswift.sampling.choice import AnswersByPrompt
    from rayswift.sampling.prompts import Prompt

logger = logging.getLogger("rayswift.sampling")


@dataclass
class RuleScorer:
    """A reward that is a function in this process."""

    reward: Reward

    @property
    def needs_reference(self) -> bool:
        return self.reward.needs_reference

    def sources(self) -> dict[str, str]:
        return {}

    def score(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Sequence[float | None]]]:
        """One call for each task."""
        for task in tasks:
            yield task.index, self.reward.scores(task.requests, [task.reference] * len(task.requests))


def make_scorers(args: SampleArguments) -> dict[str, Scorer]:
    """``orm`` and ``prm``, those that are asked for. Nothing is loaded yet.

    Raises:
        UserError: no reward and no model has that name.
    """
    found: dict[str, Scorer] = {}
    for kind, name, known in (("orm", args.orm_model, orms), ("prm", args.prm_model, prms)):
        if name is not None:
            found[kind] = make_scorer(args, kind, name, known)
    return found


def make_scorer(args: SampleArguments, kind: str, name: str, known: dict) -> Scorer:
    """The scorer of one flag: a registered name, a judge (process rewards only), or a model's folder or id."""
    flag = f"--{kind}_model"
    if name in known:
        return RuleScorer(make_reward(flag, name, known))
    if kind == "prm" and name in JUDGES:
        return Judge.of(args, name)
    if os.path.isdir(name) or "/" in name:
        return RewardModel(args, flag, name)
    names = [*known, *(JUDGES if kind == "prm" else ())]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names) or 'none'}"
    raise UserError(f"{flag} {name}: no reward of that name and no model there; {hint} (--external_plugins adds names)")


def check_references(scorers: dict[str, Scorer], prompts: Sequence[Prompt]) -> None:
    """Rewards that compare need something to compare with.

    Raises:
        UserError: a prompt has no reference; names file:line.
    """
    for kind, scorer in scorers.items():
        for prompt in prompts if scorer.needs_reference else ():
            if prompt.reference is None and not prompt.row.get("solution"):
                raise UserError(f"{prompt.where}: the row does not end with an answer, which --{kind}_model compares "
                                "with; add one as assistant message or column solution")  # fmt: skip


def score_prompts(
    scorers: dict[str, Scorer], prompts: Sequence[Prompt], candidates: AnswersByPrompt, scores: Journal
) -> None:
    """Score the answers to every prompt and keep the scores; those that an earlier start gave are kept."""
    if not scorers:
        return
    waiting: dict[int, dict[str, Sequence[float | None]]] = {}
    left = [index for index in range(len(prompts)) if index not in scores]
    with progress_bar(len(prompts), len(prompts) - len(left), hidden=False, name="score", unit="prompt") as bar:
        for kind, scorer in scorers.items():
            tasks = (make_task(index, prompts[index], candidates[index]) for index in left)
            for index, numbers in scorer.score(task for task in tasks if task.requests):
                found = waiting.setdefault(index, {})
                found[kind] = numbers
                if len(found) == len(scorers):
                    scores.add(index, waiting.pop(index))
                    bar.update(1)


def make_task(index: int, prompt: Prompt, texts: Sequence[str]) -> Task:
    """What is scored for a prompt: its answers, and the dataset's own behind them."""
    every = [*texts, *([] if prompt.reference is None else [prompt.reference])]
    return Task(index, [InferRequest(prompt.answered(text)) for text in every], prompt.reference)
