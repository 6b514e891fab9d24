"""Question sets of one's own: ``general_mcq`` (choices A to J) and ``general_qa`` (free answers), in csv, jsonl, ….

The rows are EvalScope's (https://evalscope.readthedocs.io, "custom dataset"): ``question, A, B, …, answer`` and
``question`` (or ``query``, or ``messages``), ``answer`` (or ``response``), optionally ``system``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayswift.data.files import iter_raw_rows
from rayswift.eval.benchmarks import Benchmark
from rayswift.eval.local_data import _SUFFIX, LocalData, Row, RowCheck, lay_out

LETTERS = "ABCDEFGHIJ"
#: What a question would be answered without.
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
_ASKED = {"question", "query", "messages", "answer", "response", *LETTERS}
#: Split that is evaluated, and split of the examples, of each kind (EvalScope's).
SPLITS = {"general_mcq": ("val", "dev"), "general_qa": ("test", "dev")}


def lay_out_questions(benchmark: Benchmark) -> tuple[LocalData, list[str]]:
    """The data of a question set and its subsets: one file is one subset, ``default``; each file of a folder is one.

    Raises:
        UserError: no file, or a row (named by file and line) that cannot be used.
    """
    split, examples = SPLITS[benchmark.name]
    multiple = bool(benchmark.settings.get("extra_params", {}).get("multiple_correct"))
    check: RowCheck = (lambda row: choice_row(row, multiple)) if benchmark.name == "general_mcq" else answer_row

    def text_only(row: Row) -> Row:
        if column := next((column for column in MEDIA_COLUMNS if row.get(column)), None):
            raise ValueError(f"it has {column}, and {benchmark.name} asks in text alone; leave out such rows")
        return check(row)

    subsets = list(benchmark.settings.get("subset_list") or subsets_of(str(benchmark.local_path), split, examples))
    return lay_out(replace(benchmark, file_names=tuple(subsets)), subsets, split, [examples], text_only), subsets


def subsets_of(path: str, split: str, examples: str) -> list[str]:
    """The subsets of a file or folder: ``maths_val.csv`` and ``maths.csv`` are both ``maths``."""
    if not Path(path).is_dir():
        return ["default"]
    stems = [_SUFFIX.sub("", file.name) for file in sorted(Path(path).iterdir()) if _SUFFIX.search(file.name.lower())]
    stems = [stem for stem in stems if not stem.endswith(f"_{examples}")]
    return list(dict.fromkeys(stem.removesuffix(f"_{split}") for stem in stems)) or ["default"]


def is_chinese(folder: str) -> bool:
    """Whether the questions laid out in a folder are in Chinese: by the first hundred, in which a Chinese character
    counts as much as three letters."""
    files = [str(file) for file in sorted(Path(folder).rglob("*")) if _SUFFIX.search(file.name.lower())]
    rows = (row for row, *_ in itertools.islice(iter_raw_rows(files), 100))
    texts = [str(value) for row in rows if isinstance(row, dict) for name, value in row.items() if name in _ASKED]
    chinese = sum("\u4e00" <= letter <= "\u9fff" for text in texts for letter in text)
    letters = sum(letter.isascii() and letter.isalpha() for text in texts for letter in text)
    return 3 * chinese > letters


def choice_row(row: Row, multiple: bool = False) -> Row:
    """A row with choices, checked; beside EvalScope's columns the ``choices`` and the ``gold`` index for lm-eval."""
    if not _text(row.get("question")):
        raise ValueError("no question")
    cells = [_text(row.get(letter)) for letter in LETTERS]
    count = max((number for number, cell in enumerate(cells, 1) if cell), default=0)
    if "" in cells[:count]:
        raise ValueError(f"choice {LETTERS[cells.index('')]} is empty, but {LETTERS[count - 1]} is not")
    if count < 2:
        raise ValueError("expected at least the choices A and B")
    choices, letters, given = cells[:count], LETTERS[:count], row.get("answer")
    parts = given if isinstance(given, (list, tuple)) else [given]  # ``C``, ``A,C``, ``AC``, or a list of them
    answer = [letter for part in parts for letter in _text(part).upper().replace(",", "").replace(" ", "")]
    if not answer or any(letter not in letters for letter in answer):
        raise ValueError(f"answer is {given!r}, expected one of {', '.join(letters)}")
    if len(answer) > 1 and not multiple:
        raise ValueError(
            f"answer is {given!r}: several right answers need "
            '"extra_params": {"multiple_correct": true} in --eval_dataset_args'
        )
    kept = {key: value for key, value in row.items() if key not in LETTERS}
    kept |= dict(zip(letters, choices, strict=True))
    return {**kept, "answer": answer if multiple else answer[0], "choices": choices, "gold": letters.index(answer[0])}


def answer_row(row: Row) -> Row:
    """A row with a free answer, checked; ``question`` and ``answer`` are filled in for lm-eval."""
    answer = row.get("answer") or row.get("response")
    if not _text(answer):
        raise ValueError("no answer (or response) to compare with")
    messages = row.get("messages")
    if not messages:
        question = _text(row.get("question") or row.get("query"))
    elif not isinstance(messages, Sequence) or not all(isinstance(m, dict) and m.get("content") for m in messages):
        raise ValueError('messages: expected [{"role": "user", "content": "…"}, …]')
    elif len(messages) == 1:
        question = _text(messages[0]["content"])
    else:
        question = "\n".join(f"{message.get('role', 'user')}: {message['content']}" for message in messages)
    if not question:
        raise ValueError("no question (or query, or messages)")
    return {**row, "question": question, "answer": _text(answer)}


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
