"""Every schema a user's file may have, and the reasons given for rows that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayswift.data.rows.standard import Drop, RowRules, standardise_row

DATA = Path(__file__).resolve().parents[1] / "data"
LETTERS = {"system": "S", "user": "U", "assistant": "A", "tool_call": "C", "tool_response": "R"}

# (row, its messages in short: one "X:content" per message)
SCHEMAS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "query, response, system, history": (
        {"system": "sys", "query": "q2", "response": "r2", "history": [["q1", "r1"]]},
        ["S:sys", "U:q1", "A:r1", "U:q2", "A:r2"],
    ),
    "history as a Python literal": (
        {"query": "q2", "response": "r2", "history": "[('q1', 'r1')]"},
        ["U:q1", "A:r1", "U:q2", "A:r2"],
    ),
    "empty history": ({"query": "q", "response": "r", "history": []}, ["U:q", "A:r"]),
    "alpaca": ({"instruction": "inst", "input": "inp", "output": "out"}, ["U:inst\ninp", "A:out"]),
    "alpaca, empty input": ({"instruction": "inst", "input": "", "output": "out"}, ["U:inst", "A:out"]),
    "alpaca, null input": ({"instruction": "inst", "input": None, "output": "out"}, ["U:inst", "A:out"]),
    "alpaca, empty instruction": ({"instruction": "", "input": "inp", "output": "out"}, ["U:inp", "A:out"]),
    "alpaca with system": (
        {"instruction": "inst", "input": "inp", "output": "out", "system": "sys"},
        ["S:sys", "U:inst\ninp", "A:out"],
    ),
    "instruction, output": ({"instruction": "inst", "output": "out"}, ["U:inst", "A:out"]),
    "sharegpt from, value": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
        ["U:q", "A:r"],
    ),
    "sharegpt pairs with system": (
        {"conversation": [{"human": "q1", "assistant": "r1"}, {"human": "q2", "bot": "r2"}], "system": "sys"},
        ["S:sys", "U:q1", "A:r1", "U:q2", "A:r2"],
    ),
    "messages as JSON text": (
        {
            "messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]'.replace(
                "null", '"r"'
            )
        },
        ["U:q", "A:r"],
    ),
    "messages as a Python literal": ({"messages": "[{'role': 'user', 'content': 'it\\'s'}]"}, ["U:it's"]),
    "text": ({"text": "t"}, ["A:t"]),
    "content": ({"content": "t"}, ["A:t"]),
    "c4": ({"text": "t", "url": "u", "timestamp": "d"}, ["A:t"]),
    "prompt, completion": ({"prompt": "q", "completion": "r"}, ["U:q", "A:r"]),
    "question, answer": ({"question": "q", "answer": "r"}, ["U:q", "A:r"]),
    "input, output": ({"input": "q", "output": "r"}, ["U:q", "A:r"]),
    "Question, Answer": ({"Question": "q", "Answer": "r"}, ["U:q", "A:r"]),
    "problem, solution": ({"problem": "q", "solution": "r"}, ["U:q", "A:r"]),
    "query wins over prompt": ({"prompt": "p", "query": "q", "response": "r"}, ["U:q", "A:r"]),
    "the only filled alias": ({"query": "q", "answer": None, "output": "r"}, ["U:q", "A:r"]),
    "query null": ({"query": None, "response": "r"}, ["A:r"]),
    "response null": ({"query": "q", "response": None}, ["U:q"]),
    "response list": ({"query": "q", "response": ["r1", "r2"]}, ["U:q", "A:r1"]),
    "response number": ({"query": "1+1?", "response": 2}, ["U:1+1?", "A:2"]),
    "user only": ({"messages": [{"role": "user", "content": "q"}]}, ["U:q"]),
    "user, user, assistant": (
        {"messages": [{"role": r, "content": c} for r, c in [("user", "a"), ("user", "b"), ("assistant", "c")]]},
        ["U:a", "U:b", "A:c"],
    ),
    "system of the messages wins": (
        {"messages": [{"role": "system", "content": "s1"}, {"role": "user", "content": "q"}], "system": "s2"},
        ["S:s1", "U:q"],
    ),
    "empty assistant text is kept": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
        ["U:q", "A:"],
    ),
    "role aliases": (
        {"messages": [{"role": r, "content": r} for r in ("human", "function-call", "observation", "bot")]},
        ["U:human", "C:function-call", "R:observation", "A:bot"],
    ),
    "roles of other makers": (
        {"messages": [{"role": r, "content": r} for r in ("developer", "User", "model", " Human", "ASSISTANT")]},
        ["S:developer", "U:User", "A:model", "U: Human", "A:ASSISTANT"],
    ),
    "OpenAI text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        ["U:ab"],
    ),
}

DROPS: dict[str, tuple[Any, str]] = {
    "not an object": (["a"], "JSON list"),
    "unknown columns": ({"foo": "x", "bar": "y"}, "no column holds text (columns: bar, foo); name it with --columns"),
    "nothing in the columns": ({"query": None, "response": None}, "no column holds text"),
    "two responses": (
        {"query": "q", "answer": "a", "output": "o"},
        "several columns (answer, output) could be the respon",
    ),
    "alpaca without text": ({"instruction": "", "input": None, "output": "o"}, "both instruction and input are empty"),
    "role editor": ({"messages": [{"role": "editor", "content": "x"}]}, "unknown message role 'editor'"),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "a message has no content"),
    "content missing": ({"messages": [{"role": "user"}]}, "a message has no content"),
    "content a number": ({"messages": [{"role": "user", "content": 5}]}, "neither text nor text parts"),
    "no role": ({"messages": [{"content": "x"}]}, "a message has no role"),
    "no messages": ({"messages": []}, "empty or not a list"),
    "messages not JSON": ({"messages": "hello"}, "empty or not a list"),
    "message a string": ({"messages": ["hello"]}, "not an object with role and content"),
    "history no pairs": ({"query": "q", "response": "r", "history": [["a"]]}, "history is not a list of"),
}


def short(row: Any, rules: RowRules | None = None) -> list[str]:
    standard = standardise_row(row, rules)
    assert isinstance(standard, dict), standard
    return [f"{LETTERS[message['role']]}:{message['content']}" for message in standard["messages"]]


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    row, expected = SCHEMAS[name]
    assert short(row) == expected


@pytest.mark.parametrize("name", DROPS)
def test_dropped_with_a_reason(name: str) -> None:
    row, expected = DROPS[name]
    dropped = standardise_row(row)
    assert isinstance(dropped, Drop)
    assert expected in dropped.reason


def test_message_keys_and_kept_columns() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "q", "weight": 0.5},
            {"role": "assistant", "content": "r", "loss": False, "loss_scale": 2.0},
        ],
        "rejected_response": "bad",
        "channel": "math",
        "label": False,
        "tools": "[]",
        "margin": None,
        "my_id": 7,
    }
    assert standardise_row(row) == {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "r", "loss": False, "loss_scale": 2.0},
        ],
        "rejected_response": "bad",
        "channel": "math",
        "label": False,
        "tools": "[]",
    }


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("value", ["/x/a.jpg", ["/x/a.jpg"], [{"bytes": None, "path": "/x/a.jpg"}]])
def test_images_become_a_list_of_bytes_and_path(column: str, value: Any) -> None:
    standard = standardise_row({"query": "<image>what?", "response": "a cat", column: value})
    assert isinstance(standard, dict)
    assert standard["images"] == [{"bytes": None, "path": "/x/a.jpg"}]
    assert column == "images" or "image" not in standard


def test_a_row_is_not_changed_in_place() -> None:
    row = {"messages": [{"role": "user", "content": "I am {{NAME}}"}], "system": "sys"}
    before = json.dumps(row)
    standardise_row(row, RowRules(model_name=("X",)))
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"frage": "q", "antwort": "r"}, {"frage": "query", "antwort": "response"}, ["U:q", "A:r"]),
        ({"query": "q", "answer": "a", "output": "o"}, {"answer": "_"}, ["U:q", "A:o"]),
        (
            {"messages": [{"role": "user", "content": "old"}], "new": [{"role": "user", "content": "new"}]},
            {"messages": "_", "new": "messages"},
            ["U:new"],
        ),
    ],
)
def test_columns_rename_and_hide(row: dict[str, Any], columns: dict[str, str], expected: list[str]) -> None:
    assert short(row, RowRules(columns=columns)) == expected


def test_alpaca_input_prefix_is_stripped_at_the_front_only() -> None:
    rules = RowRules(strip_input_prefix="输入：")
    row = {"instruction": "翻译", "input": "输入：你好 输入：", "output": "hello"}
    assert short(row, rules) == ["U:翻译\n你好 输入：", "A:hello"]


ZH = {"query": "你是谁？", "response": "我是{{NAME}}，由{{AUTHOR}}训练。", "tag": "zh"}
EN = {"query": "Are you {{NAME}}?", "response": "Yes, by {{AUTHOR}}.", "tag": "en"}


@pytest.mark.parametrize(
    ("row", "names", "authors", "expected"),
    [
        (ZH, ("小黄", "Xiao Huang"), ("魔搭", "ModelScope"), ["U:你是谁？", "A:我是小黄，由魔搭训练。"]),
        (EN, ("小黄", "Xiao Huang"), ("魔搭", "ModelScope"), ["U:Are you Xiao Huang?", "A:Yes, by ModelScope."]),
        (EN, ("Bee",), ("Hive",), ["U:Are you Bee?", "A:Yes, by Hive."]),
        (ZH, ("Bee",), ("Hive",), ["U:你是谁？", "A:我是Bee，由Hive训练。"]),
        # Without a tag the language of the text decides.
        ({**ZH, "tag": None}, ("小黄", "Xiao Huang"), ("魔搭", "MS"), ["U:你是谁？", "A:我是小黄，由魔搭训练。"]),
        ({"query": "who", "response": "{{NAME}}"}, ("小黄", "Xiao Huang"), (), ["U:who", "A:Xiao Huang"]),
        ({"query": "who", "response": "{{name}} {{author}}"}, ("Bee",), ("Hive",), ["U:who", "A:Bee Hive"]),
        ({"query": "Jinja?", "response": "Write {{ NAME }}."}, (), (), ["U:Jinja?", "A:Write {{ NAME }}."]),
    ],
)
def test_placeholders(
    row: dict[str, Any], names: tuple[str, ...], authors: tuple[str, ...], expected: list[str]
) -> None:
    rules = RowRules(self_cognition=True, model_name=names, model_author=authors)
    assert short(row, rules) == expected
    # In other datasets they are ordinary text.
    assert short(row, replace(rules, self_cognition=False)) == short(row)


@pytest.mark.parametrize(
    ("names", "authors", "expected"),
    [
        ((), (), "--model_author and --model_name is not given"),
        (("Bee",), (), "and --model_author is not given"),
        ((), ("Hive",), "and --model_name is not given"),
    ],
)
def test_placeholders_without_a_value_are_not_trained_on(
    names: tuple[str, ...], authors: tuple[str, ...], expected: str
) -> None:
    dropped = standardise_row(ZH, RowRules(self_cognition=True, model_name=names, model_author=authors))
    assert isinstance(dropped, Drop)
    assert expected in dropped.reason


def test_real_tool_call_conversations() -> None:
    for row in json.loads((DATA / "glaive_toolcall_3.json").read_text(encoding="utf-8")):
        standard = standardise_row(row)
        assert isinstance(standard, dict)
        roles = [message["role"] for message in standard["messages"]]
        assert {"user", "tool_call", "tool_response", "assistant"} == set(roles)
        assert [message["content"] for message in standard["messages"]] == [m["value"] for m in row["conversations"]]
        assert standard["tools"] == row["tools"]


def test_real_question_and_answer_rows() -> None:
    for line in (DATA / "gsm8k_40.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert short(row) == [f"U:{row['question']}", f"A:{row['answer']}"]
