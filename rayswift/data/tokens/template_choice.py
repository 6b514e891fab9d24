"""The template and tokenizer of a model, chosen by settings and loaded once per process."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from rayswift.data.chat.agents import OWN_AGENTS, AgentFormat, get_agent_format
from rayswift.data.chat.conversation import Conversation, DropRow, Message, Round, read_conversation
from rayswift.data.chat.dialect import ChatTemplate
from rayswift.data.chat.families import (
    FIXED_DATE,
    OWN_TEMPLATES,
    RenderOptions,
    Template,
    TextSpan,
    adds_bos,
    get_template,
    render_plain,
)
from rayswift.data.chat.jinja import JinjaTemplate
from rayswift.data.chat.loss_weights import read_loss_scale
from rayswift.data.chat.matching import match_template, same_tools
from rayswift.data.chat.shape import TemplateShape
from rayswift.data.rows.columns import MEDIA
from rayswift.data.tokens.segments import CONTENT_TAG, SegmentTokenizer
from rayswift.errors import UserError

logger = logging.getLogger("rayswift.data.tokens.template_choice")


@dataclass(frozen=True)
class TemplateSettings:
    """What decides how conversations are laid out. Fields are SWIFT's flags of the same name.

    `template`: a family of `families.json`, one of `OWN_TEMPLATES` for the model's own chat template, or None/"auto":
    the family whose layout equals the tokenizer's own chat template, else that chat template itself.
    `template_backend`: `jinja` takes the chat template in any case. `use_chat_template` False: bos, the bare texts,
    eos. `agent_template`: a format of `agents.json` for tools and tool messages, or one of `OWN_AGENTS` for that of the
    model's own chat template; None is the template's own.
    `enable_thinking`: of prompts for generation; None is the model's own default. `template_date`: the day (YYYY-MM-DD)
    in prompts that hold one.

    Raises:
        UserError: a setting has no such value; the message names flag and choices.
    """

    model_dir: str
    template: str | None = None
    system: str | None = None
    use_chat_template: bool = True
    loss_scale: str = "default"
    enable_thinking: bool | None = None
    add_non_thinking_prefix: bool = True
    template_backend: str = "swift"
    response_prefix: str | None = None
    new_special_tokens: tuple[str, ...] = ()
    trust_remote_code: bool = False
    agent_template: str | None = None
    template_date: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_dir", str(self.model_dir))
        object.__setattr__(self, "new_special_tokens", tuple(self.new_special_tokens))
        one_of("--template_backend", self.template_backend, ("swift", "jinja"))
        read_loss_scale(self.loss_scale)
        if self.template not in (None, "auto", *OWN_TEMPLATES):
            get_template(self.template)
        if self.agent_template is not None and self.agent_template not in OWN_AGENTS:
            get_agent_format(self.agent_template)
        read_date(self.template_date)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with `new_special_tokens` added."""
        return load_template(self).tokenizer

    @property
    def template_name(self) -> str:
        """Name of the family in use; `jinja` for the model's own chat template, `bare` for none."""
        return load_template(self).name

    @property
    def stop_words(self) -> list[str]:
        """Texts at which generation stops."""
        return list(load_template(self).stop_words)

    @property
    def eos_token_ids(self) -> list[int]:
        """Token ids at which generation stops: the tokenizer's eos, and what ends a trained reply or is a stop word, if
        that is one special token."""
        loaded = load_template(self)
        words = [loaded.segments.split_literal(word) for word in loaded.ends]
        ids = [parts[0] for parts in words if len(parts) == 1 and isinstance(parts[0], int)]
        eos = [] if loaded.tokenizer.eos_token_id is None else [loaded.tokenizer.eos_token_id]
        return list(dict.fromkeys([*eos, *(i for i in ids if isinstance(i, int))]))

    @property
    def stop_strings(self) -> list[str]:
        """The ends that are not one special token and so have to be looked for in the text."""
        loaded = load_template(self)
        parts = {word: loaded.segments.split_literal(word) for word in loaded.ends}
        return [word for word, split in parts.items() if len(split) != 1 or isinstance(split[0], str)]

    @property
    def takes_tools(self) -> bool:
        """Whether tools and tool messages have a format."""
        loaded = load_template(self)
        own = loaded.tools_template or loaded.template
        return loaded.agent is not None or (isinstance(own, JinjaTemplate) and own.takes_tools)

    @property
    def thinks(self) -> bool:
        """Whether the template knows thoughts, and which of them a later prompt leaves out."""
        template = load_template(self).template
        if isinstance(template, Template):
            return template.thinking is not None
        return template is not None and "</think>" in template.shape.chat.tokenizer.chat_template

    @property
    def call_end(self) -> str:
        """What ends a tool call whose result follows in the same turn (``Observation:``); empty for other formats."""
        loaded = load_template(self)
        agent = loaded.agent if loaded.tools_template is None else None
        return agent.calls_end if agent is not None and agent.result_place == "reply" else ""


