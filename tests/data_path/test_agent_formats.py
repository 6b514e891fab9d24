"""Agent templates: tools, calls and results as text, in the family each is used with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_templates import A, S, U, bound, chat, marked

from rayswift.data.chat.agents import get_agent_format, load_agent_formats
from rayswift.data.chat.conversation import DropRow, read_conversation
from rayswift.data.chat.families import RenderOptions, render_plain, text_of
from rayswift.errors import UserError

WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
PARAMETERS = json.dumps(WEATHER["parameters"])
CALL = ("tool_call", '{"name": "weather", "arguments": {"city": "北京"}}')
LOOP = chat((U, "Q"), CALL, ("tool_response", "sunny"), (A, "R"))
PARALLEL = chat((U, "Q"), CALL, CALL, ("tool_response", "sunny"), ("tool", "rain"), (A, "R"))


def layout(template: str, agent: str, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
    conversation = read_conversation(messages, tools, get_agent_format(agent))
    return marked(bound(template).render(conversation, RenderOptions(**options)))


CHATML_ASKED = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
XML_CALL = "<tool_call>\n<function=weather>\n<parameter=city>\n北京\n</parameter>\n</function>\n</tool_call>"
CALLS_DS = "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{}<｜tool▁call▁end｜>".format('{"city": "北京"}')
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "北京"}}'
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"


@pytest.mark.parametrize(
    ("template", "agent", "one", "parallel"),
    [
        (
            "chatml",
            "hermes",
            f"{CHATML_ASKED}▮{HERMES_CALL}<|im_end|>▮\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>"
            "<|im_end|>\n<|im_start|>assistant\n▮R<|im_end|>▮",
            f"{CHATML_ASKED}▮{HERMES_CALL}\n{HERMES_CALL}<|im_end|>▮\n<|im_start|>user\n<tool_response>\nsunny\n"
            "</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n▮R<|im_end|>▮",
        ),
        (
            "qwen3_coder",
            "qwen3_coder",
            f"{CHATML_ASKED}▮{XML_CALL}<|im_end|>▮\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n"
            "<|im_end|>\n<|im_start|>assistant\n▮R<|im_end|>▮",
            f"{CHATML_ASKED}▮{XML_CALL}\n{XML_CALL}<|im_end|>▮\n<|im_start|>user\n<tool_response>\nsunny\n"
            "</tool_response>\n<tool_response>\nrain\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n▮R<|im_end|>▮",
        ),
        (
            "chatml",
            "react_en",
            f'{CHATML_ASKED}▮Action: weather\nAction Input: {{"city": "北京"}}\nObservation:▮sunny\n▮R<|im_end|>▮',
            f'{CHATML_ASKED}▮Action: weather\nAction Input: {{"city": "北京"}}\nAction: weather\nAction Input: '
            '{"city": "北京"}\nObservation:▮sunny\nObservation:rain\n▮R<|im_end|>▮',
        ),
        (
            "chatml",
            "qwen_zh",
            f'{CHATML_ASKED}▮✿FUNCTION✿: weather\n✿ARGS✿: {{"city": "北京"}}\n✿RESULT✿:▮sunny\n▮R<|im_end|>▮',
            f'{CHATML_ASKED}▮✿FUNCTION✿: weather\n✿ARGS✿: {{"city": "北京"}}\n✿FUNCTION✿: weather\n✿ARGS✿: '
            '{"city": "北京"}\n✿RESULT✿:▮sunny\n✿RESULT✿:rain\n▮R<|im_end|>▮',
        ),
        (
            "llama3",
            "llama3",
            f"<|begin_of_text|>{LLAMA.format('user')}Q<|eot_id|>{LLAMA.format('assistant')}▮{LLAMA_CALL}<|eot_id|>▮"
            f'{LLAMA.format("ipython")}"sunny"<|eot_id|>{LLAMA.format("assistant")}▮R<|eot_id|>▮',
            f"<|begin_of_text|>{LLAMA.format('user')}Q<|eot_id|>{LLAMA.format('assistant')}▮{LLAMA_CALL}\n{LLAMA_CALL}"
            f'<|eot_id|>▮{LLAMA.format("ipython")}"sunny"<|eot_id|>{LLAMA.format("ipython")}"rain"<|eot_id|>'
            f"{LLAMA.format('assistant')}▮R<|eot_id|>▮",
        ),
        (
            "glm4",
            "glm4",
            '[gMASK]<sop><|user|>\nQ<|assistant|>▮weather\n{"city": "北京"}<|observation|>▮\nsunny<|assistant|>▮\n'
            "R<|user|>▮",
            '[gMASK]<sop><|user|>\nQ<|assistant|>▮weather\n{"city": "北京"}<|assistant|>weather\n{"city": "北京"}'
            "<|observation|>▮\nsunny<|observation|>\nrain<|assistant|>▮\nR<|user|>▮",
        ),
        (
            "deepseek_v3_1",
            "deepseek_v3_1",
            f"<bos><｜User｜>Q<｜Assistant｜></think>▮<｜tool▁calls▁begin｜>{CALLS_DS}<｜tool▁calls▁end｜><eos>▮"
            "<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>▮R<eos>▮",
            f"<bos><｜User｜>Q<｜Assistant｜></think>▮<｜tool▁calls▁begin｜>{CALLS_DS}{CALLS_DS}<｜tool▁calls▁end｜><eos>▮"
            "<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>▮R<eos>▮",
        ),
    ],
)
def test_calls_are_trained_and_results_are_not(template: str, agent: str, one: str, parallel: str) -> None:
    assert layout(template, agent, LOOP) == one
    assert layout(template, agent, PARALLEL) == parallel
    assert layout(template, agent, LOOP, loss_scale="last_round") == one  # a tool loop belongs to the last round


@pytest.mark.parametrize("family", ["chatml", "qwen3", "qwen3_coder", "llama3", "glm4", "deepseek_v3_1"])
def test_the_prompt_after_a_tool_result_is_the_start_of_the_trained_text(family: str) -> None:
    template = bound(family)
    agent = get_agent_format(template.agent)
    asked = template.render_prompt(read_conversation(LOOP[:-1], [WEATHER], agent), RenderOptions(enable_thinking=True))
    options = RenderOptions(loss_scale="last_round", add_non_thinking_prefix=bool(template.history_prefix))
    trained = text_of(template.render(read_conversation(LOOP, [WEATHER], agent), options))
    text = text_of(asked)
    assert trained == text + template.reply_prefix + "R" + template.suffix


def test_tools_stand_where_each_format_wants_them() -> None:
    asked = chat((S, "SYS"), (U, "Q"), (A, "R"))
    wrapped = json.dumps({"type": "function", "function": WEATHER})
    assert "system\nSYS\n\n# Tools\n\nYou may call one" in layout("chatml", "hermes", asked, [WEATHER])
    assert f"<tools>\n{wrapped}\n</tools>" in layout("chatml", "hermes", asked, json.dumps([WEATHER]))
    default = layout("qwen2_5", "hermes", chat((U, "Q"), (A, "R")), [WEATHER])
    assert "You are a helpful assistant.\n\n# Tools" in default
    react = layout("qwen2_5", "react_en", chat((U, "Q"), (A, "R")), [WEATHER])
    assert "system\nAnswer the following questions as best you can." in react and "Alibaba" not in react
    assert (
        "weather: Call this tool to interact with the weather API. What is the weather API useful for? "
        f"Weather of a city Parameters: {PARAMETERS} Format the arguments as a JSON object.\n\nUse the following"
    ) in react
    assert "should be one of [weather]\n" in react
    assert "SYS\n\nAnswer the following" in layout("qwen2_5", "react_en", asked, [WEATHER])
    assert "尽可能地回答以下问题" in layout("qwen2_5", "react_zh", asked, [WEATHER])
    assert f"### weather\n\nweather: Weather of a city 输入参数：{PARAMETERS} 此工具的输入应为JSON对象。" in layout(
        "qwen2_5", "qwen_zh", asked, [WEATHER]
    )
    llama = layout("llama3", "llama3", asked, [WEATHER, WEATHER])
    listed = json.dumps(WEATHER, indent=4)
    assert "user<|end_header_id|>\n\nGiven the following functions" in llama
    assert f"Do not use variables.\n\n{listed}\n\n{listed}\n\nQ<|eot_id|>" in llama
    glm = layout("glm4", "glm4", chat((U, "Q"), (A, "R")), [WEATHER])
    assert glm.startswith(f"[gMASK]<sop><|system|>\n# 可用工具\n## weather\n\n{listed}\n在调用上述函数时")
    assert "Json 格式表示调用的参数。<|system|>\nSYS<|user|>\nQ" in layout("glm4", "glm4", asked, [WEATHER])
    described = (
        "<function>\n<name>weather</name>\n<description>Weather of a city</description>\n<parameters>\n<parameter>\n"
        "<name>city</name>\n<type>string</type>\n</parameter>\n"
        '<required>["city"]</required>\n</parameters>\n</function>'
    )
    assert f"<tools>\n{described}\n</tools>" in layout("qwen3_coder", "qwen3_coder", asked, [WEATHER])
    coder = layout("qwen3_coder", "qwen3_coder", chat((U, "Q"), (A, "R")), [WEATHER])
    assert (
        "system\nYou are Qwen, a helpful AI assistant that can interact with a computer to solve tasks.\n\n# T" in coder
    )
    assert layout("qwen3_coder", "qwen3_coder", chat((U, "Q"), (A, "R"))) == f"{CHATML_ASKED}▮R<|im_end|>▮"
    assert "\n\nEnvironment: ipython\nCutting Knowledge" in layout("llama3_2", "llama3", asked, [WEATHER])
    assert "Environment" not in layout("llama3_2", "llama3", asked)


def test_a_user_who_writes_after_a_tool_result_has_a_turn_of_his_own() -> None:
    messages = [*LOOP[:-1], *chat((U, "and?"), (A, "R"))]
    assert layout("chatml", "hermes", messages).endswith(
        "</tool_response><|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n▮R<|im_end|>▮"
    )
    assert layout("llama3", "llama3", messages).endswith(
        f'"sunny"<|eot_id|>{LLAMA.format("user")}and?<|eot_id|>{LLAMA.format("assistant")}▮R<|eot_id|>▮'
    )


def test_a_thought_and_its_call_are_one_turn_and_the_first_flag_of_parallel_calls_counts() -> None:
    messages = chat((U, "Q"), (A, "Thinking."), (*CALL, False), (*CALL, True), ("tool", "sunny"), (A, "R"))
    assert f"▮Thinking.▮\n{HERMES_CALL}\n{HERMES_CALL}<|im_end|>\n" in layout("chatml", "hermes", messages)


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        (chat((U, "Q"), ("tool_call", "[1]")), None, "a tool_call is not a JSON object with name and arguments"),
        (chat((U, "Q"), ("tool_call", "{")), None, "tools or a tool_call is not valid JSON"),
        (LOOP, '{"name": "f"}', "tools is not a list of tool definitions"),
        (LOOP, [{"description": "d"}], "a tool definition has no name"),
        (LOOP, ["7"], "a tool definition is not a JSON object"),
    ],
)
def test_a_broken_tool_drops_the_row_with_the_reason(messages: Any, tools: Any, reason: str) -> None:
    with pytest.raises(DropRow, match=reason):
        read_conversation(messages, tools, get_agent_format("hermes"))


def test_calls_may_be_python_literals_and_spell_parameters() -> None:
    messages = chat((U, "Q"), ("tool_call", "{'name': 'weather', 'parameters': {'city': '北京'}}"), ("tool", "s"))
    assert HERMES_CALL in layout("chatml", "hermes", messages)


def test_bare_mode_writes_tool_messages_as_they_are() -> None:
    conversation = read_conversation(LOOP, [WEATHER], get_agent_format("raw"))
    wrapped = json.dumps({"type": "function", "function": WEATHER})
    assert text_of(render_plain(conversation, RenderOptions(), "", "<eos>")) == f"{wrapped}Q{CALL[1]}sunnyR<eos>"


def test_an_unknown_agent_template_is_answered_with_the_choices() -> None:
    with pytest.raises(UserError, match="--agent_template alien: unknown; choose one of hermes, qwen3_coder, react_en"):
        get_agent_format("alien")


def test_every_family_names_an_agent_template_that_exists() -> None:
    from rayswift.data.chat.families import load_templates

    assert {template.agent for template in load_templates().values()} <= {*load_agent_formats(), None}
