"""OpenAI's interface over the Transformers engine: its client, shared batches, streams that go on, bad input."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import torch
from starlette.testclient import TestClient

from rayswift.data.tokens.encoder import Encoder
from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.types import SamplingParams
from rayswift.serve.lease import RESUME_HEADER
from rayswift.serve.ports import bind
from rayswift.serve.replica.prompt_length import most_characters
from rayswift.serve.replica.transformers import TransformersServing

ASK = [{"role": "user", "content": "What is the capital of France?"}]
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def tiny_dir(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two layers with the tokenizer and the chat template of SmolLM2."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    folder = str(tmp_path_factory.mktemp("tiny"))
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_serving(tiny_dir: str) -> Iterator[Callable[..., TransformersServing]]:
    made: list[TransformersServing] = []

    def make(**limits: int) -> TransformersServing:
        engine = TransformersEngine.load(Encoder(tiny_dir), torch_dtype="float32", use_gpu=False)
        made.append(TransformersServing(engine, "tiny", **limits))
        return made[-1]

    yield make
    for serving in made:
        serving.runner.close()


@pytest.fixture(scope="module")
def serving(make_serving: Callable[..., TransformersServing]) -> TransformersServing:
    return make_serving(max_rows=4)


@pytest.fixture(scope="module")
def http(serving: TransformersServing) -> TestClient:
    return TestClient(serving.app, raise_server_exceptions=False)


@contextmanager
def serve(app: Any) -> Iterator[str]:
    """The app on a port of its own."""
    import uvicorn

    sock = bind("127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url(serving: TransformersServing) -> Iterator[str]:
    with serve(serving.app) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def events(response: Any) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


# --- what the client sees ---------------------------------------------------------------------------------------


def test_a_real_model_answers_as_the_engine_does(engine: TransformersEngine) -> None:
    serving = TransformersServing(engine, "smollm2")
    answer = TestClient(serving.app).post(CHAT, json={"messages": ASK, "temperature": 0, "max_tokens": 12}).json()
    serving.runner.close()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "The capital of France is Paris."}
    assert answer["choices"][0]["finish_reason"] == "stop"
    prompt = len(engine.encoder.encode_prompt(ASK))
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8}


def test_log_probabilities_are_the_models_own_in_infer_and_deploy(engine: TransformersEngine) -> None:
    """Before temperature and cuts: with top_k 1 those of the distribution sampled from would all be 0."""
    params = SamplingParams(max_new_tokens=6, temperature=0.5, top_k=1, logprobs=True, top_logprobs=3)
    inferred = engine.generate([ASK], params)[0].logprobs
    serving = TransformersServing(engine, "smollm2")
    body = {"messages": ASK, "temperature": 0.5, "top_k": 1, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    deployed = TestClient(serving.app).post(CHAT, json=body).json()["choices"][0]["logprobs"]
    serving.runner.close()
    assert inferred is not None
    assert inferred["content"] == deployed["content"]
    prompt = engine.encoder.encode_prompt(ASK)
    ids = [engine.encoder.tokenizer.encode(entry["token"])[0] for entry in inferred["content"]]
    with torch.no_grad():
        raw = engine.model(torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
    for place, entry in enumerate(inferred["content"]):
        assert entry["logprob"] == pytest.approx(raw[len(prompt) + place - 1, ids[place]].item(), abs=0.1)  # bf16
        assert entry["logprob"] == max(other["logprob"] for other in entry["top_logprobs"]) < 0.0
        assert len(entry["top_logprobs"]) == 3


def test_the_openai_client_gets_whole_answers_and_streams(client: openai.OpenAI, serving: TransformersServing) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=0, max_completion_tokens=10, logprobs=True, top_logprobs=2
    )  # type: ignore[arg-type]
    assert whole.choices[0].finish_reason == "length" and whole.usage is not None
    assert whole.usage.completion_tokens == 10
    assert whole.choices[0].logprobs is not None
    entries = whole.choices[0].logprobs.content or []
    assert len(entries) == 10 and all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy takes the likeliest
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=ASK, temperature=0, max_tokens=10, stream=True,
            stream_options={"include_usage": True},
        )
    )  # type: ignore[call-overload]  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == "length"


def test_completions_take_texts_and_ids_and_keep_their_order(client: openai.OpenAI, http: TestClient) -> None:
    texts = ["Once upon a time", "The quick brown fox"]
    both = client.completions.create(model="tiny", prompt=texts, temperature=0, max_tokens=6, logprobs=1)
    ids = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    from_ids = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=6)
    assert [choice.text for choice in both.choices] == [choice.text for choice in from_ids.choices]
    alone = client.completions.create(model="tiny", prompt=texts[1], temperature=0, max_tokens=6, echo=True)
    assert alone.choices[0].text == texts[1] + both.choices[1].text
    assert both.choices[0].logprobs is not None
    assert len(both.choices[0].logprobs.tokens or []) == len(both.choices[0].logprobs.text_offset or []) == 6
    streamed = client.completions.create(model="tiny", prompt=texts[0], temperature=0, max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == both.choices[0].text
    assert both.usage is not None and both.usage.prompt_tokens == sum(map(len, ids))


def test_a_seed_repeats_an_answer_and_choices_differ(http: TestClient) -> None:
    def texts(**fields: Any) -> list[str]:
        body = {"messages": ASK, "max_tokens": 8, "temperature": 1.0, **fields}
        return [choice["message"]["content"] for choice in http.post(CHAT, json=body).json()["choices"]]

    first = texts(seed=7, n=3)
    assert len(set(first)) == 3
    assert texts(seed=7, n=3) == first and texts(seed=7) == first[:1]
    assert texts(seed=8) != first[:1]
    assert texts(seed=7, top_k=1) == texts(temperature=0)  # one token to draw from
    assert texts(seed=7, temperature=0, top_p=0.5) == texts(temperature=0)


def test_penalties_and_biases_change_the_choice(http: TestClient) -> None:
    def ids(**fields: Any) -> list[int]:
        body = {"messages": ASK, "max_tokens": 12, "temperature": 0, "return_token_ids": True, **fields}
        return list(http.post(CHAT, json=body).json()["choices"][0]["token_ids"])

    plain = ids()
    assert ids(logit_bias={str(plain[0]): -100})[0] != plain[0]
    assert ids(logit_bias={"1234": 100}) == [1234] * 12
    assert ids(logit_bias={"1234": 100}, frequency_penalty=2.0) == [1234] * 12  # a bias of 100 outweighs 12 × 2
    assert len(set(ids(repetition_penalty=50.0))) == 12
    assert ids(presence_penalty=2.0)[0] == plain[0]  # nothing has been said yet


def test_stop_texts_and_tokens_end_an_answer(http: TestClient) -> None:
    body = {"messages": ASK, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    whole = http.post(CHAT, json=body).json()["choices"][0]
    text, ids = whole["message"]["content"], whole["token_ids"]
    word = text[len(text) // 2 :][:3]
    cut = http.post(CHAT, json=body | {"stop": word}).json()["choices"][0]
    assert cut["message"]["content"] == text.partition(word)[0] and cut["finish_reason"] == "stop"
    streamed = events(http.post(CHAT, json=body | {"stop": ["never said", word], "stream": True}))
    assert text_of(streamed) == text.partition(word)[0]
    by_id = http.post(CHAT, json=body | {"stop_token_ids": [ids[4]]}).json()["choices"][0]
    assert by_id["finish_reason"] == "stop" and by_id["token_ids"] == ids[: ids.index(ids[4]) + 1]
    # The end of a turn, which logit_bias makes certain here, ends the answer without being part of it.
    ended = http.post(CHAT, json=body | {"logit_bias": {"2": 100}}).json()
    assert ended["choices"][0]["message"]["content"] == "" and ended["usage"]["completion_tokens"] == 1
    going_on = http.post(CHAT, json=body | {"logit_bias": {"2": 100}, "ignore_eos": True}).json()
    assert going_on["usage"]["completion_tokens"] == 12


def test_tokens_are_those_of_training_and_back(http: TestClient, tiny_dir: str) -> None:
    asked = [{"role": "user", "content": "a <|im_end|> b"}]
    found = http.post("/tokenize", json={"messages": asked, "return_token_strs": True}).json()
    assert found["tokens"] == Encoder(tiny_dir).encode_prompt(asked) and found["count"] == len(found["token_strs"])
    assert found["max_model_len"] == 256
    assert "a <|im_end|> b" in http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"]


def test_the_schema_names_every_route(http: TestClient) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    interfaces = {"/v1/responses", "/v1/messages", "/v1/messages/count_tokens"}
    assert set(paths) == {CHAT, PLAIN, *interfaces, "/v1/models", "/tokenize", "/detokenize", "/health"}
    assert http.get("/health").json() == {"status": "ok"}


# --- batches ----------------------------------------------------------------------------------------------------


def test_requests_that_share_batches_get_the_answers_they_get_alone(url: str, serving: TransformersServing) -> None:
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "word " * length}], "max_tokens": 5 * length, **sampling}
        for length in (1, 3, 9)
        for sampling in ({"temperature": 0}, {"seed": 3, "temperature": 0.7}, {"seed": 4, "top_p": 0.9})
    ]

    def ask(body: dict[str, Any]) -> str:
        answer = httpx.post(url + CHAT, json=body, timeout=60).json()
        return str(answer["choices"][0]["message"]["content"])

    alone = [ask(body) for body in bodies]
    sizes: list[int] = []
    generate = serving.runner._generate
    serving.runner._generate = lambda rows: (sizes.append(len(rows)), generate(rows))[1]  # type: ignore[method-assign,func-returns-value]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(ask, bodies))
    serving.runner._generate = generate  # type: ignore[method-assign]
    assert together == alone
    assert 1 < max(sizes) <= 4


@pytest.mark.slow
def test_a_short_request_does_not_wait_for_the_end_of_a_long_one(
    url: str, serving: TransformersServing, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = serving.runner.turn_is_over
    slow = lambda rows, steps: (time.sleep(0.02), over(rows, steps))[1]  # noqa: E731  # 4 s for the long request
    monkeypatch.setattr(serving.runner, "turn_is_over", slow)
    done: list[str] = []

    def ask(name: str, tokens: int) -> None:
        body = {"messages": ASK, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        httpx.post(url + CHAT, json=body, timeout=300).raise_for_status()
        done.append(name)

    long = threading.Thread(target=ask, args=("long", 200))
    before = serving.runner.tokens
    long.start()
    while serving.runner.tokens == before:
        time.sleep(0.001)
    ask("short", 2)
    long.join()
    assert done == ["short", "long"]


def test_a_client_that_leaves_frees_its_place(url: str, serving: TransformersServing) -> None:
    body = {"messages": ASK, "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    before = serving.runner.tokens
    with httpx.stream("POST", url + CHAT, json=body | {"stream": True}, timeout=60) as response:
        next(response.iter_raw())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + CHAT, json=body | {"n": 4, "temperature": 1}, timeout=httpx.Timeout(60, read=0.05))
    deadline = time.monotonic() + 10
    while serving.runner.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not serving.runner.running and not serving.runner.waiting
    assert serving.runner.tokens - before < 5 * 200


def test_a_full_line_answers_429_with_the_time_to_retry(make_serving: Callable[..., TransformersServing]) -> None:
    serving = make_serving(max_rows=1, max_waiting=2)
    gate, generate = threading.Event(), serving.runner._generate
    serving.runner._generate = lambda rows: (gate.wait(30), generate(rows))[1]  # type: ignore[method-assign,func-returns-value]
    with serve(serving.app) as address:
        body = {"messages": ASK, "max_tokens": 2}
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(httpx.post, address + CHAT, json=body, timeout=60) for _ in range(6)]
            while sum(one.done() for one in asked) < 3:
                time.sleep(0.01)
            gate.set()
            responses = [one.result() for one in asked]
    refused = [response for response in responses if response.status_code == 429]
    assert len(refused) == 3 and all(response.headers["retry-after"] == "1" for response in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert [response.status_code for response in responses].count(200) == 3


def test_a_row_that_fails_alone_does_not_take_the_others_with_it(make_serving: Callable[..., Any]) -> None:
    serving = make_serving(max_rows=4)
    generate = serving.runner._generate

    def without_memory(rows: list[Any]) -> None:
        if any(row.sampling.max_tokens == 13 for row in rows):
            raise RuntimeError("out of memory")
        generate(rows)

    serving.runner._generate = without_memory
    with serve(serving.app) as address:
        bodies = [{"messages": ASK, "max_tokens": tokens} for tokens in (3, 13, 4, 5)]
        with ThreadPoolExecutor(4) as pool:
            statuses = list(
                pool.map(lambda body: httpx.post(address + CHAT, json=body, timeout=60).status_code, bodies)
            )
        stream = httpx.post(address + CHAT, json=bodies[1] | {"stream": True}, timeout=60)
    assert statuses == [200, 500, 200, 200]
    assert events(stream)[-1]["error"]["message"] == "the model failed: out of memory"


# --- streams that another replica began ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 11, "temperature": 1.0, "repetition_penalty": 1.3}])
def test_a_stream_goes_on_after_tokens_of_another_replica(sampling: dict[str, Any], http: TestClient) -> None:
    body = {
        "messages": ASK, "max_tokens": 20, "stream": True, "return_token_ids": True, "ignore_eos": True,
        "stream_options": {"include_usage": True}, **sampling,
    }  # fmt: skip
    whole = events(http.post(CHAT, json=body))
    ids = [token for chunk in whole for choice in chunk["choices"] for token in choice.get("token_ids", [])]
    assert len(ids) == 20
    for cut in (1, 7, 19, 20):
        resumed = events(http.post(CHAT, json=body, headers={RESUME_HEADER: ",".join(map(str, ids[:cut]))}))
        assert text_of(resumed) == text_of(whole)
        assert resumed[-1]["usage"] == whole[-1]["usage"]
        assert resumed[-2]["choices"][0]["finish_reason"] == "length"


def test_ids_of_another_replica_are_checked(http: TestClient) -> None:
    for header in ("x", "1;2", "-1", "999999", "²"):
        headers = [(RESUME_HEADER.encode(), header.encode())]
        response = http.post(CHAT, json={"messages": ASK, "stream": True}, headers=headers)  # type: ignore[arg-type]
        assert response.status_code == 400, header


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_dirs(tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters that change every answer, and one of a wider model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folders = []
    wide = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    for seed in range(3):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_dir) if seed < 2 else LlamaForCausalLM(wide)
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["down_proj"]))
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=2)
        folders.append(str(tmp_path_factory.mktemp("adapters") / f"checkpoint-{seed}"))
        tuned.save_pretrained(folders[-1])
    return folders


def test_adapters_answer_by_name_beside_the_base(
    make_serving: Callable[..., TransformersServing], adapter_dirs: list[str], tiny_dir: str
) -> None:
    import asyncio

    serving = make_serving(max_rows=4)
    plain = TestClient(serving.app)

    def ask(model: str) -> Any:
        body = {"model": model, "messages": ASK, "max_tokens": 40, "temperature": 0, "return_token_ids": True}
        return plain.post(CHAT, json=body).json()

    def ids(model: str) -> list[int]:
        return list(ask(model)["choices"][0]["token_ids"])

    base = ids("tiny")
    with pytest.raises(ValueError, match="another base model"):
        asyncio.run(serving.load_adapter("broken", adapter_dirs[2]))
    assert ids("tiny") == base and ask("broken")["error"]["code"] == "model_not_found"
    handles = {}
    for name, folder in zip(("one.v1", "two"), adapter_dirs[:2], strict=True):
        handles[name] = asyncio.run(serving.load_adapter(name, folder))
        assert ask(name)["error"]["code"] == "model_not_found" and ids("tiny") == base  # loaded, and nobody's name yet
        serving.answer_as(name, handles[name])
        engine = TransformersEngine.load(Encoder(tiny_dir), folder, torch_dtype="float32", use_gpu=False)
        prompt = engine.encoder.encode_prompt(ASK)
        import torch

        tokens = torch.tensor([prompt])
        alone = engine.model.generate(input_ids=tokens, max_new_tokens=40, do_sample=False)[0, len(prompt) :]
        assert ids(name) == alone.tolist() != base
    with pytest.raises(ValueError, match="another base model"):
        asyncio.run(serving.load_adapter("broken", adapter_dirs[2]))
    expected = {name: ids(name) for name in ("tiny", "one.v1", "two")}
    assert expected["tiny"] == base
    with serve(serving.app) as address:
        names = list(expected) * 3
        body = {"messages": ASK, "max_tokens": 40, "temperature": 0, "return_token_ids": True}
        with ThreadPoolExecutor(9) as pool:
            asked = pool.map(lambda name: httpx.post(address + CHAT, json=body | {"model": name}, timeout=60), names)
            assert [one.json()["choices"][0]["token_ids"] for one in asked] == [expected[name] for name in names]
    cards = {card["id"]: card["parent"] for card in plain.get("/v1/models").json()["data"]}
    assert cards == {"tiny": None, "one.v1": "tiny", "two": "tiny"}
    for name in ("one.v1", "two"):
        serving.answer_as(name, None)
        asyncio.run(serving.unload_adapter(handles[name]))
        assert ask(name)["error"]["type"] == "not_found_error" and ids("tiny") == base  # after the last one too
        assert name == "two" or ids("two") == expected["two"]


def test_who_stops_waiting_for_a_load_does_not_end_the_model(serving: TransformersServing) -> None:
    from concurrent.futures import CancelledError

    gate = threading.Event()
    first = serving.runner.between_batches(gate.wait)
    left = serving.runner.between_batches(lambda: 1)
    assert left.cancel()
    gate.set()
    assert first.result(10)
    assert serving.runner.between_batches(lambda: 2).result(10) == 2
    with pytest.raises(CancelledError):
        left.result(0)
    assert serving.runner.alive


def test_an_adapter_is_asked_with_its_own_template(
    make_serving: Callable[..., TransformersServing], adapter_dirs: list[str], tiny_dir: str
) -> None:
    import asyncio

    serving = make_serving()
    serving.encoders["one"] = own = Encoder(tiny_dir, template="default", system="Trained with this.")
    serving.answer_as("one", asyncio.run(serving.load_adapter("one", adapter_dirs[0])))
    found = TestClient(serving.app).post("/tokenize", json={"model": "one", "messages": ASK}).json()
    assert found["tokens"] == own.encode_prompt(ASK)


# --- bad input --------------------------------------------------------------------------------------------------


def test_the_openai_client_raises_its_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=ASK)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256") as too_long:
        client.chat.completions.create(model="tiny", messages=ASK, max_tokens=500)  # type: ignore[arg-type]
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="infer_backend vllm"):
        client.chat.completions.create(model="tiny", messages=ASK, extra_body={"use_beam_search": True})  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="text")


SURROGATE = '{"messages": [{"role": "user", "content": "\\ud800"}]}'
BAD_BODIES: list[tuple[str, Any]] = [
    *((CHAT, body) for body in ('"text"', "[]", "42", "null", "", '{"messages": [', "{}", "\x00", SURROGATE)),
    (CHAT, '{"messages": ' + "[" * 100_000),
    (CHAT, '{"messages": [{"role": "user", "content": "q"}], "temperature": NaN}'),
    (CHAT, '{"messages": [{"role": "user", "content": "q"}], "temperature": 1e999}'),
    (CHAT, '{"messages": [{"role": "user", "content": "q"}], "seed": ' + "9" * 400 + "}"),
    *((CHAT, {"messages": messages}) for messages in (
        [], None, "hello", [42], [None], [[]], [{}], [{"role": "user"}], [{"role": "wizard", "content": "q"}],
        [{"role": "user", "content": 42}], [{"role": "user", "content": []}], [{"role": "user", "content": {"a": 1}}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"type": "custom", "custom": {"name": "x"}}]}],
        [{"role": "assistant", "tool_calls": "not calls"}], [{"role": {}, "content": "q"}],
        [{"role": "user", "content": "word " * 300}], [{"role": "user", "content": "x" * 1_000_000}],
        [{"role": "tool", "tool_call_id": "x"}], [*ASK, {"role": "system", "content": [{"type": "late"}]}],
    )),
    *((CHAT, {"messages": ASK, **fields}) for fields in (
        {"n": 0}, {"n": 129}, {"n": 10**12}, {"n": -1}, {"n": "two"}, {"n": 1.5}, {"n": 2, "temperature": 0},
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 10**12}, {"max_completion_tokens": 0},
        {"temperature": -1}, {"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -2}, {"min_p": 2},
        {"repetition_penalty": 0}, {"presence_penalty": 3}, {"frequency_penalty": -3},
        {"logprobs": 3}, {"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}, {"stop": ""}, {"stop": [""]},
        {"stop": 5}, {"stop": ["x"] * 65}, {"stop_token_ids": [-1]}, {"stop_token_ids": ["a"]},
        {"logit_bias": {"x": 1}}, {"logit_bias": {"999999": 1}}, {"logit_bias": {"1": "x"}}, {"logit_bias": [1]},
        {"logit_bias": {"²": 1}}, {"seed": 2**63}, {"stream": "perhaps"}, {"stream_options": {"include_usage": True}},
        {"response_format": {"type": "json_schema"}}, {"response_format": "json"}, {"tools": [{"type": "function"}]},
        {"tools": "tools"}, {"functions": [{}]}, {"guided_regex": ".*"}, {"structured_outputs": {"regex": "(("}},
        {"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"enable_thinking": "maybe"}},
        {"chat_template_kwargs": []}, {"add_generation_prompt": True, "continue_final_message": True},
        {"model": 42}, {"use_beam_search": True}, {"truncate_prompt_tokens": -5}, {"guided_json": {}},
        {"tool_choice": "required"}, {"temperature": 2.1}, {"allowed_token_ids": []},
        {"min_tokens": 300}, {"min_tokens": 3, "max_tokens": 2},
    )),
    *((PLAIN, body) for body in (
        {}, {"prompt": None}, {"prompt": []}, {"prompt": ""}, {"prompt": [[]]}, {"prompt": [10**9]},
        {"prompt": [49152]}, {"prompt": [-1]}, {"prompt": [1, "a", 2]}, {"prompt": [["a"]]}, {"prompt": {"a": 1}},
        {"prompt": "q", "logprobs": 21}, {"prompt": "q", "suffix": "s"},
        {"prompt": "q", "echo": True, "logprobs": -1}, {"prompt": ["q"] * 129}, {"prompt": "word " * 300},
        {"prompt": "q", "max_tokens": 0}, {"prompt_embeds": "AAAA"},
    )),
    *(("/tokenize", body) for body in ({}, {"prompt": "q", "messages": ASK}, {"messages": []}, {"prompt": 5},
                                        {"messages": ASK, "tools": [{"no": "name"}]})),
    *(("/detokenize", body) for body in ({}, {"tokens": ["a"]}, {"tokens": [-1]}, {"tokens": [2**40]})),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), BAD_BODIES, ids=[str(number) for number in range(len(BAD_BODIES))])
def test_bad_input_is_refused_in_openais_shape(path: str, body: Any, http: TestClient) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    response = http.post(path, content=content, headers={"content-type": "application/json"})
    if body == SURROGATE:  # half a character is read as the replacement character, or refused
        assert response.status_code in (200, 400)
        return
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 1000


def test_wrong_paths_methods_and_sizes_are_refused_in_openais_shape(http: TestClient) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404), ("POST", "/v1/embeddings", 404), ("GET", CHAT, 405), ("PUT", CHAT, 405),
        ("HEAD", CHAT, 405), ("OPTIONS", CHAT, 405), ("DELETE", "/v1/models", 405),
    ):  # fmt: skip
        response = http.request(method, path, content=b"{}" if method == "POST" else None)
        assert response.status_code == status, (method, path)
        assert method == "HEAD" or response.json()["error"]["type"]
    assert http.post(CHAT, content=b"x" * (33 * 2**20)).status_code == 413
    assert http.post(CHAT, content=b"q=1", headers={"content-type": "text/plain"}).status_code == 400
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PLAIN, {"prompt": "$long"}),
        (PLAIN, {"prompt": ["$long", "a"]}),
        ("/tokenize", {"prompt": "$long"}),
        (CHAT, {"messages": [{"role": "user", "content": "$long"}]}),
        (CHAT, {"messages": [{"role": "system", "content": [{"type": "text", "text": "$long"}]}, *ASK]}),
        ("/tokenize", {"messages": [{"role": "user", "content": "$long"}]}),
        ("/v1/responses", {"input": "$long"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "$long"}], "max_tokens": 3}),
    ],
)
def test_a_prompt_that_can_never_fit_is_refused_before_it_is_tokenised(
    http: TestClient, serving: TransformersServing, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    tokenizer = serving.engine.encoder.tokenizer
    text = "x " * (most_characters(tokenizer, serving.context_length) // 2 + 1)
    monkeypatch.setattr(type(tokenizer), "encode", lambda *_, **__: pytest.fail("tokenised"))
    monkeypatch.setattr("rayswift.serve.replica.transformers.chat_prompt_ids", lambda *_: pytest.fail("laid out"))
    answer = http.post(path, json=json.loads(json.dumps(body).replace("$long", text)))
    assert answer.status_code == 400
    assert "characters" in answer.json()["error"]["message"]


def test_the_end_of_a_long_text_is_enough_for_its_last_tokens(
    http: TestClient, serving: TransformersServing, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = serving.engine.encoder.tokenizer
    most, encode, read = most_characters(tokenizer, serving.context_length), type(tokenizer).encode, list[str]()

    def reading(self: Any, text: str, **options: Any) -> Any:
        read.append(text)
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", reading)
    text = "x y z " * (most // 6 + 10)
    found = http.post("/tokenize", json={"prompt": text, "truncate_prompt_tokens": 5}).json()["tokens"]
    assert found == encode(tokenizer, text)[-5:]
    assert [len(one) for one in read] == [most]
