"""The real ``openai`` client against ``rayswift deploy``: every endpoint and option, typed errors, keys, sockets."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import re
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from command_line import wait_for
from pydantic import BaseModel
from serving import KEYS, MODEL, Deployment, beyond_this_machine, listening, running_requests, wait_until_idle

from rayswift.data.tokens.encoder import Encoder

pytestmark = pytest.mark.slow

FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
STORY: list[Any] = [{"role": "user", "content": "Write a long story about a river."}]
#: Longer than any of these requests takes on a busy machine; reached only by a hang.
TIMEOUT = 120.0


@pytest.fixture(scope="module")
def client(server: Deployment) -> Iterator[openai.OpenAI]:
    """A client with the right key that does not retry, so that the first answer is what counts."""
    with openai.OpenAI(base_url=server.base_url, api_key=KEYS[0], max_retries=0, timeout=TIMEOUT) as client:
        yield client


def ask(client: openai.OpenAI, messages: list[Any] = FRANCE, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **({"temperature": 0} | options))


# --- chat -------------------------------------------------------------------------------------------------------


def test_chat_answers_with_text_usage_and_the_served_name(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=24)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 24


def test_a_stream_has_the_text_of_the_plain_answer_and_its_usage_last(client: openai.OpenAI) -> None:
    plain = ask(client, STORY, max_tokens=24)
    chunks = list(ask(client, STORY, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == plain.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 10, "tokens come as they are generated"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == plain.usage


def test_stop_words_end_the_answer_before_the_word(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=24).choices[0].message.content
    stopped = ask(client, max_tokens=24, stop=["Paris", "never"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == whole.partition("Paris")[0]
    streamed = list(ask(client, max_tokens=24, stop="Paris", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == stopped.message.content


def test_n_answers_and_a_seed_that_repeats_them(client: openai.OpenAI) -> None:
    def sampled(seed: int) -> list[str]:
        answer = ask(client, STORY, n=3, seed=seed, temperature=1.0, max_tokens=12)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = sampled(7)
    assert len(set(first)) > 1
    assert sampled(7) == first
    assert sampled(8) != first


def test_long_prompts_at_once_with_a_seed_answer_as_each_alone(client: openai.OpenAI) -> None:
    # More tokens than one step takes: vLLM on CPUs cannot compute a seeded prompt in parts.
    prompts = [[{"role": "user", "content": f"{word} " * 1500}] for word in ("river", "stone", "cloud")]

    def text(messages: list[Any]) -> str:
        return str(ask(client, messages, seed=7, temperature=1.0, max_tokens=8).choices[0].message.content)

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(text, prompts))
    assert together == [text(messages) for messages in prompts]


def test_logprobs_of_chosen_and_likeliest_tokens(client: openai.OpenAI) -> None:
    choice = ask(client, max_tokens=6, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content).startswith(choice.message.content)
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(alternative.logprob for alternative in entry.top_logprobs) <= 0  # greedy


def test_the_other_options_of_sampling_are_taken(client: openai.OpenAI) -> None:
    options = {"top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"19": -100}}
    extra = {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 3}
    answer = ask(client, STORY, temperature=0.7, seed=1, max_tokens=8, user="someone", extra_body=extra, **options)
    assert answer.usage.completion_tokens == 8


# --- structured output ------------------------------------------------------------------------------------------


class City(BaseModel):
    name: str
    is_capital: bool


def test_json_schema_through_the_clients_own_parse(client: openai.OpenAI) -> None:
    schema = City.model_json_schema()
    schema["properties"]["name"]["maxLength"] = 12
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "City", "schema": schema, "strict": True}}
    content = ask(client, max_tokens=60, response_format=wanted).choices[0].message.content
    assert isinstance(City.model_validate_json(content).is_capital, bool)


def test_json_object_is_json(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
    schema["additionalProperties"] = False
    content = ask(client, max_tokens=40, extra_body={"structured_outputs": {"json": schema}})
    assert set(json.loads(content.choices[0].message.content)) == {"n"}
    wanted: Any = {"type": "json_object"}
    answer = ask(client, max_tokens=40, response_format=wanted).choices[0].message.content
    assert answer.lstrip().startswith("{")


def test_regex_and_choice_bind_the_answer(client: openai.OpenAI) -> None:
    number = ask(client, max_tokens=20, extra_body={"structured_outputs": {"regex": r"\d{3}-\d{4}"}})
    assert re.fullmatch(r"\d{3}-\d{4}", number.choices[0].message.content)
    colour = ask(client, max_tokens=20, extra_body={"structured_outputs": {"choice": ["red", "green"]}})
    assert colour.choices[0].message.content in ("red", "green")


# --- tools ------------------------------------------------------------------------------------------------------

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_a_forced_tool_is_called_with_arguments(client: openai.OpenAI) -> None:
    forced: Any = {"type": "function", "function": {"name": "get_weather"}}
    message = ask(client, max_tokens=200, tools=[WEATHER], tool_choice=forced).choices[0].message
    assert message.tool_calls, message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather" and call.id
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_a_streamed_tool_call_adds_up_to_the_same_arguments(client: openai.OpenAI) -> None:
    forced: Any = {"type": "function", "function": {"name": "get_weather"}}
    whole = ask(client, max_tokens=200, tools=[WEATHER], tool_choice=forced).choices[0].message.tool_calls[0]
    name, arguments = "", ""
    for chunk in ask(client, max_tokens=200, tools=[WEATHER], tool_choice=forced, stream=True):
        for call in (chunk.choices[0].delta.tool_calls if chunk.choices else None) or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, json.loads(arguments)) == (whole.function.name, json.loads(whole.function.arguments))


def test_tool_results_go_back_into_the_conversation(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages: list[Any] = [
        *FRANCE, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]  # fmt: skip
    answer = ask(client, messages, max_tokens=8, tools=[WEATHER], tool_choice="none").choices[0].message
    assert answer.content and not answer.tool_calls


# --- the other endpoints ----------------------------------------------------------------------------------------


def test_completions_plain_streamed_several_and_from_token_ids(client: openai.OpenAI, server: Deployment) -> None:
    def complete(prompt: Any, **options: Any) -> Any:
        return client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0, **options)

    prompt = "The capital of France is"
    plain = complete(prompt, logprobs=2)
    text = plain.choices[0].text
    assert "Paris" in text
    assert len(plain.choices[0].logprobs.tokens) == plain.usage.completion_tokens
    assert "".join(chunk.choices[0].text for chunk in complete(prompt, stream=True)) == text
    several = complete([prompt, "One, two, three,"]).choices
    assert [choice.index for choice in several] == [0, 1] and several[0].text == text
    ids = tokenize(server, {"prompt": prompt})["tokens"]
    assert complete(ids).choices[0].text == text
    echoed = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, temperature=0, echo=True)
    assert echoed.choices[0].text.startswith(prompt)


def tokenize(server: Deployment, body: dict[str, Any]) -> dict[str, Any]:
    status, text = server.request("POST", "/tokenize", {"model": MODEL, **body})
    assert status == 200, text
    return json.loads(text)


def test_tokenize_and_detokenize_are_inverse_and_chat_adds_the_template(
    server: Deployment, client: openai.OpenAI, smollm2_dir: str
) -> None:
    text = "Größe: 12 μm, 数据"
    ids = tokenize(server, {"prompt": text, "add_special_tokens": False})["tokens"]
    status, body = server.request("POST", "/detokenize", {"model": MODEL, "tokens": ids})
    assert (status, json.loads(body)["prompt"]) == (200, text)
    asked: list[Any] = [{"role": "user", "content": "a <|im_end|> b"}]
    chat, encoder = tokenize(server, {"messages": asked, "tools": [WEATHER]}), Encoder(smollm2_dir)
    assert chat["tokens"] == encoder.encode_prompt(asked, [WEATHER])
    assert chat["count"] == len(chat["tokens"]) > len(encoder.encode_prompt(asked))
    assert ask(client, asked, tools=[WEATHER], max_tokens=1).usage.prompt_tokens == chat["count"]


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert MODEL in [model.id for model in listed]
    card = client.models.retrieve(MODEL).model_dump()
    assert (card["id"], card["root"], card["parent"], card["max_model_len"]) == (MODEL, MODEL, None, 2048)
    assert card["created"] > 0 and card["permission"][0]["allow_sampling"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_embeddings_and_scores_of_a_model_that_only_generates_are_refused(
    client: openai.OpenAI, server: Deployment
) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        client.embeddings.create(model=MODEL, input="text")
    assert_openai_shape(refused.value)
    status, body = server.request("POST", "/v1/score", {"model": MODEL, "text_1": "a", "text_2": "b"})
    assert status in (400, 404) and json.loads(body)["error"]["message"]
    status, body = server.request("POST", "/v1/rerank", {"model": MODEL, "query": "a", "documents": ["b"]})
    assert (status, "does not do that" in json.loads(body)["error"]["message"]) == (404, True)


def test_health_and_metrics_answer(server: Deployment) -> None:
    assert server.get("/health")[0] == 200
    status, text = server.get("/metrics")
    assert status == 200
    assert b"vllm:" in text


# --- Responses and Messages -------------------------------------------------------------------------------------

SHORT = "Answer in one word."


@pytest.fixture(scope="module")
def claude(server: Deployment) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client, which sends its key in a header of its own."""
    with anthropic.Anthropic(base_url=server.address, api_key=KEYS[0], max_retries=0, timeout=TIMEOUT) as client:
        yield client


