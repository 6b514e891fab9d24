"""Gradio's conversation as OpenAI's messages."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayswift.errors import UserError
from rayswift.generate.media import EVERY_KIND

NOTE = "⚠️"  # title of a message that is the page's and not the model's
INLINE = "inline"  # id of a message of thoughts that the model wrote into its text; others came apart


def openai_messages(
    history: Sequence[Mapping[str, Any]], question: str | Mapping[str, Any], system: str | None = None
) -> list[dict[str, Any]]:
    """What to send: the system prompt if there is one, the conversation so far, and the new question.

    ``question`` is text, or with upload ``{"text", "files": [path, ...]}``. Notes of the page about an error are left
    out, together with the question that got no answer, and so are answers that were stopped before their first word.
    Thoughts (the other messages with a title) go where they came from: into the text, or beside it.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system and system.strip() else []
    thoughts: Mapping[str, Any] = {}
    for message in history:
        metadata = message.get("metadata") or {}
        if metadata.get("title") == NOTE:
            if messages and messages[-1]["role"] == "user":
                messages.pop()
            continue
        items = message["content"] if isinstance(message["content"], list) else [message["content"]]
        content = merged(part for item in items for part in parts_of(item))
        if metadata.get("title"):
            thoughts = {"text": content, "inline": metadata.get("id") == INLINE}
            continue
        if message["role"] != "assistant":  # thoughts that were stopped before their answer
            thoughts = {}
        if thoughts and thoughts["inline"]:
            content = f"<think>{thoughts['text']}</think>{content}"
        if content:
            beside = {"reasoning_content": thoughts["text"]} if thoughts and not thoughts["inline"] else {}
            messages.append({"role": message["role"], "content": content, **beside})
        thoughts = {}
    if isinstance(question, str):
        return [*messages, {"role": "user", "content": question}]
    files = [file_part(file if isinstance(file, str) else file["path"]) for file in question.get("files") or []]
    return [*messages, {"role": "user", "content": merged([*files, text_part(question.get("text") or "")])}]


def parts_of(item: Any) -> list[dict[str, Any]]:
    """OpenAI's content parts of one piece of a Gradio message: text, or a file."""
    if isinstance(item, str):
        return [text_part(item)]
    if item.get("type") == "text":
        return [text_part(item["text"])]
    file = item.get("file", item)
    return [file_part(file["path"])] if file.get("path") else []


def merged(parts: Iterable[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The parts as message content: plain text where there is nothing else, which every model takes."""
    found = [part for part in parts if part.get("text") != ""]
    if all(part["type"] == "text" for part in found):
        return "".join(part["text"] for part in found)
    return found


def text_part(text: str) -> dict[str, Any]:
    """A text as a content part."""
    return {"type": "text", "text": text}


def file_part(path: str) -> dict[str, Any]:
    """A file as a content part, its bytes inside: ``{"type": "image_url", "image_url": {"url": "data:…"}}``."""
    mime = mimetypes.guess_type(path)[0] or ""
    kind = mime.partition("/")[0]
    if kind not in EVERY_KIND:
        raise UserError(f"{Path(path).name}: not an image, video or sound that a model could take")
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{data}"}}
