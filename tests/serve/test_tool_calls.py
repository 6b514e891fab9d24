"""Calls of tools: every format that training writes is read back, in whatever pieces it comes, and can be forced."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from rayswift.data.chat.agents import AgentFormat, load_agent_formats
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.template_choice import load_template
from rayswift.generate.constraints import GrammarCompiler
from rayswift.serve.replica.tool_calls import CallReader, call_grammar

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "required": ["city"],
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "get_time", "parameters": {
        "type": "object", "properties": {"zone": {"enum": ["CET", "UTC"]}}, "required": ["zone"]}}},
]  # fmt: skip
CALLS: list[dict[str, Any]] = [
    {"name": "get_weather", "arguments": {"city": 'Par"is <b>\nnext', "days": 3}},
    {"name": "get_time", "arguments": {"zone": "UTC"}},
]
FORMATS = load_agent_formats()


def written(agent: AgentFormat, calls: list[dict[str, Any]] = CALLS) -> str:
    spans = [agent.write_call(json.dumps(call), first=number == 0, last=number == len(calls) - 1)
             for number, call in enumerate(calls)]  # fmt: skip
    return "".join(span.text for call in spans for span in call)


def read(reader: CallReader, text: str, step: int = 10**6) -> tuple[str, list[dict[str, str]]]:
    """Content and calls of a text that comes in pieces."""
    content, calls = "", {}
    for start in range(0, len(text), step):
        more, deltas = reader.feed(text[start : start + step], final=start + step >= len(text))
        content += more
        for delta in deltas:
            call = calls.setdefault(delta["index"], {"name": "", "arguments": ""})
            for key in call:
                call[key] += delta["function"].get(key, "")
            if delta["function"].get("name"):
                assert delta["id"] and delta["type"] == "function"
    return content, list(calls.values())


@pytest.mark.parametrize("step", [1, 3, 10**6])
@pytest.mark.parametrize("name", FORMATS)
def test_what_training_writes_is_read_back(name: str, step: int) -> None:
    agent = FORMATS[name]
    marked = bool(agent.calls_start or not agent.call.startswith("{{"))
    before = "Let me see. <b> " if marked else ""
    content, calls = read(CallReader(agent, TOOLS), before + written(agent), step)
    assert content == before
    assert [{**call, "arguments": json.loads(call["arguments"])} for call in calls] == CALLS


def test_arguments_come_while_they_are_written() -> None:
    reader = CallReader(FORMATS["hermes"], TOOLS)
    assert reader.feed('<tool_call>\n{"name": "get_wea') == ("", [])
    _, (first,) = reader.feed('ther", "arguments": {"city": "Pa')
    assert first["function"] == {"name": "get_weather", "arguments": '{"city": "Pa'} and first["id"]
    _, (second,) = reader.feed('ris"')
    assert second == {"index": 0, "function": {"arguments": 'ris"'}}
    _, (third,) = reader.feed("}}\n</tool_call>", final=True)
    assert third["function"] == {"arguments": "}"} and reader.called


@pytest.mark.parametrize(
    "text",
    ["I am <b>not</b> a call.", "<tool_cal", "<tool_call>\nno JSON</tool_call> and more", "<tool_call>", "a {b} c"],
)
@pytest.mark.parametrize("step", [1, 10**6])
def test_what_only_looks_like_a_call_is_content(text: str, step: int) -> None:
    reader = CallReader(FORMATS["hermes"], TOOLS)
    assert read(reader, text, step) == (text, []) and not reader.called


@pytest.mark.parametrize("step", [1, 10**6])
def test_a_call_is_found_after_what_only_looks_like_one(step: int) -> None:
    agent = FORMATS["react_en"]
    prose = "Action: none is needed first.\nThen\n"
    content, calls = read(CallReader(agent, TOOLS), prose + written(agent, CALLS[1:]), step)
    assert content == prose and [call["name"] for call in calls] == ["get_time"]


def test_a_call_that_is_cut_off_is_sent_as_far_as_it_came() -> None:
    half = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'
    assert read(CallReader(FORMATS["hermes"], TOOLS), half, 1) == (
        "",
        [{"name": "get_weather", "arguments": '{"city": "Par'}],
    )
    assert read(CallReader(FORMATS["hermes"], TOOLS), half) == (half, [])  # whole answers have whole calls


def test_text_after_a_call_is_dropped() -> None:
    agent = FORMATS["hermes"]
    text = written(agent, CALLS[:1]) + "\nDone. <tool_call> and more"
    for step in (1, 10**6):
        content, calls = read(CallReader(agent, TOOLS), text, step)
        assert content == "" and [call["name"] for call in calls] == ["get_weather"]


@pytest.mark.parametrize("name", ["glm4", "raw"])
def test_a_format_without_marks_leaves_other_answers_alone(name: str) -> None:
    reader = CallReader(FORMATS[name], TOOLS)
    content, _ = reader.feed("The weather")
    assert content == "The weather", "it is not held back to the end"
    assert reader.feed(' of "get_weather"\n{}', final=True) == (' of "get_weather"\n{}', [])


def test_one_call_where_one_is_wanted() -> None:
    agent = FORMATS["hermes"]
    assert [call["name"] for call in read(CallReader(agent, TOOLS, 1), written(agent))[1]] == ["get_weather"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_forced_call_may_be_what_training_writes_and_nothing_else(name: str, smollm2_dir: str) -> None:
    pytest.importorskip("llguidance")
    encoder = replace(Encoder(smollm2_dir), agent_template=name)
    tokenizer, agent = encoder.tokenizer, FORMATS[name]
    compile_ = GrammarCompiler(tokenizer, 49152, encoder.eos_token_ids)

    def ids(text: str) -> list[int]:
        parts = load_template(encoder).segments.split_literal(text)
        found = (
            [part] if isinstance(part, int) else tokenizer.encode(part, add_special_tokens=False) for part in parts
        )
        return [token for some in found for token in some]

    calls = [{**CALLS[0], "arguments": {"city": "Paris", "days": 3}}, CALLS[1]]
    text = written(agent, calls).removesuffix(agent.calls_end)
    matcher = compile_("lark", call_grammar(encoder, TOOLS, many=True))._matcher
    assert matcher.validate_tokens(ids(text)) == len(ids(text))
    one = compile_("lark", call_grammar(encoder, TOOLS[1:], many=False))._matcher
    other = ids(written(agent, calls[:1]))
    assert one.validate_tokens(other) < len(other)