def test_responses_say_what_the_chat_says(client: openai.OpenAI) -> None:
    chat = ask(client, [{"role": "system", "content": SHORT}, *FRANCE], max_tokens=12)
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "instructions": SHORT, "max_output_tokens": 12}
    answer = client.responses.create(input=FRANCE[0]["content"], **options)
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.usage.input_tokens, answer.usage.total_tokens) == (chat.usage.prompt_tokens, chat.usage.total_tokens)
    with client.responses.stream(input=FRANCE, **options) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert final.output_text == answer.output_text
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert (seen[0].type, seen[-1].type) == ("response.created", "response.completed")
    parsed = client.responses.parse(model=MODEL, input=FRANCE, text_format=City, temperature=0, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, City)


def test_messages_say_what_the_chat_says(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    chat = ask(client, [{"role": "system", "content": SHORT}, *FRANCE], max_tokens=12)
    options: dict[str, Any] = {
        "model": MODEL, "max_tokens": 12, "system": SHORT, "messages": FRANCE, "extra_body": {"temperature": 0},
    }  # fmt: skip
    answer = claude.messages.create(**options)
    assert answer.content[0].text == chat.choices[0].message.content
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (
        chat.usage.prompt_tokens, chat.usage.completion_tokens,
    )  # fmt: skip
    with claude.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == answer.content[0].text
        assert stream.get_final_message().stop_reason == answer.stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model=MODEL, system=SHORT, messages=FRANCE)
    assert counted.input_tokens == chat.usage.prompt_tokens


