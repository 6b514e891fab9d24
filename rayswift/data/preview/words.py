"""What both views of a preview say in the same words: numbers, sizes, texts cut short."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from rayswift.data.preview.collect import DatasetPreview
from rayswift.data.tokens.row_index import DropReport


def length_bins(lengths: np.ndarray, count: int = 12) -> list[tuple[int, int, int]]:
    """A histogram of whole numbers: at most ``count`` bins of equal width as (lowest, highest, how many)."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // count)
    edges = range(low, high + 1, width)
    numbers = np.bincount((lengths - low) // width, minlength=len(edges)).tolist()
    return [(edge, edge + width - 1, number) for edge, number in zip(edges, numbers, strict=True)]


def length_summary(lengths: np.ndarray, max_length: int | None) -> str:
    """``min 12, mean 80.5, p50 70, ... max 400; 2 longer than --max_length 300``."""
    percentiles = (f"p{p} {int(np.percentile(lengths, p, method='higher')):,}" for p in (50, 90, 95, 99))
    text = f"min {lengths.min():,}, mean {lengths.mean():,.1f}, {', '.join(percentiles)}, max {lengths.max():,}"
    if max_length is None:
        return f"{text}; no --max_length"
    return f"{text}; {int((lengths > max_length).sum()):,} longer than --max_length {max_length:,}"


def source_line(shown: DatasetPreview) -> str:
    """``2 files, 3.4 MB; the first 1,000 rows``."""
    files = f"{len(shown.files):,} file{'s' * (len(shown.files) != 1)}, {size_text(sum(s for _, s in shown.files))}"
    rows = shown.drops.rows_in
    read = f"{'all' if shown.whole else 'the first'} {rows:,} row{'s' * (rows != 1)} read"
    more = "" if shown.num_samples is None else f"; training draws {shown.num_samples:,} rows at random"
    return f"{files}; {read}{more}"


def outcome_line(shown: DatasetPreview) -> str:
    """Rows in, rows out."""
    text = f"{shown.drops.rows_in:,} rows in, {shown.standard_rows:,} standard rows"
    if shown.encoder is not None:
        share = shown.trained / max(shown.ids, 1)
        text += f", {shown.samples:,} samples out ({shown.ids:,} ids, {shown.trained:,} trained, {share:.0%})"
    return f"{text}; {sum(shown.drops.counts.values()):,} dropped"


def report_rows(report: DropReport) -> Iterable[tuple[int, str, str]]:
    """Count, reason and first place, most frequent first."""
    return ((count, reason, report.place(reason)) for reason, count in report.counts.most_common())


def size_text(size: float) -> str:
    """Bytes in words, ``3.4 MB``."""
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def shorten(text: str, limit: int) -> str:
    """The beginning and the end of a long text, with what is left out counted between them."""
    if len(text) <= limit:
        return text
    head = limit * 3 // 4
    return f"{text[:head]} … {len(text) - limit:,} characters … {text[head - limit :]}"


def shorten_values(value: Any, limit: int, items: int = 20) -> Any:
    """A JSON value with its long texts, lists and bytes cut short."""
    if isinstance(value, str):
        return shorten(value, limit)
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, dict):
        return {str(key): shorten_values(item, limit, items) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        cut = [shorten_values(item, limit, items) for item in value[:items]]
        return [*cut, f"… {len(value) - items:,} more"] if len(value) > items else cut
    return value
