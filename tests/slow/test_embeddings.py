"""Vectors instead of text: ``rayswift deploy --task_type embedding`` with both engines, and the ``openai`` client."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import openai
import pytest
import torch
from serving import KEYS, MODEL, Deployment, deployed

pytestmark = pytest.mark.slow

TEXTS = ["The capital of France is Paris.", "Paris is France's capital city.", "def add(a, b): return a + b"]


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def vectors_server(
    request: pytest.FixtureRequest, smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    flags = ["--served_model_name", MODEL, "--task_type", "embedding", "--api_key", KEYS[0]]
    flags += ["--infer_backend", request.param]
    with deployed(smollm2_dir, tmp_path_factory.mktemp("vectors"), *flags, api_key=KEYS[0]) as running:
        yield running


@pytest.fixture(scope="module")
def client(vectors_server: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=vectors_server.base_url, api_key=KEYS[0], max_retries=0, timeout=120) as client:
        yield client


def last_hidden_state(model_dir: str, text: str) -> np.ndarray:
    """What vLLM's embedding of a decoder is: the last token's hidden state, of length 1."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1].numpy()
    return state / np.linalg.norm(state)


def test_embeddings_are_the_models_own(client: openai.OpenAI, smollm2_dir: str) -> None:
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 20
    vectors = np.array([one.embedding for one in answer.data])
    assert vectors.shape == (3, 576)
    assert vectors[0] == pytest.approx(last_hidden_state(smollm2_dir, TEXTS[0]), abs=2e-3)
    alone = client.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="float")
    assert alone.data[0].embedding == pytest.approx(vectors[0].tolist(), abs=1e-4)


def test_scores_compare_texts(vectors_server: Deployment) -> None:
    body = {"model": MODEL, "text_1": TEXTS[0], "text_2": [TEXTS[0], *TEXTS[1:]]}
    status, answer = vectors_server.request("POST", "/v1/score", body)
    assert status == 200, answer
    same, alike, other = (one["score"] for one in json.loads(answer)["data"])
    assert same == pytest.approx(1, abs=1e-3)
    assert same > alike > other


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_documents_are_put_into_the_order_of_their_likeness(vectors_server: Deployment, version: str) -> None:
    """Jina's and Cohere's request."""
    body = {"model": MODEL, "query": TEXTS[0], "documents": [TEXTS[2], TEXTS[1], TEXTS[0]], "top_n": 2}
    status, answer = vectors_server.request("POST", f"/{version}/rerank", body)
    assert status == 200, answer
    found = json.loads(answer)
    assert [one["index"] for one in found["results"]] == [2, 1]
    assert found["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-3)
    assert found["results"][1]["document"]["text"] == TEXTS[1]
    assert found["usage"]["total_tokens"] > 20
    status, answer = vectors_server.request("POST", f"/{version}/rerank", {"model": MODEL, "documents": ["a"]})
    assert (status, json.loads(answer)["error"]["type"]) == (400, "invalid_request_error")


def test_mistakes_are_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=MODEL, input="word " * 4000)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="no-such-model", input="text")
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").embeddings.create(model=MODEL, input="text")
