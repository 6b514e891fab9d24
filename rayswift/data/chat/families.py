"""Chat template families as records, and how a conversation is laid out with one.

The records are in `families.json` (names and wording as in SWIFT). A template turns a conversation into *spans*:
text with its training weight, marked as template text (special tokens in it are tokens) or as content of the dataset
(special tokens in it are plain characters). :mod:`rayswift.data.tokens.segments` turns spans into ids.

Unlike SWIFT 4.x the ChatML families end with `<|im_end|>` without a newline, as SWIFT 3.3 did.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, NamedTuple

from rayswift.data.chat.agents import read_records
from rayswift.data.chat.conversation import Conversation, DropRow, ReplyPart, Round
from rayswift.data.chat.loss_weights import LossScale, read_loss_scale
from rayswift.errors import UserError

#: Llama 3.2 and others put a date into every prompt. A fixed one (the default of Llama's own chat template where there
#: is no clock) makes token ids the same today and tomorrow; `--template_date` sets another.
FIXED_DATE = date(2024, 7, 26)
#: SWIFT's names of families whose layout the model's own chat template is better at: it is used.
OWN_TEMPLATES = (
    "qwen3_5", "qwen3_6", "qwen3_next", "glm4_5", "glm4_7", "phi3", "gemma2", "gemma3", "mistral", "mistral_nemo",
    "minimax_m2", "kimi_k2", "seed_oss", "gpt_oss", "internlm3", "hunyuan", "step", "ernie", "granite",
)  # fmt: skip
_EMPTY_THINK = re.compile(r"(?:<think>\s*)?</think>\s*")
_THOUGHTS = re.compile(r"^.*</think>(\s*)", re.DOTALL)


class TextSpan(NamedTuple):
    """A span of text.

    `literal`: template text, special tokens in it count; otherwise content. `weight`: 0 is not trained (labels −100).
    `hard`: no token may reach over the start of this span.
    """

    text: str
    literal: bool
    weight: float = 0.0
    hard: bool = False


@dataclass(frozen=True)
class RenderOptions:
    """What decides the layout beside template and row; the fields are SWIFT's flags."""

    system: str | None = None
    loss_scale: str = "default"
    add_non_thinking_prefix: bool = True
    enable_thinking: bool | None = None
    response_prefix: str | None = None

    @functools.cached_property
    def scale(self) -> LossScale:
        """The parsed `--loss_scale`."""
        return read_loss_scale(self.loss_scale)

    @functools.cached_property
    def prompt_weight(self) -> float:
        """Weight of everything that is not an assistant turn."""
        return 1.0 if self.scale.base == "all" else 0.0

    def reply_weight(self, part: ReplyPart, in_last_round: bool) -> float:
        """Weight of a part of an assistant turn: its own `loss`, else the base of the flag, says whether it is trained,
        its `loss_scale` how strongly."""
        if part.given:
            return self.prompt_weight
        trained = part.loss if part.loss is not None else in_last_round or self.scale.base != "last_round"
        return float(trained and (1.0 if part.loss_scale is None else part.loss_scale))

    def weigh(self, part: ReplyPart, in_last_round: bool, query: str) -> list[TextSpan]:
        """A part of an assistant turn as spans with their weights."""
        weight = self.reply_weight(part, in_last_round)
        rules = self.scale.rules and weight and part.loss_scale is None and not (part.given or part.literal)
        if not rules:
            return [TextSpan(part.text, part.literal, weight, True)]
        return [TextSpan(text, False, weight * factor, True) for text, factor in self.scale.split(part.text, query)]


