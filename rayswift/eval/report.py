"""Results for people: a table in the terminal, and a page with every question's answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from rayswift.eval.results import Result

#: A page with more questions than this shows the first ones; all of them are in answers.jsonl.
MAX_SHOWN = 5000


def by_benchmark(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results of each benchmark, in order."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.benchmark, []).append(result)
    return grouped


def table(results: Sequence[Result]) -> str:
    """One line per benchmark, one column per model; the difference to the first behind those after it."""
    models = list(dict.fromkeys(result.model for result in results))
    rows = [["benchmark", "questions", "examples", "metric", *models]]
    for benchmark, group in by_benchmark(results).items():
        found = {result.model: result for result in group}
        first = group[0]
        cells = [_score(found.get(name), first) for name in models]
        shots = "–" if first.shots is None else str(first.shots)
        rows.append([benchmark, str(len(first.questions) or "–"), shots, first.main, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _score(result: Result | None, first: Result) -> str:
    """``0.2534 ± 0.0127``, and against the first model ``(+0.0120)``."""
    if result is None or math.isnan(result.score):
        return "–"
    text = f"{result.score:.4f}"
    if result.stderr is not None:
        text += f" ± {result.stderr:.4f}"
    if result is not first and not math.isnan(first.score):
        text += f" ({result.score - first.score:+.4f})"
    return text


def page(results: Sequence[Result], title: str) -> str:
    """The report as one HTML file without scripts."""
    groups = by_benchmark(results)
    models = list(dict.fromkeys(result.model for result in results))
    cells, rows = {}, {}
    for benchmark, group in groups.items():
        found = {result.model: result for result in group}
        cells[benchmark] = [_score(found.get(name), group[0]) for name in models]
        answers = [{question.key: question for question in result.questions} for result in group]
        keys = dict.fromkeys(question.key for result in group for question in result.questions)
        rows[benchmark] = [[each.get(key) for each in answers] for key in keys]
    # The answers are anybody's text: nothing of them may become markup.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(title=title, models=models, groups=groups, cells=cells, rows=rows, most=MAX_SHOWN)
