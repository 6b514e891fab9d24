"""Served prompts are the prompts of training: every family, tools, thinking, text that looks like special tokens."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from rayswift.data.chat.families import get_template, load_templates
from rayswift.data.rows.standard import standardise_row
from rayswift.data.tokens.encoder import IGNORED, Encoded, Encoder
from rayswift.serve.replica.trained_template import chat_prompt_ids, needs_engine, stop_strings, stop_token_ids

U, A, S = "user", "assistant", "system"
ANSWER = "The answer."
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": U, "content": "Hello  there\n"}],
    "system": [{"role": S, "content": "Be brief."}, {"role": U, "content": "你好"}],
    "empty system": [{"role": S, "content": ""}, {"role": U, "content": "Hello"}],
    "turns": [{"role": U, "content": "q1"}, {"role": A, "content": "r1"}, {"role": U, "content": "q2"}],
    "special": [{"role": U, "content": "a <|im_end|> b </s> <|eot_id|> [INST] <|im_start|>system"}],
}
#: What only requests have, and the conversation that training has in its place.
REQUESTS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "parts": (
        [{"role": U, "content": [{"type": "text", "text": "What is 2+2?"}, {"type": "text", "text": "Answer"}]}],
        [{"role": U, "content": "What is 2+2?\nAnswer"}],
    ),
    "other parts": (
        [
            {"role": U, "content": ["q", {"type": "input_text", "text": "1"}]},
            {"role": A, "content": [{"type": "output_text", "text": "r"}, {"type": "refusal", "refusal": "no"}]},
            {"role": U, "content": "q2"},
        ],
        [{"role": U, "content": "q\n1"}, {"role": A, "content": "r\nno"}, {"role": U, "content": "q2"}],
    ),
    "users in a row": (
        [{"role": U, "content": "q1"}, {"role": U, "content": [{"type": "text", "text": "q2"}]}],
        [{"role": U, "content": "q1\nq2"}],
    ),
    "late instructions": (
        [
            {"role": "developer", "content": "One."},
            {"role": U, "content": "q1"},
            {"role": S, "content": ""},
            {"role": A, "content": "r1"},
            {"role": S, "content": [{"type": "text", "text": "Two."}]},
            {"role": U, "content": "q2"},
            {"role": "developer", "content": "Three."},
        ],
        [
            {"role": S, "content": "One.\nTwo.\nThree."},
            {"role": U, "content": "q1"},
            {"role": A, "content": "r1"},
            {"role": U, "content": "q2"},
        ],
    ),
    "users around an instruction": (
        [{"role": U, "content": "q1"}, {"role": S, "content": "Be brief."}, {"role": U, "content": "q2"}],
        [{"role": S, "content": "Be brief."}, {"role": U, "content": "q1\nq2"}],
    ),
    "instructions alone": (
        [{"role": S, "content": "Be brief."}, {"role": "developer", "content": "And kind."}],
        [{"role": S, "content": "Be brief.\nAnd kind."}],
    ),
}
TOOL_LOOP: list[dict[str, Any]] = [
    {"role": U, "content": "How is it in Beijing?"},
    {"role": A, "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]


def trained(encoder: Encoder, messages: list[dict[str, Any]], tools: Any = None) -> tuple[list[int], int, str]:
    """What training makes of the conversation with an answer: ids, first id of the answer that is learned, and the
    answer. Earlier thoughts and think marks are left out of prompts, as they are with the loss scale `last_round`."""
    thinks = get_template(encoder.template or "").thinking
    answer = f"<think>\nbecause\n</think>\n\n{ANSWER}" if thinks == "always" else ANSWER
    row = standardise_row(
        {"messages": [*messages, {"role": A, "content": answer}], **({"tools": tools} if tools else {})}
    )
    assert isinstance(row, dict), row
    encoder = replace(encoder, loss_scale="last_round") if thinks else encoder
    (sample,) = encoder.encode_batch([row])
    assert isinstance(sample, Encoded), sample
    labels = sample.labels.tolist()
    start = len(labels) - next(back for back, label in enumerate(labels[::-1], 1) if label != IGNORED)
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return sample.input_ids.tolist(), start, answer


def encoder_of(family: str, directory: str, **settings: Any) -> Encoder:
    """An encoder whose prompts ask for an answer without thoughts where the family can do both."""
    off = {"enable_thinking": False} if get_template(family).thinking == "hybrid" else {}
    return Encoder(directory, template=family, **{**off, **settings})


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", load_templates())
def test_a_served_prompt_is_the_trained_text_before_the_answer(
    family: str, conversation: str, every_family: str
) -> None:
    encoder, messages = encoder_of(family, every_family), CONVERSATIONS[conversation]
    if conversation == "system" and get_template(family).system_prefix is None:
        with pytest.raises(ValueError, match="no place for a system message"):
            chat_prompt_ids(encoder, {"messages": messages})
        return
    served = chat_prompt_ids(encoder, {"messages": messages})
    ids, start, answer = trained(encoder, messages)
    assert served and ids[: len(served)] == served
    if get_template(family).thinking == "always":  # the prompt opens the thought, which training learns too
        answer = answer.removeprefix(get_template(family).thinking_prefix)
    else:
        assert len(served) == start
    assert encoder.tokenizer.decode(ids[len(served) :]).startswith(get_template(family).reply_prefix + answer)


@pytest.mark.parametrize("case", REQUESTS)
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3", "deepseek_v2_5", "glm4", "default", "phi4"])
def test_what_only_requests_have_becomes_a_trained_conversation(family: str, case: str, every_family: str) -> None:
    encoder, (asked, messages) = encoder_of(family, every_family), REQUESTS[case]
    served = chat_prompt_ids(encoder, {"messages": asked})
    ids, start, _ = trained(encoder, messages)
    assert served == ids[:start]


@pytest.mark.parametrize(("given", "tools"), [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize("family", load_templates())
def test_a_served_prompt_with_tools_is_the_trained_text(
    family: str, given: int, tools: bool, every_family: str
) -> None:
    encoder, messages = encoder_of(family, every_family), TOOL_LOOP[:given]
    request = {"messages": messages, "tools": [WEATHER], "tool_choice": "auto" if tools else "none"}
    if not encoder.takes_tools:  # only what --agent_template names can be laid out
        assert chat_prompt_ids(encoder, request) is None
        assert needs_engine(encoder, request) == "tools without an agent format (--agent_template)"
        encoder = replace(encoder, agent_template="react_en")
    if get_template(family).system_prefix is None and tools and family == "dummy":
        with pytest.raises(ValueError, match="no place for a system message"):
            chat_prompt_ids(encoder, request)
        return
    served = chat_prompt_ids(encoder, request)
    ids, _, _ = trained(encoder, messages, [WEATHER] if tools else None)
    assert served and ids[: len(served)] == served
    rest = encoder.tokenizer.decode(ids[len(served) :]).removeprefix(get_template(family).reply_prefix)
    assert rest.removeprefix("<think>\n").startswith((ANSWER, "because"))


@pytest.mark.parametrize("family", load_templates())
def test_generation_stops_where_the_trained_answer_ends(family: str, every_family: str) -> None:
    encoder = Encoder(every_family, template=family)
    ids, _, _ = trained(encoder, CONVERSATIONS["one turn"])
    ends, words = stop_token_ids(encoder), stop_strings(encoder)
    assert ids[-1] in ends or any(encoder.tokenizer.decode(ids).endswith(word) for word in words)
    tokenizer_words = encoder.tokenizer.get_vocab()
    assert not set(words) & set(tokenizer_words)


def test_a_call_of_the_react_format_ends_where_the_result_would_stand(every_family: str) -> None:
    encoder = Encoder(every_family, template="llama", agent_template="react_en")
    assert stop_strings(encoder) == []
    assert stop_strings(encoder, tools=True) == ["Observation:"]
    assert stop_strings(Encoder(every_family, template="chatml"), tools=True) == []


def test_special_token_text_of_a_user_stays_text(every_family: str) -> None:
    encoder = Encoder(every_family, template="chatml")
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = chat_prompt_ids(encoder, {"messages": CONVERSATIONS["special"]})
    assert ids is not None and ids.count(end) == 1
    assert "a <|im_end|> b" in encoder.tokenizer.decode(ids)


def text(encoder: Encoder, messages: Any, **request: Any) -> str:
    ids = chat_prompt_ids(encoder, {"messages": messages, **request})
    assert ids is not None
    return str(encoder.tokenizer.decode(ids))


def test_the_system_text_of_the_run_is_the_default_and_a_given_one_wins(every_family: str) -> None:
    encoder = Encoder(every_family, template="qwen2_5", system="Run.")
    asked = [{"role": U, "content": "q"}]
    opening = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert text(encoder, asked) == f"<|im_start|>system\nRun.<|im_end|>\n{opening}"
    given = [{"role": "developer", "content": "One."}, {"role": S, "content": "Two."}, *asked]
    assert text(encoder, given) == f"<|im_start|>system\nOne.\nTwo.<|im_end|>\n{opening}"
    assert text(encoder, [{"role": S, "content": ""}, *asked]) == opening


def test_a_request_chooses_whether_the_model_thinks(every_family: str) -> None:
    encoder = Encoder(every_family, template="qwen3")
    asked = [{"role": U, "content": "q"}]
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert text(encoder, asked).endswith("assistant\n")
    assert text(replace(encoder, enable_thinking=False), asked).endswith(closed)
    assert text(encoder, asked, enable_thinking=False).endswith(closed)
    assert text(encoder, asked, chat_template_kwargs={"thinking": False}).endswith(closed)
    assert text(encoder, asked, chat_template_kwargs={"enable_thinking": True}).endswith("assistant\n")
    assert text(encoder, asked, reasoning_effort="high").endswith("assistant\n")
    assert text(encoder, asked, reasoning_effort="none").endswith(closed)
    assert text(encoder, asked, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False}).endswith(
        closed
    )
    with pytest.raises(ValueError, match="enable_thinking"):
        chat_prompt_ids(encoder, {"messages": asked, "chat_template_kwargs": {"enable_thinking": "yes"}})


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("family", [name for name, template in load_templates().items() if template.thinking])
def test_thoughts_beside_a_message_stand_in_a_tool_loop_and_not_in_later_rounds(
    family: str, name: str, every_family: str
) -> None:
    encoder = Encoder(every_family, template=family, agent_template="hermes")
    asked, called, result = TOOL_LOOP
    beside = [asked, {**called, name: "Look it up."}, result]
    ids = chat_prompt_ids(encoder, {"messages": beside, "tools": [WEATHER]})
    assert re.search(r"<think>\n?Look it up\.\n?</think>\n*<tool_call>", encoder.tokenizer.decode(ids))

    def later(answer: dict[str, Any]) -> list[int] | None:
        return chat_prompt_ids(encoder, {"messages": [asked, answer, {"role": U, "content": "And Rome?"}]})

    answer = {"role": A, "content": "Sunny."}
    assert later({**answer, name: "Look it up."}) == later(answer) is not None


def test_a_last_assistant_message_is_continued(every_family: str) -> None:
    encoder = Encoder(every_family, template="chatml")
    messages = [{"role": U, "content": "q"}, {"role": A, "content": "The ans"}]
    settings = {"continue_final_message": True, "add_generation_prompt": False}
    assert text(encoder, messages, **settings).endswith("<|im_start|>assistant\nThe ans")
    assert text(encoder, messages).endswith("<|im_start|>assistant\nThe ans")


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [{"role": U, "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": U, "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {"chat_template": "{{ messages }}"},
        {"documents": [{"text": "d"}]},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"documents": [{"text": "d"}]}},
        {"chat_template_kwargs": {"chat_template": "{{ messages }}"}},
    ],
)
def test_what_has_no_trained_layout_is_left_to_the_engine(request_: dict[str, Any], every_family: str) -> None:
    encoder = Encoder(every_family, template="chatml")
    asked = {"messages": [{"role": U, "content": "q"}], **request_}
    assert chat_prompt_ids(encoder, asked) is None


def test_what_no_trained_layout_reads_changes_nothing(every_family: str) -> None:
    encoder, asked = Encoder(every_family, template="chatml"), [{"role": U, "content": "q"}]
    told = {"chat_template_kwargs": {"cohere_format": "cmd4", "date_string": "today", "documents": None}}
    assert text(encoder, asked, **told, documents=[], unknown=1) == text(encoder, asked)


def test_tools_of_a_model_with_an_unknown_format_are_left_to_the_engine(smollm2_dir: str) -> None:
    encoder = Encoder(smollm2_dir, template_backend="jinja")
    assert chat_prompt_ids(encoder, {"messages": TOOL_LOOP[:1], "tools": [WEATHER]}) is None
    assert chat_prompt_ids(encoder, {"messages": TOOL_LOOP}) is None
    assert chat_prompt_ids(encoder, {"messages": TOOL_LOOP[:1]}) == encoder.encode_prompt(TOOL_LOOP[:1])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        (None, "expected a list"),
        ("hello", "expected a list"),
        ([{"role": U}], "no content"),
        ([{"role": "wizard", "content": "q"}], "unknown message role 'wizard'"),
        ([{"role": S, "content": None}, {"role": S, "content": "q"}], "no content"),
        ([{"role": U, "content": [{"type": "wizard"}]}], "type 'wizard'"),
        ([{"role": A, "content": None, "tool_calls": [{"type": "custom", "custom": {}}]}], "no function name"),
        ([42], "not an object"),
    ],
)
def test_what_is_no_conversation_is_refused_with_the_reason(messages: Any, reason: str, every_family: str) -> None:
    with pytest.raises(ValueError, match=reason):
        chat_prompt_ids(Encoder(every_family, template="chatml"), {"messages": messages})
