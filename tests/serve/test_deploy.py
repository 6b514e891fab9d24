"""``rayswift deploy`` as a user runs it, with the Transformers engine (``tests/slow`` has it with vLLM)."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import ray
from serving import Deployment, beyond_this_machine, deployed, listening

from rayswift.arguments import make_arguments
from rayswift.generate.model_spec import model_specs
from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.types import SamplingParams
from rayswift.serve import deploy
from rayswift.serve.ports import free_port

MODEL, KEY = "SmolLM2-135M-Instruct", "sk-of-this-test"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deploy")
    flags = ["--infer_backend", "transformers", "--use_gpu", "false", "--api_key", KEY, "--max_length", "512"]
    with deployed(smollm2_dir, folder, *flags, api_key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Deployment) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0, timeout=120)


def test_it_answers_what_infer_answers_streamed_and_whole(client: openai.OpenAI, engine: TransformersEngine) -> None:
    expected = engine.generate([QUESTION], SamplingParams(max_new_tokens=12, temperature=0))[0].text
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=12, temperature=0)
    assert whole.choices[0].message.content == expected
    pieces = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=12, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected


def test_mistakes_are_openai_errors(server: Deployment, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
        client.chat.completions.create(model="nobody", messages=QUESTION)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.base_url, api_key="wrong", max_retries=0).models.list()
    for path in ("/no/such/path", "/v1/chat/completions/x"):
        status, body = server.get(path)
        assert status == 404
        assert json.loads(body)["error"]["type"] == "not_found_error"
    assert server.get("/v1/completions")[0] == 405


def test_it_lists_its_model_and_says_how_it_is(server: Deployment, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "rayswift"
    assert server.get("/health")[0] == 200
    metrics = server.get("/metrics")[1].decode()
    assert "rayswift_requests_total" in metrics
    assert f'served_model="{MODEL}"' in metrics
    paths = json.loads(server.get("/openapi.json")[1])["paths"]
    assert {"/v1/chat/completions", "/v1/models", "/health"} <= set(paths)


def test_its_ports_are_this_machines_own(server: Deployment) -> None:
    found = listening(server.tree())
    assert ("127.0.0.1", server.port) in found
    assert not beyond_this_machine(found)
    assert Path(server.log).read_text().count("ready:") == 1


@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_that_the_caller_had_started_runs_on(smollm2_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a deployment: what is looked at is whose Ray it is."""
    for name in ("apply", "wait_until_ready"):
        monkeypatch.setattr(deploy, name, lambda *_: None)
    monkeypatch.setattr(deploy, "_deploy_times", lambda _: {})
    args = make_arguments(
        "deploy", model=smollm2_dir, infer_backend="transformers", use_gpu=False, port=free_port("127.0.0.1", 20000)
    )
    before = signal.getsignal(signal.SIGTERM)
    with deploy.deployment(args, model_specs(args)):
        pass
    assert ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is before
