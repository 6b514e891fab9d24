"""What the page makes of an answer's text: HTML stays text, code and maths stay as they are, thoughts are folded."""

from __future__ import annotations

from typing import Any

import pytest

from rayswift.chat_page.messages import openai_messages
from rayswift.generate.types import Answer


def conversation() -> Any:
    """The page's chat."""
    import gradio as gr

    from rayswift.chat_page.conversation import show_as_written

    return show_as_written(gr.Chatbot())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Use <template> for it.\n\nAnd then?", "Use \\<template> for it.\n\nAnd then?"),
        ("<b>bold</b> and **bold**", "\\<b>bold\\</b> and **bold**"),
        ("<!-- gone --> 3 < 4 <= 5 <-", "\\<!-- gone --> 3 < 4 <= 5 <-"),
        ("`<b>` and ``a ` <i>`` and <u>", "`<b>` and ``a ` <i>`` and \\<u>"),
        ("```html\n<p>\n```\n<p>", "```html\n<p>\n```\n\\<p>"),
        ("1. one\n   ```\n   <p>\n   ```\n   <p>", "1. one\n   ```\n   <p>\n   ```\n   \\<p>"),
        ("code:\n\n    <p>\n\n<p>", "code:\n\n    <p>\n\n\\<p>"),
        ("```\n<p> never closed", "```\n<p> never closed"),
        ("\\( a <b \\) <b> $$x<y$$ \\[ p<q \\]", "\\( a <b \\) \\<b> $$x<y$$ \\[ p<q \\]"),
        ("`open <b>", "`open \\<b>"),
        ("> <div>\n> quoted", "> \\<div>\n> quoted"),
        ("plain", "plain"),
    ],
)
def test_a_tag_is_text_outside_code_and_maths_and_comes_back_as_it_was(text: str, shown: str) -> None:
    chat = conversation()
    sent = chat.postprocess([{"role": "assistant", "content": text}])
    assert sent.root[0].content[0].text == shown
    assert chat.preprocess(sent)[0]["content"][0]["text"] == text


def messages(answer: Answer, lang: str = "en") -> list[dict[str, Any]]:
    """What the page keeps of an answer."""
    from rayswift.chat_page.page import said

    chat = conversation()
    parts = [{"role": "assistant", "content": part} if isinstance(part, str) else part for part in said(answer, lang)]
    return chat.preprocess(chat.postprocess(parts))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("answer", "thoughts", "text", "status"),
    [
        (Answer("4", thoughts="2+2"), "2+2", "4", "done"),
        (Answer("", thoughts="2+"), "2+", None, "pending"),
        (Answer("<think>\n2+2 <b>\n</think>\n\n4"), "\n2+2 <b>\n", "\n\n4", "done"),
        (Answer("<think>\n2+"), "\n2+", None, "pending"),
        (Answer("2+2\n</think>\n\n4"), "2+2\n", "\n\n4", "done"),
        (Answer("4"), None, "4", None),
        (Answer("The tag </think> ends a thought."), None, "The tag </think> ends a thought.", None),
        (Answer("<think>\n\n</think>\n\n4"), None, "\n\n4", None),
    ],
)
def test_thoughts_are_a_folded_message_of_their_own(
    answer: Answer, thoughts: str | None, text: str | None, status: str | None
) -> None:
    kept = messages(answer)
    folded = [one for one in kept if (one["metadata"] or {}).get("title")]
    assert [one["content"][0]["text"] for one in folded] == ([] if thoughts is None else [thoughts])
    assert [one["metadata"]["status"] for one in folded] == ([] if status is None else [status])
    assert [one["content"][0]["text"] for one in kept if one not in folded] == ([] if text is None else [text])
    assert [one["metadata"]["title"] for one in messages(answer, "zh")[:-1]] == ["思考过程"] * (len(kept) - 1)


def test_the_next_question_sends_thoughts_back_where_they_came_from() -> None:
    asked = {"role": "user", "content": "2+2?"}
    apart, inline = messages(Answer("4", thoughts="Easy.")), messages(Answer("<think>\nEasy.\n</think>\n\n4"))
    stopped = messages(Answer("", thoughts="Eas"))
    assert openai_messages([asked, *apart], "Sure?")[1] == {
        "role": "assistant", "content": "4", "reasoning_content": "Easy.",
    }  # fmt: skip
    assert openai_messages([asked, *inline], "Sure?")[1] == {
        "role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4",
    }  # fmt: skip
    assert openai_messages([asked, *stopped, asked, *messages(Answer("4"))], "Sure?")[1:3] == [
        asked, {"role": "assistant", "content": "4"},
    ]  # fmt: skip