def read_date(value: str | None) -> date:
    """The day of `--template_date`, by default one that never changes.

    Raises:
        UserError: it is no date.
    """
    try:
        return FIXED_DATE if value is None else date.fromisoformat(value)
    except ValueError:
        raise UserError(f"--template_date {value}: not a date; write it as YYYY-MM-DD") from None


def one_of(flag: str, value: str, choices: Sequence[str]) -> None:
    """Raise UserError if a flag has none of the values it may have."""
    if value not in choices:
        raise UserError(f"{flag} {value}: choose one of {', '.join(choices)}")


_TOOL_ROLES = ("tool_call", "tool_response", "tool")


@dataclass
class LoadedTemplate:
    """What an encoder works with; `template` None is bare mode. `prompt_template` lays out generation prompts,
    `tools_template` rows with tools, where the family that fits the model writes them in another way than the model's
    own chat template.

    `prompt_thinking`: `enable_thinking` of generation prompts. In training a flag that is not given leaves the mark of
    no thinking in front of answers without a thought (SWIFT's `add_non_thinking_prefix`).
    """

    tokenizer: Any
    template: Template | JinjaTemplate | None
    prompt_template: Template | JinjaTemplate | None
    segments: SegmentTokenizer
    bos: str
    eos: str
    agent: AgentFormat | None
    options: RenderOptions
    prompt_thinking: bool | None
    tools_template: JinjaTemplate | None = None

    @property
    def name(self) -> str:
        return self.template.name if self.template else "bare"

    @property
    def stop_words(self) -> tuple[str, ...]:
        return self.template.stop_words if self.template else ()

    @property
    def ends(self) -> tuple[str, ...]:
        """The stop words, and what ends a trained reply."""
        suffix = self.template.suffix.strip() if isinstance(self.template, Template) else ""
        own = self.tools_template.stop_words if self.tools_template else ()
        return tuple(dict.fromkeys([*self.stop_words, *filter(None, [suffix]), *own]))

    def render(self, row: Mapping[str, Any]) -> list[list[TextSpan]]:
        """Lay out a standard row for training: one sample, or several where the model's own chat template rewrites
        earlier turns.

        Raises:
            DropRow: it cannot be a conversation of this template, or has nothing to train.
        """
        refuse_media(row)
        options, messages, tools = self.options_of(row), row.get("messages") or (), row.get("tools")
        template = self._for_tools(messages, tools) or self.template
        if isinstance(template, JinjaTemplate):
            return template.render(row, options, self._with_agent(messages, tools))
        conversation = self.conversation(messages, tools)
        if options.scale.base != "all":
            conversation = conversation.without_trailing_query()
            if not conversation.rounds:
                raise DropRow("no assistant message")
        if options.scale.base == "last_round":
            conversation = conversation.with_last_answer_trained()
        if template is None:
            return [render_plain(conversation, options, self.bos, self.eos)]
        return [template.render(conversation, options)]

    def conversation(self, messages: Sequence[Message], tools: Any) -> Conversation:
        """The messages as a conversation, thoughts in the think block of the template.

        Raises:
            DropRow: as :func:`read_conversation`.
        """
        template = self.template
        think = (
            template.thinking_prefix or "<think>\n" if isinstance(template, Template) and template.thinking else None
        )
        return read_conversation(messages, tools, self.agent, think)

    def options_of(self, row: Mapping[str, Any]) -> RenderOptions:
        """The options for a row, whose ``chat_template_kwargs`` come before the flags."""
        given = row.get("chat_template_kwargs") or {}
        thinking = next((given[name] for name in ("enable_thinking", "thinking") if given.get(name) is not None), None)
        if thinking is None and given.get("reasoning_effort"):
            thinking = given["reasoning_effort"] != "none"
        return self.options if thinking is None else replace(self.options, enable_thinking=bool(thinking))

    def _with_agent(self, messages: Sequence[Message], tools: Any) -> Conversation | None:
        """What a derived template is given beside the row: the conversation as an agent template writes it."""
        if self.agent is None or self.tools_template is not None:
            return None
        return self.conversation(messages, tools)

    def _for_tools(self, messages: Sequence[Message], tools: Any) -> JinjaTemplate | None:
        if self.tools_template is None or not (tools or any(one["role"] in _TOOL_ROLES for one in messages)):
            return None
        return self.tools_template

    def render_prompt(self, messages: Sequence[Message], tools: Any) -> list[TextSpan]:
        """Lay out messages for generation, up to where the reply starts.

        Raises:
            DropRow: they cannot be a conversation of this template.
        """
        template, options = self._for_tools(messages, tools) or self.prompt_template, self.options
        options = replace(options, enable_thinking=self.prompt_thinking)
        if isinstance(template, JinjaTemplate):
            row = {"messages": messages, "tools": tools}
            return template.render_prompt(row, options, self._with_agent(messages, tools))
        conversation = self.conversation(messages, tools)
        if not conversation.rounds:  # a system text alone: the reply follows it, as in a row that starts with a reply
            conversation.rounds.append(Round(None))
        if template is None:
            return render_plain(conversation, options, self.bos, "")
        return template.render_prompt(conversation, options)


