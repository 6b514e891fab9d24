"""A preview as one HTML page that needs nothing else: no script, no network, pictures and styles inside.

A dataset's text is not trusted: everything is escaped, and the page's own Content-Security-Policy forbids scripts,
requests and styles that are not this module's. Pictures come from local files with an image's first bytes only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from rayswift.data.preview.collect import DatasetPreview, Sample, ShownRow
from rayswift.data.preview.words import (
    length_bins,
    length_summary,
    outcome_line,
    report_rows,
    shorten,
    shorten_values,
    size_text,
    source_line,
)
from rayswift.data.rows.standard import MEDIA
from rayswift.data.tokens.row_index import DropReport

#: Characters of one text of a row that are shown.
_TEXT = 8000
#: Bytes of one picture, and of all pictures of a page: mail programs and phones still open the page.
MAX_PICTURE_BYTES = 2_000_000
MAX_PAGE_PICTURE_BYTES = 20_000_000
_IMAGE_STARTS = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}
_DATA_URI = re.compile(r"data:image/(?:png|jpeg|gif|webp|bmp);base64,[A-Za-z0-9+/=]+")
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --dim: #666b73; --line: #d8dbe0; --card: #f6f7f9;
  --trained: #b7ecc3; --trained2: #9fe2af; --context: #e9ebef; --context2: #f6f7f9; --bar: #2d7dd2; --over: #d1495b; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14161a; --text: #e4e6ea; --dim: #9aa0aa; --line: #343942; --card: #1c2026;
    --trained: #1f5c33; --trained2: #17492a; --context: #2a2f38; --context2: #1c2026; --bar: #5aa2ee; --over: #ef6f80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; } h4 { margin: 1rem 0 .3rem; } h5 { margin: .5rem 0 .2rem; }
p, ul { margin: .3rem 0; } header p, ul, figcaption, .named { color: var(--dim); font-size: .9rem; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 0 1rem 1rem; margin: 1rem 0; }
section { border-left: 4px solid var(--line); padding-left: .7rem; margin: .5rem 0; }
.system { border-color: #9b59b6; } .user { border-color: #2d7dd2; } .assistant { border-color: #2e9e53; }
.tool { border-color: #c98a1b; }
pre { margin: 0; white-space: pre-wrap; font: .9rem/1.55 ui-monospace, Menlo, Consolas, monospace; }
details pre, .tokens { background: var(--card); padding: .6rem; border-radius: 6px; }
summary { cursor: pointer; margin-top: .6rem; font-weight: 600; }
.t { background: var(--trained); font-weight: 600; } .t:nth-child(even) { background: var(--trained2); }
.c { background: var(--context); } .c:nth-child(even) { background: var(--context2); }
.media { display: flex; flex-wrap: wrap; gap: .6rem; } figure { margin: 0; max-width: 20rem; }
img { max-width: 100%; max-height: 20rem; border-radius: 6px; }
svg { width: 100%; max-width: 40rem; height: auto; } rect { fill: var(--bar); } rect.over { fill: var(--over); }
line { stroke: var(--over); stroke-width: 1.5; stroke-dasharray: 4 3; } text { fill: var(--dim); font-size: 11px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
th, td:first-child { white-space: nowrap; }
"""
_ROLES = ("system", "user", "assistant", "tool")


@dataclass
class _Pictures:
    """Turns the entries of an images column into pictures, as long as the page has room for them."""

    room: int = MAX_PAGE_PICTURE_BYTES

    def show(self, item: Any) -> str:
        """A picture (a list of them for the frames of a video), or its name and why it is not shown."""
        if isinstance(item, list):
            return "".join(map(self.show, item))
        path = item.get("path") if isinstance(item, Mapping) else item
        if not isinstance(path, str):
            return _named(shorten(str(path), 200), "no path")
        if path.startswith("data:"):
            name = f"inline picture, {size_text(len(path))}"
            if not _DATA_URI.fullmatch(path):
                return _named(name, "not a picture that browsers show")
            return self._place(path, name, len(path))
        # SWIFT: ROOT_IMAGE_DIR is the folder that relative paths start from.
        local = os.path.join(os.environ.get("ROOT_IMAGE_DIR", ""), path.removeprefix("file://"))
        if "://" in local or not os.path.isfile(local):
            return _named(path, "not fetched" if "://" in path else "no such file")
        size = os.path.getsize(local)
        if size > MAX_PICTURE_BYTES:
            return _named(path, f"{size_text(size)}, too big to show")
        try:
            with open(local, "rb") as file:
                data = file.read()
        except OSError as error:
            return _named(path, str(error.strerror))
        kind = _image_type(data)
        if kind is None:
            return _named(path, "not a picture that browsers show")
        return self._place(f"data:{kind};base64,{base64.b64encode(data).decode()}", path, size)

    def _place(self, uri: str, name: str, size: int) -> str:
        if size > min(self.room, MAX_PICTURE_BYTES * 4 // 3):
            return _named(name, "no more room on this page" if size > self.room else "too big to show")
        self.room -= size
        shown = _text(name)
        return f'<figure><img src="{escape(uri)}" alt="{shown}"><figcaption>{shown}</figcaption></figure>'


def render_page(previews: list[DatasetPreview], model: str | None) -> str:
    """The page of some datasets.

    Args:
        previews: what there is to see of each.
        model: what ``--model`` said; None if no tokens were made.
    """
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    pictures = _Pictures()
    bodies = "\n".join("".join(_dataset(shown, pictures)) for shown in previews)
    title = _text(", ".join(shown.name for shown in previews))
    tokens = f"Tokens of {_text(model)}." if model else "No tokens yet: --model NAME adds them."
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{title} – RaySwift</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>Dataset preview</h1><p>{tokens}</p></header>\n{bodies}\n</body>\n</html>\n"
    )


