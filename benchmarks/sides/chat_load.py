"""Ask a chat endpoint with a fixed number of requests under way, in a process of its own; write what came and when.

A closed loop: each of ``--concurrency`` askers sends its next question as soon as its answer has ended. Nothing is
parsed while requests run: the bytes of a stream are kept with the time of their arrival, and read afterwards. The
client's own share of a core is part of the result, because on a small machine it is taken from the server.

    python sides/chat_load.py --base_url URL --model NAME --questions FILE --max_tokens N --concurrency N --out FILE
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

#: A question without an answer after this many seconds has failed.
PATIENCE = 300


@dataclass
class Exchange:
    """One question: when it was sent, and each piece of its answer with the time of its arrival."""

    number: int
    sent: float = 0.0
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)


async def ask(session: aiohttp.ClientSession, url: str, body: bytes, exchange: Exchange) -> None:
    """Send a question and keep the bytes of its answer as they come."""
    exchange.sent = time.perf_counter()
    async with session.post(url, data=body) as response:
        exchange.status = response.status
        async for piece in response.content.iter_any():
            exchange.pieces.append((time.perf_counter(), piece))


async def load(url: str, bodies: list[bytes], concurrency: int, api_key: str | None) -> tuple[list[Exchange], float]:
    """Ask everything; the exchanges in the order of the questions, and the seconds it took."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    exchanges = [Exchange(number) for number in range(len(bodies))]
    waiting = iter(exchanges)

    async def asker(session: aiohttp.ClientSession) -> None:
        for exchange in waiting:
            await ask(session, url, bodies[exchange.number], exchange)

    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        began = time.perf_counter()
        await asyncio.gather(*(asker(session) for _ in range(concurrency)))
        return exchanges, time.perf_counter() - began


def read_stream(exchange: Exchange) -> dict[str, Any]:
    """The text of a streamed answer, its tokens, and the seconds to its first text and to its end.

    Raises:
        SystemExit: an error instead of an answer, or a stream without its ``[DONE]``.
    """
    text, first, usage, finished, rest = "", None, None, False, b""
    for arrived, piece in exchange.pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:"):
                continue
            if data == b"[DONE]":
                finished = True
                continue
            event = json.loads(data)
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if content := choice["delta"].get("content"):
                    first = first or arrived
                    text += content
    if exchange.status != 200 or not finished or first is None or usage is None:
        raw = b"".join(piece for _, piece in exchange.pieces)[-500:]
        raise SystemExit(f"question {exchange.number}: status {exchange.status}, no whole answer: {raw!r}")
    return {
        "text": text,
        "tokens": usage["completion_tokens"],
        "prompt_tokens": usage["prompt_tokens"],
        "first_text_s": first - exchange.sent,
        "seconds": exchange.pieces[-1][0] - exchange.sent,
    }


def question_body(model: str, question: str, max_tokens: int) -> bytes:
    """A streaming chat request under greedy decoding; its own system prompt, so that no side's default comes in."""
    messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": question}]
    asked = {
        "model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(asked).encode()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--base_url", required=True)
    options.add_argument("--model", required=True)
    options.add_argument("--questions", type=Path, required=True, help="a JSON list of texts")
    options.add_argument("--max_tokens", type=int, required=True)
    options.add_argument("--concurrency", type=int, required=True)
    options.add_argument("--api_key")
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    questions = json.loads(given.questions.read_text())
    bodies = [question_body(given.model, question, given.max_tokens) for question in questions]
    gc.disable()
    cpu = time.process_time()
    url = f"{given.base_url}/chat/completions"
    exchanges, seconds = asyncio.run(load(url, bodies, given.concurrency, given.api_key))
    cpu = time.process_time() - cpu
    result = {
        "seconds": seconds,
        "client_cpu_share": cpu / seconds,
        "client_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "answers": [read_stream(exchange) for exchange in exchanges],
    }
    given.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
