"""A template derived from the model's own chat template, for tokenizers that no family of `families.json` fits.

A chat template is a program that writes text; nothing in it says which part the model is to learn. What the model
writes in a turn is what the rendering of the conversation up to that turn adds to the rendering of the messages before
it with the generation prompt, up to the token that ends the turn. So each turn is rendered as the model will meet it in
use. Where later renderings keep earlier turns as they were, one sample holds them all; where the template rewrites
earlier turns (it leaves out their thoughts, most often), a row gives several samples, and each turn is trained once.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from rayswift.data.chat.agents import BadTool, read_tools, wrap_tool
from rayswift.data.chat.conversation import Conversation, DropRow, Message
from rayswift.data.chat.dialect import ANSWER, ANSWERED, ASKED, CALLED, NEXT, RESULT, THOUGHT, TOOLS, ChatTemplate
from rayswift.data.chat.dialect import Dialect, find_dialect, split_thought
from rayswift.data.chat.families import RenderOptions, TextSpan
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


class Ending(NamedTuple):
    """How the template ends a turn. `rest`: behind the end of a last turn. `add`: the end that it only writes with the
    next turn. `eos`: the end that it never writes. `word`: the end-of-turn token."""

    rest: str
    add: str
    eos: str
    word: str


@dataclass
class JinjaTemplate:
    """The layout of a tokenizer's own chat template.

    `specials`: the tokens that are none in content. `eos`: put after a last reply that the chat template leaves open.
    `stops`: the tokens at which the model's generation_config.json stops, if it says so.
    """

    chat: ChatTemplate
    specials: tuple[str, ...]
    bos: str
    eos: str
    stops: tuple[str, ...] = ()
    name: str = "jinja"
    agent: str | None = None

    @property
    def literals(self) -> tuple[str, ...]:
        """Template text in which special tokens count."""
        return (self.chat.source, *(ending.word for ending in self._endings.values()), self.eos)

    @property
    def stop_words(self) -> tuple[str, ...]:
        """The special tokens that end a turn."""
        return tuple(dict.fromkeys(ending.word for ending in self._endings.values() if ending.word))

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template shows tools and their calls."""
        return self._dialect.tools and self._dialect.calls

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
            if turns[first].role != "assistant":
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
        continued = turns.pop() if turns[-1].role == "assistant" else None
        if continued is not None and continued.calls:
            raise DropRow("a last assistant turn that calls tools cannot be continued")
        prompt = self._render(turns, tools, add_generation_prompt=True, **self.chat.thinking(options.enable_thinking))
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
        needed = {
            "tools": bool(tools),
            "tool calls": any(turn.calls for turn in turns),
            "tool results": any(turn.role == "tool" for turn in turns),
        }
        shown = {"tools": self._dialect.tools, "tool calls": self._dialect.calls, "tool results": self._dialect.results}
        for what in needed:
            if needed[what] and not shown[what]:
                raise DropRow(f"the model's chat template does not show {what}; --agent_template writes them as text")
        return protect(turns, self._special), protect(tools, self._special)

    def _samples(self, turns: list[Turn], tools: Any, options: RenderOptions) -> list[list[TextSpan]]:
        last_round = max((i for i, turn in enumerate(turns) if turn.role in ("user", "tool")), default=-1)
        weights = {i: _weight(turn, options, i > last_round) for i, turn in enumerate(turns) if turn.role == "assistant"}
        everything = options.scale.base == "all"
        trained = [i for i in weights if everything or weights[i]] or [*weights][-1:]
        replies = {i: self._reply(turns[: i + 1], tools) for i in trained}
        samples: list[list[TextSpan]] = []
        while trained or not samples:
            end = len(turns) - 1 if everything else trained[-1]
            last = replies.get(end)
            text = last.text if last is not None else self._render(turns, tools)
            shown = [i for i in trained if text.startswith(replies[i].text)]
            self._refuse_lost(turns[: end + 1], text)
            spans, position = [], 0
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

    def _reply(self, turns: list[Turn], tools: Any) -> Reply:
        """The last turn, an assistant's, in its context."""
        turn = turns[-1]
        rest, add, eos, word = self._endings[bool(turn.calls), bool(tools)]
        thought, answer = split_thought(turn.text)
        needed = [text for text in (thought, answer.strip(), *(name for name, _ in turn.calls)) if text]
        reason = DropRow("the model's chat template does not go on from its own generation prompt")
        for text, start in self._candidates(turns, tools, thinks=bool(thought)):
            if any(part not in text[start:] for part in needed):
                reason = DropRow("the model's chat template does not show the whole of an assistant turn")
                continue
            end = len(text) - len(rest)
            if not text.endswith(rest):  # in another mode the template puts something else behind a last turn
                end = text.rfind(word, start) + len(word) if word in text[start:] else len(text)
            text, behind = text[:end] + add, text[end:]
            return Reply(text, start + self._empty_thought(text, start), behind, eos)
        opened = self._opened_thought(turns, tools)
        if opened is None:
            raise reason
        return opened

    def _candidates(self, turns: list[Turn], tools: Any, *, thinks: bool) -> Iterator[tuple[str, int]]:
        """Renderings of the turns, and where in each the model begins to write, best first: the template's own default,
        then its other modes, then what it makes of the last turn put behind its generation prompt."""
        modes = (None, True, False) if thinks else (None, False, True)
        differing: list[tuple[str, str, int]] = []
        refused: DropRow | None = None
        for mode in modes if self.chat.switches else modes[:1]:
            kwargs = self.chat.thinking(mode)
            try:
                text = self._render(turns, tools, **kwargs)
                prompt = self._render(turns[:-1], tools, add_generation_prompt=True, **kwargs)
            except DropRow as reason:
                refused = refused or reason
                continue
            if text.startswith(prompt):
                yield text, len(prompt)
                continue
            shared = self._shared(prompt, text)
            if self._closes(prompt[shared:]):
                # The prompt of a model that is not to think ends with an empty thought.
                if not thinks:
                    yield prompt + text[shared:], len(prompt)
                continue
            differing.append((text, prompt, shared))
        for text, prompt, shared in differing if not thinks else ():
            if prompt[shared:].strip() in self._open_thoughts:
                yield text, shared
        for text, prompt, shared in differing:
            yield from self._behind_prompt(text, prompt, shared)
        if refused is not None and not differing:
            raise refused

    def _behind_prompt(self, text: str, prompt: str, shared: int) -> Iterator[tuple[str, int]]:
        """The last turn behind the generation prompt, where the template writes the messages before it in another way:
        it starts behind the longest end of the prompt that stands in the rest of the rendering."""
        for mark in self._marks.finditer(prompt, shared):
            head = prompt[mark.start() :]
            place = text.find(head, shared)
            if place >= 0:
                yield prompt + text[place + len(head) :], len(prompt)
        yield prompt + text[shared:], len(prompt)

    def _opened_thought(self, turns: list[Turn], tools: Any) -> Reply | None:
        """A turn whose thoughts the template does not show, though its generation prompt opens them (DeepSeek-R1)."""
        prompt = self._render(turns[:-1], tools, add_generation_prompt=True)
        opening = _THINK_OPENS.match(turns[-1].text)
        if opening is None or turns[-1].calls or not prompt.rstrip().endswith("<think>"):
            return None
        rest, add, eos, _ = self._endings[False, bool(tools)]
        end = self._try([ASKED, ANSWERED], TOOLS if tools else None).rpartition(ANSWER)[2].removesuffix(rest)
        return Reply(prompt + turns[-1].text[opening.end() :] + end + add, len(prompt), "", eos)

    def _render(self, turns: Sequence[Turn], tools: Any = None, **kwargs: Any) -> str:
        return self.chat.render(self._dialect.messages(turns), tools, **kwargs)

    # --- spans --------------------------------------------------------------------------------------------------

    def _reply_spans(self, text: str, weight: float, turn: Turn, options: RenderOptions, query: str) -> list[TextSpan]:
        if not (weight and options.scale.rules and turn.parts and turn.parts[0].loss_scale is None):
            return self._pieces(text, weight, hard=True)
        end = len(text)
        while found := self._last_special(text, end):
            end = found.start()
        spans = []
        for part, factor in options.scale.split(text[:end], query):
            spans += self._pieces(part, weight * factor, hard=not spans)
        return spans + self._pieces(text[end:], weight)

    def _last_special(self, text: str, end: int) -> re.Match[str] | None:
        return next((found for found in self._special.finditer(text, 0, end) if found.end() == end), None)

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
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _splitter(self) -> re.Pattern[str]:
        return re.compile(f"\ue000([\\d,]+)\ue001|{self._special.pattern}")

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        """Special tokens and marks of the content."""
        return re.compile(rf"{self._special.pattern}|</?\w+>")

    # --- what the template shows of itself ------------------------------------------------------------------------

    @cached_property
    def _dialect(self) -> Dialect:
        return find_dialect(self.chat)

    def _try(self, turns: list[Turn], tools: Any = None, **kwargs: Any) -> str:
        try:
            return self._render(turns, tools, **kwargs)
        except DropRow:
            return ""

    @cached_property
    def _endings(self) -> dict[tuple[bool, bool], Ending]:
        """How a turn ends, by whether it calls tools and whether there are tools."""
        endings: dict[tuple[bool, bool], Ending] = {}
        for tools in (None, TOOLS) if self._dialect.tools else (None,):
            last = self._try([ASKED, ANSWERED], tools).rpartition(ANSWER)[2]
            next_turn = self._try([ASKED, ANSWERED, Turn("user", NEXT)], tools)
            answer = self._ending(last, next_turn.rpartition(NEXT)[0].rpartition(ANSWER)[2])
            endings[False, bool(tools)] = endings[True, bool(tools)] = answer
            if self._dialect.calls:
                last = self._try([ASKED, CALLED], tools).rpartition("zqValue")[2]
                result = self._try([ASKED, CALLED, Turn("tool", RESULT)], tools)
                behind = result.rpartition(RESULT)[0].rpartition("zqValue")[2]
                # What begins a user's turn ends no call.
                begins = next_turn.rpartition(NEXT)[0].rpartition(ANSWER)[2].rpartition(answer.word)[2]
                heads = {found[0] for found in self._special.finditer(begins)}
                cut = next((found.start() for found in self._special.finditer(last) if found[0] in heads), len(last))
                ending = self._ending(last[:cut], behind, answer.word)
                endings[True, bool(tools)] = ending._replace(rest=ending.rest + last[cut:])
        return endings

    def _ending(self, last: str, followed: str, known: str = "") -> Ending:
        """How a turn ends, from what stands behind the content of a last turn, and of one with a turn behind it.

        `known`: the token that ends other turns.
        """
        shared = self._shared(last, followed) if followed else len(last)
        found = [*self._special.finditer(last, 0, shared)]
        if found and not last[found[-1].end() : shared].strip():
            # A template that always writes the next head, too, goes on behind the token that generation stops at.
            end = next((one for one in found[::-1] if one[0] in (self.eos, *self.stops)), found[-1])
            return Ending(last[end.end() :], "", "", end[0])
        if known and known in last:
            return Ending(last.rpartition(known)[2], "", "", known)
        if known and known in followed:
            content = followed.partition(known)[0]
            return Ending(last[len(last.rstrip()) :], content[len(content.rstrip()) :] + known, "", known)
        # Not ended yet: by a token that the template puts behind a last turn only, or before the next one only.
        for text, before_next in ((last, False), (followed, True)):
            end = self._special.match(text, len(text) - len(text[shared:].lstrip()))
            if end and end[0] != self.bos and not (before_next and self.stops and end[0] not in self.stops):
                if before_next:
                    return Ending(last[shared:], text[shared : end.end()], "", end[0])
                return Ending(last[end.end() :], "", "", end[0])
        return Ending(last[shared:], "", self.eos, self.eos)

    @cached_property
    def _openings(self) -> dict[bool | None, str]:
        """By mode, what the generation prompt has behind the head of an assistant turn (an open or empty thought)."""
        openings = {}
        for mode in (None, False, True):
            kwargs = self.chat.thinking(mode)
            prompt = self._try([ASKED], add_generation_prompt=True, **kwargs)
            text = self._try([ASKED, ANSWERED], **kwargs).partition(ANSWER)[0]
            openings[mode] = prompt[self._shared(prompt, text) :]
        return openings

    def _shared(self, one: str, other: str) -> int:
        """Length of the common start of two texts, without the start of a token."""
        shared = len(os.path.commonprefix([one, other]))
        for text in (one, other):
            split = next((found for found in self._marks.finditer(text) if found.start() < shared < found.end()), None)
            shared = split.start() if split else shared
        return shared

    @cached_property
    def _thought_marks(self) -> tuple[str, str]:
        """What opens and closes a thought."""
        if self._dialect.thoughts != "text":
            thinking = [ASKED, Turn("assistant", f"<think>{THOUGHT}</think>{ANSWER}")]
            for mode in (None, True, False):
                before, _, behind = self._try(thinking, **self.chat.thinking(mode)).partition(THOUGHT)
                marks = [*self._marks.finditer(before)]
                if marks and behind:
                    return before[marks[-1].start() :].strip(), behind.partition(ANSWER)[0].strip()
        return "<think>", "</think>"

    @cached_property
    def _open_thoughts(self) -> set[str]:
        """What a generation prompt that opens a thought ends with."""
        known = {opening.strip() for opening in self._openings.values()}
        return {opening for opening in known | {self._thought_marks[0]} if opening and not self._closes(opening)}

    def _closes(self, opening: str) -> bool:
        return opening.rstrip().endswith(self._thought_marks[1])

    def _empty_thought(self, text: str, start: int) -> int:
        """Length of the empty thought at the start of a turn, which the model is not to learn."""
        opens, closes = map(re.escape, self._thought_marks)
        # Where a prompt without thinking ends with an empty thought, it says how much white space goes with it.
        ends = [opening for opening in self._openings.values() if self._closes(opening)]
        space = re.escape(ends[0][len(ends[0].rstrip()) :]) if ends else r"\s*"
        found = re.compile(rf"\s*({opens})?\s*{closes}(?:{space})?").match(text, start)
        return found.end() - start if found else 0


def _weight(turn: Turn, options: RenderOptions, in_last_round: bool) -> float:
    """The weight of an assistant turn, by the flags of the messages it was written as."""
    weights = {options.reply_weight(part, in_last_round) for part in turn.parts}
    if len(weights) > 1:
        raise DropRow("one assistant turn with and without loss needs a template family (--template)")
    return weights.pop()