@dataclass(frozen=True, slots=True)
class Template:
    """One family. Texts may hold `{{SYSTEM}}`, `{{QUERY}}`, `{{BOS}}`, `{{EOS}}`, `{{DATE}}`, `{{ISO_DATE}}`.

    prefix / system_prefix: start without / with a system text (system_prefix None: no system text possible).
    prompt: around the query, up to where the reply starts; next_prompt: the same after an earlier round, where it
    differs. reply_start: the end of `prompt` that opens the reply, enough where a conversation starts with a reply
    (None: such a conversation gets an empty query). reply_prefix: what the model writes in front of an answer (not of a
    call) after that. chat_sep: after the reply of an earlier round.
    suffix: after the last reply; trained, and what the model stops at. default_system: used when none is given.
    thinking: None, `hybrid` (may think; non_thinking_prefix says no) or `always` (a prompt opens the think block).
    thinking_prefix: what opens a thought in a prompt. history_prefix: what earlier replies start with whose thoughts
    are left out; history_space: the white space behind those stays. agent: name of the agent template (None: tools are
    refused). environment: what `{{ENVIRONMENT}}` in the start is where there are tools. auto_add_bos: start with the
    bos token if the tokenizer adds one by itself. own_prompt: prompts for generation are those of the tokenizer's own
    chat template. note: where the models' own chat templates are followed and not SWIFT.
    """

    name: str
    prompt: str
    chat_sep: str
    suffix: str
    prefix: str = ""
    system_prefix: str | None = None
    next_prompt: str | None = None
    reply_start: str | None = None
    reply_prefix: str = ""
    default_system: str | None = None
    stop_words: tuple[str, ...] = ()
    thinking: str | None = None
    thinking_prefix: str = ""
    non_thinking_prefix: str = "<think>\n\n</think>\n\n"
    history_prefix: str = ""
    history_space: bool = False
    agent: str | None = None
    environment: str = ""
    auto_add_bos: bool = False
    own_prompt: bool = False
    note: str = ""

    def bind(self, bos: str | None, eos: str | None, adds_bos: bool, day: date = FIXED_DATE) -> Template:
        """The template with the tokenizer's own bos and eos and a day filled in.

        Raises:
            UserError: the template needs an eos token and the tokenizer has none.
        """
        if not eos and "{{EOS}}" in self.suffix + self.chat_sep:
            raise UserError(f"--template {self.name} ends replies with the eos token, and the tokenizer has none")
        start = bos if adds_bos and bos and self.auto_add_bos else ""

        def fill(text: str) -> str:
            text = text.replace("{{BOS}}", bos or "").replace("{{EOS}}", eos or "")
            return text.replace("{{DATE}}", day.strftime("%d %b %Y")).replace("{{ISO_DATE}}", day.isoformat())

        return replace(
            self,
            prefix=start + fill(self.prefix),
            system_prefix=None if self.system_prefix is None else start + fill(self.system_prefix),
            chat_sep=fill(self.chat_sep),
            suffix=fill(self.suffix),
            default_system=None if self.default_system is None else fill(self.default_system),
        )

    @property
    def literals(self) -> tuple[str, ...]:
        """All template text in which special tokens count."""
        return (self.prefix, self.system_prefix or "", self.prompt, self.chat_sep, self.suffix)

    def render(self, conversation: Conversation, options: RenderOptions) -> list[TextSpan]:
        """Lay out a conversation for training.

        Raises:
            DropRow: a system text where the template has no place for one.
        """
        spans = self._start(conversation, options)
        last_round = conversation.last_round
        for index in range(len(conversation.rounds)):
            spans += self._round(conversation, index, options, index >= last_round)
        return spans

    def render_prompt(self, conversation: Conversation, options: RenderOptions) -> list[TextSpan]:
        """Lay out a conversation for generation: earlier rounds as in training, then up to where the reply starts.

        A conversation that ends with an assistant turn is continued: its text stands open at the end. Thinking of
        earlier rounds is left out, as the models' own chat templates do; in a tool loop it stays, and so does the mark
        of no thinking that the earlier prompts of the loop ended with.
        """
        marked = options.add_non_thinking_prefix and not options.enable_thinking
        options = replace(options, loss_scale="last_round", add_non_thinking_prefix=marked or bool(self.history_prefix))
        spans = self._start(conversation, options)
        last_round, end = conversation.last_round, len(conversation.rounds) - 1
        for index in range(end):
            spans += self._round(conversation, index, options, index >= last_round)
        spans += self._query(conversation, end, 0.0)
        if conversation.rounds[-1].reply is None:
            # After a tool result in a turn of its own the reply goes on: no think mark, as in training.
            goes_on = conversation.rounds[-1].results is not None and options.response_prefix is None
            spans.append(TextSpan("" if goes_on else self.opening(options), True))
        else:
            spans += [TextSpan(part.text, part.literal, hard=True) for part in self._written(conversation.rounds[-1])]
        return spans

    def opening(self, options: RenderOptions) -> str:
        """What stands before the first generated token: `--response_prefix`, or the think mark the mode asks for."""
        if options.response_prefix is not None:
            return options.response_prefix and self.reply_prefix + options.response_prefix
        if self.thinking == "hybrid" and not options.enable_thinking:
            return self.non_thinking_prefix
        if self.thinking is not None and options.enable_thinking is not False:
            return self.thinking_prefix
        return ""

    def _start(self, conversation: Conversation, options: RenderOptions) -> list[TextSpan]:
        weight, tools, agent = options.prompt_weight, conversation.tools, conversation.agent
        place = agent.tools_place if tools and agent is not None else ""
        in_system = place not in ("", "before_query")
        default = None if place == "instead_of_default" else self.default_system
        if in_system and agent is not None:
            default = default or agent.default_system
        system = choose_system(conversation.system, options.system, default)
        environment = self.environment if tools else ""
        if not system and not in_system:
            prefix = self.prefix.replace("{{ENVIRONMENT}}", environment)
            return [TextSpan(prefix, True, weight)] if prefix else []
        if self.system_prefix is None:
            raise DropRow(f"template {self.name} has no place for a system message")
        before, after = _around(self.system_prefix.replace("{{ENVIRONMENT}}", environment), "{{SYSTEM}}")
        told = [TextSpan(text, literal, weight) for text, literal in tools if in_system]
        said = [TextSpan(system, False, weight)] if system else []
        gap = [TextSpan("\n\n", False, weight)] if told and said else []
        parts = [*said, *gap, *told]
        if gap and place == "own_block":
            parts = [*told, TextSpan(after + before.removeprefix(self.prefix), True, weight), *said]
        return [TextSpan(before, True, weight), *parts, TextSpan(after, True, weight)]

    def _round(
        self, conversation: Conversation, index: int, options: RenderOptions, in_last_round: bool
    ) -> list[TextSpan]:
        """A round, with the end-of-turn token (trained like the end of the reply) and what stands before the next."""
        rounds, agent, prompt_weight = conversation.rounds, conversation.agent, options.prompt_weight
        spans, reply = self._query(conversation, index, prompt_weight), rounds[index].reply
        if reply is None:
            return spans
        is_end = index == len(rounds) - 1
        spans += self._reply(rounds[index], options, in_last_round, is_end=is_end)
        last_part = reply[-1]
        called = agent is not None and agent.call_ends_turn and last_part.literal and last_part.text == agent.calls_end
        if called and (is_end or rounds[index + 1].results is not None):
            return spans
        weight = options.reply_weight(last_part, in_last_round)
        if is_end:
            spans.append(TextSpan(self.suffix, True, weight))
        # SWIFT trains, after an earlier reply, the part of chat_sep that equals the suffix (the end-of-turn token).
        elif self.suffix and self.chat_sep.startswith(self.suffix):
            spans.append(TextSpan(self.suffix, True, weight))
            spans.append(TextSpan(self.chat_sep[len(self.suffix) :], True, prompt_weight, hard=True))
        else:
            spans.append(TextSpan(self.chat_sep, True, prompt_weight, hard=True))
        return spans

    def _query(self, conversation: Conversation, index: int, weight: float) -> list[TextSpan]:
        """What the model reads in a round, up to where its reply starts."""
        round_, agent = conversation.rounds[index], conversation.agent
        answered = round_.reply is not None or index == len(conversation.rounds) - 1
        if round_.results is not None and agent is not None:
            results = [TextSpan(text, literal, weight) for text, literal in round_.results]
            return [*results, TextSpan(agent.results_end if answered else "", True, weight)]
        if round_.query is None and self.reply_start is not None:
            return [TextSpan(self.reply_start, True, weight)]
        follows_reply = index > 0 and conversation.rounds[index - 1].reply is not None
        prompt = self.next_prompt if follows_reply and self.next_prompt is not None else self.prompt
        before, after = _around(prompt, "{{QUERY}}")
        spans = [TextSpan(before, True, weight)]
        if index == 0 and conversation.tools and agent is not None and agent.tools_place == "before_query":
            spans += [TextSpan(text, literal, weight) for text, literal in conversation.tools]
        spans.append(TextSpan(round_.query or "", False, weight))
        # A user who goes on after a tool result: the first user turn is closed as SWIFT closes it.
        spans.append(TextSpan(after if answered else self.chat_sep, True, weight))
        return spans

    def _written(self, round_: Round) -> list[ReplyPart]:
        """The reply of a round with what the model writes in front of it."""
        reply = round_.reply or []
        if not self.reply_prefix or round_.calls or not reply or reply[0].text.startswith(self.reply_prefix):
            return reply
        return [reply[0]._replace(text=self.reply_prefix + reply[0].text), *reply[1:]]

    def _reply(self, round_: Round, options: RenderOptions, in_last_round: bool, *, is_end: bool) -> list[TextSpan]:
        reply, spans = self._written(round_), []
        if self.thinking is not None:
            if options.scale.base == "last_round" and not in_last_round:
                space = r"\1" if self.history_space and not round_.beside else ""
                reply = [part._replace(text=_THOUGHTS.sub(space, part.text)) for part in reply]
                if self.history_prefix:
                    spans.append(TextSpan(self.history_prefix, True, 0.0))
            # In prompts no reply but the one they ask for is marked, unless the template marks its history, too.
            marks = options.scale.base != "last_round" or (in_last_round and (is_end or bool(self.history_prefix)))
            marks = marks and round_.results is None
            opening, reply = self._think_block(reply, options, marks=marks)
            spans += opening
        for part in reply:
            spans += options.weigh(part, in_last_round, round_.query or "")
        return spans

    def _think_block(
        self, reply: list[ReplyPart], options: RenderOptions, *, marks: bool
    ) -> tuple[list[TextSpan], list[ReplyPart]]:
        """Split off the start of a reply that is not trained, or at whose end a prompt for generation would stop."""
        first, rest = reply[0], reply[1:]
        if self.thinking == "hybrid":
            empty = _EMPTY_THINK.match(first.text)
            if empty:
                answer = first._replace(text=first.text[empty.end() :])
                return [TextSpan(empty.group(), False, 0.0, True)], [answer, *rest]
            wanted = options.add_non_thinking_prefix and (not options.enable_thinking or bool(self.history_prefix))
            if wanted and marks and not first.text.lstrip().startswith("<think>"):
                return [TextSpan(self.non_thinking_prefix, True, 0.0)], reply
        if self.thinking_prefix and first.text.startswith(self.thinking_prefix):  # it stands in the prompt
            opened = TextSpan(self.thinking_prefix, True, options.prompt_weight, True)
            return [opened], [first._replace(text=first.text[len(self.thinking_prefix) :]), *rest]
        return [], reply


