"""What of a row is trained, spelled out: raw row → standard messages → the text between ▮ marks, or the reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import Arguments, make_arguments
from rayswift.data.flow import plan as plans
from rayswift.data.flow.plan import plan_stream
from rayswift.data.flow.prepare import load_train_data
from rayswift.data.flow.stream import task_tokens
from rayswift.data.names import resolve_datasets
from rayswift.data.rows.standard import WARNINGS, Drop, standardise_row
from rayswift.data.tokens.encoder import IGNORED, Dropped, Encoded, Encoder
from rayswift.data.tokens.table import TokenRows

LETTERS = {"system": "S", "user": "U", "assistant": "A", "tool_call": "C", "tool_response": "R", "tool": "R"}
U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def short(raw: Any, key: str = "messages") -> str:
    """A row's messages as ``U:u A:a``, its thoughts in parentheses and its flags in brackets; or why there is none."""
    row = standardise_row(raw)
    if isinstance(row, Drop):
        return f"dropped: {row.reason}"
    shown = []
    for message in row[key]:
        others = {k: v for k, v in message.items() if k not in ("role", "content", "reasoning_content")}
        thoughts = f"({message['reasoning_content']})" if "reasoning_content" in message else ""
        shown.append(f"{LETTERS[message['role']]}:{thoughts}{message['content']}{list(others.items()) or ''}")
    return " ".join(shown)


def marked(ids: Any, labels: Any, tokenizer: Any) -> str:
    """The text with trained stretches between ▮ marks."""
    shown, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            mark = "" if labels[start] == IGNORED else "▮"
            shown += mark + tokenizer.decode(ids[start:end], skip_special_tokens=False) + mark
            start = end
    for written, sign in (("<|im_start|>", "<"), ("<|im_end|>\n", ">"), ("<|im_end|>▮\n", ">▮"), ("<|im_end|>", ">")):
        shown = shown.replace(written, sign)
    return shown


def trained(encoder: Encoder, raw: Any) -> str:
    """What is made of a raw row: its marked text (``chosen | rejected`` of a pair), or why nothing is."""
    row = standardise_row(raw)
    if isinstance(row, Drop):
        return f"dropped: {row.reason}"
    (sample,) = encoder.encode_batch([row])
    if isinstance(sample, Dropped):
        return f"dropped: {sample.reason}"
    cut = sample.rejected_start or len(sample.input_ids)
    sides = [marked(sample.input_ids[part], sample.labels[part], encoder.tokenizer)
             for part in (slice(cut), slice(cut, None))]  # fmt: skip
    return " | ".join(side for side in sides if side)


@pytest.fixture(scope="module")
def chatml(family_dir: Callable[[str], str]) -> Encoder:
    """Hermes tools, no default system text, hybrid thinking that writes nothing where there is no thought."""
    return Encoder(family_dir("qwen3"), template="qwen3_nothinking")


def calls(*names: str) -> list[dict[str, Any]]:
    return [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in names]


def openai_results(*names: str, key: str = "tool_call_id") -> list[dict[str, Any]]:
    return [{"role": "tool", key: name, "content": f"of {name}"} for name in names]


def anthropic(*names: str) -> list[dict[str, Any]]:
    uses = [{"type": "tool_use", "id": name, "name": name, "input": {}} for name in "ab"]
    results = [{"type": "tool_result", "tool_use_id": name, "content": f"of {name}"} for name in names]
    return [U, {"role": "assistant", "content": uses}, {"role": "user", "content": [*results, {"text": "go on"}]}]


