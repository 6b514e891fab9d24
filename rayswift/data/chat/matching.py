"""Which family a tokenizer belongs to: the one that lays a conversation out as the model's own chat template does."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import date
from typing import Any

from rayswift.data.chat.agents import get_agent_format
from rayswift.data.chat.conversation import Conversation, DropRow, ReplyPart, Round, read_conversation
from rayswift.data.chat.dialect import ANSWER, ANSWERED, ASKED, CALL, CALLED, RESULT, THOUGHT, TOOLS, ChatTemplate
from rayswift.data.chat.families import FIXED_DATE, RenderOptions, Template, adds_bos, load_templates, text_of
from rayswift.data.chat.shape import TemplateShape
from rayswift.data.chat.turns import Turn

logger = logging.getLogger("rayswift.data.chat.matching")

_PROBE_ROUNDS = [Round("q 1", [ReplyPart("r 1")]), Round("q 2", [ReplyPart("r 2")]), Round("q 3")]


def match_template(tokenizer: Any, day: date = FIXED_DATE) -> Template | None:
    """The family whose layout equals what the tokenizer's own chat template renders, bound to the tokenizer and a day.

    Compared with and without a system text, over two rounds, with the generation prompt and at the end of a reply
    (where a newline after the end-of-turn token does not count). None when no family fits.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = ChatTemplate(tokenizer, day)
    try:
        expected = [chat.render(_messages(probe), **kwargs) for probe, kwargs in _probes()]
    except DropRow as refused:  # no place for a system text, for instance
        logger.debug("no family fits: %s", refused.reason)
        return None
    starts_with_bos = adds_bos(tokenizer)
    for template in load_templates().values():
        bound = template.bind(tokenizer.bos_token, tokenizer.eos_token or "\0", starts_with_bos, day)
        try:
            if _same_layout(bound, expected):
                return bound
        except DropRow:  # the family has no place for a system text
            continue
    return None


def same_tools(template: Template, shape: TemplateShape) -> bool:
    """Whether a family writes tools, calls and results as the model's own chat template does, or that shows none."""
    dialect = shape.dialect
    if not (dialect.tools and dialect.calls and dialect.results):
        return True
    if template.agent is None:
        return False
    chats = [
        [ASKED, CALLED, Turn("tool", RESULT), ANSWERED],
        [ASKED, Turn("assistant", ANSWER, [CALL, CALL]), Turn("tool", RESULT), Turn("tool", RESULT), ANSWERED],
    ]
    if dialect.call_thoughts != "text":
        chats.append([ASKED, Turn("assistant", f"<think>\n{THOUGHT}\n</think>\n\n", [CALL])])
    options = RenderOptions(add_non_thinking_prefix=False)
    agent = get_agent_format(template.agent)
    try:
        for turns in chats:
            messages: list[dict[str, str]] = []
            for turn in turns:
                role = "tool_response" if turn.role == "tool" else turn.role
                messages += [{"role": role, "content": turn.text}] if turn.text else []
                calls = [{"name": name, "arguments": arguments} for name, arguments in turn.calls]
                messages += [{"role": "tool_call", "content": json.dumps(call)} for call in calls]
            own = shape.render(turns, TOOLS).replace(template.non_thinking_prefix, "")
            text = text_of(template.render(read_conversation(messages, TOOLS, agent), options))
            if text.rstrip("\n") != own.rstrip("\n"):
                return False
    except DropRow:
        return False
    return True


def _messages(probe: Conversation) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": probe.system}] if probe.system else []
    for round_ in probe.rounds:
        messages.append({"role": "user", "content": round_.query or ""})
        if round_.reply is not None:
            messages.append({"role": "assistant", "content": round_.reply[0].text})
    return messages


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
            if text.rstrip("\n") != own.replace(template.non_thinking_prefix, "").rstrip("\n"):
                return False
    return True
