"""Rows to measure with: a source's rows repeated to any number, each made distinct by a suffix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.environments import REPOSITORY

#: 40 question/answer rows that are part of the repository.
DEFAULT_SOURCE = REPOSITORY / "tests" / "data" / "gsm8k_40.jsonl"
#: (question, addition to it, answer) columns that a source may have.
_COLUMNS = (("question", "", "answer"), ("instruction", "input", "output"), ("query", "", "response"))


def read_source(path: Path) -> list[dict[str, str]]:
    """The rows of a ``.json`` array or a ``.jsonl`` file, only their text columns.

    Raises:
        SystemExit: the rows have none of the known column sets.
    """
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    columns = _columns_of(rows[0], path)
    return [{name: row[name] or "" for name in columns if name} for row in rows]


def _columns_of(row: dict[str, Any], path: Path) -> tuple[str, str, str]:
    for columns in _COLUMNS:
        if all(name in row for name in columns if name):
            return columns
    known = "; ".join(", ".join(filter(None, columns)) for columns in _COLUMNS)
    raise SystemExit(f"--source {path}: columns {', '.join(row)}; known are {known}")


def write_rows(source: Path, count: int, target: Path) -> Path:
    """Write ``count`` distinct rows: the source's, repeated, with their number after question and answer.

    Both get the number, because a tokenizer call over many rows may encode equal texts only once.
    """
    rows = read_source(source)
    question, _, answer = _columns_of(rows[0], source)
    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = dict(rows[number % len(rows)])
            row[question] += f" ({number})"
            row[answer] += f" ({number})"
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return target


def chatml_texts(path: Path) -> Iterator[str]:
    """Each row of a file of :func:`write_rows` as the ChatML text whose ids a training row consists of."""
    columns = None
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            columns = columns or _columns_of(row, path)
            question, addition, answer = columns
            query = "\n".join(filter(None, (row[question], row.get(addition))))
            yield f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n{row[answer]}<|im_end|>"
