"""``rayswift deploy`` in this process, with a random model (``tests/slow`` has the command with real ones)."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest
from serving import free_port, listening

from rayswift.arguments import make_arguments
from rayswift.data.tokens.encoder import Encoder
from rayswift.generate.model_spec import model_specs
from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.types import SamplingParams
from rayswift.serve.deploy import deployment

MODEL, KEY = "tiny-llama", "sk-of-this-test"
ORIGIN = "https://chat.example.com"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@contextmanager
def said(logger: str) -> Iterator[list[str]]:
    """What a logger says meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    found = logging.getLogger(logger)
    level = found.level
    found.addHandler(handler)
    found.setLevel(logging.INFO)
    yield lines
    found.removeHandler(handler)
    found.setLevel(level)


@pytest.fixture(scope="module")
def server(ray_cluster: None, tiny_dir: str) -> Iterator[httpx.Client]:
    """A client of the deployed endpoint. Ray, which was there before, is there afterwards."""
    import ray
    from ray import serve

    args = make_arguments(
        "deploy", model=tiny_dir, infer_backend="transformers", torch_dtype="float32", use_gpu=False, api_key=[KEY],
        max_length=512, port=free_port(), allowed_origins=[ORIGIN],
    )  # fmt: skip
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = f"http://127.0.0.1:{args.port}"
    with said("rayswift.serve.deploy") as lines:
        with deployment(args, model_specs(args)):
            assert [line for line in lines if "ready:" in line] == [f"ready: {address}/v1  ({MODEL})"]
            with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}) as client:
                yield client
        assert "stopping: running requests finish first" in lines[-1]
    assert ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is on_sigterm
    assert not serve.status().applications
    serve.shutdown()


@pytest.fixture(scope="module")
def client(server: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=0, timeout=120)


def test_it_answers_what_infer_answers_streamed_and_whole(client: openai.OpenAI, tiny_dir: str) -> None:
    engine = TransformersEngine.load(Encoder(tiny_dir), torch_dtype="float32", use_gpu=False)
    expected = engine.generate([QUESTION], SamplingParams(max_new_tokens=12, temperature=0))[0].text
    assert expected
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=12, temperature=0)
    assert whole.choices[0].message.content == expected
    pieces = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=12, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected


def test_responses_and_messages_say_the_same_through_the_gateway(server: httpx.Client, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8, temperature=0)
    expected = chat.choices[0].message.content
    response = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=8, temperature=0)
    assert response.output_text == expected
    with client.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=8, temperature=0) as events:
        assert events.get_final_response().output_text == expected
    claude = anthropic.Anthropic(base_url=str(server.base_url), api_key=KEY, max_retries=0, timeout=120)
    asked: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "extra_body": {"temperature": 0}}
    assert claude.messages.create(**asked).content[0].text == expected
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == expected
    assert claude.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens == chat.usage.prompt_tokens
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="wrong").messages.create(**asked)


def test_web_pages_of_the_allowed_origins_may_ask(server: httpx.Client) -> None:
    asks = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = httpx.options(f"{server.base_url}/v1/chat/completions", headers=asks)  # without the key
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, ORIGIN)
    refused = httpx.get(f"{server.base_url}/v1/models", headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)


def test_mistakes_are_openai_errors(server: httpx.Client, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
        client.chat.completions.create(model="nobody", messages=QUESTION)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="wrong", max_retries=0).models.list()
    for path in ("/no/such/path", "/v1/chat/completions/x"):
        found = server.get(path)
        assert found.status_code == 404
        assert found.json()["error"]["type"] == "not_found_error"
    assert server.get("/v1/completions").status_code == 405


def test_it_lists_its_model_and_says_how_it_is(server: httpx.Client, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    card = client.models.retrieve(MODEL).model_dump()
    assert (card["owned_by"], card["max_model_len"], card["root"], card["parent"]) == ("rayswift", 512, MODEL, None)
    assert server.get("/health").status_code == 200
    metrics = server.get("/metrics").text
    assert "rayswift_requests_total" in metrics
    assert f'served_model="{MODEL}"' in metrics
    paths = json.loads(server.get("/openapi.json").text)["paths"]
    assert {"/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/models", "/health"} <= set(paths)


def test_its_port_is_this_machines_own(server: httpx.Client) -> None:
    found = listening(psutil.Process().children(recursive=True))
    assert [host for host, port in found if port == server.base_url.port] == ["127.0.0.1"]
