"""OpenAI's interface over the Transformers engine, for models that vLLM lacks (``--infer_backend transformers``).

Prompts are those of training (`trained_template`), answers come from `batches`. A streamed request can go on after
tokens that another replica generated: ``x-rayswift-resume: 12,34`` (or the notes of the replica's lease).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.generate.continuous_batching import BASE, BatchRunner, Busy, Sequence, TokenDelta
from rayswift.generate.token_choice import Sampling
from rayswift.generate.transformers import TransformersEngine
from rayswift.modeling.adapters import add_adapter
from rayswift.serve.lease import RESUME_HEADER, current_notes
from rayswift.serve.model_cards import model_cards
from rayswift.serve.openai_errors import ApiError, add_error_handlers
from rayswift.serve.replica import messages, responses
from rayswift.serve.replica.openai_answers import DONE, EventStream, Shape, collect, pieces_of, usage_of
from rayswift.serve.replica.openai_requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from rayswift.serve.replica.trained_template import chat_prompt_ids
from rayswift.serve.request_body import client_left, read_object

logger = logging.getLogger("rayswift.serve.replica.transformers")

RETRY_AFTER = 1  # seconds; a batch makes room within about that
_NO_LAYOUT = (
    "this engine answers text: it takes no images or other files, no chat template or documents in the request, and no "
    "tools without an agent format (--agent_template)"
)


@dataclass(frozen=True)
class Prompt:
    """A prompt of a request, and the text of it that a completion with ``echo`` starts with."""

    ids: list[int]
    text: str = ""


class TransformersServing:
    """An engine, its batches and its app.

    ``encoders``: adapter name → how its prompts are laid out, where it is not the model's own way; filled by whoever
    loads adapters.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        served_model_name: str,
        encoders: dict[str, Encoder] | None = None,
        *,
        max_rows: int = 16,
        max_waiting: int = 1024,
    ) -> None:
        self.engine, self.name = engine, served_model_name
        self.encoders = {} if encoders is None else encoders
        self.runner = BatchRunner(engine, max_rows, max_waiting)
        self._vocabulary = int(engine.model.get_input_embeddings().weight.shape[0])
        # A model that was loaded with an adapter answers with it.
        self._adapters = {served_model_name: next(iter(getattr(engine.model, "peft_config", ())), BASE)}
        self._loaded = 0
        self.requests = self.prompt_tokens = 0
        self.app = make_app(self)

    @classmethod
    def from_plan(cls, plan: Any, encoders: dict[str, Encoder]) -> TransformersServing:
        """Load the model of a `ModelSpec`; ``encoders``: its own."""
        engine = TransformersEngine.load(
            replace(encoders[""], max_length=plan.max_model_len),
            torch_dtype=plan.torch_dtype,
            attn_impl=plan.attn_impl,
            use_gpu=plan.use_gpu,
            model_kwargs=plan.model_kwargs,
        )
        return cls(engine, plan.name, encoders)

    async def start(self) -> None:
        """The engine runs from the beginning; here for the other engines' sake."""

    async def check_health(self) -> None:
        """Raises when the thread of the model has ended."""
        if not self.runner.alive:
            raise RuntimeError("the thread of the model has ended")

    async def load_adapter(self, name: str, folder: str) -> None:
        """Make the adapter in ``folder`` answer requests for the model ``name``. Raises ValueError with the reason."""
        if name in self._adapters:
            raise ValueError(f"{name} is loaded already")
        self._loaded += 1
        key = f"adapter_{self._loaded}"  # a served name may hold what PEFT does not allow in one

        def load() -> None:
            self.engine.model = add_adapter(self.engine.model, folder, key)

        try:
            await asyncio.wrap_future(self.runner.between_batches(load))
        except UserError as error:
            raise ValueError(str(error)) from None
        self._adapters[name] = key

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that are running finish first."""
        key = self._adapters.pop(name, None)
        if key is None or name == self.name:
            return
        while self.runner.has_rows_of(key):
            await asyncio.sleep(0.05)
        await asyncio.wrap_future(self.runner.between_batches(lambda: self.engine.model.delete_adapter(key)))

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.engine.context_length

    def metrics(self) -> str:
        """Prometheus text."""
        values = (
            ("requests_total", "counter", "Requests for an answer.", self.requests),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("generation_tokens_total", "counter", "Generated tokens.", self.runner.tokens),
            ("running_answers", "gauge", "Answers in the batch.", len(self.runner.running)),
            ("waiting_answers", "gauge", "Answers that wait for a batch.", self.runner.waiting),
        )
        lines = []
        for name, kind, text, value in values:
            metric = f"rayswift_engine_{name}"
            lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}", f"{metric} {value}"]
        return "\n".join(lines) + "\n"

    # --- what requests ask for ----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The model's name and those of its adapters."""
        return list(self._adapters)

    def find(self, name: str | None) -> tuple[str, str, Encoder]:
        """Name, adapter key and encoder of a requested model. Raises ApiError (404)."""
        name = self.name if name is None else name
        if name not in self._adapters:
            raise ApiError(
                404, f"The model `{name[:200]}` does not exist; models: {', '.join(self._adapters)}",
                code="model_not_found", param="model",
            )  # fmt: skip
        return name, self._adapters[name], self.encoders.get(name, self.engine.encoder)

    async def chat_prompt(self, encoder: Encoder, body: ChatRequest | TokenizeRequest) -> Prompt:
        """The prompt of a chat request."""
        asked = {name: value for name, value in body if value is not None}
        try:
            # In a thread: a long text takes a while.
            ids = await asyncio.to_thread(chat_prompt_ids, encoder, asked)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        if ids is None:
            raise ApiError(400, _NO_LAYOUT, param="messages")
        return Prompt(ids)

    async def plain_prompt(self, prompt: str | list[int], *, special_tokens: bool = True) -> Prompt:
        """The prompt of a plain completion."""
        tokenizer = self.engine.encoder.tokenizer
        if isinstance(prompt, str):
            ids = await asyncio.to_thread(tokenizer.encode, prompt, add_special_tokens=special_tokens)
            return Prompt(ids, prompt)
        self.check_ids(prompt, "prompt")
        return Prompt(prompt, tokenizer.decode(prompt))

    def check_ids(self, ids: list[int], param: str) -> None:
        """Raises ApiError (400) for ids that are no tokens."""
        if ids and max(ids) >= self._vocabulary:
            raise ApiError(400, f"token id {max(ids)} is out of the vocabulary of {self._vocabulary}", param=param)

    def sampling(self, body: GenerationRequest, prompt: Prompt, index: int) -> Sampling:
        """How choice ``index`` of the request is sampled: its fields, else the model's ``generation_config.json``."""
        room = self.engine.context_length - len(prompt.ids)
        wanted = body.token_limit
        if not prompt.ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if room < 1 or (wanted or 0) > room:
            asked = f"{len(prompt.ids)} in the prompt" + (f" and {wanted} for the answer" if wanted else "")
            limit = f"This model's maximum context length is {self.engine.context_length} tokens"
            raise ApiError(400, f"{limit}; you asked for {asked}", code="context_length_exceeded", param="messages")
        config = self.engine.model.generation_config
        chosen: dict[str, Any] = {}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            own = getattr(body, name)
            chosen[name] = getattr(config, name, None) if own is None else own
        chosen |= {name: getattr(body, name) for name in ("presence_penalty", "frequency_penalty", "seed")}
        if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in body.logit_bias or ()):
            raise ApiError(400, "logit_bias: keys are token ids", param="logit_bias")
        bias = {int(key): value for key, value in (body.logit_bias or {}).items()}
        self.check_ids(list(bias), "logit_bias")
        skips = body.skip_special_tokens
        return Sampling(
            max_tokens=wanted or room,
            logit_bias=bias,
            logprobs=body.alternatives,
            skip_special_tokens=True if skips is None else skips,
            index=index,
            **{name: value for name, value in chosen.items() if value is not None},
        )

    def rows(
        self, body: GenerationRequest, prompts: list[Prompt], adapter: str, encoder: Encoder,
        emit: Callable[[int, TokenDelta], Any],
    ) -> list[Sequence]:  # fmt: skip
        """A row for each choice of each prompt; ``emit`` gets the number of the choice with each piece."""
        ends = set() if body.ignore_eos else {*encoder.eos_token_ids, *self.engine.stop_token_ids}
        ends |= set(body.stop_token_ids or ())
        asked = [body.stop] if isinstance(body.stop, str) else body.stop or []
        words = (*asked, *(() if body.ignore_eos else encoder.stop_strings))
        ends_with: dict[str, Any] = {"adapter": adapter, "stop_ids": frozenset(ends), "stop_words": words}
        choices = [(prompt, choice) for prompt in prompts for choice in range(body.n or 1)]
        return [
            Sequence(self.engine, prompt.ids, self.sampling(body, prompt, choice), partial(emit, index), **ends_with)
            for index, (prompt, choice) in enumerate(choices)
        ]

    # --- answers ------------------------------------------------------------------------------------------------

    async def answer(self, request: Request, body: GenerationRequest, prompts: list[Prompt], echo: bool) -> Response:
        """Generate and respond: an event stream, or one object."""
        name, adapter, encoder = self.find(body.model)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, TokenDelta]]()

        def emit(index: int, piece: TokenDelta) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        rows = self.rows(body, prompts, adapter, encoder, emit)
        resume = _resumed_ids(request)
        self.check_ids(resume, RESUME_HEADER)
        if resume and len(rows) > 1:
            raise ApiError(400, f"{RESUME_HEADER} is for requests with one choice")
        rows[0].replay(resume)
        try:
            self.runner.submit([row for row in rows if not row.done])
        except Busy:
            raise ApiError(
                429, "too many requests wait for this server", code="overloaded", retry_after=RETRY_AFTER
            ) from None
        self.requests += 1
        self.prompt_tokens += sum(len(prompt.ids) for prompt in prompts)
        texts = [prompt.text for prompt in prompts for _ in range(body.n or 1)] if echo else []
        shape = Shape(name, isinstance(body, ChatRequest), bool(body.return_token_ids), texts)
        answers, ids = pieces_of(rows, pieces), [prompt.ids for prompt in prompts]
        if body.stream:
            return EventStream(self._events(body, shape, rows, ids, answers), rows)
        return await self._whole(request, shape, rows, ids, answers)

    async def _whole(
        self, request: Request, shape: Shape, rows: list[Sequence], prompts: list[list[int]],
        answers: AsyncIterator[tuple[int, TokenDelta]],
    ) -> Response:  # fmt: skip
        collecting = asyncio.ensure_future(collect(answers, len(rows)))
        leaving = asyncio.ensure_future(client_left(request.receive))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # nobody reads it
            usage = usage_of(prompts, sum(len(row.generated) for row in rows))
            return JSONResponse(shape.whole(collecting.result(), [row.prompt for row in rows], usage))
        finally:
            leaving.cancel()
            collecting.cancel()
            for row in rows:
                row.cancel()

    async def _events(
        self, body: GenerationRequest, shape: Shape, rows: list[Sequence], prompts: list[list[int]],
        answers: AsyncIterator[tuple[int, TokenDelta]],
    ) -> AsyncIterator[bytes]:  # fmt: skip
        notes = current_notes.get()
        try:
            for index, row in enumerate(rows):
                if first := shape.first_event(index, row.prompt):
                    yield first
            async with aclosing(answers):  # type: ignore[type-var]
                async for index, piece in answers:
                    if notes is not None:
                        notes.add(piece.token_ids)
                    yield shape.piece_event(index, piece)
            if body.stream_options is not None and body.stream_options.include_usage:
                yield shape.usage_event(usage_of(prompts, sum(len(row.generated) for row in rows)))
        except ApiError as error:
            yield error.event()
        yield DONE


