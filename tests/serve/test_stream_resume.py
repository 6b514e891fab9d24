"""A stream that another replica resumes: the client gets each character once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayswift.serve.gateway.stream_resume import (
    Mismatch,
    ResumedEvents,
    ResumedStream,
    StreamLog,
    can_resume,
    longest_stop,
)
from rayswift.serve.replica.messages import MessagesWriter
from rayswift.serve.replica.responses import ResponsesRequest, ResponsesWriter


def chat_events(pieces: list[str], *, ids: bool = False, role: bool = True, finish: str | None = "stop") -> list[bytes]:
    """A chat stream as a replica writes it."""
    deltas: list[tuple[dict, str | None]] = [({"role": "assistant", "content": ""}, None)] if role else []
    deltas += [({"content": piece}, None) for piece in pieces]
    if finish:
        deltas.append(({}, finish))
    events = []
    for number, (delta, reason) in enumerate(deltas):
        if ids and number:
            events.append(f": {number * 10},{number * 10 + 1}".encode())
        chunk = {"id": "x", "created": 1, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        events.append(b"data: " + json.dumps(chunk).encode())
    return [*events, b"data: [DONE]"]


def text_of(events: list[bytes]) -> str:
    chunks = [json.loads(event[6:]) for event in events if event.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_events_are_found_however_the_bytes_are_cut_and_ids_are_taken_out() -> None:
    wire = b"".join(event + b"\n\n" for event in chat_events(["Hel", "lo"], ids=True))
    for size in (1, 7, 64, len(wire)):
        stream = StreamLog()
        events = [e for i in range(0, len(wire), size) for e in stream.take(wire[i : i + size])]
        for event in events:
            stream.events.append(event)
        assert events == chat_events(["Hel", "lo"])
        assert stream.finished
        assert stream.ids_to_resume(held_back=0) == [10, 11, 20, 21, 30]
        assert stream.ids_to_resume(held_back=4) == [10, 11]
        assert stream.ids_to_resume(held_back=50) == []


def test_a_stream_that_was_cut_has_no_end() -> None:
    stream = StreamLog()
    for event in stream.take(b"".join(event + b"\n\n" for event in chat_events(["a"])[:-1])):
        stream.events.append(event)
    assert not stream.finished


@settings(deadline=None)
@given(
    pieces=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=8),
    cut=st.integers(min_value=0, max_value=9),
    data=st.data(),
)
def test_the_client_gets_each_character_once_wherever_the_first_replica_died(pieces, cut, data) -> None:
    whole = "".join(pieces)
    sent = chat_events(pieces)[: min(cut, len(pieces) + 2)]
    again: list[str] = []  # the second replica cuts the same text elsewhere
    rest = whole
    while rest:
        size = data.draw(st.integers(min_value=1, max_value=len(rest)))
        again.append(rest[:size])
        rest = rest[size:]
    resumed = ResumedStream(sent)
    passed = [event for event in map(resumed.pass_on, chat_events(again)) if event is not None]
    assert text_of(sent + passed) == whole
    choices = [json.loads(event[6:])["choices"][0] for event in (sent + passed)[:-1]]
    assert [choice["delta"].get("role") for choice in choices].count("assistant") == 1
    assert [choice["finish_reason"] for choice in choices].count("stop") == 1
    assert (sent + passed)[-1] == b"data: [DONE]"


def test_a_different_text_is_noticed_and_not_sent() -> None:
    resumed = ResumedStream(chat_events(["Paris", " is"])[:3])
    role, same, other, *_ = chat_events(["Paris", " was"])
    assert resumed.pass_on(role) is None
    assert resumed.pass_on(same) is None
    with pytest.raises(Mismatch):
        resumed.pass_on(other)


def test_an_answer_that_ends_before_what_was_sent_is_noticed() -> None:
    resumed = ResumedStream(chat_events(["Paris", " is"])[:3])
    role, same, finish, _ = chat_events(["Paris"])
    assert resumed.pass_on(role) is None
    assert resumed.pass_on(same) is None
    with pytest.raises(Mismatch):
        resumed.pass_on(finish)


def test_tool_calls_and_completions_are_resumed_too() -> None:
    def event(choice: dict) -> bytes:
        return b"data: " + json.dumps({"choices": [{"index": 0, "finish_reason": None, **choice}]}).encode()

    def arguments(text: str) -> dict:
        return {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}}

    call = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "f", "arguments": ""}}
    first = [event({"delta": {"tool_calls": [call]}}), event(arguments('{"a"'))]
    resumed = ResumedStream(first)
    other = {**call, "id": "call-2"}
    assert resumed.pass_on(event({"delta": {"tool_calls": [other]}})) is None
    rest = resumed.pass_on(event(arguments('{"a": 1}')))
    assert rest is not None
    assert json.loads(rest[6:])["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"] == ": 1}"

    resumed = ResumedStream([event({"text": "one two"})])
    assert resumed.pass_on(event({"text": "one"})) is None
    rest = resumed.pass_on(event({"text": " two three"}))
    assert rest is not None
    assert json.loads(rest[6:])["choices"][0]["text"] == " three"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": []}, True),
        ({"temperature": 0.7, "seed": 3, "stop": ["x"]}, True),
        ({"n": 2}, False),
        ({"logprobs": True}, False),
        ({"presence_penalty": 0.5}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"tool_choice": "required"}, False),
        ({"prompt": "one"}, True),
        ({"prompt": [1, 2, 3]}, True),
        ({"prompt": ["one", "two"]}, False),
    ],
)
def test_only_requests_whose_state_is_in_their_tokens_go_on_from_tokens(body: dict, expected: bool) -> None:
    assert can_resume(body) is expected


def test_the_longest_stop_text_counts() -> None:
    assert longest_stop({"stop": "ab"}) == 2
    assert longest_stop({"stop": ["a", "abc"]}) == 3
    assert longest_stop({}) == 0


# --- named events: Responses, Messages ----------------------------------------------------------------------------


def named_events(kind: str, pieces: list[str], thoughts: str = "Hm.") -> list[bytes]:
    """A stream as a replica writes it; its ids are other ones each time."""
    writer = MessagesWriter() if kind == "messages" else ResponsesWriter(ResponsesRequest(input="?"))
    call = {"index": 0, "id": f"call_{id(writer)}", "function": {"name": "now", "arguments": "{}"}}
    deltas: list[dict] = [{"role": "assistant"}, {"reasoning": thoughts}, *({"content": piece} for piece in pieces)]
    deltas.append({"tool_calls": [call]})
    chunks = [{"model": "m", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    values = [value for chunk in chunks for value in writer.take(chunk)] + list(writer.end())
    return [f"event: {value['type']}\ndata: {json.dumps(value)}".encode() for value in values]


def values_of(events: list[bytes]) -> list[dict]:
    return [json.loads(event.partition(b"\ndata: ")[2]) for event in events]


def ids_in(value: object) -> set[str]:
    if isinstance(value, dict):
        own = {item for key, item in value.items() if key in ("id", "item_id", "call_id") and isinstance(item, str)}
        return own.union(*map(ids_in, value.values()))
    return set().union(*map(ids_in, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("kind", ["messages", "responses"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_named_stream_is_one_stream_wherever_the_first_replica_died(kind: str, data) -> None:
    pieces = data.draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=6))
    first = named_events(kind, pieces)
    sent = first[: data.draw(st.integers(min_value=0, max_value=len(first) - 1))]
    resumed = ResumedEvents(sent)
    passed = [event for event in map(resumed.pass_on, named_events(kind, ["".join(pieces)])) if event is not None]
    whole, got = values_of(first), values_of(sent + passed)
    assert [one.partition(b"\n")[0] for one in sent + passed] == [f"event: {v['type']}".encode() for v in got]
    marks = [[v["type"] for v in values if "delta" not in v["type"]] for values in (whole, got)]
    assert marks[0] == marks[1]
    texts = [
        "".join(v["delta"] for v in got if v["type"] == "response.output_text.delta"),
        "".join(v["delta"].get("text", "") for v in got if v["type"] == "content_block_delta"),
    ]
    assert "".join(texts) == "".join(pieces)
    assert ids_in(got) == ids_in(values_of(sent)) | ids_in(got[len(sent) :])
    assert len(ids_in(got)) == len(ids_in(whole))  # one name for each thing, to the end
    if kind == "responses":
        assert [value["sequence_number"] for value in got] == list(range(len(got)))


@pytest.mark.parametrize("kind", ["messages", "responses"])
@pytest.mark.parametrize("again", [["London"], ["Par"], []])
def test_a_named_stream_that_says_something_else_is_noticed(kind: str, again: list[str]) -> None:
    first = named_events(kind, ["Paris", " is"])
    cut = next(place for place, one in enumerate(first) if b"Paris" in one) + 1
    resumed = ResumedEvents(first[:cut])
    with pytest.raises(Mismatch):
        list(map(resumed.pass_on, named_events(kind, again)))


@pytest.mark.parametrize("kind", ["messages", "responses"])
def test_a_named_stream_has_its_own_end(kind: str) -> None:
    stream = StreamLog()
    events = named_events(kind, ["a"])
    for event in stream.take(b"".join(event + b"\n\n" for event in events)):
        assert not stream.finished
        stream.events.append(event)
    assert stream.finished
