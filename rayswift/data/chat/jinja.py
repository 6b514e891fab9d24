"""A template derived from the model's own chat template, for tokenizers that no family of `families.json` fits.

A chat template is a program that writes text; nothing in it says which part the model is to learn. What the model
writes in a turn is what the rendering of the conversation up to that turn adds to the rendering of the messages before
it with the generation prompt, up to the token that ends the turn. So each turn is rendered as the model will meet it in
use. Where later renderings keep earlier turns as they were, one sample holds them all; where the template rewrites
earlier turns (it leaves out their thoughts, most often), a row gives several samples, and each turn is trained once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from rayswift.data.chat.agents import BadTool, read_tools, wrap_tool
from rayswift.data.chat.conversation import Conversation, DropRow, Message
from rayswift.data.chat.dialect import ANSWER, ANSWERED, ASKED, TOOLS, split_thought
from rayswift.data.chat.families import RenderOptions, TextSpan
from rayswift.data.chat.shape import TemplateShape
from rayswift.data.chat.turns import Turn, protect, turns_of_conversation, turns_of_messages, unprotect

_THINK_OPENS = re.compile(r"\s*<think>\s*")


class Reply(NamedTuple):
    """An assistant turn in the context in which it is generated. `text`: the conversation up to the end of the turn;
    the model writes what stands behind `start`. `rest`: what the template puts behind a last turn. `eos`: ends the turn
    at the end of a sample, where the template never does."""

    text: str
    start: int
    rest: str
    eos: str


@dataclass
class JinjaTemplate:
    """The layout of a tokenizer's own chat template."""

    shape: TemplateShape
    name: str = "jinja"
    agent: str | None = None

    @property
    def literals(self) -> tuple[str, ...]:
        """Template text in which special tokens count."""
        return (self.shape.chat.source, *(ending.word for ending in self.shape.endings.values()), self.shape.eos)

    @property
    def stop_words(self) -> tuple[str, ...]:
        """The special tokens that end a turn."""
        return tuple(dict.fromkeys(ending.word for ending in self.shape.endings.values() if ending.word))

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template shows tools and their calls."""
        return self.shape.dialect.tools and self.shape.dialect.calls

    def render(
        self, row: Message, options: RenderOptions, conversation: Conversation | None = None
    ) -> list[list[TextSpan]]:
        """Lay out a row for training: one sample, or several where the chat template rewrites earlier turns.

        `conversation`: the row with its tools as text, for an agent template; None: the chat template writes them.

        Raises:
            DropRow: the chat template refuses the row, or does not show what is in it.
        """
        turns, tools = self._read(row, options, conversation)
        if options.scale.base != "all":
            while turns and turns[-1].role != "assistant":
                turns.pop()
            if not turns:
                raise DropRow("no assistant message")
        try:
            return self._samples(turns, tools, options)
        except DropRow:
            first = next((i for i, turn in enumerate(turns) if turn.role != "system"), 0)
            if not turns or turns[first].role != "assistant":
                raise
        # A chat template that refuses to start with a reply is given an empty query first.
        return self._samples([*turns[:first], Turn("user", ""), *turns[first:]], tools, options)

    def render_prompt(
        self, row: Message, options: RenderOptions, conversation: Conversation | None = None
    ) -> list[TextSpan]:
        """Lay out a conversation for generation; a last assistant turn is continued.

        Raises:
            DropRow: as for :meth:`render`.
        """
        turns, tools = self._read(row, options, conversation)
        continued = turns.pop() if turns and turns[-1].role == "assistant" else None
        if continued is not None and continued.calls:
            raise DropRow("a last assistant turn that calls tools cannot be continued")
        prompt = self.shape.render(
            turns, tools, add_generation_prompt=True, **self.shape.chat.thinking(options.enable_thinking)
        )
        if [turn.role for turn in turns] == ["system"] and turns[0].text not in prompt:
            raise DropRow("the model's chat template does not show a system text without a query")
        spans = self._pieces(prompt, 0.0)
        if options.response_prefix:
            spans.append(TextSpan(options.response_prefix, True))
        return spans + (self._pieces(continued.text, 0.0, hard=True) if continued is not None else [])

    # --- rows ---------------------------------------------------------------------------------------------------

    def _read(
        self, row: Message, options: RenderOptions, conversation: Conversation | None
    ) -> tuple[list[Turn], list[dict[str, Any]] | None]:
        """The row as turns, in which no special-token text can be taken for the template's own, and its tools."""
        tools = None
        if conversation is not None:
            turns = turns_of_conversation(conversation, options.system)
        else:
            turns = turns_of_messages(row.get("messages") or (), options.system)
            try:
                tools = [wrap_tool(tool) for tool in read_tools(row["tools"])] if row.get("tools") else None
            except BadTool as bad:
                raise DropRow(str(bad)) from None
        dialect = self.shape.dialect
        for what, needed, shown in (
            ("tools", bool(tools), dialect.tools),
            ("tool calls", any(turn.calls for turn in turns), dialect.calls),
            ("tool results", any(turn.role == "tool" for turn in turns), dialect.results),
        ):
            if needed and not shown:
                raise DropRow(f"the model's chat template does not show {what}; --agent_template writes them as text")
        return protect(turns, self.shape.special), protect(tools, self.shape.special)

    def _samples(self, turns: list[Turn], tools: Any, options: RenderOptions) -> list[list[TextSpan]]:
        last_round = max((i for i, turn in enumerate(turns) if turn.role in ("user", "tool")), default=-1)
        weights = {
            i: _weight(turn, options, i > last_round) for i, turn in enumerate(turns) if turn.role == "assistant"
        }
        everything = options.scale.base == "all"
        trained = [i for i in weights if everything or weights[i]] or [*weights][-1:]
        thinking = options.enable_thinking
        replies = {i: self._reply(turns[: i + 1], tools, thinking) for i in trained}
        samples: list[list[TextSpan]] = []
        while trained or not samples:
            end = len(turns) - 1 if everything else trained[-1]
            last = replies.get(end)
            text = last.text if last else self.shape.render(turns, tools, **self.shape.chat.thinking(thinking))
            shown = [i for i in trained if text.startswith(replies[i].text)]
            self._refuse_lost(turns[: end + 1], text)
            spans: list[TextSpan] = []
            position = 0
            for i in shown:
                spans += self._pieces(text[position : replies[i].start], options.prompt_weight)
                end_of_reply = len(replies[i].text)
                query = turns[i - 1].text if i else ""
                reply = text[replies[i].start : end_of_reply] + (replies[i].eos if i == end else "")
                spans += self._reply_spans(reply, weights[i], turns[i], options, query)
                position = end_of_reply
            rest = last.rest if last is not None and last.rest.strip() else ""
            samples.append(spans + self._pieces(text[position:] + rest, options.prompt_weight))
            trained = [] if everything else [i for i in trained if i not in shown]
        return samples[::-1]

    def _refuse_lost(self, turns: list[Turn], text: str) -> None:
        for turn in turns:
            if turn.role in ("system", "user") and turn.text.strip() not in text:
                raise DropRow(f"the model's chat template does not show the text of a {turn.role} message")
        if "\\ue000" in text:
            raise DropRow("the model's chat template rewrites a message that holds special-token text")

    # --- turns --------------------------------------------------------------------------------------------------

    def _reply(self, turns: list[Turn], tools: Any, thinking: bool | None) -> Reply:
        """The last turn, an assistant's, in its context: with `--enable_thinking`, or the row's, where it fits."""
        turn = turns[-1]
        rest, add, eos, word = self.shape.endings[bool(turn.calls), bool(tools)]
        if turn.calls and eos and not self.shape.endings[False, bool(tools)].eos:
            raise DropRow("the model's chat template does not end a tool call; --agent_template writes calls as text")
        thought, answer = split_thought(turn.text)
        needed = [text for text in (thought, answer.strip(), *(name for name, _ in turn.calls)) if text]
        reason = DropRow("the model's chat template does not go on from its own generation prompt")
        for text, start in self._candidates(turns, tools, thinking, thinks=bool(thought)):
            if any(part not in text[start:] for part in needed):
                reason = DropRow("the model's chat template does not show the whole of an assistant turn")
                continue
            end = len(text) - len(rest)
            if not text.endswith(rest):  # in another mode the template puts something else behind a last turn
                end = text.rfind(word, start) + len(word) if word in text[start:] else len(text)
            text, behind = text[:end] + add, text[end:]
            return Reply(text, start + self.shape.empty_thought(text, start), behind, eos)
        opened = self._opened_thought(turns, tools)
        if opened is None:
            raise reason
        return opened

    def _candidates(
        self, turns: list[Turn], tools: Any, thinking: bool | None, *, thinks: bool
    ) -> Iterator[tuple[str, int]]:
        """Renderings of the turns, and where in each the model begins to write, best first: the mode that is asked for,
        the template's own default, its other modes, then what it makes of the last turn put behind its generation
        prompt."""
        modes = tuple(dict.fromkeys((thinking, None, thinks, not thinks)))
        differing: list[tuple[str, str, int]] = []
        refused: DropRow | None = None
        for mode in modes if self.shape.chat.switches else modes[:1]:
            kwargs = self.shape.chat.thinking(mode)
            try:
                text = self.shape.render(turns, tools, **kwargs)
                prompt = self.shape.render(turns[:-1], tools, add_generation_prompt=True, **kwargs)
            except DropRow as reason:
                refused = refused or reason
                continue
            if text.startswith(prompt):
                yield text, len(prompt)
                continue
            shared = self.shape.shared(prompt, text)
            if self.shape.closes(prompt[shared:]):
                # The prompt of a model that is not to think ends with an empty thought.
                if not thinks:
                    yield prompt + text[shared:], len(prompt)
                continue
            differing.append((text, prompt, shared))
        for text, prompt, shared in differing if not thinks else ():
            if prompt[shared:].strip() in self.shape.open_thoughts:
                yield text, shared
        for text, prompt, shared in differing:
            yield from self._behind_prompt(text, prompt, shared)
        if refused is not None and not differing:
            raise refused

    def _behind_prompt(self, text: str, prompt: str, shared: int) -> Iterator[tuple[str, int]]:
        """The last turn behind the generation prompt, where the template writes the messages before it in another way:
        it starts behind the longest end of the prompt that stands in the rest of the rendering."""
        for mark in self.shape.marks.finditer(prompt, shared):
            head = prompt[mark.start() :]
            place = text.find(head, shared)
            if place >= 0:
                yield prompt + text[place + len(head) :], len(prompt)
        yield prompt + text[shared:], len(prompt)

    def _opened_thought(self, turns: list[Turn], tools: Any) -> Reply | None:
        """A turn whose thoughts the template does not show, though its generation prompt opens them (DeepSeek-R1)."""
        prompt = self.shape.render(turns[:-1], tools, add_generation_prompt=True)
        opening = _THINK_OPENS.match(turns[-1].text)
        if opening is None or turns[-1].calls or not prompt.rstrip().endswith("<think>"):
            return None
        rest, add, eos, _ = self.shape.endings[False, bool(tools)]
        end = self.shape.render([ASKED, ANSWERED], TOOLS if tools else None).rpartition(ANSWER)[2].removesuffix(rest)
        return Reply(prompt + turns[-1].text[opening.end() :] + end + add, len(prompt), "", eos)

    # --- spans --------------------------------------------------------------------------------------------------

    def _reply_spans(self, text: str, weight: float, turn: Turn, options: RenderOptions, query: str) -> list[TextSpan]:
        if not (weight and options.scale.rules and turn.parts and turn.parts[0].loss_scale is None):
            return self._pieces(text, weight, hard=True)
        end = len(text)
        for found in [*self.shape.special.finditer(text)][::-1]:
            end = found.start() if found.end() == end else end
        spans: list[TextSpan] = []
        for part, factor in options.scale.split(text[:end], query):
            spans += self._pieces(part, weight * factor, hard=not spans)
        return spans + self._pieces(text[end:], weight)

    def _pieces(self, text: str, weight: float, *, hard: bool = False) -> list[TextSpan]:
        """A rendering as spans: its special tokens, the texts between them, and special-token text of the content."""
        spans = []
        position = 0
        for found in self._splitter.finditer(text):
            if found.start() > position:
                spans.append(TextSpan(text[position : found.start()], False, weight))
            spans.append(TextSpan(unprotect(found[1]) if found[1] else found[0], not found[1], weight))
            position = found.end()
        if position < len(text):
            spans.append(TextSpan(text[position:], False, weight))
        if hard and spans:
            spans[0] = spans[0]._replace(hard=True)
        return spans

    @cached_property
    def _splitter(self) -> re.Pattern[str]:
        return re.compile(f"\ue000([\\d,]+)\ue001|{self.shape.special.pattern}")


def _weight(turn: Turn, options: RenderOptions, in_last_round: bool) -> float:
    """The weight of an assistant turn, by the flags of the messages it was written as."""
    weights = {options.reply_weight(part, in_last_round) for part in turn.parts}
    if len(weights) > 1:
        raise DropRow("one assistant turn with and without loss needs a template family (--template)")
    return weights.pop()
