"""A template derived from the model's own chat template, for tokenizers that no family of `families.json` fits.

A chat template is a program that writes text; nothing in it says which part the model is to learn. It is found by
rendering: a reply starts where the rendering of the messages before it, with the generation prompt, ends; and it ends
after the first special token that follows its content. To keep special-token strings in the content plain text, the
rendering is done once per sequence of roles with placeholders as contents; each row is then filled into that
*skeleton*, and checked against the real rendering.
"""

from __future__ import annotations

import itertools
import os.path
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rayswift.data.chat.conversation import Conversation, DropRow, Round
from rayswift.data.chat.families import FIXED_DATE, RenderOptions, TextSpan, choose_system

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")


class Slot(NamedTuple):
    """A part of a skeleton: template text, or (`message` ≥ 0) the content of that message. `reply`: index of the
    assistant turn that this part is learned with, or −1."""

    text: str
    message: int = -1
    reply: int = -1


@dataclass
class JinjaTemplate:
    """The layout of a tokenizer's own chat template.

    `specials`: the special tokens of the tokenizer. `eos`: put after a last reply that the chat template leaves open.
    """

    tokenizer: Any
    specials: tuple[str, ...]
    eos: str
    name: str = "jinja"
    agent: str | None = None
    _skeletons: dict[tuple[str, ...], list[Slot] | DropRow] = field(default_factory=dict, repr=False)

    @property
    def literals(self) -> tuple[str, ...]:
        """Template text in which special tokens count: what a one-round conversation shows of it."""
        roles = ("user", "assistant", "user")
        try:
            return (*(slot.text for slot in self._skeleton(roles)), self.eos)
        except DropRow:
            return (self.eos,)

    @property
    def stop_words(self) -> tuple[str, ...]:
        """The special token that ends a reply."""
        try:
            ends = [slot.text for slot in self._skeleton(("user", "assistant")) if slot.reply >= 0]
        except DropRow:
            return ()
        return tuple(special for special in self.specials if ends[-1].endswith(special))

    def render(self, conversation: Conversation, options: RenderOptions) -> list[TextSpan]:
        """Lay out a conversation for training.

        Raises:
            DropRow: the chat template refuses the conversation, or rewrites it beyond recognition.
        """
        messages = _messages(conversation, options)
        first = next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)
        try:
            slots = self._fill(messages)
        except DropRow:
            if not messages or messages[first]["role"] != "assistant":
                raise
            # A chat template that refuses to start with a reply is given an empty query first.
            messages.insert(first, {"role": "user", "content": ""})
            slots = self._fill(messages)
        weights: list[float] = []
        rules: list[bool] = []
        for index, round_ in enumerate(conversation.rounds):
            if round_.reply is not None:
                losses = {options.reply_weight(part, index >= conversation.last_round) for part in round_.reply}
                if len(losses) > 1:
                    raise DropRow("one assistant turn with and without loss needs a template family (--template)")
                weights.append(losses.pop())
                rules.append(round_.reply[0].loss_scale is None)
        if weights and slots[-1].reply < 0 and not slots[-1].text.strip():
            slots = slots[:-1]  # the newline after the last turn, which the families leave out too
        spans = []
        for span, slot in zip(_text_spans(slots, weights, options.prompt_weight), slots, strict=True):
            if slot.reply >= 0 and slot.message >= 0 and span.weight and options.scale.rules and rules[slot.reply]:
                query = messages[slot.message - 1]["content"] if slot.message else ""
                cuts = options.scale.split(span.text, query)
                spans += [span._replace(text=text, weight=span.weight * factor) for text, factor in cuts]
            else:
                spans.append(span)
        return spans

    def render_prompt(self, conversation: Conversation, options: RenderOptions) -> list[TextSpan]:
        """Lay out a conversation for generation; a last assistant turn is continued.

        Raises:
            DropRow: as for :meth:`render`.
        """
        continued = conversation.rounds[-1].reply
        if continued is not None:
            last = conversation.rounds[-1]
            asked = replace(conversation, rounds=[*conversation.rounds[:-1], Round(last.query)])
        else:
            asked = conversation
        messages = _messages(asked, options)
        thinking = options.enable_thinking
        think = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        real = self._render(messages, add_generation_prompt=True, **think)
        skeleton = _placeholders(message["role"] for message in messages)
        slots = self._slots(skeleton, self._render(skeleton, add_generation_prompt=True, **think))
        filled = _filled(slots, [message["content"] for message in messages], real)
        if filled is None:
            self._refuse_specials(messages)
            filled = [Slot(real)]
        spans = _text_spans(filled, [0.0] * len(messages), 0.0)
        if options.response_prefix:
            spans.append(TextSpan(options.response_prefix, True))
        if continued is not None:
            spans.append(TextSpan("".join(part.text for part in continued), False, hard=True))
        return spans

    def _render(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        return apply_chat_template(self.tokenizer, messages, **kwargs)

    def _skeleton(self, roles: tuple[str, ...]) -> list[Slot]:
        if roles not in self._skeletons:
            messages = _placeholders(roles)
            try:
                slots = self._slots(messages, self._render(messages))
                last = slots[-1]
                if roles[-1] == "assistant" and last.message >= 0 and self.eos:
                    # The template ends no turn: without this none would stop.
                    slots.append(Slot(self.eos, -1, last.reply))
                self._skeletons[roles] = slots
            except DropRow as refused:
                self._skeletons[roles] = refused
        skeleton = self._skeletons[roles]
        if isinstance(skeleton, DropRow):
            raise DropRow(skeleton.reason)
        return skeleton

    def _slots(self, messages: list[dict[str, str]], text: str) -> list[Slot]:
        """Cut the rendering `text` of messages with placeholders, with the bounds of every assistant turn."""
        if sorted(int(number) for number in _PLACEHOLDER.findall(text)) != list(range(len(messages))):
            raise DropRow("the model's chat template does not show every message once")
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return _cut(text, [self._bounds(messages, i, text) for i in replies])

    def _bounds(self, messages: list[dict[str, str]], index: int, text: str) -> tuple[int, int]:
        """Where assistant message `index` starts and ends in the rendering `text` of all messages."""
        content = messages[index]["content"]
        at = text.index(content)
        before = self._render(messages[:index], add_generation_prompt=True) if index else ""
        shared = len(os.path.commonprefix([before, text]))
        earlier = max((text.index(m["content"]) + len(m["content"]) for m in messages[:index]), default=0)
        # Where the generation prompt opens a think block that the full rendering has not, the shared part is the
        # start of the reply; where history is rewritten the shared part ends too early, and only the content counts.
        start = shared if earlier < shared <= at else at
        empty_think = _EMPTY_THINK.match(text, start)
        if empty_think and empty_think.end() <= at:
            start = empty_think.end()
        content_end = at + len(content)
        following = _PLACEHOLDER.search(text, content_end)
        limit = following.start() if following else len(text)
        return start, self._after_special(text, content_end, limit, otherwise=content_end)

    def _after_special(self, text: str, start: int, limit: int, otherwise: int) -> int:
        """The end of the first special token of `text[start:limit]`."""
        found = ((text.find(special, start, limit), special) for special in self.specials)
        return min((at + len(special) for at, special in found if at >= 0), default=otherwise)

    def _fill(self, messages: list[dict[str, str]]) -> list[Slot]:
        slots = self._skeleton(tuple(message["role"] for message in messages))
        real = self._render(messages)
        filled = _filled(slots, [message["content"] for message in messages], real, self.eos)
        return filled if filled is not None else self._from_real(messages, real)

    def _from_real(self, messages: list[dict[str, str]], real: str) -> list[Slot]:
        """A row that the chat template rewrites (thoughts dropped, text changed), cut by its own rendering."""
        self._refuse_specials(messages)
        slots, position, reply = [], 0, 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], add_generation_prompt=True) if index else ""
            if not real.startswith(before) or len(before) < position:
                raise DropRow("the model's chat template rewrites earlier turns; choose a family with --template")
            end = self._after_special(real, len(before), len(real), otherwise=len(real))
            slots += [Slot(real[position : len(before)]), Slot(real[len(before) : end], -1, reply)]
            position, reply = end, reply + 1
        return [*slots, Slot(real[position:])]

    def _refuse_specials(self, messages: Iterable[dict[str, str]]) -> None:
        if any(special in message["content"] for message in messages for special in self.specials):
            raise DropRow("the model's chat template rewrites a message that holds special-token text")


