"""Vectors, classes and scores instead of text (``--task_type embedding``, ``seq_cls``, the rerankers).

The interface and the numbers are those of vLLM's pooling models: OpenAI's embeddings, classes, scores of pairs of
texts, and the reranking of Jina and Cohere. A model of a hub reads texts as its tokenizer gives them; one that was
trained here (its ``args.json`` says the task) as it was trained, with both engines.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI
from pydantic import Field, model_validator

from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.generate.task_answers import TaskEngine, ids_of_text
from rayswift.generate.transformers import TransformersEngine
from rayswift.modeling.task_models import pooled, pooling_of
from rayswift.serve.model_cards import model_cards
from rayswift.serve.openai_errors import ApiError, add_error_handlers
from rayswift.serve.replica.conversion import Body
from rayswift.serve.replica.prompt_length import check_characters

#: Texts that are computed together.
_BATCH = 32
_Text = Annotated[str, Field(min_length=1)]
_Texts = _Text | Annotated[list[_Text], Field(min_length=1, max_length=4096)]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class EmbeddingRequest(Body):
    """``POST /v1/embeddings``: texts, or token ids as they are."""

    model: str | None = None
    input: _Texts | _Ids | Annotated[list[_Ids], Field(min_length=1, max_length=4096)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class ScoreRequest(Body):
    """``POST /v1/score``: one text with each of several, or as many with as many."""

    model: str | None = None
    text_1: _Texts
    text_2: _Texts

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, data: Any) -> Any:
        """vLLM's newer names for the two."""
        if isinstance(data, dict) and "queries" in data:
            return {**data, "text_1": data["queries"], "text_2": data.get("documents", data.get("items"))}
        return data


class RerankRequest(Body):
    """``POST /v1/rerank``."""

    model: str | None = None
    query: _Text
    documents: _Texts
    top_n: int = Field(0, ge=0)


class ClassifyRequest(Body):
    """``POST /classify``."""

    model: str | None = None
    input: _Texts


class TextReader:
    """What the app (:func:`make_app`) asks of a model: numbers about texts. Engines say how they are computed.

    Args:
        encoder: how texts are laid out; of another ``task_type`` than ``causal_lm`` for a model that was trained so.
        served_model_name: what clients call the model.
        task: ``--task_type``.
        config: of the model, as ``config.json`` has it.
    """

    def __init__(self, encoder: Encoder, served_model_name: str, task: str, config: dict[str, Any]) -> None:
        self.encoder, self.name, self.makes_vectors = encoder, served_model_name, task == "embedding"
        self.tokenizer, self.config, self.was_trained = encoder.tokenizer, config, encoder.task_type != "causal_lm"
        labels = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
        self.labels = {int(number): str(label) for number, label in labels.items()}
        self.tells_classes = task == "seq_cls"
        self.requests = self.tokens = 0

    @property
    def context_length(self) -> int:
        """Tokens that a text, or a pair of texts, may have."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """What clients may ask for."""
        return [self.name]

    async def values(self, rows: list[dict[str, list[int]]], name: str | None) -> list[Any]:
        """What the model of this name tells of each text: a vector, or what its head says after its activation."""
        raise NotImplementedError

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for another model."""
        if name is not None and name not in self.names():
            message = f"The model `{name[:200]}` does not exist; models: {', '.join(self.names())}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def encoder_of(self, name: str | None) -> Encoder:
        """How texts for the model of this name are laid out."""
        return self.encoder

    def read(self, text: str | list[int], other: str | None, encoder: Encoder) -> dict[str, list[int]]:
        """A text, or a pair, as the model's input. Raises ApiError (400) for one that is too long."""
        characters = 0 if isinstance(text, list) else len(text + (other or ""))
        try:
            check_characters(self.tokenizer, self.context_length, characters)
        except ValueError as error:
            raise ApiError(400, str(error), code="context_length_exceeded", param="input") from None
        if isinstance(text, list):
            if max(text) >= self.config["vocab_size"]:
                raise ApiError(400, f"token id {max(text)} is out of the vocabulary", param="input")
            found = {"input_ids": text}
        elif encoder.task_type != "causal_lm":
            messages = [{"role": "user", "content": text}]
            messages += [] if other is None else [{"role": "assistant", "content": other}]
            try:
                found = {"input_ids": ids_of_text(encoder, {"messages": messages}).tolist()}
            except UserError as error:
                raise ApiError(400, str(error), param="input") from None
        elif other is not None and not self.config.get("use_sep_token", True):
            found = dict(self.tokenizer(text + other))
        else:
            found = dict(self.tokenizer(text, other))
        length, limit = len(found["input_ids"]), self.context_length
        if not 0 < length <= limit:
            message = f"This model's maximum context length is {limit} tokens; the text has {length}"
            raise ApiError(400, message, code="context_length_exceeded", param="input")
        return {**found, "attention_mask": [1] * length}

    async def compute(
        self, texts: Sequence[tuple[str | list[int], str | None]], name: str | None = None
    ) -> tuple[list[Any], int]:
        """The numbers of each text, or pair, and the tokens in all."""
        encoder = self.encoder_of(name)
        rows = await asyncio.to_thread(lambda: [self.read(*text, encoder) for text in texts])
        tokens = sum(len(row["input_ids"]) for row in rows)
        self.requests += 1
        self.tokens += tokens
        return await self.values(rows, name), tokens

    async def scores(self, pairs: list[tuple[str, str]], name: str | None = None) -> tuple[list[float], int]:
        """How alike the texts of each pair are (cosine of their vectors), or what the model says of it; and tokens."""
        import torch

        if not self.makes_vectors:
            if self.tells_classes and len(self.labels) != 1:
                raise ApiError(
                    400, f"scores need a model with one label, this one has {len(self.labels)}", param="model"
                )
            found, tokens = await self.compute(pairs, name)
            return [float(score) for score in found], tokens
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        found, tokens = await self.compute([(text, None) for text in texts], name)
        vectors, cosine = dict(zip(texts, found, strict=True)), torch.nn.functional.cosine_similarity
        return [float(cosine(vectors[one], vectors[other], dim=0)) for one, other in pairs], tokens


