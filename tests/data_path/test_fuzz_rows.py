"""Any row at all: standardise_row answers with a well-formed standard row or a reason, and keeps texts as they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayswift.data.json_text import BadJson, has_half_surrogate, loads
from rayswift.data.rows.columns import COLUMN_ALIASES, KEPT_COLUMNS
from rayswift.data.rows.messages import ROLE_ALIASES, ROLES
from rayswift.data.rows.standard import Drop, RowRules, standardise_row, standardise_rows

FUZZ = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

#: Text that JSON can carry; the interesting characters come up often.
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20) | st.sampled_from(
    ["", "{{NAME}}", "<image>", "[]", "{}", "null", "\x00", "\ufeff", "[[1, 2]]", '{"role": "user"}', "'", "\u2028"]
)
NAMES = [alias for aliases in COLUMN_ALIASES.values() for alias in aliases] + [*KEPT_COLUMNS, "tag", "foo", "Query"]
KEYS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "human", "assistant", "tool_calls", "function", "name",
     "arguments", "input", "image", "image_url", "source", "data", "loss", "bbox", "ref", "bytes", "path"]
)  # fmt: skip
WORDS = st.sampled_from([*ROLES, *ROLE_ALIASES, "text", "image", "tool_use", "tool_result", "image_url", "thinking"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | TEXT, inner, max_size=4), max_leaves=20
)
MESSAGE_LIKE = st.dictionaries(KEYS, VALUES, max_size=4) | st.fixed_dictionaries({"role": WORDS, "content": VALUES})
ROWS = st.dictionaries(
    st.sampled_from(NAMES) | TEXT,
    VALUES | st.lists(MESSAGE_LIKE, max_size=4) | st.lists(MESSAGE_LIKE, max_size=2).map(json.dumps),
    max_size=6,
)
RULES = st.builds(
    RowRules,
    columns=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([*NAMES, "_"]), max_size=2),
    model_name=st.sampled_from([(), ("甲", "A")]),
    keep_extra=st.booleans(),
    remove_text=st.sampled_from(["", "a"]),
    query_suffix=st.sampled_from(["", "!"]),
)


def check_messages(messages: Any) -> None:
    assert isinstance(messages, list)
    assert messages
    for message in messages:
        assert message["role"] in ROLES
        assert isinstance(message["content"], str)
        assert set(message) <= {"role", "content", "loss", "loss_scale", "name"}


def check(result: Any) -> None:
    """Well-formed, and fit to travel as UTF-8 JSON; or a reason in one short line."""
    if isinstance(result, Drop):
        assert result.reason
        assert len(result.reason) < 1000
        return
    check_messages(result["messages"])
    if "rejected_messages" in result:
        check_messages(result["rejected_messages"])
    for conversation in result.get("positive_messages", []):
        check_messages(conversation)
    assert isinstance(result.get("rejected_response", ""), str)
    json.dumps(result, ensure_ascii=False, default=str).encode()


@FUZZ
@given(ROWS | VALUES, RULES)
def test_any_row_gives_a_standard_row_or_a_reason(row: Any, rules: RowRules) -> None:
    before = repr(row)
    result = standardise_row(row, rules)
    check(result)
    assert repr(row) == before
    assert repr(standardise_row(row, rules)) == repr(result)


@FUZZ
@given(st.lists(st.fixed_dictionaries({"role": WORDS, "content": VALUES}) | MESSAGE_LIKE, min_size=1, max_size=4))
def test_any_message_list(messages: Any) -> None:
    check(standardise_row({"messages": messages}))
    check(standardise_row({"messages": json.dumps(messages)}))


@FUZZ
@given(ROWS)
def test_any_preprocess_result(row: Any) -> None:
    for made in (row, [row, row], None, [], [None], 3):
        for result in standardise_rows({"text": "t"}, RowRules(preprocess=lambda _, made=made: made)):
            check(result)


PLAIN = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda text: "{{" not in text
)
SPELLINGS = [
    ("role", "content", "user", "assistant"),
    ("from", "value", "human", "gpt"),
    ("role", "content", "human", "bot"),
]


@FUZZ
@given(st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=3), st.none() | PLAIN, st.sampled_from(SPELLINGS))
def test_texts_survive_in_every_spelling_of_messages(
    turns: list[tuple[str, str]], system: str | None, spelling: tuple[str, str, str, str]
) -> None:
    role, content, user, assistant = spelling
    expected = [("system", system)] if system is not None else []
    expected += [pair for query, reply in turns for pair in (("user", query), ("assistant", reply))]
    listed = [{role: who, content: text} for query, reply in turns for who, text in ((user, query), (assistant, reply))]
    pairs = [{"human": query, "assistant": reply} for query, reply in turns]
    parts = [{**item, content: [{"type": "text", "text": item[content]}]} for item in listed]
    for messages in (listed, pairs, parts, json.dumps(listed), repr(listed), [json.dumps(item) for item in listed]):
        row = {"conversations": messages, "system": system}
        result = standardise_row(row)
        assert isinstance(result, dict), result
        assert [(message["role"], message["content"]) for message in result["messages"]] == expected


@FUZZ
@given(
    PLAIN, PLAIN, st.lists(st.tuples(PLAIN, PLAIN), max_size=2),
    st.sampled_from(COLUMN_ALIASES["query"]), st.sampled_from(COLUMN_ALIASES["response"][:-1]),
)  # fmt: skip
def test_texts_survive_in_columns(
    query: str, reply: str, history: list[tuple[str, str]], query_column: str, reply_column: str
) -> None:
    expected = [text for pair in history for text in pair] + [query, reply]
    for past in (history, repr(history), json.dumps(history)):
        result = standardise_row({query_column: query, reply_column.title(): reply, "history": past})
        assert isinstance(result, dict), result
        assert [message["content"] for message in result["messages"]] == expected


@FUZZ
@given(PLAIN, PLAIN, PLAIN)
def test_alpaca_texts_survive(instruction: str, extra: str, output: str) -> None:
    result = standardise_row({"instruction": instruction, "input": extra, "output": output})
    assert isinstance(result, dict), result
    assert [message["content"] for message in result["messages"]] == [f"{instruction}\n{extra}", output]


def as_read(text: str) -> Any:
    """As the json module reads it; NaN and the infinities, which are no JSON, are missing values."""
    return json.loads(text, parse_constant=lambda _: None)


@FUZZ
@given(VALUES | st.integers(-(10**40), 10**40) | st.lists(st.integers(-(10**30), 10**30)), st.booleans())
def test_json_is_read_exactly_as_the_json_module_reads_it(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    for given_text in (text, text.encode(), f" {text}\r\n".encode()):
        assert repr(loads(given_text)) == repr(as_read(text))


@FUZZ
@given(st.binary(max_size=40) | TEXT.map(str.encode))
def test_what_json_refuses_is_refused(data: bytes) -> None:
    try:
        expected = as_read(data.decode())
    except ValueError:
        with pytest.raises((BadJson, UnicodeDecodeError)):
            loads(data)
    else:
        assert repr(loads(data)) == repr(expected)


@FUZZ
@given(st.text(max_size=10))
def test_half_surrogates_are_found(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        assert has_half_surrogate({"a": [text]})
    else:
        assert not has_half_surrogate({text: [text]})
