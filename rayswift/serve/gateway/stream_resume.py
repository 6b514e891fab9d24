"""What a client has already been sent of a stream, so that another replica can resume it with exactly the rest.

A replica writes before each piece of a stream the ids of its tokens, as a comment of the event stream (``: 12,13``,
which the gateway takes out). When the replica dies, the request goes to another one together with those ids; that one
delivers the text of the ids again, followed by new text, and `ResumedStream` passes on only what is new. A request
that cannot be resumed from ids (see `can_resume`) starts from the beginning there, which gives the same text under
greedy decoding, and again only what is new is passed on.

Neither Ray Serve (it retries before an answer begins) nor vLLM resumes streams. A healthy stream costs a split and two
appends an event.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

EVENT_END = b"\n\n"
IDS_COMMENT = b": "
DATA = b"data: "
NAMED = b"event: "
DONE = b"data: [DONE]"
ERROR = (b'data: {"error"', b"event: error")
#: How the last event of a stream begins: OpenAI's mark, or by name that of Messages and of Responses.
ENDS = (
    DONE, b"event: message_stop", b"event: response.completed", b"event: response.incomplete",
    b"event: response.failed", b"event: error",
)  # fmt: skip


#: Fields that ask for a grammar or for log probabilities, those of Responses and Messages last.
_OWN_STATE = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
    "text", "include", "output_config",
)  # fmt: skip


class Mismatch(Exception):
    """The other replica wrote something else than what the client already has."""


@dataclass
class StreamLog:
    """The events of one stream as they came from replicas: ``events`` went to the client, ``token_ids`` are in them.

    Bytes are kept as they are and read only when a replica dies: a healthy stream costs next to nothing.
    """

    events: list[bytes] = field(default_factory=list)
    token_ids: list[bytes] = field(default_factory=list)
    _rest: bytes = b""

    def take(self, chunk: bytes) -> Iterator[bytes]:
        """Whole events in ``chunk`` and what was left of the one before, without their ends; ids are noted."""
        parts = (self._rest + chunk).split(EVENT_END)
        self._rest = parts.pop()
        for event in parts:
            if event.startswith(IDS_COMMENT):
                self.token_ids.append(event[len(IDS_COMMENT) :])
            elif event:
                yield event

    def reset(self) -> None:
        """Forget the ids and a half-read event: their connection is gone."""
        self.token_ids.clear()
        self._rest = b""

    @property
    def finished(self) -> bool:
        """Whether the client has the end of the stream."""
        return bool(self.events) and self.events[-1].startswith(ENDS)

    def ids_to_resume(self, held_back: int) -> list[int]:
        """The token ids that another replica goes on from.

        Args:
            held_back: characters that a replica may hold back while a stop text could still complete. As many tokens
                are left out (at least one, which may have been an end token without text): a token has at least one
                character, and greedy decoding finds the same ones again.
        """
        ids = [int(one) for part in self.token_ids for one in part.split(b",") if one]
        return ids[: max(0, len(ids) - max(1, held_back))]


def can_resume(body: dict[str, Any]) -> bool:
    """Whether a request can be resumed from token ids: one choice, and no state that only its own tokens give.

    A grammar would start anew in the middle of its text; penalties count generated tokens only; the log
    probabilities of the tokens so far are gone.
    """
    prompt = body.get("prompt")  # one text or one list of ids; a chat has none
    return (
        body.get("n") in (None, 1)
        and (not isinstance(prompt, list) or all(isinstance(one, int) for one in prompt))
        and not body.get("echo")
        and not body.get("logprobs")
        and not body.get("use_beam_search")
        and not body.get("presence_penalty")
        and not body.get("frequency_penalty")
        and body.get("tool_choice") in (None, "none", "auto")
        and not any(body.get(name) for name in _OWN_STATE)
    )


def longest_stop(body: dict[str, Any]) -> int:
    """Characters of the longest stop text of a request."""
    stop = body.get("stop") or body.get("stop_sequences") or []
    texts = [stop] if isinstance(stop, str) else stop
    return max((len(text) for text in texts if isinstance(text, str)), default=0)


class ResumedStream:
    """Passes on what a second stream has beyond the first one's ``events``.

    The text of a choice is compared in each of its fields (content, reasoning, arguments of a tool call, text of a
    completion), so that a difference is noticed and never sent.
    """

    def __init__(self, events: list[bytes]) -> None:
        self._waiting: dict[tuple[Any, ...], str] = {}
        self._marks: set[tuple[Any, ...]] = set()  # parts that come once: roles, names of tools, reasons of finishing
        self._first: dict[str, Any] = {}
        for event in events:
            chunk = _read(event) or {}
            self._first = self._first or chunk
            for choice in chunk.get("choices") or []:
                for place, text in _texts(choice):
                    self._waiting[place] = self._waiting.get(place, "") + text
                self._marks |= set(_marks(choice))
            if chunk.get("usage") and not chunk.get("choices"):
                self._marks.add(("usage",))

    def pass_on(self, event: bytes) -> bytes | None:
        """``event`` of the second stream without what the client has; None when nothing is left of it.

        Raises:
            Mismatch: it says something else than what the client has.
        """
        chunk = _read(event)
        if chunk is None:
            return event
        chunk |= {key: self._first[key] for key in ("id", "created") if key in self._first}
        if not chunk.get("choices"):
            return None if ("usage",) in self._marks else _write(chunk)
        kept = [choice for choice in chunk["choices"] if self._strip(choice)]
        return _write(chunk | {"choices": kept}) if kept else None

    def _strip(self, choice: dict[str, Any]) -> bool:
        """Take out of ``choice`` what the client has; whether anything is left."""
        left = False
        for place, text in _texts(choice):
            waiting = self._waiting.get(place, "")
            known = min(len(waiting), len(text))
            if waiting[:known] != text[:known]:
                raise Mismatch(f"{waiting[:known]!r} was sent, {text[:known]!r} came")
            self._waiting[place] = waiting[known:]
            _set_text(choice, place, text[known:])
            left = left or len(text) > known
        for mark in _marks(choice):
            if mark in self._marks:
                _drop_mark(choice, mark)
            else:
                left = True
        if choice.get("finish_reason") and any(
            text for place, text in self._waiting.items() if place[0] == choice.get("index")
        ):
            raise Mismatch("the answer ended before what was sent")
        return left


class ResumedEvents:
    """The same for streams of named events (Responses, Messages).

    Each event stands for a piece of text at a place, or for something that happens once there. What the second stream
    calls otherwise (ids, made at random) gets the names that the client knows.
    """

    def __init__(self, events: list[bytes]) -> None:
        self._waiting: dict[tuple[Any, ...], str] = {}
        self._marks: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._names: dict[bytes, bytes] = {}
        self._number = -1
        for event in events:
            value = _named(event)
            place, (holder, key) = _place(value), _text_of(value)
            self._number = value.get("sequence_number", self._number)
            if key:
                self._waiting[place] = self._waiting.get(place, "") + holder[key]
            else:
                self._marks[place] = value

    def pass_on(self, event: bytes) -> bytes | None:
        """As `ResumedStream.pass_on`."""
        for theirs, known in self._names.items():
            event = event.replace(theirs, known)
        value = _named(event)
        place, (holder, key) = _place(value), _text_of(value)
        if key:
            waiting, text = self._waiting.get(place, ""), holder[key]
            known_length = min(len(waiting), len(text))
            if waiting[:known_length] != text[:known_length]:
                raise Mismatch(f"{waiting[:known_length]!r} was sent, {text[:known_length]!r} came")
            self._waiting[place], holder[key] = waiting[known_length:], text[known_length:]
            if not holder[key]:
                return None
        elif place in self._marks:
            self._names |= _other_names(value, self._marks[place])
            return None
        elif any(self._waiting.values()):
            raise Mismatch("the answer went on before what was sent")
        if "sequence_number" in value:
            self._number += 1
            value["sequence_number"] = self._number
        return NAMED + value["type"].encode() + b"\n" + _write(value)


def _named(event: bytes) -> dict[str, Any]:
    """The value of a named event. Raises Mismatch for another one."""
    try:
        value = json.loads(event.partition(b"\n" + DATA)[2])
        return {**value, "type": str(value["type"])}
    except (ValueError, KeyError, TypeError):
        raise Mismatch("an event without a type") from None


def _place(value: dict[str, Any]) -> tuple[Any, ...]:
    """What an event is about: its kind, and which part of the answer."""
    delta = value.get("delta")
    kind = delta.get("type") if isinstance(delta, dict) else None
    return (value["type"], kind, *(value.get(name) for name in ("output_index", "content_index", "index")))


def _text_of(value: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Where the text of an event of text stands: the object and the key; an empty key for another event."""
    delta = value.get("delta")
    if isinstance(delta, str):
        return value, "delta"
    if isinstance(delta, dict):
        for key in ("text", "thinking", "partial_json"):
            if isinstance(delta.get(key), str):
                return delta, key
    return value, ""