def _resumed_ids(request: Request) -> list[int]:
    """The tokens that the client already has of this answer."""
    listed = request.headers.get(RESUME_HEADER, "").replace(" ", "")
    ids = [part for part in listed.split(",") if part]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in ids):
        raise ApiError(400, f"{RESUME_HEADER}: expected token ids, for example 12,34")
    return [int(part) for part in ids]


def make_app(serving: TransformersServing) -> ASGIApp:
    """The ASGI app with its routes."""
    app = FastAPI(title="RaySwift", docs_url=None, redoc_url=None, redirect_slashes=False)
    created = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        body.check()
        _, _, encoder = serving.find(body.model)
        return await serving.answer(request, body, [await serving.chat_prompt(encoder, body)], echo=False)

    async def count(body: ChatRequest) -> int:
        _, _, encoder = serving.find(body.model)
        return len((await serving.chat_prompt(encoder, body)).ids)

    responses.add_routes(app, chat)
    messages.add_routes(app, chat, count)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        body.check()
        serving.find(body.model)
        prompts = [await serving.plain_prompt(prompt) for prompt in body.prompts]
        return await serving.answer(request, body, prompts, echo=bool(body.echo))

    @app.get("/v1/models")
    async def models() -> Any:
        cards = model_cards(
            serving.name, [name for name in serving.names() if name != serving.name], created=created,
            owned_by="rayswift", max_model_len=serving.context_length,
        )  # fmt: skip
        return {"object": "list", "data": cards}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Any:
        _, _, encoder = serving.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "tokenize: give either prompt or messages", param="prompt")
        if body.prompt is None:
            ids = (await serving.chat_prompt(encoder, body)).ids
        else:
            special = body.add_special_tokens is not False
            ids = (await serving.plain_prompt(body.prompt, special_tokens=special)).ids
        texts = encoder.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        limit = serving.engine.context_length
        return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Any:
        serving.find(body.model)
        serving.check_ids(body.tokens, "tokens")
        return {"prompt": await asyncio.to_thread(serving.engine.encoder.tokenizer.decode, body.tokens)}

    @app.get("/health")
    async def health() -> Any:
        await serving.check_health()
        return {"status": "ok"}

    add_error_handlers(app, "the engine failed; its log says why")
    return _checked(app)


def _checked(app: ASGIApp) -> ASGIApp:
    """``app``, which gets bodies only when they are within their limits."""

    async def checking(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        try:
            raw, _ = await read_object(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        read = [{"type": "http.request", "body": raw, "more_body": False}]

        async def reading() -> Message:
            return read.pop() if read else await receive()

        await app(scope, reading, send)

    return checking