def refuse_media(row: Mapping[str, Any]) -> None:
    """Raise DropRow for a row with pictures or sound."""
    if not row.keys().isdisjoint(MEDIA) and (media := next((medium for medium in MEDIA if row.get(medium)), None)):
        raise DropRow(f"it holds {media}, and text alone is trained here; --columns can hide the column")


# A server asks with an encoder per adapter and thinking mode.
@functools.lru_cache(maxsize=128)
def load_template(settings: TemplateSettings) -> LoadedTemplate:
    """Tokenizer and template of these settings; equal encoders in one process share them."""
    tokenizer = _load_tokenizer(settings.model_dir, settings.new_special_tokens, settings.trust_remote_code)
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    template = _choose_template(settings, tokenizer) if settings.use_chat_template else None
    prompt_template = template
    if isinstance(template, Template) and template.own_prompt and tokenizer.chat_template:
        prompt_template = _jinja(settings, tokenizer)
    options = RenderOptions(
        settings.system,
        settings.loss_scale,
        settings.add_non_thinking_prefix,
        settings.enable_thinking,
        settings.response_prefix,
    )
    thinking = settings.enable_thinking
    prompt_thinking = _thinks_by_default(settings, template, tokenizer) if thinking is None else thinking
    tools_template = _own_tools(settings, template, tokenizer)
    format_name = settings.agent_template or (template.agent if template else "raw")
    agent = get_agent_format(format_name) if format_name and format_name not in OWN_AGENTS else None
    literals = (*(template.literals if template else ()), *(agent.literals if agent else ()))
    literals += tools_template.literals if tools_template else ()
    segments = _load_segments(tokenizer, literals, settings.new_special_tokens)
    eos = tokenizer.eos_token or ""
    return LoadedTemplate(
        tokenizer, template, prompt_template, segments, bos, eos, agent, options, prompt_thinking, tools_template
    )


# Loading a tokenizer of 150,000 tokens and copying it takes seconds: encoders that differ in other settings share both.
_load_segments = functools.lru_cache(maxsize=16)(SegmentTokenizer)


@functools.lru_cache(maxsize=16)
def _load_tokenizer(model_dir: str, new_special_tokens: tuple[str, ...], trust_remote_code: bool) -> Any:
    from rayswift.modeling.loading import load_tokenizer

    tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    if new_special_tokens:
        tokenizer.add_tokens(list(new_special_tokens), special_tokens=True)
    return tokenizer


