"""A model's template in Ollama's language (Go's ``text/template`` over ``.System``, ``.Tools``, ``.Messages``).

Its parts are found by laying out conversations of stand-ins and cutting between them, so that Ollama's prompts are
those of ``rayswift deploy`` whatever the template is: first and later rounds, thoughts, tool calls and results. Left to
Ollama is how JSON is spaced: it writes tools and arguments without spaces.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

from rayswift.data.chat.agents import AgentFormat, get_agent_format
from rayswift.data.chat.conversation import DropRow
from rayswift.data.chat.families import Template, adds_bos, text_of
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.template_choice import load_template

#: Stand-ins for the parts of a conversation.
_SYSTEM, _RESULT = "systemtexthere", "resulthere"
_QUERIES, _REPLIES = ("firstquestionhere", "secondquestionhere"), ("firstanswerhere", "secondanswerhere")
_CALL = {"role": "tool_call", "content": json.dumps({"name": "callnamehere", "arguments": {}})}
_ANSWER = {"role": "tool_response", "content": _RESULT}
_THOUGHT, _THINK = "thoughthere", "<think>"
#: Marks of an agent format (`rayswift.data.chat.agents`) → Ollama's words for them, within a tool and within a call.
_TOOL_MARKS = {
    "NAME": "{{ .Function.Name }}", "HUMAN_NAME": "{{ .Function.Name }}",
    "DESCRIPTION": "{{ .Function.Description }}", "PARAMETERS": "{{ json .Function.Parameters }}",
    "TOOL_JSON": "{{ . }}", "TOOL_JSON_INDENTED": "{{ . }}", "FUNCTION_JSON_INDENTED": "{{ json .Function }}",
}  # fmt: skip
_CALL_MARKS = {
    "NAME": "{{ .Function.Name }}", "NAME_JSON": '"{{ .Function.Name }}"', "ARGUMENTS": "{{ .Function.Arguments }}",
    "CALL_JSON": '{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}',
}  # fmt: skip
_MARK = re.compile(r"\{\{([A-Z_]+)\}\}")
#: A message of the tool loop that the last user's opened; one that follows a tool's result.
_IN_LOOP, _AFTER_RESULT = "gt $i $last", 'eq $before "tool"'


@dataclass(frozen=True)
class _Layout:
    """Lays out conversations with one setting of thinking."""

    encoder: Encoder

    def text(self, *messages: dict[str, str]) -> str:
        """The prompt's text; without the bos token that Ollama adds by itself.

        Raises:
            DropRow: the template has no place for one of the messages.
        """
        found = text_of(load_template(self.encoder).render_prompt(messages, None))
        tokenizer = self.encoder.tokenizer
        return found.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else found


def _user(number: int) -> dict[str, str]:
    return {"role": "user", "content": _QUERIES[number]}


def _reply(number: int) -> dict[str, str]:
    return {"role": "assistant", "content": _REPLIES[number]}


def ollama_template(encoder: Encoder) -> tuple[str, str]:
    """The template's own system text, and the template in Ollama's language."""
    modes = [_Layout(replace(encoder, enable_thinking=mode)) for mode in (encoder.enable_thinking, True, False)]
    layout = modes[0]
    agent, template = _agent(encoder), load_template(encoder).template
    default, start = _start(layout, agent)
    if agent is not None and isinstance(template, Template) and template.environment:
        behind = (template.system_prefix or "").partition("{{ENVIRONMENT}}")[2].partition("{{SYSTEM}}")[0]
        start = start.replace(
            _literal(behind), f"{{{{ if .Tools }}}}{template.environment}{{{{ end }}}}{_literal(behind)}"
        )
    prefix = template.reply_prefix if isinstance(template, Template) else ""  # before an answer, not before a call
    old = _after(layout.text(_user(0), _reply(0), _user(1)), _QUERIES[0], _REPLIES[0]).removesuffix(prefix)
    between = _after(layout.text(_user(0), _reply(0), _user(1)), _REPLIES[0], _QUERIES[1])
    tail = _by_thinking([_literal(mode.text(_user(0)).partition(_QUERIES[0])[2]) for mode in modes])
    tools_first = ""
    if agent is not None and agent.tools_place == "before_query":
        tools_first = f"{{{{ if and $.Tools (not $later) }}}}{_tools(agent)}{{{{ end }}}}"
    user = f"{{{{ if $later }}}}{_literal(between)}{{{{ end }}}}{tools_first}{{{{ $later = true }}}}{{{{ .Content }}}}"
    reply, result, end = _literal(old), "", tail
    said = _if(".Content", _literal(prefix), "") + "{{ .Content }}"
    if agent is not None:
        loop = _Loop.of(modes, agent, prefix)
        reply = _if(_AFTER_RESULT, _if(_IN_LOOP, loop.goes_on, loop.went_on), _if(_IN_LOOP, loop.called, reply))
        said = loop.thoughts + said + loop.calls
        result = f'{{{{ else if eq .Role "tool" }}}}{loop.result}'
        end = _if(_AFTER_RESULT, loop.end, tail)
    message = (
        f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{reply}{said}{result}{{{{ end }}}}'
    )
    return default, (
        '{{ $last := -1 }}{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ $last = $i }}{{ end }}{{ end }}'
        f'{{{{ $before := "" }}}}{{{{ $later := false }}}}{start}'
        f"{{{{ range $i, $_ := .Messages }}}}{message}{{{{ $before = .Role }}}}{{{{ end }}}}"
        f'{{{{ if ne $before "assistant" }}}}{end}{{{{ end }}}}'
    )


def _start(layout: _Layout, agent: AgentFormat | None) -> tuple[str, str]:
    """The default system text, and what stands before the first query."""
    plain = layout.text(_user(0)).partition(_QUERIES[0])[0]
    try:
        system = layout.text({"role": "system", "content": _SYSTEM}, _user(0)).partition(_QUERIES[0])[0]
    except DropRow:  # the template has no place for a system text
        return "", _literal(plain)
    before, _, after = system.partition(_SYSTEM)
    default = ""
    if plain.startswith(before) and plain.endswith(after) and len(plain) > len(before) + len(after):
        default = plain[len(before) : len(plain) - len(after)]
        plain = layout.text({"role": "system", "content": ""}, _user(0)).partition(_QUERIES[0])[0]
    if agent is not None and agent.tools_place == "own_block":
        first = plain.removesuffix(after)
        head = _literal(before.removeprefix(first))
        told = f"{_if('.Tools', head + _tools(agent), '')}{_if('.System', head + '{{ .System }}', '')}"
        return default, _literal(first) + told + _literal(after)
    told, given = "", ".System"
    if agent is not None and agent.tools_place != "before_query":
        gap = "{{ if .System }}\n\n{{ end }}"
        told, given = f"{{{{ if .Tools }}}}{gap}{_tools(agent)}{{{{ end }}}}", "or .System .Tools"
    return default, _if(given, f"{_literal(before)}{{{{ .System }}}}{told}{_literal(after)}", _literal(plain))


@dataclass(frozen=True)
class _Loop:
    """The parts of a tool loop. ``called``: before a call of the current loop; ``goes_on`` and ``went_on``: after a
    result, in the current loop and in earlier ones; ``thoughts``: before what is said in the current loop; ``end``:
    after the last result, up to where the reply starts."""

    called: str
    goes_on: str
    thoughts: str
    went_on: str
    end: str
    calls: str
    result: str

    @classmethod
    def of(cls, modes: list[_Layout], agent: AgentFormat, prefix: str) -> _Loop:
        """Cut from conversations with one call and its result."""
        written = text_of(agent.write_call(_CALL["content"], first=True, last=True))  # type: ignore[arg-type]
        given = text_of(agent.write_result(_RESULT, first=True))  # type: ignore[arg-type]
        running = [mode.text(_user(0), _CALL, _ANSWER) for mode in modes]
        again = [mode.text(_user(0), _CALL, _ANSWER, _CALL, _ANSWER) for mode in modes]
        ended = modes[0].text(_user(0), _CALL, _ANSWER, _reply(0), _user(1))
        called = _by_thinking([_literal(_after(text, _QUERIES[0], written)) for text in running])
        goes_on = _by_thinking([_literal(_after(text, given, written)) for text in again])
        thoughts = ""
        if modes[0].encoder.thinks:
            thought = {"role": "assistant", "content": "", "reasoning_content": _THOUGHT}
            looped = modes[0].text(_user(0), thought, _CALL, _ANSWER, thought, _CALL, _ANSWER)
            told = modes[0].text(_user(0), {**thought, **_reply(0)}, _CALL, _ANSWER)
            before, tag, opening = _after(looped, _QUERIES[0], _THOUGHT).partition(_THINK)
            called = _if(".Thinking", _literal(before), called)
            goes_on = _if(".Thinking", _literal(_after(looped, given, _THOUGHT).partition(_THINK)[0]), goes_on)
            end = _after(told, _THOUGHT, _REPLIES[0])
            before_call = _after(looped, _THOUGHT, written).removeprefix(end)
            thoughts = _if(f"and .Thinking ({_IN_LOOP})", f"{tag}{opening}{{{{ .Thinking }}}}{end}", "")
            thoughts += _if(f"and .Thinking ({_IN_LOOP}) (not .Content)", before_call, "")
        gap, apart = _after(running[0], written, given), _literal(agent.result_separator)
        before, mark, after = _MARK.split(agent.result)
        shown = "{{ json .Content }}" if mark == "RESULT_JSON" else "{{ .Content }}"
        start, separator = _literal(agent.calls_start), _literal(agent.call_separator)
        call_text = _filled(agent.call, _CALL_MARKS)
        return cls(
            called,
            goes_on,
            thoughts,
            _literal(_after(ended, given, _REPLIES[0]).removesuffix(prefix)),
            _by_thinking([_literal(text.partition(given)[2]) for text in running]),
            f"{{{{ if .ToolCalls }}}}{_if('.Content', _literal(agent.text_separator), '')}"
            "{{ range $n, $_ := .ToolCalls }}"
            f"{_if('$n', separator, start)}{call_text}{{{{ end }}}}{_literal(agent.calls_end)}{{{{ end }}}}",
            f"{_if(_AFTER_RESULT, apart, _literal(gap))}{_literal(before)}{shown}{_literal(after)}",
        )


def _agent(encoder: Encoder) -> AgentFormat | None:
    """The format of tools, if Ollama has words for all of it and its calls end an answer."""
    agent = load_template(encoder).agent
    if agent is None or agent.result_place == "reply" or agent is get_agent_format("raw"):
        return None
    marks = (*_MARK.findall(agent.tool), *_MARK.findall(agent.tools), *_MARK.findall(agent.call))
    return agent if {*marks} <= {*_TOOL_MARKS, *_CALL_MARKS, "TOOLS"} else None


def _tools(agent: AgentFormat) -> str:
    """The text that tells the model of its tools."""
    each, apart = _filled(agent.tool, _TOOL_MARKS), _literal(agent.tool_separator)
    listed = f"{{{{ range $n, $_ := $.Tools }}}}{{{{ if $n }}}}{apart}{{{{ end }}}}{each}{{{{ end }}}}"
    return _filled(agent.tools, {"TOOLS": listed})


def _filled(record: str, marks: dict[str, str]) -> str:
    """A record's text with its marks in Ollama's words; other braces are text."""
    parts = _MARK.split(record)
    return "".join(marks[part] if number % 2 else _literal(part) for number, part in enumerate(parts))


def _after(text: str, first: str, then: str) -> str:
    """What stands between the first ``first`` and the ``then`` that follows it."""
    return text.partition(first)[2].partition(then)[0]


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _if(condition: str, then: str, otherwise: str) -> str:
    if then == otherwise:
        return then
    alternative = f"{{{{ else }}}}{otherwise}" if otherwise else ""
    return f"{{{{ if {condition} }}}}{then}{alternative}{{{{ end }}}}"


def _by_thinking(texts: list[str]) -> str:
    """A part as it is when nothing is said about thinking, with it, and without it."""
    unset, with_thoughts, without = texts
    return _if("and $.IsThinkSet (not $.Think)", without, _if("$.IsThinkSet", with_thoughts, unset))
