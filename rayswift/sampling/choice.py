"""Which answers are kept: the best by their scores, each beside the worst."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rayswift.arguments import SampleArguments
    from rayswift.journal import Journal
    from rayswift.sampling.prompts import Prompt

Row = dict[str, Any]

#: How much more than the process reward the outcome counts (SWIFT's).
ORM_WEIGHT = 10


@dataclass(frozen=True)
class SelectionRules:
    """What is kept. ``orm``, ``prm``: whether answers have such scores; the others are the flags of their names."""

    orm: bool
    prm: bool
    n_best_to_keep: int = 5
    prm_threshold: float = 0.0
    easy_query_threshold: float | None = None

    @classmethod
    def of(cls, args: SampleArguments) -> SelectionRules:
        """The rules that the flags describe."""
        return cls(args.orm_model is not None, args.prm_model is not None, args.n_best_to_keep, args.prm_threshold,
                   args.easy_query_threshold)  # fmt: skip


@dataclass
class SampleStats:
    """What came of a run."""

    prompts: int = 0
    answers: int = 0
    right: int = 0
    undecided: int = 0
    prompts_with_a_right_answer: int = 0
    too_easy: int = 0
    none_good: int = 0
    rows: int = 0
    pairs: int = 0
    scored: bool = False

    def to_dict(self) -> Row:
        """As JSON-able values."""
        return {name: value for name, value in asdict(self).items() if name != "scored"}

    def describe(self) -> str:
        """One line for people."""
        text = f"{self.prompts} prompts, {self.answers} answers"
        if self.scored:
            share = 100 * self.right / self.answers if self.answers else 0.0
            unknown = f", {self.undecided} undecided" if self.undecided else ""
            text += f", {self.right} of them right ({share:.1f} %){unknown}; "
            text += (f"{self.prompts_with_a_right_answer} prompts have a right answer, {self.too_easy} were too easy, "
                     f"{self.none_good} have nothing to keep")  # fmt: skip
        return f"{text}; {self.rows} rows, {self.pairs} with a rejected answer"


class AnswersByPrompt(Protocol):
    """The answers to each prompt."""

    def __getitem__(self, index: int) -> list[str]: ...


def chosen_rows(
    rules: SelectionRules, prompts: Sequence[Prompt], candidates: AnswersByPrompt, scores: Journal, counts: SampleStats
) -> Iterator[Row]:
    """The rows of the result file, in the order of the prompts; ``counts`` is filled meanwhile."""
    for index, prompt in enumerate(prompts):
        texts = candidates[index]
        counts.answers += len(texts)
        if rules.orm or rules.prm:
            counts.scored = True
            found = scores.get(index) or {}
            kept = choose(rules, texts, prompt.reference, found.get("orm"), found.get("prm"), counts)
        else:
            kept = [(text, None) for text in texts]
        for text, rejected in kept:
            counts.rows += 1
            counts.pairs += rejected is not None
            yield (
                prompt.answered(text)
                | ({} if rejected is None else {"rejected_response": rejected})
                | {"id": prompt.id}
            )


def choose(
    rules: SelectionRules,
    texts: Sequence[str],
    reference: str | None,
    orm: Sequence[float | None] | None,
    prm: Sequence[float | None] | None,
    counts: SampleStats,
) -> list[tuple[str, str | None]]:
    """The answers to keep, best first, each with the worst answer (None where none is worse).

    SWIFT's rule: an answer's score is its process reward plus ten times its outcome reward, both scaled to 0…1 over
    the answers to the prompt, among which is the dataset's own (the last of ``orm`` and ``prm``). Kept are those of
    the ``n_best_to_keep`` best whose outcome reward is above 0 and whose process reward is above the threshold. Unlike
    there, a text is kept once, sampled answers go before the dataset's where they are as good, and an answer is not
    rejected for one that is no better. An answer that a reward cannot judge is neither kept nor rejected.
    """
    every = [*texts, *([] if reference is None else [reference])]
    given = [scores for scores in (orm, prm) if scores]
    judged = [i for i in range(len(every)) if all(scores[i] is not None for scores in given)]
    sampled = sum(i < len(texts) for i in judged)
    counts.undecided += len(texts) - sampled
    every = [every[i] for i in judged]
    orm, prm = ([scores[i] or 0.0 for i in judged] if scores else None for scores in (orm, prm))
    right = [score > 0 for score in orm] if orm else [True] * len(every)
    good = [is_right and (not prm or prm[i] > rules.prm_threshold) for i, is_right in enumerate(right)]
    if orm:
        counts.right += sum(right[:sampled])
        counts.prompts_with_a_right_answer += any(right[:sampled])
    limit = rules.easy_query_threshold
    if orm and limit is not None and sampled and sum(right[:sampled]) / sampled > limit:
        counts.too_easy += 1
        return []
    total = [o * ORM_WEIGHT + p for o, p in zip(scaled(orm, len(every)), scaled(prm, len(every)), strict=True)]
    order = sorted(range(len(every)), key=lambda i: -total[i])  # stable: earlier answers first where they are equal
    first_of = {text: i for i, text in reversed(list(enumerate(every)))}
    best = [i for i in order if first_of[every[i]] == i][: rules.n_best_to_keep]
    kept = [i for i in best if good[i]]
    counts.none_good += not kept
    worst = order[-1] if order else 0
    return [(every[i], every[worst] if total[worst] < total[i] else None) for i in kept]


def scaled(scores: Sequence[float] | None, count: int) -> list[float]:
    """Scores from 0 (the least) to 1; where all are the same, that value, at most 1. None counts as all 1."""
    if not scores:
        return [1.0] * count
    least, most = min(scores), max(scores)
    if least == most:
        return [min(1.0, least)] * count
    return [(score - least) / (most - least) for score in scores]