def render_plain(conversation: Conversation, options: RenderOptions, bos: str, eos: str) -> list[TextSpan]:
    """`--use_chat_template false`: bos, every text of the conversation in order, eos.

    SWIFT keeps only the last round and no system text; here nothing is lost. An empty `bos` or `eos` leaves it out.
    """
    weight = options.prompt_weight
    spans = [TextSpan(bos, True, weight)] if bos else []
    system = choose_system(conversation.system, options.system, None)
    if system:
        spans.append(TextSpan(system, False, weight))
    spans += [TextSpan(span.text, False, weight) for span in conversation.tools]
    end_weight = weight
    last_round = conversation.last_round
    for index, round_ in enumerate(conversation.rounds):
        if round_.query:
            spans.append(TextSpan(round_.query, False, weight))
        for part in round_.reply or ():
            weighed = options.weigh(part, index >= last_round, round_.query or "")
            if len(spans) <= bool(bos):
                weighed[0] = weighed[0]._replace(hard=False)
            spans += weighed
            end_weight = options.reply_weight(part, index >= last_round)
    return [*spans, TextSpan(eos, True, end_weight)] if eos else spans


def choose_system(in_row: str | None, from_flag: str | None, default: str | None) -> str | None:
    """The row's system text, else `--system`, else the template's; an empty one means none."""
    return in_row if in_row is not None else from_flag if from_flag is not None else default


def text_of(spans: list[TextSpan]) -> str:
    """The spans as one text."""
    return "".join(span.text for span in spans)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its bos token before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


@functools.cache
def _around(text: str, mark: str) -> tuple[str, str]:
    before, _, after = text.partition(mark)
    return before, after


# --- records ----------------------------------------------------------------------------------------------------


@functools.cache
def load_templates() -> Mapping[str, Template]:
    """All families by name, in the order in which a tokenizer is matched against them."""
    return {
        name: Template(name=name, **{**record, "stop_words": tuple(record.get("stop_words", ()))})
        for name, record in read_records("families.json").items()
    }


def get_template(name: str) -> Template:
    """The family of this name.

    Raises:
        UserError: there is none; the message lists the names.
    """
    try:
        return load_templates()[name]
    except KeyError:
        names = [*load_templates(), *OWN_TEMPLATES]
        near = ", ".join(difflib.get_close_matches(name, names))
        listed = ", ".join(names) + (f"; nearest: {near}" if near else "")
        raise UserError(f"--template {name}: unknown; choose auto or one of {listed}") from None