def _choose_template(settings: TemplateSettings, tokenizer: Any) -> Template | JinjaTemplate:
    bos, eos, day = tokenizer.bos_token, tokenizer.eos_token, read_date(settings.template_date)
    if settings.template_backend == "jinja" or settings.template in OWN_TEMPLATES:
        if not tokenizer.chat_template:
            own_name = settings.template in OWN_TEMPLATES
            flag = f"--template {settings.template}" if own_name else "--template_backend jinja"
            raise UserError(f"{flag}: the model has no chat template; leave it out or set --template")
        return _jinja(settings, tokenizer)
    if settings.template not in (None, "auto"):
        return get_template(settings.template).bind(bos, eos, adds_bos(tokenizer), day)
    if not tokenizer.chat_template:
        logger.warning(
            "%s has no chat template: using template `default` (--template sets another)", settings.model_dir
        )
        return get_template("default").bind(bos, eos, adds_bos(tokenizer), day)
    matched = match_template(tokenizer, day, _shape(settings.model_dir, settings.template_date, tokenizer))
    if matched is None:
        logger.info("no template family fits the model's chat template: using that chat template itself")
        return _jinja(settings, tokenizer)
    return matched


def _thinks_by_default(
    settings: TemplateSettings, template: Template | JinjaTemplate | None, tokenizer: Any
) -> bool | None:
    """Whether a prompt asks a model that can do both to think: as its own chat template has it, else yes (SWIFT's
    rule). None: the template has no switch, or is that chat template."""
    if not isinstance(template, Template) or template.thinking != "hybrid":
        return None
    if not tokenizer.chat_template:
        return True
    chat = ChatTemplate(tokenizer, read_date(settings.template_date))

    def prompt(**switch: bool) -> str:
        return chat.render([{"role": "user", "content": "q"}], None, add_generation_prompt=True, **switch)

    try:
        thinking, not_thinking = (prompt(enable_thinking=value, thinking=value) for value in (True, False))
        return thinking == not_thinking or prompt() != not_thinking
    except DropRow:
        return True


def _own_tools(
    settings: TemplateSettings, template: Template | JinjaTemplate | None, tokenizer: Any
) -> JinjaTemplate | None:
    """The model's own chat template, for rows with tools, where the family found for it writes those differently, or
    where `--agent_template` names its format."""
    mark = OWN_AGENTS.get(settings.agent_template or "")
    if template is not None and mark is not None:
        own = _jinja(settings, tokenizer) if tokenizer.chat_template else None
        if own is None or not own.takes_tools or mark not in own.shape.chat.source:
            raise UserError(
                f"--agent_template {settings.agent_template}: the model's own chat template writes no tools in this "
                "format; leave the flag out, or name one that is written as text, such as hermes"
            )
        return None if isinstance(template, JinjaTemplate) else own
    chosen = settings.agent_template or settings.template not in (None, "auto")
    if chosen or not isinstance(template, Template) or not tokenizer.chat_template:
        return None
    own = _jinja(settings, tokenizer)
    return None if same_tools(template, own.shape) else own


def _jinja(settings: TemplateSettings, tokenizer: Any) -> JinjaTemplate:
    return JinjaTemplate(_shape(settings.model_dir, settings.template_date, tokenizer))


@functools.lru_cache(maxsize=16)
def _shape(model_dir: str, template_date: str | None, tokenizer: Any) -> TemplateShape:
    """What is found out about the tokenizer's own chat template, once."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    specials = tuple(token for token in added.values() if not CONTENT_TAG.fullmatch(token))
    stops = tuple(added.get(number, "") for number in _stop_ids(model_dir))
    chat = ChatTemplate(tokenizer, read_date(template_date))
    return TemplateShape(chat, specials, tokenizer.bos_token or "", tokenizer.eos_token or "", stops)


def _stop_ids(model_dir: str) -> list[int]:
    """Where generation stops by the model's generation_config.json; none if it does not say."""
    try:
        config = json.loads((Path(model_dir) / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    stops = config.get("eos_token_id") if isinstance(config, dict) else None
    return [stop for stop in (stops if isinstance(stops, list) else [stops]) if isinstance(stop, int)]