CALL_A, CALL_B = '{"name": "a", "arguments": {}}', '{"name": "b", "arguments": {}}'


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # Parallel results belong to the call with their id.
        ([U, {"role": "assistant", "tool_calls": calls("a", "b")}, *openai_results("b", "a")],
         f"U:u C:{CALL_A} C:{CALL_B} R:of a R:of b"),
        ([U, {"role": "assistant", "tool_calls": calls("a", "b")}, *openai_results("b", "a", key="call_id")],
         f"U:u C:{CALL_A} C:{CALL_B} R:of a R:of b"),
        ([U, {"role": "assistant", "tool_calls": calls("a", "b")}, *openai_results("b", "x")],
         f"U:u C:{CALL_A} C:{CALL_B} R:of b R:of x"),
        (anthropic("b", "a"), f"U:u C:{CALL_A} C:{CALL_B} R:of a R:of b U:go on"),
        # A call written as a message of its own.
        ([U, {"role": "tool_call", "name": "a", "arguments": {}}], f"U:u C:{CALL_A}"),
        ([U, {"role": "function_call", "name": "a", "arguments": "{}"}], f"U:u C:{CALL_A}"),
        ([U, {"role": "tool_call", "arguments": {}}], "dropped: a message has no content"),
        # Thoughts beside the answer.
        ([U, {**A, "reasoning_content": "hm"}], "U:u A:(hm)a"),
        ([U, {**A, "reasoning": "hm"}], "U:u A:(hm)a"),
        ([U, {"role": "assistant", "content": "<think>x</think>a", "reasoning": "hm"}], "U:u A:<think>x</think>a"),
        ([U, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}],
         "U:u A:(hm)a"),
        ([U, {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": calls("a")}],
         f"U:u A:(hm) C:{CALL_A}"),
        ([U, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"},
                                               {"type": "tool_use", "name": "a", "input": {}}]}],
         f"U:u A:(hm) C:{CALL_A}"),
        # Flags.
        ([U, {**A, "loss": "false"}], "U:u A:a[('loss', False)]"),
        ([U, {**A, "loss": 1, "loss_scale": "0.5"}], "U:u A:a[('loss', True), ('loss_scale', 0.5)]"),
        ([U, {**A, "loss": []}], "dropped: the loss of a message is [], not true or false"),
        ([U, {**A, "loss": {"a": 1}}], "dropped: the loss of a message is {'a': 1}, not true or false"),
        ([U, {**A, "loss": "maybe"}], "dropped: the loss of a message is maybe, not true or false"),
        ([U, {**A, "loss_scale": [1]}], "dropped: the loss_scale of a message is [1], not a number from 0 on"),
        ([U, {**A, "loss_scale": -1}], "dropped: the loss_scale of a message is -1, not a number from 0 on"),
        ([U, {**A, "loss_scale": True}], "dropped: the loss_scale of a message is True, not a number from 0 on"),
        # The same said as other tools do.
        ([U, {**A, "weight": 0}, U, {**A, "weight": 1.0}], "U:u A:a[('loss', False)] U:u A:a[('loss', True)]"),
        ([U, {**A, "weight": "0"}], "U:u A:a[('loss', False)]"),
        ([U, {**A, "weight": 0.5}], "U:u A:a[('loss_scale', 0.5)]"),
        ([U, {**A, "weight": -1}], "dropped: the weight of a message is -1, not a number from 0 on"),
        ([U, {**A, "train": False}], "U:u A:a[('loss', False)]"),
        ([U, {**A, "training": "false"}], "U:u A:a[('loss', False)]"),
        ([U, {**A, "trainable": False}], "U:u A:a[('loss', False)]"),
        ([U, {**A, "loss_mask": 0}], "U:u A:a[('loss', False)]"),
        ([U, {**A, "masked": True}], "U:u A:a[('loss', False)]"),
        ([U, {**A, "masked": False, "weight": None}], "U:u A:a[('loss', True)]"),
        ([U, {**A, "weight": 1, "train": False}], "U:u A:a[('loss', False)]"),
        ([U, {**A, "loss": True, "train": False}], "U:u A:a[('loss', True)]"),
        ([U, {**A, "train": [0, 3]}], "dropped: the train of a message is [0, 3], not true or false"),
        ([U, {"role": "assistant", "tool_calls": calls("a"), "weight": 0}], f"U:u C:{CALL_A}[('loss', False)]"),
        ([{"human": "u", "assistant": "a", "weight": 0}], "U:u A:a[('loss', False)]"),
        ([{"from": "human", "value": "u"}, {"from": "gpt", "value": "a", "weight": 0.0}], "U:u A:a[('loss', False)]"),
    ],
)  # fmt: skip
def test_messages_of_every_maker(messages: Any, expected: str) -> None:
    assert short({"messages": messages}) == expected


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([U, {**A, "train_detail": [{"begin_offset": 0}]}], "the key 'train_detail' of messages is not known"),
        ([{**U, "images": ["a.png"]}, A], "the key 'images' of messages is not known"),
        ([{**U, "name": "Ann"}, A], "the key 'name' of messages is not known"),
        ([{"human": "u", "assistant": "a", "system": "s"}], "the key 'system' of messages is not known"),
        ([{**U, "train": True}, A], "a mark to train a message that is no answer has no effect"),
        ([{**U, "weight": 0, "images": None}, {**A, "refusal": None, "annotations": []}], ""),
        ([U, {"role": "assistant", "tool_calls": calls("a")}, {**openai_results("a")[0], "name": "a"}], ""),
    ],
)
def test_what_messages_hold_and_is_not_read_is_said(messages: Any, says: str) -> None:
    row = standardise_row({"messages": messages})
    assert not isinstance(row, Drop)
    warnings = row.get(WARNINGS, [])
    assert (not warnings) if not says else (len(warnings) == 1 and warnings[0].startswith(says))


