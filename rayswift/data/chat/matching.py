"""Which family a tokenizer belongs to: the one that lays a conversation out as the model's own chat template does."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import date
from typing import Any

from rayswift.data.chat.agents import get_agent_format
from rayswift.data.chat.conversation import Conversation, DropRow, ReplyPart, Round, read_conversation
from rayswift.data.chat.dialect import (
    ANSWER,
    ANSWERED,
    ASKED,
    CALL,
    CALLED,
    NEXT,
    QUESTION,
    RESULT,
    THOUGHT,
    TOOLS,
    ChatTemplate,
)
from rayswift.data.chat.families import FIXED_DATE, RenderOptions, Template, adds_bos, load_templates, text_of
from rayswift.data.chat.shape import TemplateShape
from rayswift.data.chat.turns import Turn

logger = logging.getLogger("rayswift.data.chat.matching")

_PROBE_ROUNDS = [Round("q 1", [ReplyPart("r 1")]), Round("q 2", [ReplyPart("r 2")]), Round("q 3")]


def match_template(tokenizer: Any, day: date = FIXED_DATE, shape: TemplateShape | None = None) -> Template | None:
    """The family whose layout equals what the tokenizer's own chat template renders, bound to the tokenizer and a day.

    Compared with and without a system text, over two rounds, with the generation prompt and at the end of a reply
    (where a newline after the end-of-turn token does not count), with thoughts where a family knows them, and with
    tools where the chat template shows them: of several families the first that writes all of them alike, or at least
    calls and results. None when no family fits.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    shape = shape or TemplateShape(ChatTemplate(tokenizer, day), (), bos or "", eos or "")
    try:
        expected = [shape.chat.render(_messages(probe), **kwargs) for probe, kwargs in _probes()]
    except DropRow as refused:  # no place for a system text, for instance
        logger.debug("no family fits: %s", refused.reason)
        return None
    starts_with_bos = adds_bos(tokenizer)
    fitting = []
    for template in load_templates().values():
        bound = template.bind(bos, eos or "\0", starts_with_bos, day)
        try:
            if _same_layout(bound, expected) and (template.thinking is None or _same_history(bound, shape)):
                fitting.append(bound)
        except DropRow:  # the family has no place for a system text
            continue
    if not fitting or not shape.dialect.tools:
        return next(iter(fitting), None)
    best = max(fitting, key=lambda one: _alike_tools(one, shape))
    return best if _alike_tools(best, shape) else None


def _shows_tools(shape: TemplateShape) -> bool:
    return shape.dialect.tools and shape.dialect.calls and shape.dialect.results


def same_tools(template: Template, shape: TemplateShape) -> bool:
    """Whether a family writes tools, calls and results as the model's own chat template does, or that shows none."""
    if not _shows_tools(shape):
        return True
    if template.thinking is not None:  # the thoughts of a tool loop stay, and those of earlier ones go
        return False
    return all(_same(_with_tools(template, shape, turns)) for turns in (*_LOOPS, _THINKING_CALL))


_LOOPS = (
    [ASKED, CALLED, Turn("tool", RESULT), ANSWERED],
    [Turn("system", "zqSystem"), ASKED, Turn("assistant", ANSWER, [CALL]), Turn("tool", RESULT), ANSWERED],
    [ASKED, Turn("assistant", ANSWER, [CALL, CALL]), Turn("tool", RESULT), Turn("tool", RESULT), ANSWERED],
)
_THINKING_CALL = [ASKED, Turn("assistant", f"<think>\n{THOUGHT}\n</think>\n\n", [CALL])]


def _alike_tools(template: Template, shape: TemplateShape) -> int:
    """2: a family writes a tool loop, or what of it the model's own chat template shows, as that does, 1: but for what
    stands before the question, 0: otherwise."""
    texts = _with_tools(template, shape, _LOOPS[0] if _shows_tools(shape) else [ASKED, ANSWERED])
    if texts is None:
        return 0
    return 2 if _same(texts) else int(_same(tuple(text[text.find(QUESTION) :] for text in texts)))


def _with_tools(template: Template, shape: TemplateShape, turns: list[Turn]) -> tuple[str, ...] | None:
    """A conversation with tools as a family lays it out, and as the model's own chat template does; None where one of
    them has no place for it."""
    if template.agent is None:
        return None
    messages: list[dict[str, str]] = []
    for turn in turns:
        role = "tool_response" if turn.role == "tool" else turn.role
        messages += [{"role": role, "content": turn.text}] if turn.text else []
        calls = [{"name": name, "arguments": arguments} for name, arguments in turn.calls]
        messages += [{"role": "tool_call", "content": json.dumps(call)} for call in calls]
    think = template.thinking_prefix or "<think>\n" if template.thinking else None
    try:
        conversation = read_conversation(messages, TOOLS, get_agent_format(template.agent), think)
        text = text_of(template.render(conversation, RenderOptions(add_non_thinking_prefix=False)))
        return _ended_alike(template, text, shape.render(turns, TOOLS))
    except DropRow:
        return None


def _ended_alike(template: Template, text: str, own: str) -> tuple[str, str]:
    """A conversation as a family lays it out and as the model's own chat template does, without what may differ."""
    own = own.replace(template.non_thinking_prefix, "").rstrip("\n")
    if template.suffix == template.chat_sep and not own.endswith(template.suffix):
        text = text.removesuffix(template.suffix)  # with that chat template only the next turn ends this one
    return text.rstrip("\n"), own


def _same(texts: tuple[str, ...] | None) -> bool:
    return texts is not None and texts[0] == texts[1]


def _messages(probe: Conversation) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": probe.system}] if probe.system else []
    for round_ in probe.rounds:
        messages.append({"role": "user", "content": round_.query or ""})
        if round_.reply is not None:
            messages.append({"role": "assistant", "content": round_.reply[0].text})
    return messages


def _same_history(template: Template, shape: TemplateShape) -> bool:
    """Whether a family writes earlier thoughts into a prompt as the model's own chat template does."""
    turns = [ASKED, Turn("assistant", f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"), Turn("user", NEXT)]
    think = template.thinking_prefix or "<think>\n"
    conversation = read_conversation([{"role": one.role, "content": one.text} for one in turns], think=think)
    own = shape.render(turns, None, add_generation_prompt=True, **shape.chat.thinking(True))
    return text_of(template.render_prompt(conversation, RenderOptions(enable_thinking=True))) == own


def _probes() -> Iterator[tuple[Conversation, dict[str, Any]]]:
    for system in ("s 1", None):
        asked = Conversation(system, _PROBE_ROUNDS)
        for thinking in (True, False):  # the switch is `enable_thinking` with Qwen, `thinking` with DeepSeek
            yield asked, {"add_generation_prompt": True, "enable_thinking": thinking, "thinking": thinking}
        yield asked.without_trailing_query(), {}


def _same_layout(template: Template, expected: list[str]) -> bool:
    for (probe, kwargs), own in zip(_probes(), expected, strict=True):
        if kwargs:
            options = RenderOptions(enable_thinking=kwargs["enable_thinking"])
            if template.thinking == "always":  # has no switch
                options = RenderOptions(enable_thinking=True)
            if text_of(template.render_prompt(probe, options)) != own:
                return False
        else:
            text = text_of(template.render(probe, RenderOptions(add_non_thinking_prefix=False)))
            if not _same(_ended_alike(template, text, own)):
                return False
    return True
