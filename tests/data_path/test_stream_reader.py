"""The reader of a stream, without Ray: what hundreds of workers and tasks ask of it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from rayswift.data.flow import stream

WORKERS = 512


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> stream.StreamReader:
    """A reader whose stream gives nothing by itself."""
    monkeypatch.setattr(stream.StreamReader, "_read", lambda *_: None)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(current_actor=None))
    packed: Any = SimpleNamespace(unpack=lambda: None)
    return stream.StreamReader(None, packed, None, stream.StreamPosition(), WORKERS, 1.0)  # type: ignore[arg-type]


def give(reader: stream.StreamReader, *blocks: str) -> None:
    """What `_read` does with each block."""
    for block in blocks:
        with reader._changed:
            reader._blocks[reader._end] = (block, 1)
            reader._end += 1
            reader._changed.notify_all()


def test_every_worker_gets_every_block_in_order_by_few_calls(reader: stream.StreamReader) -> None:
    made = [f"block {number}" for number in range(60)]
    give(reader, *made)
    reader._over = True
    calls, seen = 0, [list[str]() for _ in range(WORKERS)]
    while any(len(blocks) < len(made) for blocks in seen):  # in step, as training ranks are
        for worker, blocks in enumerate(seen):
            blocks += reader.blocks(worker, len(blocks))
            calls += 1
        assert len(reader._blocks) == len(made) - len(seen[0]) + stream.BLOCKS_AT_ONCE or seen[0] == made
    assert all(blocks == made for blocks in seen)
    assert calls == WORKERS * -(-len(made) // stream.BLOCKS_AT_ONCE)
    assert [reader.blocks(worker, len(made)) for worker in range(WORKERS)] == [[]] * WORKERS
    assert not reader._blocks


def test_a_worker_that_has_everything_waits_for_the_next_block(reader: stream.StreamReader) -> None:
    got: list[list[str]] = []
    give(reader, "first")
    assert reader.blocks(0, 0) == ["first"]
    waiting = threading.Thread(target=lambda: got.append(reader.blocks(0, 1)))
    waiting.start()
    waiting.join(0.1)
    assert not got
    assert reader._blocks, "the others have not had the first"
    give(reader, "second")
    waiting.join(10)
    assert got == [["second"]]


def test_what_stopped_the_stream_comes_after_what_was_ready(reader: stream.StreamReader) -> None:
    give(reader, "first")
    reader._error, reader._over = ValueError("broken"), True
    assert reader.blocks(0, 0) == ["first"]
    with pytest.raises(ValueError, match="broken"):
        reader.blocks(0, 1)


def test_tasks_that_are_held_back_ask_seldom_but_the_first_at_once(reader: stream.StreamReader) -> None:
    """Of hundreds on as many nodes; the one that the workers wait for must not sleep."""
    size = stream.AHEAD_BYTES // 256
    pauses = [reader.pause(task, size) for task in range(WORKERS)]
    held_back = [pause for pause in pauses if pause]
    assert 200 < len(held_back) < WORKERS
    assert sum(1 / pause for pause in held_back) < WORKERS / 2, "calls per second"
    reader._blocks[0] = (None, 8 * stream.READY_BYTES)  # as many times as much as for 64 workers
    assert reader.pause(0, size + 1) == stream.ASK_SECONDS
