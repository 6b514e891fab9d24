"""A preview in the terminal: plain text, with colours where they can be seen."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from rayswift.console import printable
from rayswift.data.preview.collect import DatasetPreview, ShownRow
from rayswift.data.preview.words import (
    length_bins,
    length_summary,
    outcome_line,
    report_rows,
    shorten,
    shorten_values,
    source_line,
)
from rayswift.data.tokens.row_index import DropReport
from rayswift.redaction import mask_known

_BOLD, _DIM, _TRAINED = "1", "2", "1;32"
_ROLE_COLOURS = {"system": "35", "user": "36", "assistant": "32", "tool": "33"}
#: Characters of one text that are printed, of one value in the JSON of a row, and lines of that JSON.
_TEXT, _VALUE, _JSON_LINES = 1500, 300, 40
_BAR = 40


@dataclass(frozen=True)
class _Paint:
    """Colours, or none."""

    on: bool

    def __call__(self, code: str, text: str) -> str:
        if not self.on or not text:
            return text
        return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))

    def trained(self, text: str) -> str:
        """Text of trained tokens: coloured, or between marks."""
        return self(_TRAINED, text) if self.on else f"▮{text}▮"


def print_preview(shown: DatasetPreview, stream: TextIO) -> None:
    """Print one dataset's preview. Colours are used on a terminal, unless ``NO_COLOR`` is set."""
    paint = _Paint(stream.isatty() and not os.environ.get("NO_COLOR"))
    text = mask_known("\n".join(_lines(shown, paint))) + "\n\n"
    # A terminal that cannot show a character shows its number.
    stream.write(text.encode(stream.encoding or "utf-8", "backslashreplace").decode(stream.encoding or "utf-8"))


def _lines(shown: DatasetPreview, paint: _Paint) -> Iterator[str]:
    yield paint(_BOLD, f"Dataset {printable(shown.name)}")
    yield f"  {source_line(shown)}"
    for path, _ in shown.files[:5]:
        yield paint(_DIM, f"  {printable(path)}")
    if len(shown.files) > 5:
        yield paint(_DIM, f"  … {len(shown.files) - 5:,} more files")
    for number, row in enumerate(shown.shown, start=1):
        yield ""
        yield paint(_BOLD, f"── row {number} of {len(shown.shown)} shown, {printable(row.place)}")
        yield from _row_lines(row, paint)
    yield ""
    if shown.encoder is None:
        yield "No tokens yet: --model NAME adds token ids, what is trained, and lengths."
    else:
        lengths, limit = shown.lengths, shown.encoder.max_length
        yield paint(_BOLD, "Token lengths") + f"  {length_summary(lengths, limit)}"
        bins = length_bins(lengths)
        most = max(count for _, _, count in bins)
        width = len(f"{bins[-1][1]:,}")
        for low, high, count in bins:
            bar = "█" * -(-count * _BAR // most)
            over = "  > --max_length" if limit is not None and low > limit and count else ""
            yield f"  {low:>{width},} – {high:>{width},}  {bar:<{_BAR}} {count:,}{over}"
    yield ""
    yield paint(_BOLD, "Rows") + f"  {outcome_line(shown)}"
    yield from _report_lines("dropped", shown.drops)
    yield from _report_lines("noticed", shown.warnings)


def _row_lines(row: ShownRow, paint: _Paint) -> Iterator[str]:
    yield paint(_DIM, "raw row")
    yield _indent(_json(row.raw))
    yield paint(_DIM, "standard row")
    for message in row.standard["messages"]:
        role = str(message["role"])
        label = paint(_ROLE_COLOURS.get(role, _BOLD), printable(role))
        others = {key: value for key, value in message.items() if key not in ("role", "content")}
        yield f"  {label}{f'  {_json(others, indent=None)}' if others else ''}"
        yield _indent(printable(shorten(str(message["content"]), _TEXT)), 4)
    for name, value in row.standard.items():
        if name != "messages":
            yield _indent(f"{printable(name)}: {_json(value)}")
    for number, sample in enumerate(row.samples, start=1):
        which = (
            f" ({sample.side})" if sample.side else f" {number} of {len(row.samples)}" if len(row.samples) > 1 else ""
        )
        yield paint(_DIM, f"encoded sample{which}: {sample.num_ids:,} ids, {sample.num_trained:,} trained")
        parts = []  # the trained ones marked; a weight other than 1 is said
        for weight, run in itertools.groupby(sample.texts, key=lambda text: text.weight):
            text = printable(shorten("".join(token.text for token in run), _TEXT))
            parts.append(text if not weight else paint.trained(text) + ("" if weight == 1 else f"[× {weight:g}]"))
        if sample.num_hidden:
            parts.append(f" … {sample.num_hidden:,} more ids")
        yield _indent("".join(parts))


def _report_lines(verb: str, report: DropReport) -> Iterator[str]:
    for count, reason, place in report_rows(report):
        yield f"  {verb} {count:,}: {printable(reason)} (first at {printable(place)})"


def _json(value: Any, indent: int | None = 2) -> str:
    text = json.dumps(shorten_values(value, _VALUE), ensure_ascii=False, indent=indent, default=str)
    lines = printable(text).split("\n")
    more = [f"… {len(lines) - _JSON_LINES:,} more lines"] if len(lines) > _JSON_LINES else []
    return "\n".join(lines[:_JSON_LINES] + more)


def _indent(text: str, by: int = 2) -> str:
    return "\n".join(" " * by + line for line in text.split("\n"))
