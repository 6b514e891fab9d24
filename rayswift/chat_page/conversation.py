"""The chat of the page: Markdown and maths are rendered, HTML is shown as the text that it is, thoughts are folded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gradio as gr
from markdown_it import MarkdownIt

#: What models write maths in.
MATHS: list[dict[str, str | bool]] = [
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False))
]
#: Code and maths within a paragraph, which the browser shows as they are.
_LITERAL = re.compile(
    r"(?<![\\`])(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)|\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)", re.DOTALL
)
_TAG = re.compile(r"(?<!\\)<(?=[A-Za-z/!?])")
_ESCAPED_TAG = re.compile(r"\\<(?=[A-Za-z/!?])")
_MARKDOWN = MarkdownIt("commonmark", {"html": False})
_THOUGHTS = re.compile(r"\s*<think>(?P<thoughts>.*?)(?:</think>(?P<answer>.*)|$)", re.DOTALL)
#: Where the prompt has opened the block, its end stands on a line of its own.
_OPENED_THOUGHTS = re.compile(r"(?P<thoughts>.*?)^</think>[ \t]*$(?P<answer>.*)", re.DOTALL | re.MULTILINE)


def show_as_written(chat: gr.Chatbot) -> gr.Chatbot:
    """The chat, in which HTML is text.

    Gradio takes Markdown with HTML in it: a tag gets the backslash that makes it text in Markdown on its way to the
    browser, and loses it on its way back. A subclass would do the same, and Gradio writes a stub file beside each.
    """
    to_browser, from_browser = chat.postprocess, chat.preprocess

    def postprocess(value: Any) -> Any:
        return _with_texts(to_browser(value and [_as_written(message) for message in value]), escape_tags)

    def preprocess(payload: Any) -> Any:
        return from_browser(payload and _with_texts(payload, unescape_tags))

    chat.postprocess, chat.preprocess = postprocess, preprocess  # type: ignore[method-assign]
    return chat


def _as_written(message: Any) -> Any:
    """A message whose texts Gradio does not dedent, as it does with those that are no parts."""
    content = message["content"] if isinstance(message, dict) else message.content
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part
             for part in (content if isinstance(content, list) else [content])]  # fmt: skip
    return {**message, "content": parts} if isinstance(message, dict) else replace(message, content=parts)


def _with_texts(chat: Any, change: Callable[[str], str]) -> Any:
    """Gradio's conversation with each text changed."""
    messages = []
    for message in chat.root:
        content = [part.model_copy(update={"text": change(part.text)}) if part.type == "text" else part
                   for part in message.content]  # fmt: skip
        messages.append(message.model_copy(update={"content": content}))
    return chat.model_copy(update={"root": messages})


def split_thoughts(text: str) -> tuple[str, str] | None:
    """The thoughts that a model writes before its answer, and the answer; None without thoughts."""
    found = _THOUGHTS.match(text) or _OPENED_THOUGHTS.match(text)
    return (found["thoughts"], found["answer"] or "") if found else None


def escape_tags(text: str) -> str:
    """Markdown in which every HTML tag is text."""
    return _in_prose(text, lambda prose: _TAG.sub(r"\\<", prose)) if "<" in text else text


def unescape_tags(text: str) -> str:
    """What :func:`escape_tags` was given."""
    return _in_prose(text, lambda prose: _ESCAPED_TAG.sub("<", prose)) if "\\<" in text else text


def _in_prose(text: str, change: Callable[[str], str]) -> str:
    """The text with what is neither code nor maths changed."""
    lines = text.split("\n")
    blocks = [block.map for block in _MARKDOWN.parse(text) if block.type in ("fence", "code_block") and block.map]
    found, end = [], 0
    for start, stop in [*blocks, [len(lines), len(lines)]]:
        if end < start:
            found.append(_in_paragraphs("\n".join(lines[end:start]), change))
        if start < stop:
            found.append("\n".join(lines[start:stop]))
        end = stop
    return "\n".join(found)


def _in_paragraphs(prose: str, change: Callable[[str], str]) -> str:
    found, end = "", 0
    for literal in _LITERAL.finditer(prose):
        found += change(prose[end : literal.start()]) + literal.group()
        end = literal.end()
    return found + change(prose[end:])
