"""Talking to a served model: the answers of the engine itself, and one line for everything that goes wrong."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from in_process import rayswift

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.generate.endpoint import EndpointEngine
from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.types import EngineUnusable, SamplingParams
from rayswift.inference.chat import Chat
from rayswift.inference.command import infer
from rayswift.inference.rows import result_row

GREEDY = SamplingParams(max_new_tokens=10, temperature=0)
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def endpoint(served: Any) -> EndpointEngine:
    return EndpointEngine.connect(served.base_url, api_key=served.api_key)


def test_the_only_model_needs_no_name_and_the_key_may_come_from_the_environment(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", served.api_key)
    assert EndpointEngine.connect(served.base_url).model == "small"


def test_a_stream_adds_up_to_what_the_engine_itself_says(endpoint: EndpointEngine, engine: TransformersEngine) -> None:
    pieces = list(endpoint.stream(FRANCE, GREEDY))
    (own,) = engine.generate([FRANCE], GREEDY)
    assert len(pieces) > 1
    assert "".join(pieces) == endpoint.last_stream.text == own.text
    assert endpoint.last_stream.num_prompt_tokens == own.num_prompt_tokens
    assert endpoint.last_stream.num_generated_tokens == own.num_generated_tokens


def test_answers_come_in_order_and_one_that_fails_is_alone(endpoint: EndpointEngine) -> None:
    too_long = [{"role": "user", "content": "word " * 9000}]
    answers = endpoint.generate([FRANCE, too_long, FRANCE], GREEDY)
    assert answers[0].text == answers[2].text == "The capital of France is Paris."
    assert answers[1].text == ""
    assert answers[1].error is not None
    assert "\n" not in answers[1].error


def test_sampling_settings_and_logprobs_reach_the_server(endpoint: EndpointEngine) -> None:
    settings = SamplingParams(max_new_tokens=4, temperature=0, stop_words=(" France",), logprobs=True, top_logprobs=2)
    (answer,) = endpoint.generate([FRANCE], settings)
    assert answer.text == "The capital of"
    assert answer.logprobs is not None
    assert [len(entry["top_logprobs"]) for entry in answer.logprobs["content"]][:3] == [2, 2, 2]
    seeded = [
        EndpointEngine(endpoint.client, endpoint.model, seed=seed).generate(
            [FRANCE], SamplingParams(max_new_tokens=12, temperature=2.0)
        )[0].text
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert seeded[0] == seeded[1] != seeded[2]


def thinking_endpoint(name: str, asked: list[Any]) -> EndpointEngine:
    """A server that sends what the model thought beside the answer, by this name; ``asked`` gets the requests."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        asked.append(body)
        if not body.get("stream"):
            message = {"role": "assistant", "content": "Paris.", name: "The user asks. Easy."}
            return httpx.Response(200, json={"choices": [{"index": 0, "message": message}]})
        deltas = [{name: "The user "}, {name: "asks. Easy."}, {"content": "Par"}, {"content": "is."}]
        chunks = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
        return httpx.Response(200, text="".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"]))

    http = httpx.Client(transport=httpx.MockTransport(answer))
    return EndpointEngine(openai.OpenAI(base_url="http://h/v1", api_key="k", http_client=http), "m")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_that_a_server_sends_apart_are_kept_by_either_name(name: str) -> None:
    asked: list[Any] = []
    engine = thinking_endpoint(name, asked)
    whole, streamed = engine.complete(FRANCE, GREEDY), "".join(engine.stream(FRANCE, GREEDY))
    assert (whole.text, whole.thoughts) == ("Paris.", "The user asks. Easy.")
    assert streamed == whole.shown == "<think>\nThe user asks. Easy.\n</think>\n\nParis."
    assert (engine.last_stream.text, engine.last_stream.thoughts) == (whole.text, whole.thoughts)
    distilled = replace(engine, with_thoughts=True).complete(FRANCE, GREEDY)
    assert distilled.text == "<think>The user asks. Easy.</think>\n\n<answer>Paris.</answer>"
    said = {"role": "assistant", "content": "Paris.", "reasoning_content": "The user asks. Easy."}
    assert result_row({"messages": FRANCE}, whole)["messages"] == [*FRANCE, said]
    # A conversation shows them, and its next request has them beside the answer.
    for stream in (True, False):
        lines, shown = iter(["What?", "And?", "exit"]), list[str]()
        Chat(engine, GREEDY, lambda _, lines=lines: next(lines), shown.append, stream=stream).run()
        assert "".join(shown).count(streamed) == 2
        assert asked[-1]["messages"][1] == said


def test_closing_a_stream_stops_the_model(endpoint: EndpointEngine, served: Any) -> None:
    story = [{"role": "user", "content": "Write a very long story about the sea."}]
    pieces = endpoint.stream(story, SamplingParams(max_new_tokens=2000, temperature=0))
    next(pieces)
    assert served.serving.runner.running
    pieces.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while served.serving.runner.running and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not served.serving.runner.running


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_url": "http://127.0.0.1:9/v1"}, "no server answers there"),
        ({"api_key": "sk-wrong"}, "the key is not accepted; give --api_key"),
        ({"model": "large"}, "--model large: "),
        ({"path": "/v2"}, "the address usually ends in /v1"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_one_line(served: Any, change: dict[str, str], said: str) -> None:
    path = change.pop("path", "/v1")
    settings = {"base_url": served.base_url.replace("/v1", path), "api_key": served.api_key, **change}
    with pytest.raises(EngineUnusable) as caught:
        EndpointEngine.connect(**settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    if "model" in change:
        assert "it has small" in str(caught.value)


def test_beam_search_is_refused(endpoint: EndpointEngine) -> None:
    with pytest.raises(UserError, match="--num_beams"):
        list(endpoint.stream(FRANCE, SamplingParams(num_beams=2)))


def test_a_dataset_is_answered_in_its_order(served: Any, tmp_path: Path) -> None:
    rows = [{"query": f"What is the capital of {name}?"} for name in ("France", "Italy", "Spain", "Japan")]
    rows.insert(2, {"nothing": "here"})
    source, path = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = infer(
        make_arguments(
            "infer", base_url=served.base_url, api_key=served.api_key, val_dataset=[str(source)], max_new_tokens=12,
            temperature=0, result_path=str(path),
        )
    )  # fmt: skip
    assert results == [json.loads(line) for line in path.read_text().splitlines()]
    asked = [row["messages"][0]["content"].split()[-1] if row["messages"] else "bad" for row in results]
    assert asked == ["France?", "Italy?", "bad", "Spain?", "Japan?"]
    assert [bool(row["response"]) for row in results] == [True, True, False, True, True]


def test_the_command_answers_a_pipe_through_an_endpoint(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", served.api_key)
    command = ["infer", "--base_url", served.base_url, "--model", "small"]
    done = rayswift(*command, "--temperature", "0", "--max_new_tokens", "10", stdin="What is the capital of France?\n")
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr
    wrong = rayswift(*command, "--api_key", "sk-wrong", stdin="hi\n")
    assert (wrong.returncode, wrong.stderr.count("\n"), "sk-wrong" in wrong.stderr) == (2, 1, False), wrong.stderr


def test_a_system_prompt_is_sent_where_the_conversation_has_none(endpoint: EndpointEngine) -> None:
    engine = EndpointEngine(endpoint.client, endpoint.model, system="Be brief.")
    own = [{"role": "system", "content": "Be kind."}, *FRANCE]
    assert engine.request(FRANCE, GREEDY, None)["messages"] == [{"role": "system", "content": "Be brief."}, *FRANCE]
    assert engine.request(own, GREEDY, None)["messages"] == own
    assert endpoint.request(FRANCE, GREEDY, None)["messages"] == FRANCE


def test_flags_that_the_server_decides_are_named(caplog: pytest.LogCaptureFixture) -> None:
    make_arguments("infer", base_url="http://h/v1", template="qwen", infer_backend="vllm", system="s", api_key="k")
    assert "--infer_backend, --template have no effect here: the server at --base_url decides" in caplog.text
    with pytest.raises(UserError, match="--base_url h:1: expected an address"):
        make_arguments("infer", base_url="h:1")
    with pytest.raises(UserError, match="--adapters"):
        make_arguments("app", base_url="http://h/v1", adapters=["a"])
