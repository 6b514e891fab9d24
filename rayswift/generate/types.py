"""What every engine speaks: how an answer is sampled, what comes back, and the two calls that get it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from rayswift.errors import UserError
from rayswift.generate.media import with_files

Messages = Sequence[Mapping[str, Any]]
JsonRow = dict[str, Any]


@dataclass(frozen=True)
class SamplingParams:
    """How answers are sampled; the fields are SWIFT's flags. None takes the model's ``generation_config.json``.

    ``temperature`` 0 is greedy. ``max_new_tokens`` None generates until the context is full. ``top_k`` −1 is no limit.
    ``logprobs``: log probabilities of the model itself, before penalties, temperature and cuts (OpenAI's meaning, and
    vLLM's ``raw_logprobs``), in every engine.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    stop_words: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.logprobs and self.num_beams > 1:
            raise UserError("--logprobs true does not work with --num_beams above 1; leave one of them out")

    @classmethod
    def from_arguments(cls, args: Any) -> SamplingParams:
        """Take the fields from the attributes of the same name."""
        given = {field.name: getattr(args, field.name) for field in fields(cls)}
        return cls(**{**given, "stop_words": tuple(args.stop_words)})

    def resolved(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Temperature (0 is greedy), cuts and penalty as numbers: these, else the model's ``own``, else none.

        Without a word from either the answer is greedy. "None" and not a library's default (Transformers' top_k 50).
        """
        off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        given = {name: getattr(self, name) for name in off}
        asked = any(given[name] is not None for name in ("temperature", "top_k", "top_p"))
        models = {name: own[name] for name in off if own.get(name) is not None}
        found = {**off, **models, **{name: value for name, value in given.items() if value is not None}}
        if self.temperature == 0 or not (asked or own.get("do_sample")):
            found |= {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
        return {**found, "top_k": max(int(found["top_k"]), 0)}


@dataclass
class Answer:
    """What came of one conversation. ``error`` is set, and the rest empty, when it could not be answered.

    ``thoughts``: what a server sends apart as the model's reasoning; elsewhere it stands in the text as the model wrote
    it, ``<think>…</think>`` with most. ``told``: in place of a text, of a model that tells numbers. ``logprobs``:
    OpenAI's ``{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}``, when asked for. ``seconds``: how long the
    engine took, where a pool says so.
    """

    text: str = ""
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    logprobs: dict[str, Any] | None = None
    error: str | None = None
    seconds: float = 0.0
    thoughts: str = ""
    told: Any = None

    @property
    def shown(self) -> str:
        """The answer with its thoughts, as the model wrote both."""
        return f"<think>\n{self.thoughts}\n</think>\n\n{self.text}" if self.thoughts else self.text

    @property
    def message(self) -> JsonRow:
        """The answer as a message of its conversation; thoughts that came apart go back apart, by the name that every
        server reads."""
        return {"role": "assistant", "content": self.text} | (
            {"reasoning_content": self.thoughts} if self.thoughts else {}
        )


class EngineUnusable(UserError):
    """The engine itself fails (no server there, wrong key): every other conversation would fail too."""


class Engine(Protocol):
    """Something that answers conversations: a model in this process, or an endpoint."""

    last_stream: Answer  # of the latest stream(): what has come so far, its counts when it ends

    def stream(self, messages: Messages, params: SamplingParams, tools: Any = None) -> Iterator[str]:
        """Answer one conversation; yields the text in pieces while it is generated, thoughts that come apart between
        ``<think>`` and ``</think>``. Closing it stops the model."""

    def generate(
        self, conversations: Sequence[Messages], params: SamplingParams, tools: Sequence[Any] | None = None
    ) -> list[Answer]:
        """Answer several conversations, in their order; one that cannot be answered has an ``error``."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI endpoint: ``base_url`` ends in ``/v1``, ``model`` is the name to ask for."""

    base_url: str
    api_key: str | None
    model: str


@dataclass(frozen=True)
class Request:
    """A prompt (``row`` without its reference) to be answered once for each number; ``seeds``: one for each, or none.

    All its answers come from one engine, which keeps the prompt's cache between them.
    """

    numbers: tuple[int, ...]
    row: JsonRow
    seeds: tuple[int, ...] = ()


#: Gets requests and answers each of their numbers once, in any order.
AnswerSource = Callable[[Sequence[Request]], Iterable[tuple[int, Answer]]]


def split_reference(messages: list[JsonRow]) -> tuple[list[JsonRow], str | None]:
    """The messages to answer, and the reference answer that stood at their end (None where there is none)."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None


def prompt_of(row: JsonRow) -> list[JsonRow]:
    """The messages of a row that are to be answered, with its files in them (`rayswift.generate.media`)."""
    return with_files(split_reference(row["messages"])[0], row)