class PoolingServing(TextReader):
    """A model that reads texts with Transformers, and its app; requests take turns."""

    def __init__(self, engine: TransformersEngine | TaskEngine, served_model_name: str, task: str) -> None:
        config = engine.model.config
        if getattr(config, "pad_token_id", None) is None:  # with it a classifier finds the last token of a row
            config.pad_token_id = engine.encoder.tokenizer.pad_token_id
        super().__init__(engine.encoder, served_model_name, task, config.to_dict())
        self.engine = engine
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._pooling, self._is_normal = pooling_of(engine.encoder.model_dir)
        self._turn = asyncio.Lock()
        self.app = make_app(self)

    @classmethod
    def from_plan(cls, plan: Any, encoder: Encoder) -> PoolingServing:
        """Load the model of a `ModelSpec`."""
        options = {"torch_dtype": plan.torch_dtype, "attn_impl": plan.attn_impl, "use_gpu": plan.use_gpu,
                   "model_kwargs": plan.model_kwargs}  # fmt: skip
        encoder = replace(encoder, max_length=plan.max_model_len)
        if encoder.task_type != "causal_lm":
            return cls(TaskEngine.load(encoder, **options), plan.name, plan.task_type)
        auto_class = "AutoModel" if plan.task_type == "embedding" else "AutoModelForSequenceClassification"
        return cls(TransformersEngine.load(encoder, auto_class=auto_class, **options), plan.name, plan.task_type)

    @property
    def context_length(self) -> int:
        """Tokens that a text, or a pair of texts, may have."""
        return self.engine.context_length

    async def start(self) -> None:
        """The model is there from the beginning; here for the other engines' sake."""

    async def check_health(self) -> None:
        """Nothing runs beside the requests that could have ended."""

    async def load_adapter(self, name: str, folder: str) -> None:
        """Raises ValueError: vectors and scores come from the model itself."""
        raise ValueError("a model of vectors or scores takes adapters with --infer_backend vllm only")

    def answer_as(self, name: str, handle: Any) -> None:
        """Nothing was loaded."""

    async def unload_adapter(self, handle: Any) -> None:
        """Nothing was loaded."""

    def metrics(self) -> str:
        """Prometheus text."""
        values = (("requests_total", "Requests.", self.requests), ("prompt_tokens_total", "Tokens read.", self.tokens))
        lines = []
        for name, text, value in values:
            metric = f"rayswift_engine_{name}"
            lines += [f"# HELP {metric} {text}", f"# TYPE {metric} counter", f"{metric} {value}"]
        return "\n".join(lines) + "\n"

    # --- numbers ----------------------------------------------------------------------------------------------------

    async def values(self, rows: list[dict[str, list[int]]], name: str | None) -> list[Any]:
        """As :class:`TextReader`."""
        async with self._turn:
            return await asyncio.to_thread(self._compute, rows)

    def _compute(self, rows: list[dict[str, list[int]]]) -> list[Any]:
        import torch

        if isinstance(self.engine, TaskEngine):
            told = self.engine.tell([np.array(row["input_ids"], np.int32) for row in rows])
            return told if self.makes_vectors else [self._activated(one) for one in told]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))  # little padding
        found: dict[int, Any] = {}
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            batch = self.tokenizer.pad([rows[place] for place in places], padding_side="right", return_tensors="pt")
            with torch.inference_mode():
                values = self._values(batch.to(self.engine.model.device))
            found |= dict(zip(places, values.float().cpu(), strict=True))
        return [found[place] for place in range(len(rows))]

    def _values(self, batch: Any) -> Any:
        import torch

        answer = self.engine.model(**batch)
        if not self.makes_vectors:
            return self._activated(answer.logits.float().squeeze(-1))
        vectors = pooled(answer.last_hidden_state.float(), batch["attention_mask"], self._pooling)
        return torch.nn.functional.normalize(vectors, dim=-1) if self._is_normal else vectors

    def _activated(self, logits: Any) -> Any:
        """What the head says, as vLLM gives it: probabilities of classes; numbers of a regression as they are."""
        problem = self.config.get("problem_type")
        if self.tells_classes and problem == "regression":
            return logits
        one_of = self.tells_classes and len(self.labels) > 1 and problem != "multi_label_classification"
        return logits.softmax(-1) if one_of else logits.sigmoid()


