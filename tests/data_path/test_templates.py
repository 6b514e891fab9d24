"""Conversations and their layout as text: no tokenizer needed but for matching."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from rayswift.data.chat.agents import get_agent_format
from rayswift.data.chat.conversation import DropRow, read_conversation
from rayswift.data.chat.families import (
    RenderOptions,
    Template,
    TextSpan,
    get_template,
    load_templates,
    render_plain,
    text_of,
)
from rayswift.data.chat.matching import match_template
from rayswift.errors import UserError

U, A, S = "user", "assistant", "system"


def chat(*turns: tuple[str, str] | tuple[str, str, bool]) -> list[dict[str, Any]]:
    return [{"role": t[0], "content": t[1], **({"loss": t[2]} if len(t) > 2 else {})} for t in turns]


def marked(spans: list[TextSpan]) -> str:
    """The layout as one string, trained stretches between ▮ marks."""
    shown, trained = "", False
    for span in spans:
        if span.text and bool(span.weight) != trained:
            shown, trained = shown + "▮", not trained
        shown += span.text
    return shown + ("▮" if trained else "")


def bound(name: str) -> Template:
    return get_template(name).bind("<bos>", "<eos>", adds_bos=False)


def layout(name: str, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
    template = bound(name)
    agent = get_agent_format(template.agent) if template.agent else None
    return marked(template.render(read_conversation(messages, tools, agent), RenderOptions(**options)))


def prompt(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    template = bound(name)
    return text_of(template.render_prompt(read_conversation(messages), RenderOptions(**options)))


ONE = chat((U, "Q"), (A, "R"))
TWO = chat((S, "SYS"), (U, "q1"), (A, "r1"), (U, "q2"), (A, "r2"))

INTERNLM_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文."
)
CHATML_ONE = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n▮R<|im_end|>▮"
CHATML_TWO = (
    "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n▮r1<|im_end|>▮\n"
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n▮r2<|im_end|>▮"
)
NO_THINK = "<think>\n\n</think>\n\n"
QWEN3_ONE = f"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{NO_THINK}▮R<|im_end|>▮"
QWEN3_TWO = CHATML_TWO.replace("▮r", f"{NO_THINK}▮r")
LLAMA3_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3_ONE = f"<|begin_of_text|>{LLAMA3_TURN.format(U)}Q<|eot_id|>{LLAMA3_TURN.format(A)}▮R<|eot_id|>▮"
LLAMA3_TWO = (
    f"<|begin_of_text|>{LLAMA3_TURN.format(S)}SYS<|eot_id|>{LLAMA3_TURN.format(U)}q1<|eot_id|>{LLAMA3_TURN.format(A)}"
    f"▮r1<|eot_id|>▮{LLAMA3_TURN.format(U)}q2<|eot_id|>{LLAMA3_TURN.format(A)}▮r2<|eot_id|>▮"
)
LLAMA3_DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
MISTRAL_SYSTEM = str(bound("mistral_2501").default_system)
DEEPSEEK_TWO = "<bos>SYS<｜User｜>q1<｜Assistant｜>▮r1<eos>▮<｜User｜>q2<｜Assistant｜>▮r2<eos>▮"


def with_system(text: str, system: str) -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n{text}"


#: name, one round, and two rounds with a system text; trained stretches between ▮ marks.
LAYOUTS: list[tuple[str, str, str | None]] = [
    ("chatml", CHATML_ONE, CHATML_TWO),
    ("qwen", with_system(CHATML_ONE, "You are a helpful assistant."), CHATML_TWO),
    (
        "qwen2_5",
        with_system(CHATML_ONE, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        CHATML_TWO,
    ),
    (
        "smollm2",
        with_system(CHATML_ONE, "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        CHATML_TWO,
    ),
    ("qwen3", QWEN3_ONE, QWEN3_TWO),
    ("qwen3_thinking", CHATML_ONE, CHATML_TWO),
    ("qwen3_nothinking", CHATML_ONE, CHATML_TWO),
    ("llama3", LLAMA3_ONE, LLAMA3_TWO),
    (
        "llama3_2",
        LLAMA3_ONE.replace("text|>", f"text|>{LLAMA3_TURN.format(S)}{LLAMA3_DATE}<|eot_id|>", 1),
        LLAMA3_TWO.replace("SYS", LLAMA3_DATE + "SYS"),
    ),
    (
        "deepseek",
        "<bos>User: Q\n\nAssistant:▮ R<eos>▮",
        "<bos>SYS\n\nUser: q1\n\nAssistant:▮ r1<eos>▮User: q2\n\nAssistant:▮ r2<eos>▮",
    ),
    ("deepseek_v2_5", "<bos><｜User｜>Q<｜Assistant｜>▮R<eos>▮", DEEPSEEK_TWO),
    ("deepseek_r1", "<bos><｜User｜>Q<｜Assistant｜>▮R<eos>▮", DEEPSEEK_TWO),
    (
        "default",
        "You are a helpful assistant.\n\n### Human:\nQ\n\n### Assistant:\n▮R<eos>▮",
        "SYS\n\n### Human:\nq1\n\n### Assistant:\n▮r1▮\n\n### Human:\nq2\n\n### Assistant:\n▮r2<eos>▮",
    ),
    (
        "internlm2",
        with_system(CHATML_ONE, INTERNLM_SYSTEM),
        CHATML_TWO,
    ),
    ("yi_coder", with_system(CHATML_ONE, "You are a helpful assistant."), CHATML_TWO),
    ("qwen3_coder", CHATML_ONE, CHATML_TWO),
    (
        "llama",
        "<s>[INST] Q [/INST]▮ R </s>▮",
        "<s>[INST] <<SYS>>\nSYS\n<</SYS>>\n\nq1 [/INST]▮ r1 </s>▮<s>[INST] q2 [/INST]▮ r2 </s>▮",
    ),
    (
        "mistral_2501",
        f"<s>[SYSTEM_PROMPT]{MISTRAL_SYSTEM}[/SYSTEM_PROMPT][INST]Q[/INST]▮R</s>▮",
        "<s>[SYSTEM_PROMPT]SYS[/SYSTEM_PROMPT][INST]q1[/INST]▮r1</s>▮[INST]q2[/INST]▮r2</s>▮",
    ),
    (
        "gemma",
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n▮R<end_of_turn>▮",
        "<bos><start_of_turn>system\nSYS<end_of_turn>\n<start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\n"
        "▮r1<end_of_turn>▮\n<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n▮r2<end_of_turn>▮",
    ),
    (
        "phi4",
        "<|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>▮R<|im_end|>▮",
        "<|im_start|>system<|im_sep|>SYS<|im_end|><|im_start|>user<|im_sep|>q1<|im_end|><|im_start|>assistant<|im_sep|>"
        "▮r1<|im_end|>▮<|im_start|>user<|im_sep|>q2<|im_end|><|im_start|>assistant<|im_sep|>▮r2<|im_end|>▮",
    ),
    (
        "chatglm4",
        "[gMASK]<sop><|user|>\nQ<|assistant|>▮\nR<|user|>▮",
        "[gMASK]<sop><|system|>\nSYS<|user|>\nq1<|assistant|>▮\nr1<|user|>▮\nq2<|assistant|>▮\nr2<|user|>▮",
    ),
    (
        "glm4",
        "[gMASK]<sop><|user|>\nQ<|assistant|>▮\nR<|user|>▮",
        "[gMASK]<sop><|system|>\nSYS<|user|>\nq1<|assistant|>▮\nr1<|user|>▮\nq2<|assistant|>▮\nr2<|user|>▮",
    ),
    (
        "deepseek_v3_1",
        "<bos><｜User｜>Q<｜Assistant｜></think>▮R<eos>▮",
        "<bos>SYS<｜User｜>q1<｜Assistant｜></think>▮r1<eos>▮<｜User｜>q2<｜Assistant｜></think>▮r2<eos>▮",
    ),
    ("dummy", "Q▮R<eos>▮", None),  # no place for a system text
]


@pytest.mark.parametrize(("name", "one", "two"), LAYOUTS)
def test_every_family_lays_out_one_and_two_rounds_as_written_down(name: str, one: str, two: str | None) -> None:
    assert layout(name, ONE) == one
    if two is not None:
        assert layout(name, TWO) == two
    else:
        with pytest.raises(DropRow, match=f"template {name} has no place for a system message"):
            layout(name, TWO)


def test_the_table_above_covers_every_family() -> None:
    assert {name for name, *_ in LAYOUTS} == set(load_templates())


@pytest.mark.parametrize(
    ("loss_scale", "expected"),
    [
        ("default", "SYS|q1|▮r1|q2|▮r2"),
        ("last_round", "SYS|q1|r1|q2|▮r2"),
        ("all", "▮SYS|▮q1|▮r1|▮q2|▮r2"),
    ],
)
def test_loss_scale_decides_what_is_trained(loss_scale: str, expected: str) -> None:
    template = bound("chatml")
    spans = template.render(read_conversation(TWO), RenderOptions(loss_scale=loss_scale))
    shown = [("▮" if span.weight else "") + span.text for span in spans if not span.literal]
    assert "|".join(shown) == expected
    if loss_scale == "all":
        assert all(span.weight for span in spans)


def test_a_loss_flag_on_a_message_overrides_the_loss_scale() -> None:
    messages = chat((U, "q1"), (A, "r1", True), (U, "q2"), (A, "r2", False))
    expected = CHATML_TWO.replace("<|im_start|>system\nSYS<|im_end|>\n", "").replace("▮r2<|im_end|>▮", "r2<|im_end|>")
    assert layout("chatml", messages, loss_scale="last_round") == expected
    assert layout("chatml", messages) == expected


def test_parts_of_one_turn_keep_their_own_loss_flags() -> None:
    messages = chat((U, "q"), (A, "thought", False), (A, "answer"))
    assert layout("chatml", messages).endswith("assistant\nthought▮answer<|im_end|>▮")


def test_consecutive_messages_of_one_role_are_joined_without_separator() -> None:
    messages = chat((U, "a"), (U, "b"), (A, "c"), (A, "d"))
    assert layout("chatml", messages) == CHATML_ONE.replace("Q", "ab").replace("R", "cd")


def test_the_system_text_of_the_row_comes_before_the_flag_and_the_flag_before_the_default() -> None:
    assert layout("qwen2_5", TWO, system="FLAG") == CHATML_TWO
    assert layout("qwen2_5", ONE, system="FLAG") == with_system(CHATML_ONE, "FLAG")
    assert layout("qwen2_5", ONE, system="") == CHATML_ONE
    assert layout("qwen2_5", chat((S, ""), *((m["role"], m["content"]) for m in ONE))) == CHATML_ONE


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>assistant\n▮R<|im_end|>▮"),
        ("llama3", f"<|begin_of_text|>{LLAMA3_TURN.format(A)}▮R<|eot_id|>▮"),
        ("deepseek_r1", "<bos><｜Assistant｜>▮R<eos>▮"),
        ("glm4", "[gMASK]<sop><|assistant|>▮\nR<|user|>▮"),
        ("dummy", "▮R<eos>▮"),
        ("llama", "<s>[INST]  [/INST]▮ R </s>▮"),  # [INST] cannot be left out
    ],
)
def test_a_conversation_that_starts_with_the_assistant_gets_no_query(name: str, expected: str) -> None:
    assert layout(name, chat((A, "R"))) == expected


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([], None, "no messages"),
        (chat((U, "q"), (S, "late"), (A, "r")), None, "a system message that is not the first message"),
        ([{"role": "user", "content": [{"type": "image"}]}], None, "message content is not text"),
        (chat((U, "q"), ("tool_call", "{}")), None, "the template has no format for tool messages"),
        (ONE, '[{"name": "f"}]', "the template has no format for tools"),
    ],
)
def test_a_row_that_is_no_conversation_is_dropped_with_the_reason(messages: Any, tools: Any, reason: str) -> None:
    with pytest.raises(DropRow, match=reason):
        read_conversation(messages, tools)


def test_hybrid_thinking_keeps_thoughts_and_does_not_train_the_empty_block() -> None:
    thought = chat((U, "q1"), (A, "<think>\na\n</think>\n\nr1"), (U, "q2"), (A, f"{NO_THINK}r2"))
    shown = layout("qwen3", thought)
    assert "assistant\n▮<think>\na\n</think>\n\nr1<|im_end|>▮" in shown
    assert shown.endswith(f"assistant\n{NO_THINK}▮r2<|im_end|>▮")


def test_last_round_drops_earlier_thoughts_and_adds_the_empty_block_to_the_last_round_only() -> None:
    thought = chat((U, "q1"), (A, "<think>\na\n</think>\n\nr1"), (U, "q2"), (A, "r2"))
    shown = layout("qwen3", thought, loss_scale="last_round")
    assert "assistant\nr1<|im_end|>" in shown
    assert shown.count("<think>") == 1
    assert "<think>" not in layout("qwen3", ONE, add_non_thinking_prefix=False)


@pytest.mark.parametrize(
    ("name", "options", "opening"),
    [
        ("qwen3", {}, NO_THINK),
        ("qwen3", {"enable_thinking": True}, ""),
        ("qwen3", {"enable_thinking": False}, NO_THINK),
        ("qwen3_thinking", {}, "<think>\n"),
        ("qwen3_nothinking", {}, ""),
        ("deepseek_v3_1", {}, "</think>"),
        ("deepseek_v3_1", {"enable_thinking": True}, "<think>"),
        ("qwen3", {"response_prefix": "Sure: "}, "Sure: "),
        ("glm4", {"response_prefix": "Sure: "}, "\nSure: "),
    ],
)
def test_the_prompt_ends_as_the_thinking_mode_asks(name: str, options: dict[str, Any], opening: str) -> None:
    starts = {"deepseek_v3_1": "<bos><｜User｜>Q<｜Assistant｜>", "glm4": "[gMASK]<sop><|user|>\nQ<|assistant|>"}
    start = starts.get(name, CHATML_ONE.split("▮")[0])
    assert prompt(name, chat((U, "Q")), **options) == start + opening


def test_a_prompt_that_ends_with_an_assistant_message_is_continued() -> None:
    assert prompt("llama3", ONE) == LLAMA3_ONE.replace("▮", "").removesuffix("<|eot_id|>")


def test_tools_are_written_as_the_qwen_models_expect_them() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    messages = chat(
        (U, "q"),
        ("tool_call", '{"name": "weather", "arguments": "{\\"city\\": \\"北京\\"}"}'),
        ("tool_call", '{"name": "weather", "arguments": {}}'),
        ("tool_response", "sunny"),
        ("tool", "rain"),
        (A, "R"),
    )
    shown = layout("qwen2_5", messages, [tool], loss_scale="last_round")
    assert "assistant.\n\n# Tools\n\nYou may call" in shown
    assert '<tools>\n{"type": "function", "function": {"name": "weather", "parameters": {}}}\n</tools>' in shown
    assert (
        '▮<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>▮\n<|im_start|>user\n'
        "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n▮R<|im_end|>▮"
    ) in shown


def test_bare_mode_keeps_every_text_in_order() -> None:
    everything = render_plain(read_conversation(TWO), RenderOptions(loss_scale="all"), "<bos>", "<eos>")
    assert marked(everything) == "▮<bos>SYSq1r1q2r2<eos>▮"
    replies = render_plain(read_conversation(TWO), RenderOptions(), "", "<eos>")
    assert marked(replies) == "SYSq1▮r1▮q2▮r2<eos>▮"


def test_an_unknown_template_name_is_answered_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"--template qwen9: unknown; choose auto or one of chatml, qwen, qwen2_5"):
        get_template("qwen9")


def test_a_template_that_ends_with_eos_needs_one() -> None:
    with pytest.raises(UserError, match="--template default ends replies with the eos token"):
        get_template("default").bind(None, None, adds_bos=False)


def test_importing_the_templates_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'numpy', 'pyarrow', 'tokenizers'}"
    code = f"import sys, rayswift.data.chat.families; sys.exit(repr({heavy} & set(sys.modules)) != 'set()')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["qwen3", "qwen3_thinking", "llama3", "llama3_2", "deepseek_v2_5", "deepseek_r1"])
def test_a_tokenizer_is_matched_to_the_family_of_its_chat_template(name: str, family_dir: Callable[[str], str]) -> None:
    from transformers import AutoTokenizer

    matched = match_template(AutoTokenizer.from_pretrained(family_dir(name)))
    assert matched is not None and matched.name == name


@pytest.mark.parametrize("name", ["gemma", "llama2", "phi3", "open_ended", "no_template"])
def test_other_chat_templates_match_no_family(name: str, family_dir: Callable[[str], str]) -> None:
    from transformers import AutoTokenizer

    assert match_template(AutoTokenizer.from_pretrained(family_dir(name))) is None