def test_tools_of_responses_and_messages_are_in_the_prompt_and_called(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    schema: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    answer = client.responses.create(
        model=MODEL, input=FRANCE, temperature=0, max_output_tokens=60,
        tools=[{"type": "function", "name": "weather", "parameters": schema, "strict": True}],
        tool_choice={"type": "function", "name": "weather"},
    )  # fmt: skip
    assert [item.type for item in answer.output] == ["function_call"]
    assert isinstance(json.loads(answer.output[0].arguments)["city"], str)
    message = claude.messages.create(
        model=MODEL, messages=FRANCE, max_tokens=60, extra_body={"temperature": 0},
        tools=[{"name": "weather", "input_schema": schema, "strict": True}],
        tool_choice={"type": "tool", "name": "weather"},
    )  # fmt: skip
    assert (message.content[-1].type, message.stop_reason) == ("tool_use", "tool_use")
    assert isinstance(message.content[-1].input["city"], str)


def test_mistakes_in_responses_and_messages_are_typed_errors(
    client: openai.OpenAI, claude: anthropic.Anthropic, server: Deployment
) -> None:
    for options in ({"temperature": -1}, {"max_output_tokens": 100_000}, {"input": "word " * 5000},
                    {"background": True}, {"input": [{"type": "nothing"}]}):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**({"model": MODEL, "input": "x"} | options))
        assert_openai_shape(refused.value)
    for options in ({"model": "nobody"}, {"previous_response_id": "resp_1"}):
        with pytest.raises(openai.NotFoundError):
            client.responses.create(**({"model": MODEL, "input": "x"} | options))
    for options in ({"max_tokens": 0}, {"max_tokens": 100_000}, {"messages": []}, {"extra_body": {"top_p": 3}}):
        with pytest.raises(anthropic.BadRequestError) as wrong:
            claude.messages.create(**({"model": MODEL, "max_tokens": 4, "messages": FRANCE} | options))
        assert (wrong.value.body["type"], wrong.value.body["error"]["type"]) == ("error", "invalid_request_error")
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="nobody", max_tokens=4, messages=FRANCE)
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="wrong").messages.create(model=MODEL, max_tokens=4, messages=FRANCE)


# --- errors -----------------------------------------------------------------------------------------------------


