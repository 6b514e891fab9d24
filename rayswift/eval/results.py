"""What came of one benchmark on one model: scores, and each question with its answer."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rayswift.files import write_whole

RESULT_FILE, ANSWERS_FILE = "result.json", "answers.jsonl"
#: Fields that have another name in the files.
_KEYS = {"model": "contender"}


def folder_name(label: str) -> str:
    """What names a model or a benchmark, as the name of a folder."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label)


@dataclass(frozen=True)
class Question:
    """One question and what became of it.

    ``key`` is the same for the same question in every run. ``answer``: the raw generation, or the choice with the
    highest likelihood. ``read``: what the scorer read from it. ``scores``: by metric.
    """

    key: str
    prompt: str
    answer: str
    read: str
    expected: str
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    """One benchmark on one model. ``main``: the metric that stands for it. ``shots``: examples in each prompt."""

    benchmark: str
    model: str
    backend: str
    main: str
    scores: dict[str, float]
    shots: int | None = None
    questions: list[Question] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The score that stands for the benchmark."""
        return self.scores.get(self.main, math.nan)

    @property
    def stderr(self) -> float | None:
        """Standard error of the main score over the questions; None where it is no mean of theirs."""
        values = [q.scores[self.main] for q in self.questions if self.main in q.scores]
        if len(values) < 2 or not math.isclose(statistics.fmean(values), self.score, abs_tol=1e-3):
            return None
        return statistics.stdev(values) / math.sqrt(len(values))

    def summary(self) -> dict[str, Any]:
        """Without the questions, as JSON-able values."""
        values = {_KEYS.get(key, key): value for key, value in asdict(self).items() if key != "questions"}
        return {**values, "num_questions": len(self.questions), "stderr": self.stderr}

    def save(self, folder: Path) -> None:
        """Write answers and result; the result last, by rename: with it the benchmark counts as done."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ANSWERS_FILE).open("w", encoding="utf-8") as file:
            for question in self.questions:
                file.write(json.dumps(asdict(question), ensure_ascii=False) + "\n")
        write_json(folder / RESULT_FILE, self.summary())


def load_result(folder: Path) -> Result | None:
    """A result that an earlier start has finished; None where there is none."""
    if not (folder / RESULT_FILE).is_file():
        return None
    saved = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    with (folder / ANSWERS_FILE).open(encoding="utf-8") as file:
        questions = [Question(**json.loads(line)) for line in file]
    names = ("benchmark", "model", "backend", "main", "scores", "shots")
    return Result(**{name: saved[_KEYS.get(name, name)] for name in names}, questions=questions)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write whole or not at all."""
    write_whole(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
