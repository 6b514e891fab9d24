"""An engine over an endpoint with OpenAI's interface: RaySwift's own, vLLM's, SWIFT's, anyone's.

What goes wrong comes back as one line that says what to do. ``EngineUnusable`` is about the endpoint (not there, wrong
key, no such model) and ends a run; any other ``UserError`` is about one conversation.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import openai

from rayswift.errors import UserError
from rayswift.generate.openai_chat import DEFAULT_AGENT, sent_messages, sent_tools, text_of, why_empty, with_calls
from rayswift.generate.types import Answer, EngineUnusable, Messages, SamplingParams
from rayswift.redaction import redact_text

Key = TypeVar("Key")
Result = TypeVar("Result")

NO_KEY = "none"  # the client insists on a key; a server without one ignores it
CONNECT_SECONDS = 10.0
# An answer may take long to start, behind others in the queue.
READ_SECONDS = 600.0
RETRIES = 2  # of a request that somebody waits for: about 2 s
MOST_CHOICES = 128  # OpenAI's limit
#: What a model's card says of the server's start or state, not of the model.
_OF_THE_START = ("created", "permission", "max_model_len")
BATCH_RETRIES = 8  # of one among many: about 40 s, which spans a server's restart


@dataclass
class EndpointEngine:
    """A served model. Make one with :meth:`connect`.

    ``seed``: sent with each request, so that a sampled answer can be repeated; None leaves it to the server.
    ``system``: system prompt of conversations that have none; None leaves it to the server.
    ``parallel``: conversations under way at a time. ``with_thoughts``: what the server sends as the model's reasoning
    becomes part of the answer, as ``<think>…</think><answer>…</answer>``. ``turn``: returns when the next request of
    :meth:`several` may go. ``most_choices``: answers that one request asks for. ``agent_template``: how the calls of
    an answer are written as its text.
    """

    client: openai.OpenAI
    model: str
    seed: int | None = None
    system: str | None = None
    parallel: int = 32
    with_thoughts: bool = False
    turn: Callable[[], None] = lambda: None
    most_choices: int = MOST_CHOICES
    agent_template: str = DEFAULT_AGENT
    last_stream: Answer = field(default_factory=Answer)

    @classmethod
    def connect(
        cls,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        seed: int | None = None,
        system: str | None = None,
        agent_template: str | None = None,
    ) -> EndpointEngine:
        """Check that ``base_url`` serves ``model`` (None: the first it lists) and the key is right.

        ``api_key`` None takes the environment's ``OPENAI_API_KEY``.

        Raises:
            EngineUnusable: nothing answers there, it wants another key, it has no such model.
        """
        client = openai.OpenAI(
            base_url=base_url,
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or NO_KEY,
            timeout=openai.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            max_retries=0,
        )
        names = model_names(client)
        if not names and model is None:
            raise EngineUnusable(f"--base_url {base_url}: it serves no model yet; name one with --model")
        engine = cls(
            client.with_options(max_retries=RETRIES), model or names[0], seed, system,
            agent_template=agent_template or DEFAULT_AGENT,
        )  # fmt: skip
        if model is not None and model not in names:
            # Ask for one token: a server may know more models (adapters loaded on demand) than it lists.
            with translated(engine.client, engine.model):
                engine.client.chat.completions.create(
                    model=engine.model, messages=[{"role": "user", "content": "hi"}], max_tokens=1
                )
        return engine

    def models(self) -> list[str]:
        """Names that the endpoint lists now: models and adapters."""
        return model_names(self.client)

    # --- the engine interface -----------------------------------------------------------------------------------

    def stream(self, messages: Messages, params: SamplingParams, tools: Any = None) -> Iterator[str]:
        """Answer one conversation in pieces, thoughts that the server sends apart between ``<think>`` and ``</think>``.

        Closing the iterator closes the connection, which stops the model. Calls come whole, at the end.

        Raises:
            UserError: the answer is empty.
        """
        self.last_stream = answer = Answer()
        calls: dict[int, list[str]] = {}
        reason = refusal = None
        request = {**self.request(messages, params, tools), "stream": True, "stream_options": {"include_usage": True}}
        with translated(self.client, self.model), self.client.chat.completions.create(**request) as chunks:
            for chunk in chunks:
                if chunk.usage is not None:
                    answer.num_prompt_tokens = chunk.usage.prompt_tokens
                    answer.num_generated_tokens = chunk.usage.completion_tokens
                if not chunk.choices:
                    continue
                delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason or reason
                thought, piece = thoughts_of(delta), text_of(delta.content)
                refusal = (refusal or "") + (delta.refusal or "") or None
                for part in delta.tool_calls or []:
                    call = calls.setdefault(part.index, ["", ""])
                    call[0] += (part.function and part.function.name) or ""
                    call[1] += (part.function and part.function.arguments) or ""
                opens, closes = not answer.thoughts, bool(answer.thoughts) and not answer.text
                answer.thoughts += thought
                answer.text += piece
                if thought:
                    yield f"<think>\n{thought}" if opens else thought
                if piece:
                    yield f"\n</think>\n\n{piece}" if closes or (thought and opens) else piece
        if calls:
            told = answer.text
            answer.text = with_calls(told, ((name, said) for name, said in calls.values()), self.agent_template)
            yield ("\n</think>\n\n" if answer.thoughts and not told else "") + answer.text.removeprefix(told)
        if not answer.text.strip():
            answer.error = why_empty(reason, answer.thoughts, refusal)
            raise UserError(answer.error)

    def generate(
        self, conversations: Sequence[Messages], params: SamplingParams, tools: Sequence[Any] | None = None
    ) -> list[Answer]:
        """Answer several conversations side by side, in their order. EngineUnusable when the endpoint itself fails."""
        each_tools = tools or [None] * len(conversations)
        numbered = zip(range(len(conversations)), conversations, each_tools, strict=True)
        found = dict(self.answers(numbered, params))
        return [found[index] for index in range(len(conversations))]

    def answers(
        self, conversations: Iterable[tuple[int, Messages, Any]], params: SamplingParams
    ) -> Iterator[tuple[int, Answer]]:
        """Answer numbered conversations (number, messages, tools), ``parallel`` at a time, in the order they finish."""
        answer = self.patient().answer
        calls = ((number, partial(answer, messages, params, tools)) for number, messages, tools in conversations)
        return in_parallel(calls, self.parallel)

    def patient(self) -> EndpointEngine:
        """The same engine for work that can wait for a server that restarts or is busy."""
        return replace(self, client=self.client.with_options(max_retries=BATCH_RETRIES))

    def answer(self, messages: Messages, params: SamplingParams, tools: Any = None) -> Answer:
        """Answer one conversation; what is wrong with it alone is the answer's ``error``."""
        try:
            return self.complete(messages, params, tools)
        except EngineUnusable:
            raise
        except UserError as error:
            return Answer(error=str(error))

    def complete(self, messages: Messages, params: SamplingParams, tools: Any = None) -> Answer:
        """Answer one conversation, whole. UserError when it cannot be answered."""
        answer = self.choices(messages, params, tools)[0]
        if answer.error:
            raise UserError(answer.error)
        return answer

    def choices(self, messages: Messages, params: SamplingParams, tools: Any = None, **fields: Any) -> list[Answer]:
        """The answers of one request; ``fields`` of its body, such as ``n``, go before those of ``params``.

        The tokens of the request count with the first answer. UserError when it cannot be answered; a choice with
        neither text nor calls has an ``error``.
        """
        body = self.request(messages, params, tools)
        body["extra_body"] = {**body.get("extra_body", {}), **fields}  # the client refuses fields that OpenAI lacks
        with translated(self.client, self.model):
            reply = self.client.chat.completions.create(**body)
        answers = [self._answer_of(choice) for choice in reply.choices]
        if not answers:
            raise UserError("the server's reply has no answer in it")
        if reply.usage:
            answers[0].num_prompt_tokens = reply.usage.prompt_tokens
            answers[0].num_generated_tokens = reply.usage.completion_tokens
        return answers

    def several(
        self, messages: Messages, settings: SamplingParams, tools: Any, seeds: Sequence[int], **fields: Any
    ) -> list[Answer]:
        """One answer for each seed, with one request where the server gives several; ``error`` says what failed.

        A server that gives fewer is asked again, one that does not know ``n`` for each answer alone.
        """
        answers: list[Answer] = []
        most = self.most_choices
        while left := len(seeds) - len(answers):
            count = min(left, most)
            body = {**fields, "seed": seeds[len(answers)], **({"n": count} if count > 1 else {})}
            self.turn()
            try:
                answers += self.choices(messages, settings, tools, **body)[:count]
            except EngineUnusable:
                raise
            except UserError as error:
                if count == 1:
                    answers += [Answer(error=str(error))] * left
                most = 1  # perhaps it is n that the server does not like
                continue
            if most == 1:
                self.most_choices = 1
        return answers

    def _answer_of(self, choice: Any) -> Answer:
        logprobs = choice.logprobs.model_dump(include={"content"}) if choice.logprobs else None
        said, thoughts = choice.message, thoughts_of(choice.message)
        named = [call.function for call in said.tool_calls or [] if call.function] or [said.function_call]
        try:
            calls = ((one.name, one.arguments or "") for one in named if one)
            text = with_calls(text_of(said.content), calls, self.agent_template)
        except UserError as error:
            return Answer(error=str(error))
        if not text.strip():
            return Answer(error=why_empty(choice.finish_reason, thoughts, said.refusal))
        if self.with_thoughts and thoughts:
            text, thoughts = f"<think>{thoughts}</think>\n\n<answer>{text}</answer>", ""
        return Answer(text, logprobs=logprobs, thoughts=thoughts)

    def request(self, messages: Messages, params: SamplingParams, tools: Any) -> dict[str, Any]:
        """The body of a chat completion; what is None is left to the server."""
        if params.num_beams > 1:
            raise UserError("--num_beams: an endpoint has no beam search; use --infer_backend transformers")
        beyond_openai = {"top_k": params.top_k, "repetition_penalty": params.repetition_penalty}
        has_own = not messages or messages[0]["role"] == "system" or self.system is None
        body = {
            "model": self.model,
            "messages": [*([] if has_own else [{"role": "system", "content": self.system}]), *sent_messages(messages)],
            "tools": sent_tools(tools),
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "stop": list(params.stop_words),
            "seed": self.seed,
            "logprobs": params.logprobs or None,
            "top_logprobs": params.top_logprobs if params.logprobs else None,
            "extra_body": {name: value for name, value in beyond_openai.items() if value is not None},
        }
        return {name: value for name, value in body.items() if value not in (None, [], {})}