def _other_names(theirs: Any, known: Any) -> dict[bytes, bytes]:
    """The ids of one event that differ in another one like it."""
    if isinstance(theirs, list) and isinstance(known, list):
        pairs: Any = [(None, one, other) for one, other in zip(theirs, known, strict=False)]
    elif isinstance(theirs, dict) and isinstance(known, dict):
        pairs = [(key, value, known.get(key)) for key, value in theirs.items()]
    else:
        return {}
    found: dict[bytes, bytes] = {}
    for key, one, other in pairs:
        if key in ("id", "item_id", "call_id") and isinstance(one, str) and isinstance(other, str):
            found |= {json.dumps(one).encode(): json.dumps(other).encode()} if one != other else {}
        else:
            found |= _other_names(one, other)
    return found


def _read(event: bytes) -> dict[str, Any] | None:
    """The chunk in an event; None for the end mark and for comments."""
    if not event.startswith(DATA) or event.startswith(DONE):
        return None
    chunk = json.loads(event[len(DATA) :])
    return chunk if isinstance(chunk, dict) else None


def _write(chunk: dict[str, Any]) -> bytes:
    return DATA + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()


_DELTA_TEXTS = ("content", "reasoning", "reasoning_content", "refusal")


def _texts(choice: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Each text of a choice with its place: ``(index, field)`` or ``(index, "tool", number)``."""
    index, delta = choice.get("index"), choice.get("delta") or {}
    if isinstance(choice.get("text"), str):
        yield (index, "text"), choice["text"]
    for name in _DELTA_TEXTS:
        if isinstance(delta.get(name), str):
            yield (index, name), delta[name]
    for call in delta.get("tool_calls") or []:
        arguments = (call.get("function") or {}).get("arguments")
        if isinstance(arguments, str):
            yield (index, "tool", call.get("index")), arguments


def _set_text(choice: dict[str, Any], place: tuple[Any, ...], text: str) -> None:
    if place[1] == "text":
        choice["text"] = text
    elif place[1] == "tool":
        for call in choice["delta"]["tool_calls"]:
            if call.get("index") == place[2]:
                call["function"]["arguments"] = text
    else:
        choice["delta"][place[1]] = text


def _marks(choice: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The parts of a choice that come once."""
    index, delta = choice.get("index"), choice.get("delta") or {}
    if delta.get("role"):
        yield (index, "role")
    for call in delta.get("tool_calls") or []:
        if call.get("id") or (call.get("function") or {}).get("name"):
            yield (index, "tool", call.get("index"))
    if choice.get("finish_reason"):
        yield (index, "finish")


def _drop_mark(choice: dict[str, Any], mark: tuple[Any, ...]) -> None:
    if mark[1] == "role":
        choice["delta"].pop("role", None)
    elif mark[1] == "finish":
        choice["finish_reason"] = None
    else:
        for call in choice["delta"]["tool_calls"]:
            if call.get("index") == mark[2]:
                for key in ("id", "type"):
                    call.pop(key, None)
                call.get("function", {}).pop("name", None)
