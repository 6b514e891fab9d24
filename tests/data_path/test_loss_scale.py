"""`--loss_scale`: bases, rules and the flags of single messages, as text with weights."""

from __future__ import annotations

from typing import Any

import pytest
from test_templates import A, U, bound, chat

from rayswift.data.chat.conversation import read_conversation
from rayswift.data.chat.families import RenderOptions
from rayswift.data.chat.loss_weights import read_loss_scale
from rayswift.errors import UserError

REACT = "Thought: t\nAction: f\nAction Input: {}\nObservation: ok\nFinal Answer: done"
QWEN = "✿FUNCTION✿: f\n✿ARGS✿: {}\n✿RESULT✿: ok\n✿RETURN✿: done"
HERMES = "text\n<tool_call>\n{}\n</tool_call>\n<tool_call>\n{1}\n</tool_call> end"


def weighed(text: str, reply: str, query: str = "q") -> str:
    """`[weight:text]` for every stretch."""
    shown = read_loss_scale(text).split(reply, query)
    assert "".join(part for part, _ in shown) == reply
    return "".join(f"[{weight:g}:{part}]" for part, weight in shown)


@pytest.mark.parametrize(
    ("loss_scale", "reply", "expected"),
    [
        ("default", "<think>\n\n</think>\n\nr", "[1:<think>\n\n</think>\n\nr]"),
        ("default+ignore_empty_think", "<think>\n\n</think>\n\nr", "[0:<think>\n\n</think>\n\n][1:r]"),
        ("ignore_empty_think", "</think>r", "[0:</think>][1:r]"),
        ("ignore_empty_think", "<think>\na\n</think>r", "[1:<think>\na\n</think>r]"),
        ("ignore_empty_think", "r <think></think>", "[1:r <think></think>]"),
        ("ignore_think_prefix", "<think>\na\n</think>r", "[0:<think>\n][1:a\n</think>r]"),
        ("last_round+ignore_think_prefix", "r", "[1:r]"),
        (
            "hermes",
            HERMES,
            "[1:text\n][2:<tool_call>\n{}\n</tool_call>][1:\n][2:<tool_call>\n{1}\n</tool_call>][1: end]",
        ),
        (
            "react",
            REACT,
            "[1:Thought: t\n][2:Action: f\nAction Input: {}\nObservation:][0: ok\n][1:Final Answer: done]",
        ),
        ("alpha_umi", "a Next: b", "[1:a ][2:Next: b]"),
        ("react", "a Next: b", "[1:a Next: b]"),
        ("qwen", QWEN, "[2:✿FUNCTION✿: f\n✿ARGS✿: {}\n✿RESULT✿:][0: ok\n][1:✿RETURN✿: done]"),
        ("agentflan", "Thought: t\nAction: f", "[1:Thought: t\nAction:][3: f]"),
        ("default+ignore_empty_think+hermes", "</think><tool_call>{}</tool_call>",
         "[0:</think>][2:<tool_call>{}</tool_call>]"),
    ],
)  # fmt: skip
def test_rules_weigh_the_parts_of_a_reply(loss_scale: str, reply: str, expected: str) -> None:
    assert weighed(loss_scale, reply) == expected


def test_agentflan_weighs_the_answer_to_a_question_for_a_part_of_a_call() -> None:
    assert weighed("agentflan", "weather", "What is the tool you want to use?") == "[3:weather]"


@pytest.mark.parametrize("text", ["some", "default+some", "last_round+default", ""])
def test_an_unknown_name_is_answered_with_the_choices(text: str) -> None:
    with pytest.raises(
        UserError, match=r"choose one of default, last_round, all; after . may follow hermes, ignore_empty_think"
    ):
        read_loss_scale(text)


def test_the_spelling_of_swift_3_means_the_same() -> None:
    assert read_loss_scale("last_round_with_ignore_empty_think") == read_loss_scale("last_round+ignore_empty_think")


def turn(text: str, **flags: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **flags}


@pytest.mark.parametrize(
    ("loss_scale", "flags", "expected"),
    [
        ("hermes", {}, "[2:<tool_call>{}</tool_call>][1:<|im_end|>]"),
        ("hermes", {"loss": True}, "[2:<tool_call>{}</tool_call>][1:<|im_end|>]"),
        ("hermes", {"loss": False}, ""),
        ("hermes", {"loss_scale": 0.5}, "[0.5:<tool_call>{}</tool_call><|im_end|>]"),
        ("default", {"loss": False, "loss_scale": 0.5}, ""),
        ("default", {"loss": True, "loss_scale": 0.5}, "[0.5:<tool_call>{}</tool_call><|im_end|>]"),
        ("default", {"loss_scale": 0.0}, ""),
        ("last_round", {"loss": True}, "[1:<tool_call>{}</tool_call><|im_end|>]"),
        ("last_round", {"loss": True, "loss_scale": 2}, "[2:<tool_call>{}</tool_call><|im_end|>]"),
        ("last_round", {"loss_scale": 2}, ""),
        ("last_round", {}, ""),
    ],
)
def test_flags_of_a_message_come_before_the_flag_of_the_run(
    loss_scale: str, flags: dict[str, Any], expected: str
) -> None:
    """The first of two rounds, its end-of-turn token included."""
    messages = [*chat((U, "q1")), turn("<tool_call>{}</tool_call>", **flags), *chat((U, "q2"), (A, "r2"))]
    spans = bound("chatml").render(read_conversation(messages), RenderOptions(loss_scale=loss_scale))
    shown, last = "", 0.0
    for span in spans[: next(i for i, span in enumerate(spans) if span.text == "q2")]:
        if span.weight and span.text:
            shown = shown[:-1] + span.text + "]" if span.weight == last else f"{shown}[{span.weight:g}:{span.text}]"
            last = span.weight
    assert shown == expected


def test_rules_leave_system_texts_and_queries_alone() -> None:
    messages = chat(("system", "<tool_call>s</tool_call>"), (U, "<tool_call>q</tool_call>"), (A, "r"))
    spans = bound("chatml").render(read_conversation(messages), RenderOptions(loss_scale="all+hermes"))
    assert {span.weight for span in spans} == {1.0}
