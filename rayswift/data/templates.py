"""Chat template families as records, and how a conversation is laid out with one.

The records are in `templates.json` (names and wording as in SWIFT). A template turns a conversation into *pieces*:
text with its training weight, marked as template text (special tokens in it are tokens) or as content of the dataset
(special tokens in it are plain characters). `encoding.py` turns pieces into ids.

Unlike SWIFT 4.x the ChatML families end with `<|im_end|>` without a newline, as SWIFT 3.3 did.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, NamedTuple

from rayswift.data.conversation import Conversation, DropRow, ReplyPart, Round
from rayswift.errors import UserError

logger = logging.getLogger("rayswift.data.templates")

#: Llama 3.2 puts a date into every prompt. A fixed one (the default of the model's own chat template where there is
#: no clock) makes token ids the same today and tomorrow.
FIXED_DATE = "26 Jul 2024"
LOSS_SCALES = ("default", "last_round", "all")
_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")


class Piece(NamedTuple):
    """A stretch of text.

    `literal`: template text, special tokens in it count; otherwise content. `weight`: 0 is not trained (labels −100).
    `hard`: no token may reach over the start of this piece.
    """

    text: str
    literal: bool
    weight: float = 0.0
    hard: bool = False


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """What decides the layout beside template and row; the fields are SWIFT's flags."""

    system: str | None = None
    loss_scale: str = "default"
    add_non_thinking_prefix: bool = True
    enable_thinking: bool | None = None
    response_prefix: str | None = None

    @property
    def prompt_weight(self) -> float:
        """Weight of everything that is not an assistant turn."""
        return 1.0 if self.loss_scale == "all" else 0.0

    def reply_weight(self, part: ReplyPart, in_last_round: bool) -> float:
        """Weight of a part of an assistant turn: its own `loss` flag, else by the loss scale."""
        trained = part.loss if part.loss is not None else in_last_round or self.loss_scale != "last_round"
        return float(trained)


