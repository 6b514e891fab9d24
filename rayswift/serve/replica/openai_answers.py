"""Answers in OpenAI's shapes: whole ones, chunks of streams, usage, log probabilities; and their pieces."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rayswift.generate.continuous_batching import Sequence, TokenDelta
from rayswift.serve.openai_errors import ApiError


@dataclass
class Shape:
    """The frame of one response: a chat's or a plain completion's. ``echoes``: text before each choice."""

    model: str
    is_chat: bool
    include_token_ids: bool = False
    echoes: list[str] = field(default_factory=list)
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._offsets: dict[int, int] = {}

    def _frame(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.is_chat else "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def first_event(self, index: int, prompt: list[int]) -> bytes:
        """The chunk that opens a choice of a chat stream (role), or of a completion with ``echo``; may be empty."""
        echo = self.echoes[index] if self.echoes else ""
        if not self.is_chat and not echo:
            return b""
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": None}
        choice |= {"delta": {"role": "assistant", "content": ""}} if self.is_chat else {"text": echo}
        frame = self._frame([choice], chunk=True)
        return event(frame | {"prompt_token_ids": prompt} if self.include_token_ids else frame)

    def piece_event(self, index: int, piece: TokenDelta) -> bytes:
        """One piece as a chunk of a stream."""
        choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(index, piece.logprobs)}
        choice |= {"delta": {"content": piece.text} if piece.text else {}} if self.is_chat else {"text": piece.text}
        choice["finish_reason"] = piece.finish_reason
        if self.include_token_ids:
            choice["token_ids"] = piece.token_ids
        return event(self._frame([choice], chunk=True))

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The last chunk of a stream whose client asked for it."""
        return event(self._frame([], chunk=True) | {"usage": usage})

    def whole(self, answers: list[TokenDelta], prompts: list[list[int]], usage: dict[str, Any]) -> dict[str, Any]:
        """A whole response. ``answers`` and ``prompts``: one per choice."""
        choices = []
        for index, answer in enumerate(answers):
            text = (self.echoes[index] if self.echoes else "") + answer.text
            choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(index, answer.logprobs)}
            choice |= {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choice["finish_reason"] = answer.finish_reason
            if self.include_token_ids:
                choice["token_ids"] = answer.token_ids
                choice |= {} if self.is_chat else {"prompt_token_ids": prompts[index]}
            choices.append(choice)
        frame = self._frame(choices, chunk=False) | {"usage": usage}
        return frame | {"prompt_token_ids": prompts[0]} if self.is_chat and self.include_token_ids else frame

    def _logprobs(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not entries:
            return None
        if self.is_chat:
            return {"content": entries}
        offsets = []
        for entry in entries:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }


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
            [entry for piece in parts for entry in piece.logprobs],
            parts[-1].finish_reason,
        )
        for parts in found
    ]
