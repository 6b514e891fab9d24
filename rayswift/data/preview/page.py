"""A preview as one HTML page that needs nothing else: no script, no network, pictures and styles inside.

A dataset's text is not trusted: the template escapes everything, and the page's own Content-Security-Policy forbids
scripts, requests and styles that are not the template's. Pictures come from local files with an image's first bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from rayswift.data.preview import words
from rayswift.data.preview.collect import DatasetPreview
from rayswift.data.rows.standard import MEDIA

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


class Picture(NamedTuple):
    """An entry of a media column: what its bytes are, or `why` they are not shown."""

    name: str
    uri: str = ""
    why: str = ""


class _Pictures:
    """Turns the entries of media columns into pictures, as long as the page has room for them."""

    def __init__(self) -> None:
        self.room = MAX_PAGE_PICTURE_BYTES

    def show(self, value: Any) -> list[Picture]:
        """The pictures of a column; the frames of a video are a list of them."""
        if isinstance(value, list):
            return [picture for item in value for picture in self.show(item)]
        path = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(path, str):
            return [Picture(words.shorten(str(path), 200), why="no path")]
        picture, size = _picture(path)
        if picture.uri and size > min(self.room, MAX_PICTURE_BYTES * 4 // 3):
            why = "no more room on this page" if size > self.room else "too big to show"
            picture = Picture(picture.name, why=why)
        if picture.uri:
            self.room -= size
            return [picture]
        return [picture._replace(name=words.shorten(picture.name, 300))]


def _picture(path: str) -> tuple[Picture, int]:
    """What a path or ``data:`` URI holds, and its size."""
    if path.startswith("data:"):
        name = f"inline picture, {words.size_text(len(path))}"
        if not _DATA_URI.fullmatch(path):
            return Picture(name, why="not a picture that browsers show"), 0
        return Picture(name, path), len(path)
    # SWIFT: ROOT_IMAGE_DIR is the folder that relative paths start from.
    local = os.path.join(os.environ.get("ROOT_IMAGE_DIR", ""), path.removeprefix("file://"))
    if "://" in local or not os.path.isfile(local):
        return Picture(path, why="not fetched" if "://" in path else "no such file"), 0
    size = os.path.getsize(local)
    if size > MAX_PICTURE_BYTES:
        return Picture(path, why=f"{words.size_text(size)}, too big to show"), 0
    try:
        with open(local, "rb") as file:
            data = file.read()
    except OSError as error:
        return Picture(path, why=str(error.strerror)), 0
    kind = next((kind for start, kind in _IMAGE_STARTS.items() if data.startswith(start)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "image/webp"
    if kind is None:
        return Picture(path, why="not a picture that browsers show"), 0
    return Picture(path, f"data:{kind};base64,{base64.b64encode(data).decode()}"), size


def render_page(previews: list[DatasetPreview], model: str | None) -> str:
    """The page of some datasets.

    Args:
        previews: what there is to see of each.
        model: what ``--model`` said; None if no tokens were made.
    """
    from jinja2 import Environment, StrictUndefined

    page = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        # Null bytes, which HTML cannot hold, as the character that stands for them.
        finalize=lambda value: value.replace("\0", "\ufffd") if isinstance(value, str) else value,
    )
    page.filters |= {
        "digest": lambda style: base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        "json": lambda value, indent=None: json.dumps(
            words.shorten_values(value, _TEXT), ensure_ascii=False, indent=indent, default=str
        ),
        "short": lambda text: words.shorten(str(text), _TEXT),
        "thousands": "{:,}".format,
        "without": lambda row, *names: {key: value for key, value in row.items() if key not in names},
    }
    page.tests["media"] = lambda name: name in MEDIA or name.endswith("_images")
    template = page.from_string(resources.files(__package__).joinpath("preview.html.jinja").read_text("utf-8"))
    return template.render(previews=previews, model=model, show=_Pictures().show, words=words)
