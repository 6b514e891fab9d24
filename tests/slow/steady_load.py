"""A bounded load of requests on a thread beside a test, which meanwhile disturbs the server.

Whole answers come from chat, streams in turn from chat, Responses and Messages: the text must be the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from serving import MODEL, Deployment, chat_body

#: Each asked plain and as a stream; greedy decoding gives each its one answer.
QUESTIONS = [
    "What is the capital of France?", "Name three colours.", "Write one sentence about the sea.", "What is 2 + 2?",
    "Who wrote Romeo and Juliet?", "What do bees make?", "Describe a cat.", "Why is the sky blue?",
]  # fmt: skip
MAX_TOKENS = 48
#: Who streams.
STREAMS = ("chat/completions", "responses", "messages")
#: A request without its end after this many seconds hangs; one that wakes the first replica takes a minute or two.
PATIENCE = 240.0


@dataclass(frozen=True)
class Outcome:
    """One request: what it asked and how, when it began and ended, and its text, or why it failed."""

    question: str
    stream: bool
    began: float
    ended: float
    text: str | None
    failure: str | None = None


@dataclass
class Outcomes:
    """What a load has seen so far; filled while it runs."""

    done: list[Outcome] = field(default_factory=list)

    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.done if outcome.failure is not None]

    def altered(self, expected: dict[str, str]) -> list[tuple[Outcome, str]]:
        """Answers that differ from the undisturbed ones, with those."""
        whole = [outcome for outcome in self.done if outcome.failure is None]
        return [
            (outcome, expected[outcome.question]) for outcome in whole if outcome.text != expected[outcome.question]
        ]

    def since(self, moment: float) -> Outcomes:
        """Those that began at or after ``time.monotonic()`` was ``moment``."""
        return Outcomes([outcome for outcome in self.done if outcome.began >= moment])

    def describe(self) -> str:
        """For a test's output: how many, and the longest."""
        longest = max((outcome.ended - outcome.began for outcome in self.done), default=0.0)
        streams, failed = sum(outcome.stream for outcome in self.done), len(self.failed())
        return f"{len(self.done)} requests ({streams} streams), {failed} failed, the longest took {longest:.1f} s"


@contextlib.contextmanager
def steady_load(server: Deployment, askers: int = 4) -> Iterator[Outcomes]:
    """Keep ``askers`` requests under way; at the end no new ones begin, and those that run are waited for."""
    outcomes, stopping = Outcomes(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_load(server, askers, outcomes, stopping)), name="load")
    thread.start()
    try:
        yield outcomes
    finally:
        stopping.set()
        thread.join(PATIENCE + 30)
        assert not thread.is_alive(), "a request hangs"


def undisturbed(server: Deployment) -> dict[str, str]:
    """The answer to each question when nothing else runs."""
    return {question: asyncio.run(_once(server, question)) for question in QUESTIONS}


async def _once(server: Deployment, question: str) -> str:
    async with _session(server) as session:
        outcome = await _ask(session, server, question)
    assert outcome.text is not None, outcome.failure
    return outcome.text


def _session(server: Deployment) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=PATIENCE))


async def _load(server: Deployment, askers: int, outcomes: Outcomes, stopping: threading.Event) -> None:
    turns = itertools.count()

    async def asker(session: aiohttp.ClientSession) -> None:
        while not stopping.is_set():
            turn = next(turns)
            question = QUESTIONS[(turn // 2) % len(QUESTIONS)]
            streams = STREAMS[turn // 2 % len(STREAMS)] if turn % 2 == 0 else ""
            outcome = await _ask(session, server, question, streams)
            outcomes.done.append(outcome)
            if outcome.failure is not None:
                await asyncio.sleep(0.5)  # a server that is away is asked again, not hammered

    async with _session(server) as session:
        await asyncio.gather(*(asker(session) for _ in range(askers)))


async def _ask(session: aiohttp.ClientSession, server: Deployment, question: str, streams: str = "") -> Outcome:
    """``streams``: who streams the answer, of `STREAMS`; empty for a whole one."""
    began, text, failure = time.monotonic(), None, None
    body = chat_body(MODEL, question, max_tokens=MAX_TOKENS, stream=bool(streams))
    if streams == "responses":
        body |= {"input": body.pop("messages"), "max_output_tokens": body.pop("max_tokens")}
    try:
        async with session.post(f"{server.base_url}/{streams or STREAMS[0]}", json=body) as response:
            raw = await response.read()
            if response.status != 200:
                failure = f"status {response.status}: {raw[:300]!r}"
            elif not streams:
                text = json.loads(raw)["choices"][0]["message"]["content"]
            else:
                text = _streamed_text(raw) if streams == STREAMS[0] else _named_text(raw)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
        failure = f"{streams} {type(error).__name__}: {error}"
    return Outcome(question, bool(streams), began, time.monotonic(), text, failure)


def _named_text(raw: bytes) -> str:
    """The text of a stream of Responses or Messages.

    Raises:
        ValueError: the stream is broken: an error in it, no end, a mark that comes twice, a number that is left out.
    """
    events = [json.loads(line.removeprefix(b"data: ")) for line in raw.split(b"\n") if line.startswith(b"data: ")]
    kinds = [event["type"] for event in events]
    marks = [kind for kind in kinds if "delta" not in kind or kind == "message_delta"]
    if kinds[-1:] not in (["response.completed"], ["message_stop"]) or len(set(marks)) != len(marks):
        raise ValueError(f"not one answer: {marks}, {raw[-300:]!r}")
    if kinds[-1] == "message_stop":
        return "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    if [event["sequence_number"] for event in events] != list(range(len(events))):
        raise ValueError(f"numbers: {[event['sequence_number'] for event in events]}")
    item = events[-1]["response"]["output"][0]
    if {event.get("item_id", item["id"]) for event in events} != {item["id"]}:
        raise ValueError("an item with two names")
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    if text != item["content"][0]["text"]:
        raise ValueError("the pieces are not the whole")
    return text


def _streamed_text(raw: bytes) -> str:
    """The text of a stream's events.

    Raises:
        ValueError: the stream is broken: an error in it, no end, more than one beginning, or two ids.
    """
    lines = [line.removeprefix(b"data: ") for line in raw.split(b"\n") if line.startswith(b"data: ")]
    if not lines or lines[-1] != b"[DONE]" or lines.count(b"[DONE]") != 1:
        raise ValueError(f"a stream without its end: {raw[-200:]!r}")
    events: list[dict[str, Any]] = [json.loads(line) for line in lines[:-1]]
    if any("error" in event for event in events):
        raise ValueError(f"an error in the stream: {[event for event in events if 'error' in event]}")
    choices = [choice for event in events for choice in event["choices"]]
    roles = [choice["delta"]["role"] for choice in choices if choice["delta"].get("role")]
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    if len({event["id"] for event in events}) != 1 or roles != ["assistant"] or len(reasons) != 1:
        raise ValueError(
            f"not one answer: roles {roles}, reasons {reasons}, ids { ({event['id'] for event in events}) }"
        )
    return "".join(choice["delta"].get("content") or "" for choice in choices)
