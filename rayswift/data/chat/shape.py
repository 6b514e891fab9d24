"""What a model's own chat template shows of itself in small renderings: how it ends a turn, how its generation prompt
opens one, and what stands around a thought."""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from rayswift.data.chat.conversation import DropRow
from rayswift.data.chat.dialect import (
    ANSWER,
    ANSWERED,
    ASKED,
    CALLED,
    NEXT,
    RESULT,
    THOUGHT,
    TOOLS,
    ChatTemplate,
    Dialect,
    find_dialect,
)  # fmt: skip
from rayswift.data.chat.turns import Turn


class Ending(NamedTuple):
    """How the template ends a turn. `rest`: behind the end of a last turn. `add`: the end that it only writes with the
    next turn. `eos`: the end that it never writes. `word`: the end-of-turn token."""

    rest: str
    add: str
    eos: str
    word: str


@dataclass
class TemplateShape:
    """A chat template with what is found out about it, each at its first use.

    `specials`: the tokens that are none in content. `bos`, `eos`: the tokenizer's. `stops`: the tokens at which the
    model's generation_config.json stops, if it says so.
    """

    chat: ChatTemplate
    specials: tuple[str, ...]
    bos: str
    eos: str
    stops: tuple[str, ...] = ()

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Any special token."""
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def marks(self) -> re.Pattern[str]:
        """Special tokens and marks of the content."""
        return re.compile(rf"{self.special.pattern}|</?\w+>")

    def render(self, turns: Sequence[Turn], tools: Any = None, **kwargs: Any) -> str:
        """What the chat template makes of turns. Raises DropRow where it refuses them."""
        return self.chat.render(self.dialect.messages(turns), tools, **kwargs)

    @cached_property
    def dialect(self) -> Dialect:
        """What messages the chat template takes."""
        return find_dialect(self.chat)

    def _try(self, turns: list[Turn], tools: Any = None, **kwargs: Any) -> str:
        try:
            return self.render(turns, tools, **kwargs)
        except DropRow:
            return ""

    @cached_property
    def endings(self) -> dict[tuple[bool, bool], Ending]:
        """How a turn ends, by whether it calls tools and whether there are tools."""
        endings: dict[tuple[bool, bool], Ending] = {}
        for tools in (None, TOOLS) if self.dialect.tools else (None,):
            last = self._try([ASKED, ANSWERED], tools).rpartition(ANSWER)[2]
            next_turn = self._try([ASKED, ANSWERED, Turn("user", NEXT)], tools)
            answer = self._ending(last, next_turn.rpartition(NEXT)[0].rpartition(ANSWER)[2])
            endings[False, bool(tools)] = endings[True, bool(tools)] = answer
            if self.dialect.calls:
                last = self._try([ASKED, CALLED], tools).rpartition("zqValue")[2]
                result = self._try([ASKED, CALLED, Turn("tool", RESULT)], tools)
                behind = result.rpartition(RESULT)[0].rpartition("zqValue")[2]
                # What begins a user's turn ends no call.
                begins = next_turn.rpartition(NEXT)[0].rpartition(ANSWER)[2].rpartition(answer.word)[2]
                head = self.special.search(begins)
                cut = last.find(head[0]) if head and head[0] in last else len(last)
                behind = behind[: behind.find(head[0])] if head and head[0] in behind else behind
                ending = self._ending(last[:cut], behind, answer.word)
                endings[True, bool(tools)] = ending._replace(rest=ending.rest + last[cut:])
        return endings

    def _ending(self, last: str, followed: str, known: str = "") -> Ending:
        """How a turn ends, from what stands behind the content of a last turn, and of one with a turn behind it.

        `known`: the token that ends other turns.
        """
        shared = self.shared(last, followed) if followed else len(last)
        found = [*self.special.finditer(last, 0, shared)]
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
            closing = self.special.match(text, len(text) - len(text[shared:].lstrip()))
            if closing is None or closing[0] == self.bos:
                continue
            if not before_next:
                return Ending(last[closing.end() :], "", "", closing[0])
            if not self.stops or closing[0] in self.stops:
                return Ending(last[shared:], text[shared : closing.end()], "", closing[0])
        return Ending(last[shared:], "", self.eos, self.eos)

    @cached_property
    def openings(self) -> dict[bool | None, str]:
        """By mode, what the generation prompt has behind the head of an assistant turn (an open or empty thought)."""
        openings = {}
        for mode in (None, False, True):
            kwargs = self.chat.thinking(mode)
            prompt = self._try([ASKED], add_generation_prompt=True, **kwargs)
            text = self._try([ASKED, ANSWERED], **kwargs).partition(ANSWER)[0]
            openings[mode] = prompt[self.shared(prompt, text) :]
        return openings

    def shared(self, one: str, other: str) -> int:
        """Length of the common start of two texts, without the start of a token."""
        shared = len(os.path.commonprefix([one, other]))
        for text in (one, other):
            split = next((found for found in self.marks.finditer(text) if found.start() < shared < found.end()), None)
            shared = split.start() if split else shared
        return shared

    @cached_property
    def thought_marks(self) -> tuple[str, str]:
        """What opens and closes a thought."""
        if self.dialect.thoughts != "text":
            thinking = [ASKED, Turn("assistant", f"<think>{THOUGHT}</think>{ANSWER}")]
            for mode in (None, True, False):
                before, _, behind = self._try(thinking, **self.chat.thinking(mode)).partition(THOUGHT)
                marks = [*self.marks.finditer(before)]
                if marks and behind:
                    return before[marks[-1].start() :].strip(), behind.partition(ANSWER)[0].strip()
        return "<think>", "</think>"

    @cached_property
    def open_thoughts(self) -> set[str]:
        """What a generation prompt that opens a thought ends with."""
        known = {opening.strip() for opening in self.openings.values()}
        return {opening for opening in known | {self.thought_marks[0]} if opening and not self.closes(opening)}

    def closes(self, opening: str) -> bool:
        """Whether a prompt that ends so has an empty thought."""
        return opening.rstrip().endswith(self.thought_marks[1])

    def empty_thought(self, text: str, start: int) -> int:
        """Length of the empty thought at the start of a turn, which the model is not to learn."""
        opens, closes = map(re.escape, self.thought_marks)
        # Where a prompt without thinking ends with an empty thought, it says how much white space goes with it.
        ends = [opening for opening in self.openings.values() if self.closes(opening)]
        space = re.escape(ends[0][len(ends[0].rstrip()) :]) if ends else r"\s*"
        found = re.compile(rf"\s*({opens})?\s*{closes}(?:{space})?").match(text, start)
        return found.end() - start if found else 0