@dataclass(frozen=True, slots=True)
class Template:
    """One family. Texts may hold `{{SYSTEM}}`, `{{QUERY}}`, `{{BOS}}`, `{{EOS}}`, `{{DATE}}`.

    prefix / system_prefix: start without / with a system text (system_prefix None: no system text possible).
    prompt: around the query, up to where the reply starts. chat_sep: after the reply of an earlier round.
    suffix: after the last reply; trained, and what the model stops at. default_system: used when none is given.
    thinking: None, `hybrid` (may think; an empty think block says no) or `always` (a prompt opens the think block).
    agent: text format of tools, see `conversation.read_conversation`. auto_add_bos: start with the bos token if the
    tokenizer adds one by itself.
    """

    name: str
    prompt: str
    chat_sep: str
    suffix: str
    prefix: str = ""
    system_prefix: str | None = None
    default_system: str | None = None
    stop_words: tuple[str, ...] = ()
    thinking: str | None = None
    thinking_prefix: str = "<think>\n"
    non_thinking_prefix: str = "<think>\n\n</think>\n\n"
    agent: str | None = None
    auto_add_bos: bool = False

    def bind(self, bos: str | None, eos: str | None, adds_bos: bool) -> Template:
        """The template with the tokenizer's own bos and eos filled in.

        Raises:
            UserError: the template needs an eos token and the tokenizer has none.
        """
        if not eos and "{{EOS}}" in self.suffix + self.chat_sep:
            raise UserError(f"--template {self.name} ends replies with the eos token, and the tokenizer has none")
        start = bos if adds_bos and bos and self.auto_add_bos else ""

        def fill(text: str) -> str:
            return text.replace("{{BOS}}", bos or "").replace("{{EOS}}", eos or "").replace("{{DATE}}", FIXED_DATE)

        return replace(
            self,
            prefix=start + fill(self.prefix),
            system_prefix=None if self.system_prefix is None else start + fill(self.system_prefix),
            chat_sep=fill(self.chat_sep),
            suffix=fill(self.suffix),
        )

    @property
    def literals(self) -> tuple[str, ...]:
        """All template text in which special tokens count."""
        return (self.prefix, self.system_prefix or "", self.prompt, self.chat_sep, self.suffix)

    def render(self, conversation: Conversation, options: RenderOptions) -> list[Piece]:
        """Lay out a conversation for training.

        Raises:
            DropRow: a system text where the template has no place for one.
        """
        pieces = self._start(conversation, options)
        last = len(conversation.rounds) - 1
        for index, round_ in enumerate(conversation.rounds):
            pieces += self._query(round_, options.prompt_weight)
            if round_.reply is not None:
                in_last_round = index >= conversation.last_round
                pieces += self._reply(round_.reply, options, in_last_round, is_end=index == last)
        return pieces

    def render_prompt(self, conversation: Conversation, options: RenderOptions) -> list[Piece]:
        """Lay out a conversation for generation: earlier rounds as in training, then up to where the reply starts.

        A conversation that ends with an assistant turn is continued: its text stands open at the end. Thinking of
        earlier rounds is left out, as the models' own chat templates do.
        """
        options = replace(options, loss_scale="last_round")
        pieces = self._start(conversation, options)
        for round_ in conversation.rounds[:-1]:
            pieces += self._query(round_, 0.0)
            pieces += self._reply(round_.reply or [], options, in_last_round=False, is_end=False)
        pieces += self._query(conversation.rounds[-1], 0.0)
        reply = conversation.rounds[-1].reply
        if reply is not None:
            pieces.append(Piece("".join(part.text for part in reply), False, hard=True))
        else:
            pieces.append(Piece(self.opening(options), True))
        return pieces

    def opening(self, options: RenderOptions) -> str:
        """What stands before the first generated token: `--response_prefix`, or the think mark the mode asks for."""
        if options.response_prefix is not None:
            return options.response_prefix
        if self.thinking == "hybrid" and not options.enable_thinking:
            return self.non_thinking_prefix
        if self.thinking == "always" and options.enable_thinking is not False:
            return self.thinking_prefix
        return ""

    def _start(self, conversation: Conversation, options: RenderOptions) -> list[Piece]:
        system = choose_system(conversation.system, options.system, self.default_system)
        if conversation.tools_text:
            system = f"{system}\n\n{conversation.tools_text}" if system else conversation.tools_text
        weight = options.prompt_weight
        if not system:
            return [Piece(self.prefix, True, weight)] if self.prefix else []
        if self.system_prefix is None:
            raise DropRow(f"template {self.name} has no place for a system message")
        before, after = _around(self.system_prefix, "{{SYSTEM}}")
        return [Piece(before, True, weight), Piece(system, False, weight), Piece(after, True, weight)]

    def _query(self, round_: Round, weight: float) -> list[Piece]:
        before, after = _around(self.prompt, "{{QUERY}}")
        return [Piece(before, True, weight), Piece(round_.query, False, weight), Piece(after, True, weight)]

    def _reply(
        self, reply: list[ReplyPart], options: RenderOptions, in_last_round: bool, *, is_end: bool
    ) -> list[Piece]:
        if self.thinking is not None and options.loss_scale == "last_round" and not in_last_round:
            reply = [part._replace(text=strip_thoughts(part.text)) for part in reply]
        pieces, reply = self._think_block(reply, options, in_last_round)
        pieces += [Piece(part.text, False, options.reply_weight(part, in_last_round), hard=True) for part in reply]
        end_weight = pieces[-1].weight if pieces else 0.0
        if is_end:
            return [*pieces, Piece(self.suffix, True, end_weight)]
        # SWIFT trains, after an earlier reply, the part of chat_sep that equals the suffix (the end-of-turn token).
        if self.suffix and self.chat_sep.startswith(self.suffix):
            pieces.append(Piece(self.suffix, True, end_weight))
            return [*pieces, Piece(self.chat_sep[len(self.suffix) :], True, options.prompt_weight, hard=True)]
        return [*pieces, Piece(self.chat_sep, True, options.prompt_weight, hard=True)]

    def _think_block(
        self, reply: list[ReplyPart], options: RenderOptions, in_last_round: bool
    ) -> tuple[list[Piece], list[ReplyPart]]:
        """Split off the start of a reply that is not trained, or at whose end a prompt for generation would stop."""
        if self.thinking is None or not reply:
            return [], reply
        first, rest = reply[0], reply[1:]
        if self.thinking == "hybrid":
            empty = _EMPTY_THINK.match(first.text)
            if empty:
                return [Piece(empty.group(), False, 0.0, True)], [first._replace(text=first.text[empty.end() :]), *rest]
            wanted = options.add_non_thinking_prefix and (in_last_round or options.loss_scale != "last_round")
            if wanted and not first.text.lstrip().startswith("<think>"):
                return [Piece(self.non_thinking_prefix, True, 0.0)], reply
        elif first.text.startswith(self.thinking_prefix):
            opening = Piece(self.thinking_prefix, False, options.reply_weight(first, in_last_round), True)
            return [opening], [first._replace(text=first.text[len(self.thinking_prefix) :]), *rest]
        return [], reply