def in_parallel(calls: Iterable[tuple[Key, Callable[[], Result]]], most: int) -> Iterator[tuple[Key, Result]]:
    """Make the calls in threads, ``most`` at a time; their results in the order they finish."""
    running: dict[Future[Result], Key] = {}
    with ThreadPoolExecutor(max_workers=most) as threads:
        try:
            for key, call in calls:
                if len(running) >= most:
                    yield from _finished(running)
                running[threads.submit(call)] = key
            while running:
                yield from _finished(running)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _finished(running: dict[Future[Result], Key]) -> Iterator[tuple[Key, Result]]:
    """Wait for at least one result; takes those that are there out of ``running``."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def thoughts_of(message: Any) -> str:
    """The reasoning that a server sends beside the content: vLLM's name for it, else that of DeepSeek and SGLang."""
    return getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None) or ""


def endpoint_sources(flag: str, base_url: str | None, model: str | None, api_key: str | None) -> dict[str, str]:
    """What an endpoint says of its model in ``/v1/models``, under the flag that names it, as a mark for
    `rayswift.journal`; empty where it does not answer now, or lists no such model."""
    if not base_url:
        return {}
    client = openai.OpenAI(
        base_url=base_url, api_key=api_key or os.environ.get("OPENAI_API_KEY") or NO_KEY, timeout=CONNECT_SECONDS,
        max_retries=0,
    )  # fmt: skip
    try:
        cards = [card.model_dump() for card in client.models.list()]
    except openai.OpenAIError:
        return {}
    card = next((card for card in cards if model in (None, card["id"])), {})
    said = {name: value for name, value in card.items() if name not in _OF_THE_START and value is not None}
    return {f"{flag} {base_url}": json.dumps(said, sort_keys=True, default=str)} if said else {}