def _messages(conversation: Conversation, options: RenderOptions) -> list[dict[str, str]]:
    """The conversation as the chat template takes it, tools in the system text or the first query."""
    agent, tools = conversation.agent, "".join(span.text for span in conversation.tools)
    literal = any(part.literal for round_ in conversation.rounds for part in round_.reply or ())
    if (
        literal
        or any(span.literal for span in conversation.tools)
        or any(round_.results is not None for round_ in conversation.rounds)
    ):
        raise DropRow(f"agent template {agent.name if agent else ''} needs a template family (--template)")
    system = choose_system(conversation.system, options.system, None)
    if tools and agent is not None and agent.tools_place != "before_query":
        return as_messages(conversation, f"{system}\n\n{tools}" if system else tools)
    messages = as_messages(conversation, system)
    if tools:
        asked = next((message for message in messages if message["role"] == "user"), messages[0])
        asked["content"] = tools + asked["content"]
    return messages


def _placeholders(roles: Iterable[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]


def _cut(text: str, bounds: list[tuple[int, int]]) -> list[Slot]:
    """Cut a rendering with placeholders into slots, at the placeholders and at the ends of the learned bounds."""
    marks = {0, len(text), *(end for pair in bounds for end in pair)}
    contents = {found.start(): found for found in _PLACEHOLDER.finditer(text)}
    for found in contents.values():
        marks |= {found.start(), found.end()}
    ordered = sorted(marks)
    slots = []
    for start, end in itertools.pairwise(ordered):
        reply = next((i for i, (first, last) in enumerate(bounds) if first <= start and end <= last), -1)
        message = int(contents[start][1]) if start in contents else -1
        slots.append(Slot("" if message >= 0 else text[start:end], message, reply))
    return slots


def _filled(slots: list[Slot], contents: list[str], real: str, eos: str = "") -> list[Slot] | None:
    """The skeleton with these contents, as they are or stripped, if that is what the chat template renders."""
    for change in (str, str.strip, str.rstrip):
        filled = [slot if slot.message < 0 else slot._replace(text=change(contents[slot.message])) for slot in slots]
        text = "".join(slot.text for slot in filled)
        if text == real or (eos and text == real + eos):
            return filled
    return None


def _text_spans(slots: list[Slot], weights: list[float], prompt_weight: float) -> list[TextSpan]:
    spans, reply = [], -1
    for slot in slots:
        weight = weights[slot.reply] if slot.reply >= 0 else prompt_weight
        spans.append(TextSpan(slot.text, slot.message < 0, weight, hard=slot.reply != reply))
        reply = slot.reply
    return spans


def as_messages(conversation: Conversation, system: str | None) -> list[dict[str, str]]:
    """A conversation as plain chat messages, the system text first if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    for round_ in conversation.rounds:
        if round_.query is not None:
            messages.append({"role": "user", "content": round_.query})
        if round_.reply is not None:
            messages.append({"role": "assistant", "content": "".join(part.text for part in round_.reply)})
    return messages


def apply_chat_template(tokenizer: Any, messages: list[dict[str, str]], **kwargs: Any) -> str:
    """What the tokenizer's own chat template makes of the messages.

    Raises:
        DropRow: the template refuses them. It is a program of the model's author and can fail as programs do.
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, date_string=FIXED_DATE, **kwargs))
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DropRow(f"the model's chat template refuses the conversation: {error}") from None