def assert_openai_shape(error: openai.APIStatusError) -> None:
    """The body's ``error`` object, which the client unpacks into ``body``."""
    assert isinstance(error.body, dict), error
    assert error.body["message"] and "type" in error.body and "code" in error.body, error.body


@pytest.mark.parametrize("key", ["wrong", KEYS[0][:-1], KEYS[0].upper(), KEYS[0] + "x", "Bearer"])
def test_a_wrong_key_is_an_authentication_error(server: Deployment, key: str) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key=key, max_retries=0, timeout=TIMEOUT) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(stranger, max_tokens=1)
        assert_openai_shape(refused.value)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_every_key_of_the_list_is_good(server: Deployment) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key=KEYS[1], max_retries=0, timeout=TIMEOUT) as second:
        assert second.models.list().data


BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": -1},
    "top_p": {"top_p": 7},
    "max_tokens": {"max_tokens": 0},
    "top_logprobs": {"logprobs": True, "top_logprobs": 1000},
    "logit_bias": {"logit_bias": {"99999999": 1}},
    "role": {"messages": [{"role": "nobody", "content": "x"}]},
    "no messages": {"messages": []},
    "schema": {"response_format": {"type": "json_schema"}},
    "regex": {"extra_body": {"structured_outputs": {"regex": "("}}},
    "too long": {"messages": [{"role": "user", "content": "word " * 5000}]},
    "too much": {"max_tokens": 100_000},
    "tool_choice": {"tool_choice": "required"},
    "n": {"n": 100_000},
}


@pytest.mark.parametrize("options", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_bad_value_is_a_bad_request_error_that_says_why(client: openai.OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)) as refused:
        ask(client, **({"messages": FRANCE, "max_tokens": 4} | options))
    assert_openai_shape(refused.value)


def test_an_unknown_model_is_a_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="no-such-model", messages=FRANCE)
    assert_openai_shape(refused.value)
    assert "no-such-model" in refused.value.message


def test_an_adapter_that_cannot_be_used_is_an_unprocessable_entity_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(model="broken", messages=FRANCE)
    assert_openai_shape(refused.value)
    assert "safetensors" in refused.value.message


def test_a_client_that_goes_away_frees_its_sequence(client: openai.OpenAI, server: Deployment) -> None:
    stream = ask(client, STORY, max_tokens=1800, stream=True, extra_body={"ignore_eos": True})
    for _ in zip(range(3), stream, strict=False):
        pass
    assert running_requests(server) >= 1
    stream.close()
    wait_until_idle(server, timeout=10)


def test_a_plain_request_whose_client_goes_away_is_freed_too(server: Deployment) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"model": MODEL, "messages": STORY, "max_tokens": 1800, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    wait_for(lambda: running_requests(server) >= 1, 30, "the request to run")
    connection.close()
    wait_until_idle(server, timeout=10)


# --- overload ---------------------------------------------------------------------------------------------------


#: Requests at once; the server takes 32 and lets 64 wait.
CROWD = 150


def test_overload_is_refused_with_retry_after_and_never_hangs(server: Deployment) -> None:
    """More requests at once than the server may hold: some are answered, the rest refused at once."""
    wait_until_idle(server)
    refused: list[openai.APIStatusError] = []
    answered: list[str] = []
    gate = threading.Barrier(CROWD)

    def one(number: int) -> None:
        with openai.OpenAI(base_url=server.base_url, api_key=KEYS[0], max_retries=0, timeout=TIMEOUT) as client:
            gate.wait(60)
            try:
                answered.append(ask(client, max_tokens=1).choices[0].message.content)
            except (openai.RateLimitError, openai.InternalServerError) as error:
                refused.append(error)

    with concurrent.futures.ThreadPoolExecutor(CROWD) as pool:
        list(pool.map(one, range(CROWD)))
    assert len(answered) + len(refused) == CROWD
    assert answered and refused, f"{len(answered)} answered, {len(refused)} refused"
    for error in refused:
        assert error.status_code in (429, 503)
        assert int(error.response.headers["retry-after"]) >= 1
        assert_openai_shape(error)
    assert server.answers()


# --- keys -------------------------------------------------------------------------------------------------------