def render_bare(conversation: Conversation, options: RenderOptions, bos: str, eos: str) -> list[Piece]:
    """`--use_chat_template false`: bos, every text of the conversation in order, eos.

    SWIFT keeps only the last round and no system text; here nothing is lost. An empty `bos` or `eos` leaves it out.
    """
    weight = options.prompt_weight
    pieces = [Piece(bos, True, weight)] if bos else []
    opening = [choose_system(conversation.system, options.system, None) or "", conversation.tools_text]
    pieces += [Piece(text, False, weight) for text in opening if text]
    for index, round_ in enumerate(conversation.rounds):
        if round_.query:
            pieces.append(Piece(round_.query, False, weight))
        in_last_round = index >= conversation.last_round
        for part in round_.reply or []:
            trained = max(weight, options.reply_weight(part, in_last_round)) if part.loss is None else float(part.loss)
            pieces.append(Piece(part.text, False, trained, hard=len(pieces) > bool(bos)))
    return [*pieces, Piece(eos, True, pieces[-1].weight if pieces else weight)] if eos else pieces


def choose_system(in_row: str | None, from_flag: str | None, default: str | None) -> str | None:
    """The row's system text, else `--system`, else the template's; an empty one means none."""
    return in_row if in_row is not None else from_flag if from_flag is not None else default


def strip_thoughts(text: str) -> str:
    """A reply without its `<think>…</think>`."""
    return text.rsplit("</think>", 1)[-1].lstrip() if "</think>" in text else text


@functools.cache
def _around(text: str, mark: str) -> tuple[str, str]:
    before, _, after = text.partition(mark)
    return before, after


# --- records ----------------------------------------------------------------------------------------------------


@functools.cache
def load_templates() -> Mapping[str, Template]:
    """All families by name, in the order in which a tokenizer is matched against them."""
    records = json.loads(resources.files("rayswift.data").joinpath("templates.json").read_text(encoding="utf-8"))
    templates = {}
    for name, record in records.items():
        fields: dict[str, Any] = {}
        while record is not None:  # nearest record wins
            fields = {**record, **fields}
            record = records[fields.pop("extends")] if "extends" in record else None
        fields["stop_words"] = tuple(fields.get("stop_words", ()))
        templates[name] = Template(name=name, **fields)
    return templates


def get_template(name: str) -> Template:
    """The family of this name.

    Raises:
        UserError: there is none; the message lists the names.
    """
    try:
        return load_templates()[name]
    except KeyError:
        names = ", ".join(load_templates())
        raise UserError(f"--template {name}: unknown; choose auto or one of {names}") from None


# --- which family a tokenizer belongs to ------------------------------------------------------------------------

_PROBE_ROUNDS = [Round("q 1", [ReplyPart("r 1")]), Round("q 2", [ReplyPart("r 2")]), Round("q 3")]


def match_template(tokenizer: Any) -> Template | None:
    """The family whose layout equals what the tokenizer's own chat template renders, bound to the tokenizer.

    Compared with and without a system text, over two rounds, with the generation prompt and at the end of a reply
    (where a newline after the end-of-turn token does not count). None when no family fits.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        expected = [own_rendering(tokenizer, as_messages(probe, probe.system), **kwargs) for probe, kwargs in _probes()]
    except DropRow as refused:  # no place for a system text, for instance
        logger.debug("no family fits: %s", refused.reason)
        return None
    for template in load_templates().values():
        bound = template.bind(tokenizer.bos_token, tokenizer.eos_token or "\0", adds_bos(tokenizer))
        if _same_layout(bound, expected):
            return bound
    return None


def _probes() -> Iterator[tuple[Conversation, dict[str, Any]]]:
    for system in ("s 1", None):
        asked = Conversation(system, _PROBE_ROUNDS)
        yield asked, {"add_generation_prompt": True, "enable_thinking": True}
        yield asked, {"add_generation_prompt": True, "enable_thinking": False}
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


def text_of(pieces: list[Piece]) -> str:
    """The pieces as one text."""
    return "".join(piece.text for piece in pieces)


def as_messages(conversation: Conversation, system: str | None) -> list[dict[str, str]]:
    """A conversation as plain chat messages, the system text first if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    for round_ in conversation.rounds:
        messages.append({"role": "user", "content": round_.query})
        if round_.reply is not None:
            messages.append({"role": "assistant", "content": "".join(part.text for part in round_.reply)})
    return messages


def own_rendering(tokenizer: Any, messages: list[dict[str, str]], **kwargs: Any) -> str:
    """What the tokenizer's own chat template makes of the messages.

    Raises:
        DropRow: the template refuses them. It is a program of the model's author and can fail as programs do.
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, date_string=FIXED_DATE, **kwargs))
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DropRow(f"the model's chat template refuses the conversation: {error}") from None


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its bos token before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
