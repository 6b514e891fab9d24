"""Vectors, scores and reranking with Transformers: the numbers of the models themselves, OpenAI's client."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from starlette.testclient import TestClient
from tiny_models import llama_config

from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.generate.model_spec import ModelSpec
from rayswift.modeling.task_models import pooling_of
from rayswift.serve.replica.pooling import PoolingServing
from rayswift.serve.replica.prompt_length import most_characters

TEXTS = ["The capital of France is Paris.", "Paris!", "def add(a, b): return a + b"]


@pytest.fixture(scope="module")
def classifier_dir(tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama that gives one number for a pair of texts."""
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier") / "tiny-ranker"
    shutil.copytree(tiny_dir, folder)
    torch.manual_seed(0)
    config = llama_config(vocab_size=49152, max_position_embeddings=256, num_labels=1, initializer_range=0.5)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def serve(model: str, task: str) -> TestClient:
    plan = ModelSpec("tiny", model, "transformers", task, torch_dtype="float32", max_model_len=256)
    return TestClient(PoolingServing.from_plan(plan, Encoder(model)).app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def vectors(tiny_dir: str) -> TestClient:
    return serve(tiny_dir, "embedding")


@pytest.fixture(scope="module", params=["reranker", "seq_cls"])
def ranker(request: pytest.FixtureRequest, classifier_dir: str) -> TestClient:
    return serve(classifier_dir, request.param)


@functools.cache
def loaded(model_dir: str, auto_class: str) -> tuple[Any, Any]:
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(model_dir, dtype=torch.float32).eval()
    return transformers.AutoTokenizer.from_pretrained(model_dir), model


def states(model_dir: str, text: str, auto_class: str = "AutoModel") -> Any:
    tokenizer, model = loaded(model_dir, auto_class)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt"))


def test_vectors_are_the_last_hidden_states_of_the_model(tiny_dir: str, vectors: TestClient) -> None:
    http: Any = vectors
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)
    answer = client.embeddings.create(model="tiny", input=TEXTS)
    assert [one.index for one in answer.data] == [0, 1, 2]
    for text, one in zip(TEXTS, answer.data, strict=True):
        last = states(tiny_dir, text).last_hidden_state[0, -1]
        assert one.embedding == pytest.approx((last / last.norm()).tolist(), abs=1e-5)
    alone = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float").data[0].embedding
    assert alone == pytest.approx(answer.data[0].embedding, abs=1e-5)
    tokenizer = Encoder(tiny_dir).tokenizer
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert client.embeddings.create(model="tiny", input=ids).data[0].embedding == pytest.approx(alone, abs=1e-5)
    assert answer.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_documents_are_ordered_by_the_likeness_of_their_vectors(vectors: TestClient, version: str) -> None:
    http = vectors
    body = {"model": "tiny", "query": TEXTS[0], "documents": [TEXTS[2], TEXTS[1], TEXTS[0]]}
    found = http.post(f"/{version}/rerank", json=body).json()
    scored = http.post("/v1/score", json={"text_1": TEXTS[0], "text_2": body["documents"]}).json()["data"]
    expected = {place: one["score"] for place, one in enumerate(scored)}
    assert found["results"][0] == {
        "index": 2, "document": {"text": TEXTS[0]}, "relevance_score": pytest.approx(1, abs=1e-5),
    }  # fmt: skip
    assert {one["index"]: one["relevance_score"] for one in found["results"]} == pytest.approx(expected)
    values = [one["relevance_score"] for one in found["results"]]
    assert values == sorted(values, reverse=True) and len(set(values)) == 3
    assert [one["index"] for one in http.post(f"/{version}/rerank", json={**body, "top_n": 1}).json()["results"]] == [2]


def test_scores_of_a_model_that_was_trained_for_them(classifier_dir: str, ranker: TestClient) -> None:
    found = ranker.post("/v1/rerank", json={"query": TEXTS[0], "documents": TEXTS}).json()
    for one in found["results"]:
        pair = TEXTS[0] + one["document"]["text"]  # SmolLM2's tokenizer puts nothing between them
        logit = states(classifier_dir, pair, "AutoModelForSequenceClassification").logits[0, 0]
        assert one["relevance_score"] == pytest.approx(float(logit.sigmoid()), abs=1e-4)
    assert ranker.post("/v1/embeddings", json={"input": "a"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("rerank", {"documents": ["a"]}, 400, "query"),
        ("rerank", {"query": "a", "documents": []}, 400, None),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": -1}, 400, "top_n"),
        ("rerank", {"query": "a", "documents": ["b"], "model": "nobody"}, 404, "model"),
        ("rerank", {"query": "a", "documents": ["word " * 300]}, 400, "input"),
        ("score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, "text_1"),
        ("embeddings", {"input": []}, 400, None),
        ("embeddings", {"input": ""}, 400, None),
        ("embeddings", {"input": [10**6]}, 400, "input"),
        ("embeddings", {"input": "a", "dimensions": 3}, 400, "dimensions"),
    ],
)
def test_mistakes_are_refused(
    vectors: TestClient, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = vectors.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert param is None or answer.json()["error"]["param"] == param


def test_which_tokens_make_the_vector_is_what_the_folder_says(tiny_dir: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"},
               {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]  # fmt: skip
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True, "n": 1}))
    answer = serve(str(folder), "embedding").post("/v1/embeddings", json={"input": TEXTS}).json()["data"]
    for text, one in zip(TEXTS, answer, strict=True):  # not normalised: no such module
        assert one["embedding"] == pytest.approx(states(tiny_dir, text).last_hidden_state[0].mean(0).tolist(), abs=1e-4)
    (folder / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Normalize"}]))
    assert pooling_of(str(folder)) == ("mean", True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="pooling by pooling_mode_max_tokens needs --infer_backend vllm"):
        pooling_of(str(folder))


def test_an_encoder_is_read_at_its_first_token(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    assert pooling_of(str(tmp_path)) == ("cls", True)


def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenised(
    tiny_dir: str, vectors: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    limit = vectors.get("/v1/models").json()["data"][0]["max_model_len"]
    long = "a" * (most_characters(AutoTokenizer.from_pretrained(tiny_dir), limit) + 1)
    tokenise, longest = PreTrainedTokenizerBase.__call__, list[int]()

    def noting(self: Any, *texts: Any, **options: Any) -> Any:
        longest.append(max(len(text or "") for text in texts))
        return tokenise(self, *texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", noting)
    for path, body in (
        ("/v1/embeddings", {"input": [long]}),
        ("/v1/score", {"text_1": "a", "text_2": long}),
        ("/v1/rerank", {"query": long, "documents": ["a"]}),
    ):
        answer = vectors.post(path, json=body)
        assert answer.status_code == 400, (path, answer.text[:300])
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert max(longest, default=0) < 10
