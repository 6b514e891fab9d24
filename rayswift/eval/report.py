"""Results for people: a table in the terminal, and a page with every question's answer."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rayswift.eval.results import Question, Result

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


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.5rem}h2{margin-top:2.5rem;font-size:1.2rem}
table{border-collapse:collapse;width:100%}th,td{border-bottom:1px solid #d8dee4;padding:.4rem .6rem;text-align:left;
vertical-align:top}th{background:#f6f8fa}td.number{text-align:right;font-variant-numeric:tabular-nums}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0;font:13px/1.4 ui-monospace,monospace}
summary{cursor:pointer;overflow-wrap:anywhere}.right{background:#e6f6e6}.wrong{background:#fdeaea}
.note{color:#57606a}body:has(#differ:checked) tr.same,body:has(#wrong:checked) tr.allright{display:none}
@media (prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}th{background:#161b22}
th,td{border-color:#30363d}.right{background:#12301a}.wrong{background:#3b1618}.note{color:#8b949e}}
"""


def page(results: Sequence[Result], title: str) -> str:
    """The report as one HTML file without scripts."""
    models = list(dict.fromkeys(result.model for result in results))
    sections = "".join(
        _section(f"b{number}", name, group) for number, (name, group) in enumerate(by_benchmark(results).items())
    )
    filters = (
        '<p><label><input type="checkbox" id="wrong"> only questions that somebody got wrong</label> &nbsp; '
        '<label><input type="checkbox" id="differ"> only where they differ</label></p>'
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width='
        f'device-width"><title>{_e(title)}</title><style>{_STYLE}</style></head><body><h1>{_e(title)}</h1>'
        f"{_summary(results, models)}{filters}{sections}</body></html>\n"
    )


def _summary(results: Sequence[Result], models: list[str]) -> str:
    head = "".join(f"<th>{_e(name)}</th>" for name in ("benchmark", "questions", "examples", "metric", *models))
    body = ""
    for number, (benchmark, group) in enumerate(by_benchmark(results).items()):
        found, first = {result.model: result for result in group}, group[0]
        cells = "".join(f'<td class="number">{_e(_score(found.get(name), first))}</td>' for name in models)
        shots = "–" if first.shots is None else first.shots
        body += (
            f'<tr><td><a href="#b{number}">{_e(benchmark)}</a></td><td class="number">{len(first.questions)}</td>'
            f'<td class="number">{shots}</td><td>{_e(first.main)}</td>{cells}</tr>'
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _section(anchor: str, benchmark: str, group: list[Result]) -> str:
    """One benchmark: the other scores, then a row per question with each model's answer."""
    answers = [{question.key: question for question in result.questions} for result in group]
    keys = list(dict.fromkeys(question.key for result in group for question in result.questions))
    others = "".join(
        f"<li>{_e(result.model)}: {_e(', '.join(f'{n} {v:.4f}' for n, v in result.scores.items()))}</li>"
        for result in group
    )
    rows = "".join(
        _row(number, [found.get(key) for found in answers], group) for number, key in enumerate(keys[:MAX_SHOWN], 1)
    )
    cut = f'<p class="note">The first {MAX_SHOWN} of {len(keys)} questions.</p>' if len(keys) > MAX_SHOWN else ""
    head = "".join(f"<th>{_e(result.model)}</th>" for result in group)
    return (
        f'<h2 id="{anchor}">{_e(benchmark)}</h2><ul>{others}</ul>{cut}<table><thead><tr><th>#</th>'
        f"<th>question</th><th>expected</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _row(number: int, questions: list[Question | None], group: list[Result]) -> str:
    shown = next(question for question in questions if question is not None)
    values = [q.scores.get(r.main) if q is not None else None for q, r in zip(questions, group, strict=True)]
    kinds = [name for name, holds in (("same", len(set(values)) == 1), ("allright", set(values) == {1.0})) if holds]
    cells = "".join(_cell(question, value) for question, value in zip(questions, values, strict=True))
    return (
        f'<tr class="{" ".join(kinds)}"><td class="number">{number}</td><td>{_folded(shown.prompt)}</td>'
        f"<td>{_e(shown.expected)}</td>{cells}</tr>"
    )


def _cell(question: Question | None, value: float | None) -> str:
    if question is None:
        return "<td>–</td>"
    kind = {1.0: "right", 0.0: "wrong"}.get(value if value is not None else math.nan, "")
    score = "" if value is None or kind else f" ({value:.3f})"
    read = f"<strong>{_e(question.read)}</strong>{score}" if question.read else f"<strong>{score}</strong>"
    return f'<td class="{kind}">{read}{_folded(question.answer)}</td>'


def _folded(text: str) -> str:
    """A text behind its first line."""
    first = text.strip().split("\n", 1)[0][:120] or "(empty)"
    if first == text.strip():
        return f"<div>{_e(first)}</div>"
    return f"<details><summary>{_e(first)}</summary><pre>{_e(text)}</pre></details>"


def _e(text: object) -> str:
    return html.escape(str(text))


def write_page(path: Path, results: Sequence[Result], title: str) -> None:
    """Write the page."""
    path.write_text(page(results, title), encoding="utf-8")