GO_ON = [U, {**A, "content": "go"}, {**A, "content": "od"}]
TOOL_LOOP = [U, {"role": "tool_call", "content": CALL_A}, {"role": "tool_response", "content": "1"}]
ASKED = "<user\nu><assistant\n"
CALLED = f"<tool_call>\n{CALL_A}\n</tool_call>>"
RESULT = "<user\n<tool_response>\n1\n</tool_response>><assistant\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # A rejected response stands for everything behind the last user message.
        ({"messages": GO_ON, "rejected_response": "bad"}, f"{ASKED}▮good>▮ | {ASKED}▮bad>▮"),
        ({"messages": GO_ON, "rejected_response": "od"}, f"{ASKED}▮good>▮ | {ASKED}▮od>▮"),
        ({"messages": GO_ON, "rejected_response": "good"}, "dropped: the rejected response is the same as the answer"),
        ({"messages": [*TOOL_LOOP, A], "rejected_response": "bad"},
         f"{ASKED}{CALLED}{RESULT}▮a>▮ | {ASKED}▮bad>▮"),
        ({"messages": TOOL_LOOP[:2], "rejected_response": "bad"}, f"{ASKED}▮{CALLED}▮ | {ASKED}▮bad>▮"),
        ({"messages": [U, A], "rejected_response": [TOOL_LOOP[1]]}, f"{ASKED}▮a>▮ | {ASKED}▮{CALLED}▮"),
        ({"messages": [U, A, U, A], "rejected_response": "bad"},
         f"{ASKED}a>{ASKED}▮a>▮ | {ASKED}a>{ASKED}▮bad>▮"),
        ({"messages": [{**A, "loss": True}], "rejected_response": "bad"}, "<assistant\n▮a>▮ | <assistant\n▮bad>▮"),
        ({"messages": [{"role": "system", "content": "s"}, A], "rejected_response": "bad"},
         "<system\ns><assistant\n▮a>▮ | <system\ns><assistant\n▮bad>▮"),
        ({"query": "u", "response": "a", "rejected_response": ["bad", "worse"]}, f"{ASKED}▮a>▮ | {ASKED}▮bad>▮"),
        ({"query": "u", "response": "a", "rejected_response": ["bad"], "rejected_images": ["x.png"]},
         "dropped: rejected answer: it holds images, and text alone is trained here; --columns can hide the column"),
    ],
)  # fmt: skip
def test_pairs(row: Any, expected: str, chatml: Encoder) -> None:
    pairs = dataclasses.replace(chatml, preference=True, loss_scale="last_round")
    assert trained(pairs, row) == expected


def test_of_several_rejected_answers_it_is_said_which_is_taken() -> None:
    row = standardise_row({"query": "u", "response": "a", "rejected_response": ["bad", "worse"]})
    assert isinstance(row, dict)
    assert (row["rejected_response"], row[WARNINGS]) == ("bad", ["of 2 rejected answers the first is taken"])