#: What vLLM, FastAPI, SWIFT and Serve may answer beside what the served OpenAPI schema lists.
OTHER_PATHS = [
    "/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/metrics", "/health", "/health/", "/ping",
    "/version", "/load", "/v1", "/v1/", "/v1/models", "/v1/models/small", "/v1/responses", "/v1/messages", "/infer/",
    "/v1/audio/transcriptions", "/invocations", "/pooling", "/classify", "/rerank", "/v1/rerank", "/v2/rerank",
    "/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/is_paused", "/reset_prefix_cache", "/update_weights",
    "/init_weights_update_group", "/collective_rpc", "/server_info", "/start_profile", "/stop_profile",
    "/scale_elastic_ep", "/is_scaling_elastic_ep", "/abort_requests", "/inference/v1/generate", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/v1/adapters", "/-/routes", "/-/healthz", "/tokenizer_info", "/static/swagger-ui.css",
    "//v1/models", "/v1//models", "/v1/models/", "/V1/MODELS", "/v1/%6dodels", "/v1/models?api_key=x", "/../v1/models",
    "/v1/models;x", "/no/such/path", "/.env",
]  # fmt: skip
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND")


def bare_request(server: Deployment, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes, Any]:
    """Status, body and headers of a request with exactly this path."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, b"{}" if method in ("POST", "PUT", "PATCH") else None, headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def routes(server: Deployment) -> list[str]:
    """Every path of the served schema, parameters filled in, and the others known."""
    status, text = server.get("/openapi.json")
    assert status == 200
    described = [re.sub(r"\{[^}]+\}", "x", path) for path in json.loads(text)["paths"]]
    assert {"/v1/chat/completions", "/v1/models"} <= set(described)
    return sorted({*described, *OTHER_PATHS})


def test_no_route_answers_without_the_key(server: Deployment) -> None:
    headers = {"Content-Type": "application/json"}
    cross_site = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEYS[0]}, {"Authorization": f"Basic {KEYS[0]}"},
             {"Authorization": "Bearer "}, {"Cookie": f"api_key={KEYS[0]}"}]  # fmt: skip
    opened = []
    for path in routes(server):
        for method in METHODS:
            # A page of another origin is refused whatever its key (403); a method that HTTP servers may refuse before
            # anything else (501, 400) tells nothing either.
            for origin, refused in ((cross_site, {401, 403}), ({}, {401})):
                status, body, answered = bare_request(server, method, path, headers | origin)
                if status not in refused | {400, 405, 501} or b"vllm" in body.lower() or MODEL.encode() in body:
                    opened.append((method, path, status))
                assert answered.get("Access-Control-Allow-Origin") is None
        opened += [(kind, path) for kind in wrong if bare_request(server, "GET", path, kind)[0] != 401]
    assert not opened
    assert bare_request(server, "GET", "/v1/models", {})[2].get("WWW-Authenticate")


def test_what_the_engine_could_do_to_itself_is_not_reachable_with_the_key_either(server: Deployment) -> None:
    dangerous = ["/collective_rpc", "/update_weights", "/pause", "/sleep", "/invocations", "/reset_prefix_cache",
                 "/start_profile", "/server_info", "/abort_requests", "/scale_elastic_ep"]  # fmt: skip
    key = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
    statuses = {path: bare_request(server, "POST", path, key)[0] for path in dangerous}
    assert set(statuses.values()) <= {404, 405}, statuses


# --- what is open, what is written down -------------------------------------------------------------------------


def test_nothing_of_the_server_listens_beyond_this_machine(server: Deployment) -> None:
    found = listening(server.tree())
    assert ("127.0.0.1", server.port) in found
    assert not beyond_this_machine(found)


def test_the_engines_own_ports_do_not_answer_strangers(server: Deployment) -> None:
    """Another user of the machine must not get around the key by asking a replica directly."""
    ports = [port for _, port in listening([*server.replicas(), *server.engine_cores()])]
    assert ports
    open_ports = {}
    for port in ports:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/v1/models")
            response = connection.getresponse()
            if response.status == 200:
                open_ports[port] = response.read()[:100]
    assert not open_ports


def test_prompts_and_answers_are_in_no_log(client: openai.OpenAI, server: Deployment) -> None:
    secret = f"parrot {uuid.uuid4().hex}"
    ask(client, [{"role": "user", "content": secret}], max_tokens=4)
    client.completions.create(model=MODEL, prompt=secret, max_tokens=4)
    with pytest.raises(openai.APIStatusError):
        ask(client, [{"role": "user", "content": secret}], temperature=-1)
    with pytest.raises(openai.APIStatusError):
        ask(client, [{"role": "user", "content": f"{secret} " * 900}], max_tokens=4)
    files = dict(server.texts_of_logs())
    assert len(files) > 3
    assert not [str(path) for path, text in files.items() if secret in text or secret.split()[1] in text]
    for key in KEYS:
        assert not [str(path) for path, text in files.items() if key in text]
