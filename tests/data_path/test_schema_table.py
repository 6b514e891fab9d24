"""SWIFT's verified matrix of schemas (4.6) and its standard formats per task, every row of both spelled out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayswift.data.rows.standard import WARNINGS, Drop, RowRules, StandardRow, standardise_row

LETTERS = {"system": "S", "user": "U", "assistant": "A", "tool_call": "C", "tool_response": "R", "tool": "T"}
U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
PAIR = {"conversation": [{"human": "q1", "assistant": "r1"}, {"human": "q2", "gpt": "r2"}], "system": "s"}


def standard(row: Any, rules: RowRules | None = None) -> StandardRow:
    result = standardise_row(row, rules)
    assert isinstance(result, dict), result
    return result


def short(messages: list[dict[str, Any]]) -> list[str]:
    return [f"{LETTERS[message['role']]}:{message['content']}" for message in messages]


def reason(row: Any, rules: RowRules | None = None) -> str:
    result = standardise_row(row, rules)
    assert isinstance(result, Drop), result
    return result.reason


# The matrix of the issue, top to bottom: (row, its messages).
MATRIX: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"system": "s", "query": "q2", "response": "r2", "history": [["q1", "r1"]]},
        ["S:s", "U:q1", "A:r1", "U:q2", "A:r2"],
    ),
    ({"instruction": "inst", "input": "inp", "output": "o"}, ["U:inst\ninp", "A:o"]),
    ({"instruction": "inst", "input": "", "output": "o"}, ["U:inst", "A:o"]),
    ({"instruction": "inst", "input": None, "output": "o"}, ["U:inst", "A:o"]),
    ({"instruction": "inst", "output": "o"}, ["U:inst", "A:o"]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, ["U:q", "A:r"]),
    (PAIR, ["S:s", "U:q1", "A:r1", "U:q2", "A:r2"]),
    ({"messages": json.dumps([U, A])}, ["U:u", "A:a"]),
    ({"text": "t"}, ["A:t"]),
    ({"content": "t"}, ["A:t"]),
    ({"prompt": "q", "completion": "r"}, ["U:q", "A:r"]),
    ({"question": "q", "answer": "r"}, ["U:q", "A:r"]),
    ({"input": "q", "output": "r"}, ["U:q", "A:r"]),
    ({"Question": "q", "Answer": "r"}, ["U:q", "A:r"]),
    ({"query": None, "response": "r"}, ["A:r"]),
    ({"query": "q", "response": None}, ["U:q"]),
    ({"messages": [U]}, ["U:u"]),
    ({"messages": [U, U, A]}, ["U:u", "U:u", "A:a"]),
]


@pytest.mark.parametrize(("row", "expected"), MATRIX, ids=[", ".join(row) for row, _ in MATRIX])
def test_verified_matrix(row: dict[str, Any], expected: list[str]) -> None:
    assert standard(row) == {"messages": standard(row)["messages"]}
    assert short(standard(row)["messages"]) == expected


def test_verified_matrix_last_rows() -> None:
    assert short(standard({"messages": [{"role": "developer", "content": "x"}, A]})["messages"]) == ["S:x", "A:a"]
    row = {"query": "<image>?", "response": "r", "images": "/x/a.jpg"}
    assert standard(row)["images"] == [{"bytes": None, "path": "/x/a.jpg"}]


BOTH = [U, A]
REJECTED = [U, {"role": "assistant", "content": "bad"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL, RESULT = (
    {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'},
    {"role": "tool_response", "content": "1"},
)
FILE = {"bytes": None, "path": "a.jpg"}

# Standard formats per task: (raw row, the standard row; None where it is the raw row itself).
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "pt": ({"messages": [A]}, None),
    "sft": ({"messages": [{"role": "system", "content": "s"}, U, {**A, "loss": False, "loss_scale": 0.5}]}, None),
    "channel loss": ({"messages": BOTH, "channel": "math"}, None),
    "dpo": ({"messages": BOTH, "rejected_response": "bad"}, None),
    "dpo, rejected_messages": ({"messages": BOTH, "rejected_messages": REJECTED}, None),
    "rm": ({"messages": BOTH, "rejected_response": "bad", "margin": 0.7}, None),
    "dpo, role aliases": (
        {
            "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
            "rejected_messages": '[{"from": "human", "value": "u"}, {"from": "gpt", "value": "bad"}]',
        },
        {"messages": BOTH, "rejected_messages": REJECTED},
    ),
    "dpo, files of the rejected side": (
        {"messages": BOTH, "rejected_messages": REJECTED, "rejected_images": "a.jpg", "rejected_tools": "[]"},
        {"messages": BOTH, "rejected_messages": REJECTED, "rejected_images": [FILE], "rejected_tools": "[]"},
    ),
    "dpo, chosen and rejected texts": (
        {"prompt": "u", "chosen": "a", "rejected": "bad"},
        {"messages": BOTH, "rejected_response": "bad"},
    ),
    "dpo, chosen and rejected conversations": (
        {"prompt": "u", "chosen": BOTH, "rejected": REJECTED},
        {"messages": BOTH, "rejected_messages": REJECTED},
    ),
    "dpo, chosen and rejected replies": (
        {"prompt": [U], "chosen": [A], "rejected": [REJECTED[1]]},
        {"messages": BOTH, "rejected_response": "bad"},
    ),
    "dpo, chosen and rejected beside conversations": (
        {"conversations": [U], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "bad"}},
        {"messages": BOTH, "rejected_response": "bad"},
    ),
    "kto": ({"messages": BOTH, "label": False}, None),
    "grpo": ({"messages": [U]}, None),
    "gkd": ({"messages": BOTH}, None),
    "seq_cls": ({"messages": [U], "label": 3}, None),
    "seq_cls, several": ({"messages": [U], "label": [0, 2]}, None),
    "regression": ({"messages": [U], "label": 0.25}, None),
    "embedding": ({"messages": [U], "positive_messages": [[A]], "negative_messages": [[U], [A]]}, None),
    "embedding, one positive": (
        {"messages": [U], "positive_messages": [A]},
        {"messages": [U], "positive_messages": [[A]]},
    ),
    "multimodal": (
        {"messages": BOTH, "images": ["a.jpg"], "videos": "v.mp4", "audios": [{"path": "a.wav"}]},
        {
            "messages": BOTH,
            "images": [FILE],
            "videos": [{"bytes": None, "path": "v.mp4"}],
            "audios": [{"path": "a.wav"}],
        },
    ),
    "multimodal, frames": (
        {"messages": BOTH, "videos": [["a.jpg", "a.jpg"]]},
        {"messages": BOTH, "videos": [[FILE, FILE]]},
    ),
    "multimodal, bytes": (
        {"messages": BOTH, "image": {"bytes": b"\x89PNG", "path": None}},
        {"messages": BOTH, "images": [{"bytes": None, "path": "data:image/png;base64,iVBORw=="}]},
    ),
    "grounding": (
        {"messages": BOTH, "objects": {"ref": ["cat"], "bbox": [[9, 8, 1, 2], [5, 6]], "bbox_type": "real"}},
        {"messages": BOTH, "objects": {"ref": ["cat"], "bbox": [[1, 2, 9, 8], [5, 6]], "bbox_type": "real"}},
    ),
    "agent": ({"messages": [U, CALL, CALL, RESULT, A], "tools": TOOLS}, None),
    "agent, tools as text": ({"messages": [U, CALL, RESULT, A], "tools": json.dumps(TOOLS)}, None),
    "template options": ({"messages": BOTH, "chat_template_kwargs": {"enable_thinking": False}}, None),
    "template options as text": (
        {"messages": BOTH, "chat_template_kwargs": '{"max_pixels": 10}'},
        {"messages": BOTH, "chat_template_kwargs": {"max_pixels": 10}},
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_standard_formats_per_task(task: str) -> None:
    row, expected = TASKS[task]
    assert standard(row) == (expected or row)


def test_extra_columns_reach_reward_functions() -> None:
    rules = RowRules(keep_extra=True)
    assert standard({"messages": [U], "solution": "42", "id": 7}, rules) == {"messages": [U], "solution": "42", "id": 7}
    assert standard({"messages": [U], "solution": "42", "id": 7}) == {"messages": [U]}
    # The answer's column becomes the reply and stays; two that could be it leave the prompt alone, as in SWIFT.
    assert standard({"problem": "u", "solution": "a"}, rules) == {"messages": BOTH, "solution": "a"}
    row = {"problem": "u", "solution": "long", "answer": "42"}
    assert standard(row, rules) == {"messages": [U], "solution": "long", "answer": "42"}


OPENAI = [
    U,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"城市": "北京"}'}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": {"x": 1}}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "name": "f", "content": "sun"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "rain"}]},
    {"role": "assistant", "content": "done", "tool_calls": None},
]
ANTHROPIC = [
    {"role": "user", "content": [{"type": "text", "text": "u"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "let me look"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"城市": "北京"}},
            {"type": "tool_use", "id": "2", "name": "g", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": "sun"},
            {"type": "tool_result", "tool_use_id": "2", "content": [{"type": "text", "text": "rain"}]},
            {"type": "text", "text": "well?"},
        ],
    },
    {"role": "assistant", "content": "done"},
]


def test_openai_tool_calls() -> None:
    assert short(standard({"messages": OPENAI})["messages"]) == [
        "U:u",
        'C:{"name": "f", "arguments": {"城市": "北京"}}',
        'C:{"name": "g", "arguments": {"x": 1}}',
        "T:sun",
        "T:rain",
        "A:done",
    ]
    assert standard({"messages": OPENAI})["messages"][3]["name"] == "f"


def test_openai_tool_calls_with_text_and_older_spellings() -> None:
    call = {"name": "f", "arguments": "not JSON"}
    messages = [
        U,
        {"role": "assistant", "content": "hm", "function_call": call, "loss": True},
        {"role": "function", "content": "1"},
    ]
    found = standard({"messages": messages})["messages"]
    assert short(found) == ["U:u", "A:hm", 'C:{"name": "f", "arguments": "not JSON"}', "R:1"]
    assert [message.get("loss") for message in found] == [None, True, True, None]


def test_anthropic_blocks() -> None:
    assert short(standard({"messages": ANTHROPIC})["messages"]) == [
        "U:u",
        "A:let me look",
        'C:{"name": "f", "arguments": {"城市": "北京"}}',
        'C:{"name": "g", "arguments": {}}',
        "R:sun",
        "R:rain",
        "U:well?",
        "A:done",
    ]


@pytest.mark.parametrize(
    ("part", "column", "path"),
    [
        ({"type": "image_url", "image_url": {"url": "http://x/a.jpg"}}, "images", "http://x/a.jpg"),
        ({"type": "image_url", "image_url": "a.jpg"}, "images", "a.jpg"),
        ({"type": "image", "image": "a.jpg"}, "images", "a.jpg"),
        ({"type": "image", "url": "http://x/a.jpg", "path": None}, "images", "http://x/a.jpg"),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}},
            "images",
            "data:image/png;base64,iVBORw==",
        ),
        ({"type": "image", "source": {"type": "url", "url": "http://x/a.jpg"}}, "images", "http://x/a.jpg"),
        ({"type": "video", "video": "v.mp4"}, "videos", "v.mp4"),
        ({"type": "video_url", "video_url": {"url": "v.mp4"}}, "videos", "v.mp4"),
        (
            {"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}},
            "audios",
            "data:audio/wav;base64,UklG",
        ),
    ],
)
def test_files_inside_messages_become_placeholders_and_columns(part: dict[str, Any], column: str, path: str) -> None:
    content = [{"type": "text", "text": "see "}, part, {"type": "text", "text": "?"}]
    found = standard({"messages": [{"role": "user", "content": content}, A]})
    assert short(found["messages"]) == [f"U:see <{column[:-1]}>?", "A:a"]
    assert found[column] == [{"bytes": None, "path": path}]


def test_a_part_without_a_file_marks_the_place_of_the_column() -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "image"}, "what?"]}, A], "images": ["a.jpg"]}
    assert short(standard(row)["messages"]) == ["U:<image>what?", "A:a"]
    assert standard(row)["images"] == [FILE]


def test_a_table_with_null_messages_is_read_by_its_other_columns() -> None:
    assert short(standard({"messages": None, "query": "q", "response": "r"})["messages"]) == ["U:q", "A:r"]
    assert short(standard({"messages": [U, A], "query": None, "response": None})["messages"]) == ["U:u", "A:a"]


def test_message_lists_of_json_texts_as_swift_writes_them() -> None:
    assert standard({"messages": [json.dumps(U), json.dumps(A)]}) == {"messages": BOTH}


def test_numbers_spelled_as_text() -> None:
    assert short(standard({"question": "u", "answer": 10**25})["messages"]) == ["U:u", f"A:{10**25}"]


@pytest.mark.parametrize(
    ("row", "used"),
    [
        ({"prompt": "p", "query": "u", "response": "a"}, "columns prompt, query could all be the query: used query"),
        ({"query": "u", "answer": "x", "response": "a"}, "answer, response could all be the response: used response"),
        (
            {"instruction": "u", "input": "", "output": "a", "text": "x"},
            "output, text could all be the response: used output",
        ),
        ({"messages": BOTH, "conversation": [A]}, "conversation, messages could all be the messages: used messages"),
        (
            {"messages": [U, {**A, "reasoning": {"encrypted": "hm"}}]},
            "thoughts beside the answer that are no text (encrypted, or an object) are not trained",
        ),
    ],
)
def test_what_is_left_out_is_said(row: dict[str, Any], used: str) -> None:
    found = standard(row)
    assert found["messages"] == BOTH
    assert len(found[WARNINGS]) == 1
    assert used in found[WARNINGS][0]


def test_columns_named_by_the_user_are_certain_and_case_does_not_matter() -> None:
    rules = RowRules(columns={"Best": "response"})
    found = standard({"Question": "u", "best": "a", "answer": "x", "output": "y"}, rules)
    assert found["messages"] == BOTH
    assert "used best" in found[WARNINGS][0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "q", "response": {"a": 1}}, "the response is an object, not text"),
        ({"query": "q", "response": True}, "the response is true or false, not text"),
        ({"query": ["q"], "response": "r"}, "the query is a list, not text"),
        ({"query": "q", "response": []}, "the response is a list without a first text"),
        ({"query": "q", "response": "r", "system": {}}, "the system is an object, not text"),
        ({"query": "q", "response": "r", "history": [[{}, "r"]]}, "the history is an object, not text"),
        ({"query": "q", "response": "r", "history": "not a list"}, "history is not a list of"),
        ({"conversation": [{"human": "q", "assistant": None}]}, "a pair of messages has no text on one side"),
        ({"messages": BOTH, "rejected_response": "a"}, "the rejected response is the same as the answer"),
        ({"messages": BOTH, "rejected_messages": BOTH}, "rejected_messages are the same as messages"),
        ({"messages": BOTH, "chosen": "b", "rejected": "c"}, "already end with another answer than chosen"),
        ({"messages": BOTH, "chat_template_kwargs": "x"}, "chat_template_kwargs is not a JSON object"),
        ({"messages": BOTH, "objects": {"bbox": [[1, 2, 3]]}}, "a box that is not [x, y] or [x1, y1, x2, y2]"),
        ({"messages": BOTH, "positive_messages": "x"}, "positive_messages is not a list of conversations"),
        ({"messages": BOTH, "images": 5}, "neither a path nor an object"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "a part of type 'document'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "a tool call has no function name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a"}]}], "images": ["b"]},
            "images are both in a column and inside the messages",
        ),
        ({"messages": '[{"role": "user", "content": "\\ud83d"}]'}, "half a surrogate pair"),
    ],
)
def test_what_cannot_be_used_says_why(row: dict[str, Any], expected: str) -> None:
    assert expected in reason(row)


def test_message_names_of_a_dataset() -> None:
    from rayswift.data.rows.messages import MessageNames

    names = MessageNames(
        role_key="who", content_key="said", user_role="student", assistant_role="teacher", system_role="rules"
    )
    turns = [{"who": "rules", "said": "s"}, {"who": "student", "said": "u"}, {"who": "teacher", "said": "a", "x": 1}]
    rules = RowRules(message_names=names)
    assert short(standard({"messages": turns}, rules)["messages"]) == ["S:s", "U:u", "A:a"]
    assert short(standard({"messages": [{"student": "u", "teacher": "a"}]}, rules)["messages"]) == ["U:u", "A:a"]


def test_texts_of_a_dataset_are_edited() -> None:
    rules = RowRules(remove_text="\ufe0f", query_suffix=" /no_think", response_prefix="<think>\n\n</think>\n\n")
    row = {"query": "好❤\ufe0f", "response": "是\ufe0f", "rejected_response": "yes\ufe0f"}
    found = standard(row, rules)
    assert short(found["messages"]) == ["U:好❤ /no_think", "A:<think>\n\n</think>\n\n是"]
    assert found["rejected_response"] == "yes"