LAST = {"loss_scale": "last_round"}


@pytest.mark.parametrize(
    ("settings", "messages", "expected"),
    [
        # The last round begins at the last user or tool result message.
        (LAST, [U, A, *TOOL_LOOP, A], f"{ASKED}a>{ASKED}{CALLED}{RESULT}▮a>▮"),
        (LAST, [*TOOL_LOOP, TOOL_LOOP[1]], f"{ASKED}{CALLED}{RESULT}▮{CALLED}▮"),
        (LAST, [U, {**TOOL_LOOP[1], "loss": True}, TOOL_LOOP[2], A], f"{ASKED}▮{CALLED}▮{RESULT}▮a>▮"),
        (LAST, [U, {**A, "loss_scale": 2}, U, A], f"{ASKED}a>{ASKED}▮a>▮"),
        (LAST, [U, {**A, "loss": True, "loss_scale": 2}, U, A], f"{ASKED}▮a>▮{ASKED}▮a>▮"),
        ({**LAST, "agent_template": "react_en"}, [*TOOL_LOOP, A],
         f"{ASKED}Action: a\nAction Input: {{}}\nObservation:1\n▮a>▮"),
        ({}, [U, {**A, "loss": False, "loss_scale": 2}, U, A], f"{ASKED}a>{ASKED}▮a>▮"),
        ({}, [U, {**A, "loss": "false"}, U, A], f"{ASKED}a>{ASKED}▮a>▮"),
        # Thoughts become the think block.
        ({"template": "qwen3"}, [U, {**A, "reasoning": "hm\n"}], f"{ASKED}▮<think>\nhm\n</think>\n\na>▮"),
        # A row without a thought is trained behind the prompt that generation has.
        ({"template": "qwen3"}, [U, A], f"{ASKED}<think>\n\n</think>\n\n▮a>▮"),
        ({"template": "qwen3", "enable_thinking": False}, [U, A], f"{ASKED}<think>\n\n</think>\n\n▮a>▮"),
        ({"template": "qwen3", "enable_thinking": True}, [U, A], f"{ASKED}▮a>▮"),
    ],
)  # fmt: skip
def test_what_of_a_conversation_is_trained(settings: Any, messages: Any, expected: str, chatml: Encoder) -> None:
    assert trained(dataclasses.replace(chatml, **settings), {"messages": messages}) == expected


@pytest.mark.parametrize("told", [{"enable_thinking": True}, '{"enable_thinking": true}', {"thinking": True}])
def test_a_row_says_whether_it_thinks(told: Any, chatml: Encoder) -> None:
    hybrid = dataclasses.replace(chatml, template="qwen3", enable_thinking=False)
    row = {"messages": [U, A], "chat_template_kwargs": told}
    assert trained(hybrid, row) == f"{ASKED}▮a>▮"
    pairs = dataclasses.replace(hybrid, preference=True)
    assert trained(pairs, {**row, "rejected_response": "bad"}) == f"{ASKED}▮a>▮ | {ASKED}▮bad>▮"
    no = {"messages": [U, A], "chat_template_kwargs": {"enable_thinking": False}}
    assert trained(dataclasses.replace(hybrid, enable_thinking=True), no) == f"{ASKED}<think>\n\n</think>\n\n▮a>▮"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def test_a_single_tool_is_a_list_of_one(chatml: Encoder) -> None:
    expected = trained(chatml, {"messages": [U, A], "tools": [TOOL]})
    assert expected.count('"name": "f"') == 1
    for tools in (TOOL, json.dumps(TOOL), str(TOOL), json.dumps([TOOL]), [json.dumps(TOOL)]):
        assert trained(chatml, {"messages": [U, A], "tools": tools}) == expected


@pytest.mark.parametrize("family", ["gemma", "mistral_2501", "phi4", "llama", "default", "deepseek_r1"])
def test_a_family_without_a_format_for_tools_refuses_them(family: str, chatml: Encoder) -> None:
    encoder = dataclasses.replace(chatml, template=family)
    none = "dropped: the template has no format for tools (--agent_template names one)"
    assert trained(encoder, {"messages": [U, A], "tools": [TOOL]}) == none
    assert trained(encoder, {"messages": TOOL_LOOP}) == none.replace("tools (", "tool messages (")
    asked = dataclasses.replace(encoder, agent_template="hermes")
    assert "▮" in trained(asked, {"messages": [*TOOL_LOOP, A]})


