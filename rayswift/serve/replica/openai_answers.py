"""Answers in OpenAI's shapes: whole ones, chunks of streams, usage, log probabilities; and their pieces."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rayswift import __version__
from rayswift.generate.continuous_batching import Sequence, TokenDelta
from rayswift.generate.logprobs import logprob_entry, token_names
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.replica.tool_calls import CallReader

FINGERPRINT = f"rayswift-{__version__}"

#: Log probabilities of a prompt's tokens but the first: (token, log probability, rank) of each and of the likeliest.
PromptScores = list[list[tuple[int, float, int]]]


@dataclass
class Shape:
    """The frame of one response: a chat's or a plain completion's, and what it says beside the text.

    One entry for each choice: ``echoes``, texts before them; ``readers``, what finds tool calls in them; ``prompts``;
    ``scores``, where they are asked for; with ``echo_scores`` they are part of the log probabilities. ``tool_choice``:
    who decided that a tool is called: ``auto`` the model, ``required`` and ``named`` the client. ``stop_ids``: where
    the client wants the answer to stop.
    """

    model: str
    is_chat: bool
    tokenizer: Any
    prompts: list[list[int]]
    include_token_ids: bool = False
    tokens_as_ids: bool = False
    echoes: list[str] = field(default_factory=list)
    readers: list[CallReader] = field(default_factory=list)
    tool_choice: str = "auto"
    stop_ids: frozenset[int] = frozenset()
    scores: list[PromptScores] = field(default_factory=list)
    echo_scores: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._offsets: dict[int, int] = {}

    # --- streams ------------------------------------------------------------------------------------------------

    def first_event(self, index: int, usage: dict[str, Any] | None) -> bytes:
        """The chunk that opens a choice of a chat stream (role), or of a completion with ``echo``; may be empty."""
        echo = self.echoes[index] if self.echoes else ""
        if not (self.is_chat or echo or self.include_token_ids):
            return b""
        choice: dict[str, Any] = {"index": index, "logprobs": self._prompt_logprobs(index), "finish_reason": None}
        choice |= {"delta": {"role": "assistant", "content": echo}} if self.is_chat else {"text": echo}
        if not self.is_chat:
            choice["prompt_token_ids"] = self.prompts[index]
        frame = self._chunk([choice], usage)
        if self.is_chat and self.include_token_ids:
            frame["prompt_token_ids"] = self.prompts[index]
        return event(frame)

    def piece_event(self, index: int, piece: TokenDelta, usage: dict[str, Any] | None) -> bytes:
        """One piece as a chunk of a stream; empty for one that shows nothing."""
        delta = self._message(index, piece, final=piece.finish_reason is not None)
        logprobs = self._logprobs(index, piece.logprobs)
        if not (delta or piece.finish_reason or logprobs or self.include_token_ids):
            return b""
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs}
        choice |= {"delta": delta} if self.is_chat else {"text": piece.text}
        choice |= self._end(index, piece)
        if self.include_token_ids:
            choice["token_ids"] = piece.token_ids
        return event(self._chunk([choice], usage))

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The last chunk of a stream whose client asked for it."""
        return event(self._chunk([], usage) | {"system_fingerprint": FINGERPRINT})

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        ended = any(choice["finish_reason"] for choice in choices)
        frame = self._frame("chat.completion.chunk", choices) | ({} if usage is None else {"usage": usage})
        return frame | {"system_fingerprint": FINGERPRINT} if ended else frame

    # --- whole answers ------------------------------------------------------------------------------------------

    def whole(self, answers: list[TokenDelta], usage: dict[str, Any]) -> dict[str, Any]:
        """A whole response; ``answers``: one for each choice."""
        choices = []
        for index, answer in enumerate(answers):
            echo = self.echoes[index] if self.echoes else ""
            before, own = self._prompt_logprobs(index), self._logprobs(index, answer.logprobs)
            choice: dict[str, Any] = {"index": index, "logprobs": _joined(before, own)}
            if self.is_chat:
                message = self._message(index, answer, final=True)
                content = echo + message.get("content", "")
                if not content and "tool_calls" in message and self.tool_choice == "auto":
                    content = None
                if "tool_calls" in message:  # whole ones need no number
                    for call in message["tool_calls"]:
                        del call["index"]
                choice["message"] = {"role": "assistant", **message, "content": content}
            else:
                choice["text"] = echo + answer.text
            choice |= self._end(index, answer)
            if self.include_token_ids:
                choice["token_ids"] = answer.token_ids
                choice |= {} if self.is_chat else {"prompt_token_ids": self.prompts[index]}
            if self.scores and not self.is_chat:
                choice["prompt_logprobs"] = self._ranked(index)
            choices.append(choice)
        frame = self._frame("chat.completion", choices) | {"usage": usage, "system_fingerprint": FINGERPRINT}
        if self.is_chat and self.include_token_ids:
            frame["prompt_token_ids"] = self.prompts[0]
        return frame | {"prompt_logprobs": self._ranked(0)} if self.is_chat and self.scores else frame

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = kind if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _message(self, index: int, piece: TokenDelta, *, final: bool) -> dict[str, Any]:
        """Content and tool calls in the text of a piece."""
        if not self.readers:
            return {"content": piece.text} if piece.text else {}
        reader = self.readers[index]
        content, calls = reader.feed(piece.text, final=final)
        message: dict[str, Any] = {"content": content} if content else {}
        if not calls:
            return message
        return message | {"tool_calls": calls}

    def _end(self, index: int, piece: TokenDelta) -> dict[str, Any]:
        reason, stopped_by = piece.finish_reason, piece.stop_reason
        if reason == "stop" and self.readers and self.readers[index].called and self.tool_choice != "named":
            reason = "tool_calls"
        if isinstance(stopped_by, int) and stopped_by not in self.stop_ids:
            stopped_by = None  # the end of a turn is no stop of the client's
        return {"finish_reason": reason, "stop_reason": stopped_by}

    # --- log probabilities --------------------------------------------------------------------------------------

    def _token(self, token: int) -> str:
        return f"token_id:{token}" if self.tokens_as_ids else str(self.tokenizer.decode([token]))

    def _logprobs(self, index: int, tokens: list[list[tuple[int, float]]]) -> dict[str, Any] | None:
        """OpenAI's object of tokens and their alternatives: a chat's, or a completion's."""
        if not tokens:
            return None
        if not self.is_chat:
            return self._columns(index, [(likely[0][0], likely[0][1], dict(likely)) for likely in tokens])
        entries = [logprob_entry(self.tokenizer, likely) for likely in tokens]
        if self.tokens_as_ids:
            for entry, likely in zip(entries, tokens, strict=True):
                for one, (token, _) in zip((entry, *entry["top_logprobs"]), likely, strict=True):
                    one["token"] = self._token(token)
        return {"content": entries}

    def _prompt_logprobs(self, index: int) -> dict[str, Any] | None:
        """Those of the prompt, where they are part of the answer's (``echo``); its first token has none."""
        if not self.echo_scores:
            return None
        rest = [(found[0][0], found[0][1], {token: value for token, value, _ in found}) for found in self.scores[index]]
        return self._columns(index, [(self.prompts[index][0], None, None), *rest])

    def _columns(
        self, index: int, tokens: Iterable[tuple[int, float | None, dict[int, float] | None]]
    ) -> dict[str, Any]:
        """Tokens with their log probabilities and those of the likeliest, of which the token itself is the first."""
        columns: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, likely in tokens:
            ids, offset = list(likely or (token,)), self._offsets.get(index, 0)
            texts = [self._token(one) for one in ids]
            names = texts if self.tokens_as_ids else token_names(self.tokenizer, zip(ids, texts, strict=True))
            self._offsets[index] = offset + len(texts[0])
            top = None if likely is None else dict(zip(names, map(_finite, likely.values()), strict=True))
            values = (names[0], None if logprob is None else _finite(logprob), top, offset)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        return columns

    def _ranked(self, index: int) -> list[dict[str, Any] | None]:
        """``prompt_logprobs`` as vLLM has them."""
        return [None, *({str(token): {"logprob": _finite(value), "rank": rank, "decoded_token": self._token(token)}
                         for token, value, rank in found} for found in self.scores[index])]  # fmt: skip


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)


