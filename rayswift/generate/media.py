"""Pictures, videos and sounds of a row: which models take them, and how they travel, as OpenAI's content parts."""

from __future__ import annotations

import base64
import mimetypes
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayswift.errors import UserError

#: Column of a standard row → kind of file. ``<image>`` and so on in a message are where the files stand.
_KINDS = {"images": "image", "videos": "video", "audios": "audio"}
# What a model's config.json has when it takes such input (Transformers' names).
_CONFIG_KEYS = {"image": "vision_config", "video": "video_token_id", "audio": "audio_config"}
EVERY_KIND = tuple(_CONFIG_KEYS)


def media_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of files (``image``, ``video``, ``audio``) that the model of this ``config.json`` takes."""
    return tuple(kind for kind, key in _CONFIG_KEYS.items() if config.get(key) is not None)


def has_media(row: Mapping[str, Any]) -> bool:
    """Whether a standard row has files beside its text."""
    return any(row.get(column) for column in _KINDS)


def why_refused(row: Mapping[str, Any], takes: Collection[str], otherwise: str) -> str | None:
    """Why a model that takes these kinds of files cannot be given the row; None where it can. ``otherwise``: what is
    said of a kind that it does not take."""
    for column, kind in _KINDS.items():
        if row.get(column) and kind not in takes:
            return f"the row has {column}, which {otherwise}"
    try:
        with_files(row["messages"], row, load=False)
    except UserError as error:
        return str(error)
    return None


def with_files(messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any], *, load: bool = True) -> list[Any]:
    """The messages with the row's files in place of ``<image>``, ``<video>`` and ``<audio>``; files without a place
    stand before the first question, as in SWIFT. ``load`` False leaves out what local files hold.

    Raises:
        UserError: more places than files, or a file that is not there.
    """
    files = {kind: list(row[column]) for column, kind in _KINDS.items() if row.get(column)}
    if not files:
        return list(messages)
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
    texts = [message["content"] for message in messages]
    for kind, given in files.items():
        places = sum(text.count(f"<{kind}>") for text in texts)
        if places > len(given):
            raise UserError(f"the messages have {places} <{kind}> and the row {len(given)} {kind}s")
        texts[first] = f"<{kind}>" * (len(given) - places) + texts[first]
    split = re.compile("|".join(f"(<{kind}>)" for kind in files))
    found = []
    for message, text in zip(messages, texts, strict=True):
        pieces = [piece for piece in split.split(text) if piece]
        parts = [
            _file_part(files[piece[1:-1]].pop(0), piece[1:-1], load)
            if split.fullmatch(piece)
            else {"type": "text", "text": piece}
            for piece in pieces
        ]
        is_text = all(part["type"] == "text" for part in parts)
        found.append(message if is_text else {**message, "content": parts})
    return found


def _file_part(file: Any, kind: str, load: bool) -> dict[str, Any]:
    path = file.get("path") if isinstance(file, Mapping) else None
    if not isinstance(path, str):
        raise UserError(f"a {kind} that is no single file cannot be sent to a server")
    if not path.startswith(("http://", "https://", "data:")):
        # SWIFT: ROOT_IMAGE_DIR is the folder that relative paths start from.
        local = os.path.join(os.environ.get("ROOT_IMAGE_DIR", ""), path.removeprefix("file://"))
        if not os.path.isfile(local):
            raise UserError(f"{local}: no such {kind} (relative paths start from here, or from ROOT_IMAGE_DIR)")
        mime = mimetypes.guess_type(local)[0] or f"{kind}/*"
        path = f"data:{mime};base64,{base64.b64encode(Path(local).read_bytes()).decode() if load else ''}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": path}}