def model_names(client: openai.OpenAI) -> list[str]:
    """What ``/v1/models`` lists."""
    with translated(client, None):
        return [model.id for model in client.models.list()]


# --- errors -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def translated(client: openai.OpenAI, model: str | None) -> Iterator[None]:
    """Turn the client's errors into UserErrors; ``model`` None while the models are listed."""
    try:
        yield
    except openai.OpenAIError as error:
        raise explain(error, client, model) from None


def explain(error: openai.OpenAIError, client: openai.OpenAI, model: str | None) -> UserError:
    """What the user should know and do about an error of the client."""
    where = redact_text(f"--base_url {str(client.base_url).rstrip('/')}")
    if isinstance(error, openai.APITimeoutError):
        return EngineUnusable(f"{where}: no answer in time; the server is overloaded or stuck")
    if isinstance(error, openai.APIConnectionError):
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        return EngineUnusable(f"{where}: no server answers there{reason}; start one with rayswift deploy")
    if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
        return EngineUnusable(f"{where}: the key is not accepted; give --api_key, or set OPENAI_API_KEY")
    if isinstance(error, openai.NotFoundError):
        if model is None:
            return EngineUnusable(f"{where}: no OpenAI endpoint there; the address usually ends in /v1")
        return EngineUnusable(f"--model {model}: {where} has no such model; it has {', '.join(model_names(client))}")
    # The server's own message; OpenAI's shape, SWIFT's (``message`` at the top) or plain text.
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    # It goes into result files and to the visitors of the page, and servers repeat the key that they do not like.
    text = redact_text(" ".join(str(message or getattr(error, "message", None) or error).split()))[:500]
    if isinstance(error, openai.RateLimitError) or getattr(error, "status_code", None) in (502, 503, 504):
        return EngineUnusable(f"{where}: the server has no capacity now ({text}); try again later")
    return EngineUnusable(f"{where}: {text}") if model is None else UserError(text)