def _joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    if first is None or second is None:
        return second if first is None else first
    return {name: column + second[name] for name, column in first.items()}


def usage_of(prompts: list[list[int]], generated: int) -> dict[str, int]:
    """Token counts of a response; a prompt that several choices share counts once."""
    prompt = sum(map(len, prompts))
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def event(value: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A stream of events; when it ends, or its client has left even before it began, the model drops the rows."""

    def __init__(self, events: AsyncIterator[bytes], rows: list[Sequence]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for row in self._rows:
                row.cancel()


async def pieces_of(
    rows: list[Sequence], queue: asyncio.Queue[tuple[int, TokenDelta]]
) -> AsyncIterator[tuple[int, TokenDelta]]:
    """Pieces as they come, until every row has ended. Raises ApiError (500) when the model fails."""
    unfinished = len(rows)
    while unfinished:
        index, piece = await queue.get()
        if piece.error is not None:
            raise ApiError(500, f"the model failed: {piece.error}", code="generation_failed")
        yield index, piece
        unfinished -= piece.finish_reason is not None


async def collect(pieces: AsyncIterator[tuple[int, TokenDelta]], count: int) -> list[TokenDelta]:
    """The pieces of each answer as one."""
    found: list[list[TokenDelta]] = [[] for _ in range(count)]
    async for index, piece in pieces:
        found[index].append(piece)
    return [
        TokenDelta(
            "".join(piece.text for piece in parts),
            [token for piece in parts for token in piece.token_ids],
            [likely for piece in parts for likely in piece.logprobs],
            parts[-1].finish_reason,
            stop_reason=parts[-1].stop_reason,
        )
        for parts in found
    ]
