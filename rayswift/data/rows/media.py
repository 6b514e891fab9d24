"""Files of a row: images, videos and audios, in columns of their own or as parts of messages."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

#: What a part of a message stands for in the text, by the part's type: (column of the file, placeholder).
MEDIA_PARTS = {
    kind: (f"{medium}s", f"<{medium}>")
    for medium in ("image", "video", "audio")
    for kind in (medium, f"{medium}_url", f"input_{medium}")
}
_IMAGE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


class Unusable(Exception):
    """A row that cannot be used; the message is the reason that is reported."""


def first_of(item: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The first of these keys that has a value."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def media_file(item: Any) -> Any:
    """One file of an images, videos or audios column as ``{"bytes": None, "path": path, URL or data: URI}``.

    Rows travel as JSON, so bytes become a ``data:`` URI. A list (the frames of a video) is one item.
    """
    if isinstance(item, str):
        return {"bytes": None, "path": item}
    if isinstance(item, (list, tuple)):
        return [media_file(frame) for frame in item]
    if isinstance(item, bytes):
        return {"bytes": None, "path": _data_uri(item)}
    if not isinstance(item, Mapping):
        raise Unusable("an image, video or audio is neither a path nor an object with bytes or path")
    if isinstance(item.get("bytes"), bytes):
        return {**item, "bytes": None, "path": _data_uri(item["bytes"])}
    return dict(item)


def _data_uri(data: bytes) -> str:
    kind = next((kind for magic, kind in _IMAGE_TYPES.items() if data.startswith(magic)), "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def file_of_part(part: Mapping[str, Any], kind: str) -> Any:
    """The file of an image, video or audio part; None where the part only marks the place of a file in a column."""
    found = first_of(part, (kind, "source", "url", "path", kind.split("_")[0]))
    if isinstance(found, Mapping) and not isinstance(found.get("bytes"), bytes):
        medium = next(medium for medium in ("image", "video", "audio") if medium in kind)
        if isinstance(found.get("data"), str):
            mime = found.get("media_type") or f"{medium}/{found.get('format') or '*'}"
            return {"bytes": None, "path": f"data:{mime};base64,{found['data']}"}
        found = first_of(found, ("url", "path"))
        if found is None:
            raise Unusable(f"{medium} part without url, path or data")
    return None if found is None else media_file(found)