@pytest.mark.parametrize("column", ["images", "videos", "audios"])
def test_rows_with_files_are_refused_in_text_training(column: str, chatml: Encoder) -> None:
    said = f"dropped: it holds {column}, and text alone is trained here; --columns can hide the column"
    assert trained(chatml, {"messages": [U, A], column: ["x"]}) == said
    part = {"type": column[:-1], column[:-1]: "x"}
    assert trained(chatml, {"messages": [{"role": "user", "content": [part]}, A]}) == said
    assert trained(chatml, {"messages": [U, A], column: []}) == f"{ASKED}▮a>▮"


@pytest.mark.parametrize(
    ("label", "expected"),
    [("True", True), ("false", False), ("3", 3), ("0.5", 0.5), ("positive", "positive"), (True, True), (0, 0)],
)
def test_labels_of_a_table_of_texts(label: Any, expected: Any) -> None:
    row = standardise_row({"messages": [U, A], "label": label})
    assert isinstance(row, dict)
    assert (type(row["label"]), row["label"]) == (type(expected), expected)


@pytest.mark.parametrize("loss_scale", ["alpha_umi", "react", "qwen", "hermes", "ignore_empty_think"])
def test_rules_cut_tokens_only_where_weights_differ(loss_scale: str, qwen_dir: str) -> None:
    reply = "Thought:\nt\nFinal Answer:\ndone Next: x"  # ":\n" is one token
    plain, ruled = (
        Encoder(qwen_dir, template="chatml", loss_scale=scale).encode_batch(
            [{"messages": [U, {**A, "content": reply}]}]
        )[0]
        for scale in ("default", loss_scale)
    )
    assert isinstance(plain, Encoded) and isinstance(ruled, Encoded)
    text = plain.input_ids.tolist()
    if ruled.loss_scale is None:
        assert ruled.input_ids.tolist() == text
    else:  # one border in the reply: at "Next:"
        weights = ruled.loss_scale.tolist()
        assert [weight for n, weight in enumerate(weights) if not n or weights[n - 1] != weight] == [0.0, 1.0, 2.0, 1.0]
        cut = weights.index(2.0)
        assert ruled.input_ids.tolist()[: cut - 1] == text[: cut - 1]


# --- the same in files, read at once and as a stream ------------------------------------------------------------


def arguments(dataset: Path | str, **given: Any) -> Arguments:
    return make_arguments("sft", model="org/model", dataset=[str(dataset)], split_dataset_ratio=0, **given)


def both_ways(dataset: Path, encoder: Encoder, **given: Any) -> tuple[list[str], list[str]]:
    """Marked texts of a file and its notes and drops, read at once; a stream must give the same."""
    args = arguments(dataset, dataset_shuffle=False, **given)
    data = load_train_data(args, resolve_datasets(args), encoder, lambda *_: None)
    assert data.train is not None
    rows = TokenRows(data.train)
    texts = [marked(rows[n].input_ids, rows[n].labels, encoder.tokenizer) for n in range(len(data.train))]
    stream = arguments(dataset, dataset_shuffle=False, streaming=True, max_steps=1, **given)
    plan = plan_stream(stream, resolve_datasets(stream).train, None)
    tables = list(task_tokens(plan, 0, 0, encoder, None))
    streamed = [
        (ids, labels)
        for table in tables
        for ids, labels in zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True)
    ]
    assert [marked(*row, encoder.tokenizer) for row in streamed] == texts
    return texts, [line.partition(" (first at")[0] for line in data.drops.lines()]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSWIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plans, "MAX_PLANNED_EPOCHS", 1)


def parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def arrow(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa

    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


NAN = float("nan")
MISSING: dict[str, Any] = {
    "jsonl": '{"query": "q", "response": NaN}\n{"query": "q", "response": "r", "system": NaN}\n'
    '{"query": NaN, "response": Infinity}\n{"query": "q", "response": "r", "history": [["h", NaN]]}\n',
    "csv": "query,response,system\nq,,\nq,r,\nnan,inf,\nh,NaN,\nq,r,\n",
    "tsv": "query\tresponse\tsystem\nq\t\t\nq\tr\t\n\t\t\nq\t\t\n",
    "parquet": {"query": ["q", "q", "q"], "response": [1.5, NAN, None], "system": [NAN, 2.0, NAN]},
    "arrow": {"query": ["q", "q", "q"], "response": [1.5, float("inf"), None], "system": [NAN, 2.0, NAN]},
}
R = "<user\nq><assistant\n▮r>▮"
EXPECTED = {
    "jsonl": [R, "<user\nhq><assistant\n▮r>▮"],
    "csv": [R, R],
    "tsv": [R],
    "parquet": ["<user\nq><assistant\n▮1.5>▮"],
    "arrow": ["<user\nq><assistant\n▮1.5>▮"],
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_value_is_missing_in_every_format(name: str, chatml: Encoder, tmp_path: Path) -> None:
    path = tmp_path / f"x.{name}"
    if isinstance(MISSING[name], str):
        path.write_text(MISSING[name], encoding="utf-8")
    else:
        {"parquet": parquet, "arrow": arrow}[name](path, MISSING[name])
    texts, said = both_ways(path, chatml)
    assert texts == EXPECTED[name]
    assert not any("nan" in text.lower() for text in texts)
    if name in ("csv", "tsv"):
        assert any(line.endswith("rows: an empty cell is a missing response, not an empty text") for line in said)
        assert any(line.endswith("rows: an empty cell is a missing system, not an empty text") for line in said)


def test_an_empty_cell_leaves_the_default_system_text(chatml: Encoder, tmp_path: Path) -> None:
    encoder = dataclasses.replace(chatml, system="default")
    (tmp_path / "x.csv").write_text("system,query,response\n,q,r\ns,q,r\n", encoding="utf-8")
    assert both_ways(tmp_path / "x.csv", encoder)[0] == [f"<system\ndefault>{R}", f"<system\ns>{R}"]
    (tmp_path / "x.jsonl").write_text('{"system": "", "query": "q", "response": "r"}\n', encoding="utf-8")
    assert both_ways(tmp_path / "x.jsonl", encoder)[0] == [R]


def test_an_object_with_data_is_its_rows(chatml: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"version": 1, "data": [{"query": "q", "response": "r"}] * 2}), encoding="utf-8")
    assert both_ways(path, chatml)[0] == [R, R]
    path.write_text(json.dumps({"query": "q", "response": "r", "data": ["x"]}), encoding="utf-8")
    assert both_ways(path, chatml)[0] == [R]


def test_folders_that_datasets_saved(chatml: Encoder, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"messages": [{**U, "content": "q"}, {**A, "content": "r"}]}] * 3)
    rows.save_to_disk(str(tmp_path / "one"))
    arrow(tmp_path / "one" / "cache-0123456789abcdef.arrow", {"query": ["never"], "response": ["read"]})
    assert both_ways(tmp_path / "one", chatml)[0] == [R] * 3
    datasets.DatasetDict({"test": rows, "train": rows.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert both_ways(tmp_path / "two", chatml)[0] == [R]


def test_one_odd_row_does_not_end_a_run(chatml: Encoder, tmp_path: Path) -> None:
    odd = [
        {"messages": [U, {**A, "loss": {}}]},
        {"messages": [U, {**A, "loss_scale": "much"}]},
        {"messages": [U, A], "images": ["x.png"]},
        {"messages": [U, A], "tools": "{broken"},
        {"query": "q", "response": "r"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in odd), encoding="utf-8")
    texts, said = both_ways(path, chatml)
    assert texts == [R]
    assert sorted(said) == [
        "1 rows dropped: it holds images, and text alone is trained here; --columns can hide the column",
        "1 rows dropped: the loss of a message is {}, not true or false",
        "1 rows dropped: the loss_scale of a message is much, not a number from 0 on",
        "1 rows dropped: tools is not valid JSON",
    ]
