"""OpenAI's interface over the Transformers engine, for models that vLLM lacks (``--infer_backend transformers``).

Prompts are those of training (`trained_template`), answers come from `batches`. A streamed request can go on after
tokens that another replica generated: ``x-rayswift-resume: 12,34`` (or the notes of the replica's lease).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.generate.continuous_batching import BASE, BatchRunner, Busy, Sequence, TokenDelta
from rayswift.generate.transformers import TransformersEngine, seed_everything
from rayswift.modeling.adapters import add_adapter, remove_adapter
from rayswift.serve.lease import RESUME_HEADER, current_notes
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.replica.openai_answers import DONE, EventStream, Shape, collect, pieces_of, usage_of
from rayswift.serve.replica.openai_requests import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
    ToolChoice,
)
from rayswift.serve.replica.own_rendering import rendered_prompt_ids
from rayswift.serve.replica.prompt_length import characters_of, check_characters, most_characters
from rayswift.serve.replica.request_sampling import check_ids, rows_of
from rayswift.serve.replica.tool_calls import CallReader, agent_of
from rayswift.serve.replica.trained_template import chat_prompt_ids
from rayswift.serve.replica.transformers_app import make_app
from rayswift.serve.request_body import client_left

logger = logging.getLogger("rayswift.serve.replica.transformers")

RETRY_AFTER = 1  # seconds; a batch makes room within about that


@dataclass(frozen=True)
class Prompt:
    """A prompt of a request, and the text of it that a completion with ``echo`` starts with."""

    ids: list[int]
    text: str = ""


class TransformersServing:
    """An engine, its batches and its app.

    ``encoders``: adapter name → how its prompts are laid out, where it is not the model's own way; filled by whoever
    loads adapters. ``defaults``: sampling of requests that do not say (`ModelSpec.sampling`).
    """

    def __init__(
        self,
        engine: TransformersEngine,
        served_model_name: str,
        encoders: dict[str, Encoder] | None = None,
        *,
        max_rows: int = 16,
        max_waiting: int = 1024,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.name, self.defaults = engine, served_model_name, defaults or {}
        self.encoders = {} if encoders is None else encoders
        self.runner = BatchRunner(engine, max_rows, max_waiting)
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
        seed_everything(plan.seed)
        return cls(engine, plan.name, encoders, defaults=plan.sampling)

    async def start(self) -> None:
        """The engine runs from the beginning; here for the other engines' sake."""

    async def check_health(self) -> None:
        """Raises when the thread of the model has ended, or the model is not served under its name."""
        if not self.runner.alive:
            raise RuntimeError("the thread of the model has ended")
        self.find(self.name)

    async def load_adapter(self, name: str, folder: str) -> str:
        """As `adapter_book.Engine`; the handle is PEFT's name."""
        self._loaded += 1
        key = f"adapter_{self._loaded}"  # a served name may hold what PEFT does not allow in one

        def load() -> None:
            self.engine.model = add_adapter(self.engine.model, folder, key)

        try:
            await asyncio.wrap_future(self.runner.between_batches(load))
        except UserError as error:
            raise ValueError(str(error)) from None
        return key

    def answer_as(self, name: str, handle: str | None) -> None:
        """As `adapter_book.Engine`."""
        if handle is None:
            self._adapters.pop(name, None)
        else:
            self._adapters[name] = handle

    async def unload_adapter(self, handle: str) -> None:
        """As `adapter_book.Engine`; rows of clients that have left are out of the batch first."""
        while self.runner.has_rows_of(handle):
            await asyncio.sleep(0.05)

        def unload() -> None:
            self.engine.model = remove_adapter(self.engine.model, handle)

        await asyncio.wrap_future(self.runner.between_batches(unload))

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
        if isinstance(choice := asked.get("tool_choice"), ToolChoice):
            asked["tool_choice"] = choice.model_dump()

        self._check_characters(encoder.tokenizer, characters_of(body.messages), "messages")

        def lay_out() -> list[int]:
            ids = chat_prompt_ids(encoder, asked)
            return rendered_prompt_ids(encoder, asked) if ids is None else ids

        try:
            ids = await asyncio.to_thread(lay_out)  # a long text takes a while
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        last = body.messages[-1] if body.messages else {}
        said = last.get("content") if last.get("role") == "assistant" else None
        return Prompt(_last_of(ids, body), said if isinstance(said, str) else "")

    async def plain_prompt(self, body: CompletionRequest | TokenizeRequest, prompt: str | list[int]) -> Prompt:
        """The prompt of a plain completion."""
        tokenizer = self.engine.encoder.tokenizer
        if isinstance(prompt, str):
            special = body.add_special_tokens is not False
            if getattr(body, "truncate_prompt_tokens", None) is None:
                self._check_characters(tokenizer, len(prompt), "prompt")
            last = prompt[-most_characters(tokenizer, self.context_length) :]
            ids = await asyncio.to_thread(tokenizer.encode, last, add_special_tokens=special)
            return Prompt(_last_of(ids, body), prompt)
        check_ids(prompt, self.engine.vocabulary, "prompt")
        return Prompt(_last_of(prompt, body), tokenizer.decode(prompt))

    def _check_characters(self, tokenizer: Any, characters: int, param: str) -> None:
        try:
            check_characters(tokenizer, self.context_length, characters)
        except ValueError as error:
            raise ApiError(400, str(error), code="context_length_exceeded", param=param) from None

    # --- answers ------------------------------------------------------------------------------------------------

    async def answer(
        self, request: Request, body: GenerationRequest, found: tuple[str, str, Encoder], prompts: list[Prompt]
    ) -> Response:
        """Generate and respond: an event stream, or one object. ``found``: what `find` gave, the prompts are for it."""
        (name, adapter, encoder), echo = found, bool(body.echo)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, TokenDelta]]()

        def emit(index: int, piece: TokenDelta) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        # In a thread: a grammar takes a while, and so do the ids of words.
        rows = await asyncio.to_thread(
            rows_of, self.engine, body, [prompt.ids for prompt in prompts], adapter, encoder, emit, self.defaults
        )
        resume = _resumed_ids(request)
        check_ids(resume, self.engine.vocabulary, RESUME_HEADER)
        if resume and len(rows) > 1:
            raise ApiError(400, f"{RESUME_HEADER} is for requests with one choice")
        shape = await self._shape(body, prompts, adapter, encoder, name, rows, echo)
        for row in rows:
            if row.left == 0:
                row.end()
        rows[0].replay(resume)
        try:
            self.runner.submit([row for row in rows if not row.done])
        except Busy:
            raise ApiError(
                429, "too many requests wait for this server", code="overloaded", retry_after=RETRY_AFTER
            ) from None
        self.requests += 1
        self.prompt_tokens += sum(len(prompt.ids) for prompt in prompts)
        answers, ids = pieces_of(rows, pieces), [prompt.ids for prompt in prompts]
        if body.stream:
            return EventStream(self._events(body, shape, rows, ids, answers), rows)
        return await self._whole(request, shape, rows, ids, answers)

    async def _shape(
        self, body: GenerationRequest, prompts: list[Prompt], adapter: str, encoder: Encoder, name: str,
        rows: list[Sequence], echo: bool,
    ) -> Shape:  # fmt: skip
        """The frame of the response to a request with these rows."""
        shape = Shape(
            name, isinstance(body, ChatRequest), self.engine.encoder.tokenizer, [row.prompt for row in rows],
            bool(body.return_token_ids), bool(body.return_tokens_as_token_ids),
        )  # fmt: skip
        count, shape.stop_ids = body.n or 1, frozenset(body.stop_token_ids or ())
        if echo:
            shape.echoes = [prompt.text for prompt in prompts for _ in range(count)]
        if isinstance(body, ChatRequest) and body.wants_calls:
            agent, most = agent_of(encoder), 1 if body.parallel_tool_calls is False else MAX_CHOICES
            shape.readers = [CallReader(agent, body.tools or (), most) for _ in rows]
            shape.tool_choice = "named" if isinstance(body.tool_choice, ToolChoice) else body.tool_choice or "auto"
        shape.echo_scores = echo and not shape.is_chat and body.alternatives is not None
        if (top := body.alternatives if shape.echo_scores else body.prompt_logprobs) is not None:
            asked = [self.runner.score_prompt(prompt.ids, adapter, top) for prompt in prompts]
            found = [await asyncio.wrap_future(scores) for scores in asked]
            shape.scores = [scores for scores in found for _ in range(count)]
        return shape

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
            return JSONResponse(shape.whole(collecting.result(), usage))
        finally:
            leaving.cancel()
            collecting.cancel()
            for row in rows:
                row.cancel()

    async def _events(
        self, body: GenerationRequest, shape: Shape, rows: list[Sequence], prompts: list[list[int]],
        answers: AsyncIterator[tuple[int, TokenDelta]],
    ) -> AsyncIterator[bytes]:  # fmt: skip
        notes, options, counts = current_notes.get(), body.stream_options, [0] * len(rows)
        told = options is not None and bool(options.include_usage)
        always = options is not None and told and bool(options.continuous_usage_stats)

        def usage(index: int) -> dict[str, int] | None:
            return usage_of([rows[index].prompt], counts[index]) if always else None

        try:
            for index in range(len(rows)):
                if first := shape.first_event(index, usage(index)):
                    yield first
            async with aclosing(answers):  # type: ignore[type-var]
                async for index, piece in answers:
                    if notes is not None:
                        notes.add(piece.token_ids)
                    counts[index] += len(piece.token_ids)
                    if chunk := shape.piece_event(index, piece, usage(index)):
                        yield chunk
            if told:
                yield shape.usage_event(usage_of(prompts, sum(counts)))
        except ApiError as error:
            yield error.event()
        yield DONE


def _last_of(ids: list[int], body: Any) -> list[int]:
    """The tokens of a prompt that a request wants: its last ones, with ``truncate_prompt_tokens``."""
    kept = getattr(body, "truncate_prompt_tokens", None)
    return ids if kept is None or kept < 0 else ids[len(ids) - min(kept, len(ids)) :]


def _resumed_ids(request: Request) -> list[int]:
    """The tokens that the client already has of this answer."""
    listed = request.headers.get(RESUME_HEADER, "").replace(" ", "")
    ids = [part for part in listed.split(",") if part]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in ids):
        raise ApiError(400, f"{RESUME_HEADER}: expected token ids, for example 12,34")
    return [int(part) for part in ids]