# --- the interface --------------------------------------------------------------------------------------------------


def _pairs(one: _Texts, other: _Texts) -> list[tuple[str, str]]:
    left, right = ([text] if isinstance(text, str) else text for text in (one, other))
    left = left * len(right) if len(left) == 1 else left
    if len(left) != len(right):
        raise ApiError(400, f"{len(left)} texts and {len(right)}: give one, or as many as the others", param="text_1")
    return list(zip(left, right, strict=True))


def _inputs(given: Any) -> Iterator[str | list[int]]:
    """The texts of an embeddings request one by one."""
    whole = isinstance(given, str) or isinstance(given[0], int)
    yield from [given] if whole else given


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _written(vector: Any, kind: str) -> Sequence[float] | str:
    return base64.b64encode(vector.numpy().tobytes()).decode() if kind == "base64" else vector.tolist()


def _class_of(serving: TextReader, index: int, probs: list[float]) -> dict[str, Any]:
    likeliest = max(range(len(probs)), key=probs.__getitem__)
    return {"index": index, "label": serving.labels.get(likeliest), "probs": probs, "num_classes": len(probs)}


def make_app(serving: TextReader) -> FastAPI:
    """The app with the routes of the model's task."""
    app = FastAPI(title="RaySwift", docs_url=None, redoc_url=None, redirect_slashes=False)
    created = int(time.time())

    async def embed(body: EmbeddingRequest) -> Any:
        serving.check_model(body.model)
        if body.dimensions is not None:
            raise ApiError(400, "dimensions: this model's vectors have one length; leave it out", param="dimensions")
        vectors, tokens = await serving.compute([(text, None) for text in _inputs(body.input)], body.model)
        data = [
            {"index": index, "object": "embedding", "embedding": _written(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        return _answer(data, tokens, "embd")

    def _answer(data: list[dict[str, Any]], tokens: int, prefix: str) -> dict[str, Any]:
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        return {**head, "model": serving.name, "data": data, "usage": _usage(tokens)}

    if serving.makes_vectors:
        app.add_api_route("/v1/embeddings", embed, methods=["POST"])

    async def classify(body: ClassifyRequest) -> Any:
        serving.check_model(body.model)
        found, tokens = await serving.compute([(text, None) for text in _inputs(body.input)], body.model)
        data = [_class_of(serving, index, one.flatten().tolist()) for index, one in enumerate(found)]
        return _answer(data, tokens, "classify")

    if serving.tells_classes:
        app.add_api_route("/classify", classify, methods=["POST"])

    @app.post("/v1/score")
    async def score(body: ScoreRequest) -> Any:
        serving.check_model(body.model)
        found, tokens = await serving.scores(_pairs(body.text_1, body.text_2), body.model)
        data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(found)]
        return _answer(data, tokens, "score")

    @app.post("/v2/rerank")
    @app.post("/v1/rerank")
    async def rerank(body: RerankRequest) -> Any:
        serving.check_model(body.model)
        pairs = _pairs(body.query, body.documents)
        found, tokens = await serving.scores(pairs, body.model)
        best = sorted(range(len(pairs)), key=lambda place: found[place], reverse=True)[: body.top_n or len(pairs)]
        results = [
            {"index": place, "document": {"text": pairs[place][1]}, "relevance_score": found[place]} for place in best
        ]
        name = f"rerank-{uuid.uuid4().hex}"
        return {"id": name, "model": serving.name, "results": results, "usage": _usage(tokens)}

    @app.get("/v1/models")
    async def models() -> Any:
        limit = serving.context_length
        cards = model_cards(serving.name, [], created=created, owned_by="rayswift", max_model_len=limit)
        return {"object": "list", "data": cards}

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    add_error_handlers(app, "the engine failed; its log says why")
    return app