def _dataset(shown: DatasetPreview, pictures: _Pictures) -> Iterator[str]:
    files = "".join(f"<li>{_text(path)} ({size_text(size)})</li>" for path, size in shown.files[:20])
    more = f"<li>… {len(shown.files) - 20:,} more</li>" if len(shown.files) > 20 else ""
    yield f"<main>\n<h2>{_text(shown.name)}</h2>\n<p>{source_line(shown)}</p>\n<ul>{files}{more}</ul>\n"
    for row in shown.shown:
        yield from _row(row, pictures)
    if shown.encoder is not None:
        summary = length_summary(shown.lengths, shown.encoder.max_length)
        yield f"<h3>Token lengths</h3>\n<p>{summary}</p>\n{_histogram(shown)}\n"
    yield f"<h3>Rows</h3>\n<p>{outcome_line(shown)}</p>\n"
    yield _report("dropped because", shown.drops)
    yield _report("noticed", shown.warnings)
    yield "</main>\n"


def _row(row: ShownRow, pictures: _Pictures) -> Iterator[str]:
    yield f"<article>\n<h3>{_text(row.place)}</h3>\n"
    yield f"<details><summary>Raw row</summary><pre>{_json(row.raw)}</pre></details>\n"
    yield "<h4>Standard row</h4>\n"
    for message in row.standard["messages"]:
        role = str(message["role"])
        others = {key: value for key, value in message.items() if key not in ("role", "content")}
        extra = f" <code>{_json(others, indent=None)}</code>" if others else ""
        yield (
            f'<section class="{role if role in _ROLES else "other"}"><h5>{_text(role)}{extra}</h5>'
            f"<pre>{_text(shorten(str(message['content']), _TEXT))}</pre></section>\n"
        )
    for name, value in row.standard.items():
        if name in MEDIA or name.endswith("_images"):
            listed = value if isinstance(value, list) else [value]
            yield f'<h5>{_text(name)}</h5><div class="media">{"".join(map(pictures.show, listed))}</div>\n'
        elif name != "messages":
            yield f"<h5>{_text(name)}</h5><pre>{_json(value)}</pre>\n"
    for number, sample in enumerate(row.samples, start=1):
        which = f" {number} of {len(row.samples)}" if len(row.samples) > 1 else ""
        counts = f"{sample.num_ids:,} ids, {sample.num_trained:,} trained"
        yield f'<h4>Encoded sample{which}</h4>\n<p>{counts}</p>\n<pre class="tokens">{_tokens(sample)}</pre>\n'
    yield "</article>\n"


def _tokens(sample: Sample) -> str:
    """One span per token; the trained ones are marked, and a word on each says its id and weight."""
    spans = []
    for token in sample.texts:
        ids = f"id {' '.join(map(str, token.ids))}, weight {token.weight:g}"
        spans.append(f'<span class="{"t" if token.weight else "c"}" title="{ids}">{_text(token.text)}</span>')
    hidden = f"<em> … {sample.num_hidden:,} more ids</em>" if sample.num_hidden else ""
    return "".join(spans) + hidden


def _histogram(shown: DatasetPreview) -> str:
    """The lengths as a picture: a bar per bin, and a line where --max_length falls into the range."""
    bins = length_bins(shown.lengths, 24)
    limit = shown.encoder.max_length if shown.encoder else None
    most, step = max(number for _, _, number in bins), 400 / len(bins)
    parts = []
    for place, (low, high, number) in enumerate(bins):
        height = 120 * number / most
        over = ' class="over"' if limit is not None and low > limit else ""
        parts.append(
            f'<rect{over} x="{place * step + 0.5:.1f}" y="{130 - height:.1f}" width="{step - 1:.1f}" '
            f'height="{height:.1f}"><title>{low:,} to {high:,} ids: {number:,} rows</title></rect>'
        )
    first, last = bins[0][0], bins[-1][1]
    if limit is not None and first <= limit < last:
        x = 400 * (limit + 1 - first) / (last + 1 - first)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="130"/>')
    label = f"Histogram of token lengths from {first:,} to {last:,}, at most {most:,} rows in a bar"
    return (
        f'<svg viewBox="0 0 400 150" role="img" aria-label="{label}">{"".join(parts)}'
        f'<text x="0" y="146">{first:,}</text><text x="400" y="146" text-anchor="end">{last:,} ids</text>'
        f'<text x="400" y="12" text-anchor="end">highest bar: {most:,} rows</text></svg>'
    )


def _report(heading: str, report: DropReport) -> str:
    rows = "".join(
        f"<tr><td>{count:,}</td><td>{_text(reason)}</td><td>{_text(place)}</td></tr>\n"
        for count, reason, place in report_rows(report)
    )
    head = f"<tr><th>rows</th><th>{heading}</th><th>first at</th></tr>\n"
    return f'<div class="scroll"><table>\n{head}{rows}</table></div>\n' if rows else ""


def _json(value: Any, indent: int | None = 2) -> str:
    return _text(json.dumps(shorten_values(value, _TEXT), ensure_ascii=False, indent=indent, default=str))


def _named(name: str, why: str) -> str:
    return f'<span class="named">{_text(shorten(name, 300))} ({_text(why)})</span> '


def _text(text: str) -> str:
    """Escaped for text and attributes; null bytes, which HTML cannot hold, as the character that stands for them."""
    return escape(text.replace("\0", "\ufffd"))


def _image_type(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _IMAGE_STARTS.items() if data.startswith(start)), None)
