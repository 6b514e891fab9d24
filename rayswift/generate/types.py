"""What every engine speaks: how an answer is sampled, what comes back, and the two calls that get it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rayswift.errors import UserError

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is sampled; the fields are SWIFT's flags. None takes the model's ``generation_config.json``.

    ``temperature`` 0 is greedy. ``max_new_tokens`` None generates until the context is full. ``top_k`` −1 is no limit.
    ``logprobs`` are those of the distribution sampled from (after temperature, top-k and top-p).
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
    def from_arguments(cls, args: Any) -> GenerationSettings:
        """Take the fields from the attributes of the same name."""
        return cls(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            num_beams=args.num_beams,
            stop_words=tuple(args.stop_words),
            logprobs=args.logprobs,
            top_logprobs=args.top_logprobs,
        )


@dataclass
class Answer:
    """What came of one conversation. ``error`` is set, and the rest empty, when it could not be answered.

    ``logprobs``: OpenAI's ``{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}``, when asked for.
    ``seconds``: how long the engine took, where a pool says so.
    """

    text: str = ""
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    logprobs: dict[str, Any] | None = None
    error: str | None = None
    seconds: float = 0.0


class EngineUnusable(UserError):
    """The engine itself fails (no server there, wrong key): every other conversation would fail too."""


class Engine(Protocol):
    """Something that answers conversations: a model in this process, or an endpoint."""

    last_stream: Answer  # counts of the latest stream(), filled when it ends

    def stream(self, messages: Messages, settings: GenerationSettings, tools: Any = None) -> Iterator[str]:
        """Answer one conversation; yields the text in pieces while it is generated. Closing it stops the model."""

    def generate(
        self, conversations: Sequence[Messages], settings: GenerationSettings, tools: Sequence[Any] | None = None
    ) -> list[Answer]:
        """Answer several conversations, in their order; one that cannot be answered has an ``error``."""
