"""Responses and Messages over the chat path: the real ``openai`` and ``anthropic`` clients before the replica's app."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from rayswift.data.tokens.encoder import Encoder
from rayswift.generate.transformers import TransformersEngine
from rayswift.serve.lease import RESUME_HEADER
from rayswift.serve.openai_errors import ApiError, add_error_handlers
from rayswift.serve.replica import messages, responses
from rayswift.serve.replica.openai_answers import DONE, event
from rayswift.serve.replica.openai_requests import ChatRequest
from rayswift.serve.replica.transformers import TransformersServing

SYSTEM, ASK = "Be short.", "What is the capital of France?"
CHAT = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASK}]
TURN: Any = {"role": "user", "content": ASK}
GREEDY: Any = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def http(tiny_dir: str) -> Iterator[TestClient]:
    """The app of a Transformers replica with a tiny random model."""
    serving = TransformersServing(
        TransformersEngine.load(Encoder(tiny_dir), torch_dtype="float32", use_gpu=False), "tiny"
    )
    yield TestClient(serving.app, raise_server_exceptions=False)
    serving.runner.close()


def openai_client(http: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)


def anthropic_client(http: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url="http://testserver", api_key="none", max_retries=0, http_client=http)


@pytest.fixture(scope="module")
def chat(http: TestClient) -> Any:
    """What the chat path answers, whose text the others must give."""
    return openai_client(http).chat.completions.create(messages=CHAT, max_tokens=12, **GREEDY)


# --- the same answers as those of a chat --------------------------------------------------------------------------


def test_responses_give_the_answer_of_the_chat(http: TestClient, chat: Any) -> None:
    asked = openai_client(http).responses
    for given in (ASK, [TURN], [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": ASK}]}]):
        answer = asked.create(input=given, instructions=SYSTEM, max_output_tokens=12, **GREEDY)
        assert answer.output_text == chat.choices[0].message.content != ""
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.object, answer.model, answer.instructions) == ("response", "tiny", SYSTEM)


@pytest.mark.parametrize(
    ("path", "body", "choice", "answer"),
    [
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 3}, "auto", ("choices", 0, "message", "content")),
        ("/v1/responses", {"input": ASK, "max_output_tokens": 3}, "auto", ("output", 0, "content", 0, "text")),
        ("/v1/messages", {"messages": [TURN], "max_tokens": 3}, {"type": "auto"}, ("content", 0, "text")),
        ("/v1/messages/count_tokens", {"messages": [TURN]}, {"type": "auto"}, ("input_tokens",)),
        ("/tokenize", {"messages": CHAT}, "none", ("tokens",)),
    ],
)
def test_an_empty_list_of_tools_is_as_none_on_every_path(
    http: TestClient, path: str, body: dict[str, Any], choice: Any, answer: tuple[Any, ...]
) -> None:
    """What agents send with every request (fast-agent#781, open-webui#26655)."""
    asked = {**body, **({} if path == "/tokenize" else GREEDY)}
    found = []
    for extra in ({}, {"tools": []}, {"tools": [], "tool_choice": choice}):
        response = http.post(path, json={**asked, **extra})
        assert response.status_code == 200, response.text
        found.append(functools.reduce(lambda value, key: value[key], answer, response.json()))
    assert found[0] == found[1] == found[2]


def test_a_response_can_be_streamed(http: TestClient, chat: Any) -> None:
    with openai_client(http).responses.stream(input=ASK, instructions=SYSTEM, max_output_tokens=12, **GREEDY) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    kinds = list(dict.fromkeys(one.type for one in seen))
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [one.sequence_number for one in seen] == list(range(len(seen)))
    pieces = [one.delta for one in seen if one.type == "response.output_text.delta"]
    assert "".join(pieces) == final.output_text == chat.choices[0].message.content
    assert len(pieces) > 4
    assert final.usage.total_tokens == chat.usage.total_tokens
    assert {one.item_id for one in seen if hasattr(one, "item_id")} == {final.output[0].id}
    assert {one.response.id for one in seen if hasattr(one, "response")} == {final.id}


def test_log_probabilities_of_a_response_are_those_of_the_chat(http: TestClient) -> None:
    client = openai_client(http)
    same = {"messages": CHAT, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    wanted = client.chat.completions.create(**same, **GREEDY).choices[0].logprobs.content
    answer = client.responses.create(
        input=ASK, instructions=SYSTEM, max_output_tokens=4, include=["message.output_text.logprobs"], top_logprobs=2,
        **GREEDY,
    )  # fmt: skip
    assert [one.logprob for one in answer.output[0].content[0].logprobs] == [one.logprob for one in wanted]
    assert [len(one.top_logprobs) for one in answer.output[0].content[0].logprobs] == [2, 2, 2, 2]


def test_messages_give_the_answer_of_the_chat(http: TestClient, chat: Any) -> None:
    asked = anthropic_client(http).messages
    for turn in (TURN, {"role": "user", "content": [{"type": "text", "text": ASK}]}):
        for system in (SYSTEM, [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]):
            answer = asked.create(messages=[turn], system=system, max_tokens=12, extra_body={"temperature": 0},
                                  model="tiny")  # fmt: skip
            assert answer.content[0].text == chat.choices[0].message.content
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    assert (answer.type, answer.role, answer.model, answer.stop_reason) == (
        "message", "assistant", "tiny", "max_tokens",
    )  # fmt: skip
    counted = asked.count_tokens(messages=[TURN], system=SYSTEM, model="tiny")
    assert counted.input_tokens == chat.usage.prompt_tokens


def test_a_message_can_be_streamed(http: TestClient, chat: Any) -> None:
    with anthropic_client(http).messages.stream(
        messages=[TURN], system=SYSTEM, max_tokens=12, extra_body={"temperature": 0}, model="tiny"
    ) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == final.content[0].text == chat.choices[0].message.content
    assert len(pieces) > 4
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
    assert final.usage.input_tokens == chat.usage.prompt_tokens
    raw = http.post("/v1/messages", json={"messages": [TURN], "max_tokens": 2, "stream": True})
    names = [line.removeprefix("event: ") for line in raw.text.splitlines() if line.startswith("event: ")]
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert "[DONE]" not in raw.text


def test_a_stream_goes_on_from_the_tokens_of_another_replica(http: TestClient, chat: Any) -> None:
    body = {"messages": CHAT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    ids = http.post("/v1/chat/completions", json=body).json()["choices"][0]["token_ids"]
    others = ids[3:6][::-1]  # an answer that this replica would not have begun
    begun = http.post("/detokenize", json={"tokens": others}).json()["prompt"]
    for earlier, text in ((ids[:7], chat.choices[0].message.content), (others, begun)):
        given = {RESUME_HEADER: ",".join(map(str, earlier))}
        asked = {"system": SYSTEM, "messages": [TURN], "max_tokens": 12, "temperature": 0, "stream": True}
        raw = http.post("/v1/messages", json=asked, headers=given).text
        events = [json.loads(line.removeprefix("data: ")) for line in raw.splitlines() if line.startswith("data: ")]
        pieces = [one["delta"]["text"] for one in events if one["type"] == "content_block_delta"]
        assert "".join(pieces).startswith(text)
        asked = {"instructions": SYSTEM, "input": ASK, "max_output_tokens": 12, "temperature": 0, "stream": True}
        last = json.loads(http.post("/v1/responses", json=asked, headers=given).text.strip().rpartition("data: ")[2])
        assert last["response"]["output"][0]["content"][0]["text"] == "".join(pieces)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("responses", {}, 400, "input"),
        ("responses", {"input": []}, 400, "messages"),
        ("responses", {"input": "a", "model": "nobody"}, 404, "model"),
        ("responses", {"input": "a", "previous_response_id": "resp_1"}, 404, "previous_response_id"),
        ("responses", {"input": "a", "background": True}, 400, "background"),
        ("responses", {"input": "a", "max_output_tokens": 0}, 400, "max_output_tokens"),
        ("responses", {"input": "a", "max_output_tokens": 10**6}, 400, "messages"),
        ("responses", {"input": "a", "temperature": -1}, 400, "temperature"),
        ("responses", {"input": "a", "tools": [{"type": "web_search"}]}, 400, "tools"),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, 400, "input"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]}, 400,
         "messages"),
        ("messages", {"messages": [TURN]}, 400, "max_tokens"),
        ("messages", {"messages": [], "max_tokens": 4}, 400, "messages"),
        ("messages", {"messages": [TURN], "max_tokens": 0}, 400, "max_tokens"),
        ("messages", {"messages": [TURN], "max_tokens": 4, "model": "nobody"}, 404, "model"),
        ("messages", {"messages": [{"role": "tool", "content": "a"}], "max_tokens": 4}, 400, "messages.0.role"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "video"}]}], "max_tokens": 4}, 400, None),
        ("messages", {"messages": [TURN], "max_tokens": 4, "top_p": 2.0}, 400, "top_p"),
        ("messages", {"messages": [TURN], "max_tokens": 9000, "thinking": {"type": "enabled", "budget_tokens": 2000}},
         400, "thinking.budget_tokens"),
        ("messages/count_tokens", {"messages": "a"}, 400, "messages"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_a_shape_that_both_clients_read(
    http: TestClient, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = http.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    said = answer.json()
    assert said["type"] == "error"
    assert set(said["error"]) == {"message", "type", "param", "code"}
    assert param is None or said["error"]["param"] == param


def test_clients_raise_their_typed_errors(http: TestClient) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        openai_client(http).responses.create(input=ASK, model="nobody")
    with pytest.raises(anthropic.NotFoundError, match="does not exist") as refused:
        anthropic_client(http).messages.create(messages=[TURN], max_tokens=4, model="nobody")
    assert refused.value.body["error"]["type"] == "not_found_error"


# --- thoughts, tools, errors: what a chat path that has them says -------------------------------------------------


def call(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
    began = {"id": f"call_{index}", "type": "function"} if name else {}
    return {"index": index, **began, "function": ({"name": name} if name else {}) | {"arguments": arguments}}


DELTAS: list[dict[str, Any]] = [
    {"role": "assistant", "content": ""}, {"reasoning": "I must "}, {"reasoning": "look."}, {"content": "One "},
    {"content": "moment."}, {"tool_calls": [call(0, "", "weather")]}, {"tool_calls": [call(0, '{"city": ')]},
    {"tool_calls": [call(0, '"Paris"}')]}, {"tool_calls": [call(1, "{}", "now")]}, {},
]  # fmt: skip
MESSAGE = {
    "role": "assistant", "reasoning": "I must look.", "content": "One moment.",
    "tool_calls": [call(0, '{"city": "Paris"}', "weather"), call(1, "{}", "now")],
}  # fmt: skip
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
FRAME = {"id": "chatcmpl-1", "created": 1, "model": "thinker"}


class Told:
    """A chat path that says what it is given, and the requests that it got."""

    def __init__(self, finish: str = "tool_calls", stop: str | None = None, fails: bool = False) -> None:
        self.asked: list[ChatRequest] = []
        self.finish, self.stop, self.fails = finish, stop, fails
        self.app = FastAPI()
        add_error_handlers(self.app, "failed")
        responses.add_routes(self.app, self.chat)
        messages.add_routes(self.app, self.chat, self.count)
        self.http = TestClient(self.app)

    def sent(self, number: int) -> dict[str, Any]:
        """A request that it got, as its JSON."""
        return self.asked[number].model_dump(exclude_unset=True, by_alias=True)

    async def count(self, body: ChatRequest) -> int:
        self.asked.append(body)
        return 7

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self.asked.append(body)
        ended = {"finish_reason": self.finish, "stop_reason": self.stop}
        if body.stream:
            return StreamingResponse(self.events(ended), media_type="text/event-stream")
        return JSONResponse({**FRAME, "choices": [{"index": 0, "message": MESSAGE, **ended}], "usage": USAGE})

    async def events(self, ended: dict[str, Any]) -> AsyncIterator[bytes]:
        for place, delta in enumerate(DELTAS):
            last = ended if place == len(DELTAS) - 1 else {"finish_reason": None}
            yield event({**FRAME, "choices": [{"index": 0, "delta": delta, **last}]})
            if self.fails and place == 3:
                yield ApiError(500, "the model failed", code="generation_failed").event() + DONE
                return
        yield event({**FRAME, "choices": [], "usage": USAGE})
        yield DONE


TOOL: Any = {"name": "weather", "description": "The weather.", "input_schema": {"properties": {"city": {}}}}


def test_a_message_holds_thoughts_text_and_calls() -> None:
    told = Told()
    client = anthropic_client(told.http)
    asked: Any = {"messages": [TURN], "max_tokens": 64, "model": "thinker", "tools": [TOOL],
                  "tool_choice": {"type": "any"}, "stop_sequences": ["END"]}  # fmt: skip
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for answer in (whole, streamed):
        assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert answer.content[0].thinking == "I must look."
        assert answer.content[0].signature
        assert answer.content[1].text == "One moment."
        assert (answer.content[2].id, answer.content[2].name, answer.content[2].input) == (
            "call_0", "weather", {"city": "Paris"},
        )  # fmt: skip
        assert (answer.content[3].name, answer.content[3].input) == ("now", {})
        assert (answer.stop_reason, answer.usage.output_tokens) == ("tool_use", 5)
    sent = told.sent(0)
    assert sent["tools"] == [{"type": "function", "function": {
        "name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {"city": {}}},
    }}]  # fmt: skip
    assert (sent["tool_choice"], sent["stop"], sent["max_tokens"]) == ("required", ["END"], 64)


def test_a_message_says_which_stop_text_ended_it() -> None:
    told = Told("stop", "END")
    for body in ({"stream": False}, {"stream": True}):
        raw = told.http.post("/v1/messages", json={"messages": [TURN], "max_tokens": 9, **body}).text
        # The calls are whole, so they are to be made, whatever ended the text.
        assert '"stop_reason":"tool_use"' in raw.replace(": ", ":")
    cut = {"choices": [{"message": {"content": "One"}, "finish_reason": "stop", "stop_reason": "END"}]}
    for asked, said in ((["END"], ("stop_sequence", "END")), (None, ("end_turn", None))):  # else it is the template's
        answer = messages.MessagesWriter(asked).whole({"model": "m", **cut})
        assert (answer["stop_reason"], answer["stop_sequence"]) == said


def test_a_call_that_was_cut_short_has_no_arguments_and_is_not_to_be_made() -> None:
    cut = {"tool_calls": [call(0, '{"city": "Pa', "weather")]}
    answer = messages.MessagesWriter().whole({"model": "m", "choices": [{"message": cut, "finish_reason": "length"}]})
    assert (answer["content"][0]["input"], answer["stop_reason"]) == ({}, "max_tokens")


def test_a_conversation_with_tools_goes_back_as_chat_messages() -> None:
    told = Told()
    body = {
        "system": [{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": SYSTEM}],
        "messages": [
            TURN,
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Look.", "signature": "s"}, {"type": "text", "text": "One moment."},
                {"type": "tool_use", "id": "call_0", "name": "weather", "input": {"city": "Paris"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "call_0", "content": [{"type": "text", "text": "Rain."}]},
                {"type": "text", "text": "And now?"},
            ]},
            {"role": "system", "content": " Really."},
        ],
        "thinking": {"type": "disabled"},
    }  # fmt: skip
    assert told.http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"] == 7
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert told.sent(0)["messages"] == [
        {"role": "system", "content": f"{SYSTEM} Really."},
        TURN,
        {"role": "assistant", "content": "One moment.", "reasoning": "Look.",
         "tool_calls": [{"id": "call_0", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "call_0", "content": "Rain."},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    assert told.sent(0)["reasoning_effort"] == "none"


class City(BaseModel):
    name: str


def test_a_response_holds_thoughts_text_and_calls() -> None:
    told = Told()
    client = openai_client(told.http).responses
    tool: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": None}
    asked: Any = {"input": ASK, "model": "thinker", "tools": [tool], "reasoning": {"effort": "low"},
                  "tool_choice": {"type": "function", "name": "weather"}}  # fmt: skip
    whole = client.create(**asked)
    with client.stream(**asked) as stream:
        seen = list(stream)
        streamed = stream.get_final_response()
    for answer in (whole, streamed):
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
        assert answer.output[0].content[0].text == "I must look."
        assert answer.output_text == "One moment."
        assert (answer.output[2].call_id, answer.output[2].arguments) == ("call_0", '{"city": "Paris"}')
        assert (answer.status, answer.usage.total_tokens) == ("completed", 12)
    pieces = [one.delta for one in seen if one.type == "response.function_call_arguments.delta"]
    assert pieces == ['{"city": ', '"Paris"}', "{}"]
    sent = told.sent(0)
    assert sent["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert sent["reasoning_effort"] == "low"


def test_the_items_of_a_response_go_back_as_chat_messages() -> None:
    told = Told()
    first = told.http.post("/v1/responses", json={"input": ASK}).json()
    given = [
        TURN, *first["output"], {"type": "function_call_output", "call_id": "call_0", "output": "Rain."},
        {"role": "user", "content": [{"type": "input_text", "text": "And now?"}]},
    ]  # fmt: skip
    layout = {"format": {"type": "json_schema", "name": "City", "schema": City.model_json_schema(), "strict": True}}
    told.http.post("/v1/responses", json={"input": given, "instructions": SYSTEM, "text": layout})
    sent = told.sent(-1)
    assert sent["messages"] == [
        {"role": "system", "content": SYSTEM},
        TURN,
        {"role": "assistant", "reasoning": "I must look.", "content": "One moment.",
         "tool_calls": [{"id": one["call_id"], "type": "function",
                         "function": {"name": one["name"], "arguments": one["arguments"]}}
                        for one in first["output"][2:]]},
        {"role": "tool", "tool_call_id": "call_0", "content": "Rain."},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    assert sent["response_format"] == {
        "type": "json_schema", "json_schema": {"name": "City", "schema": City.model_json_schema(), "strict": True},
    }  # fmt: skip


def test_a_model_that_fails_in_the_middle_is_an_error_of_the_client() -> None:
    told = Told(fails=True)
    with pytest.raises(openai.APIError, match="the model failed"):
        list(openai_client(told.http).responses.create(input=ASK, model="thinker", stream=True))
    with pytest.raises(anthropic.APIStatusError, match="the model failed"):
        list(anthropic_client(told.http).messages.create(messages=[TURN], max_tokens=9, model="thinker", stream=True))
    raw = told.http.post("/v1/responses", json={"input": ASK, "stream": True}).text
    last = json.loads(raw.strip().rpartition("data: ")[2])
    assert (last["type"], last["code"], last["message"]) == ("error", "generation_failed", "the model failed")
