"""The event queue in the driver's process, as other processes of its machine see it."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayswift.train import events
from rayswift.train.checkpoints.held_state import HeldState
from rayswift.train.events import EventQueue, start_event_queue
from rayswift.train.local_events import EventsHere, EventsThere, QueueGone


@pytest.fixture
def here() -> Iterator[EventsHere]:
    queue = EventsHere(EventQueue())
    yield queue
    queue.close()


def there(queue: EventsHere) -> EventsThere:
    """What a worker has."""
    found = pickle.loads(pickle.dumps(queue))
    assert type(found) is EventsThere
    return found


def in_a_process(work: Callable[[], None]) -> int:
    """Do this in a process of its own; its id."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def logs(count: int) -> list[dict[str, Any]]:
    return [{"event": "log", "row": {"loss": float(number), "text": "x" * 1000}} for number in range(count)]


def test_what_a_worker_told_before_it_was_killed_is_there_in_order(here: EventsHere) -> None:
    worker = there(here)

    def work() -> None:
        for event in logs(1000):  # more than a socket's buffer
            worker.tell("push", event)
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_a_process(work), 0)
    here.settle()
    assert here.ask("drain") == logs(1000)
    there(here).tell("push", {"event": "resume", "step": 0})  # the worker that takes its place
    here.settle()
    assert here.ask("drain") == [{"event": "resume", "step": 0}]


def test_a_state_is_held_as_it_was_and_comes_back(here: EventsHere) -> None:
    worker = there(here)
    buffers = [np.frombuffer(bytearray(os.urandom(size)), np.uint8) for size in (3_000_000, 0, 7)]
    worker.ask("keep", 5, HeldState({"a.json": b"{}"}, b"places", buffers), {"step": 1.0})
    assert worker.ask("kept_step") == 5
    held = here.ask("kept_state")
    assert all(type(buffer) is np.ndarray for buffer in held.buffers)  # where the bytes came in, without a copy
    back = there(here).ask("kept_state")
    assert (back.files, back.places) == ({"a.json": b"{}"}, b"places")
    assert all(np.array_equal(*pair) for pair in zip(back.buffers, buffers, strict=True))
    assert here.ask("drain") == [{"event": "kept", "step": 5, "seconds": {"step": 1.0}}]


def test_a_state_that_a_dying_worker_did_not_send_whole_is_none(here: EventsHere) -> None:
    worker = there(here)
    state = HeldState({}, b"", [np.zeros(200_000_000, np.uint8)])
    child = in_a_process(lambda: worker.ask("keep", 5, state, {}))
    while not here._served or not next(iter(here._served)).has_more():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    here.settle()
    assert there(here).ask("kept_step") == 0


def test_threads_ask_at_once_and_each_hears_its_own_answer(here: EventsHere) -> None:
    worker = there(here)
    here.ask("keep", 3, HeldState({}, b"", []), {})
    found: list[Any] = []

    def ask(name: str) -> None:
        found.extend((name, worker.ask(name)) for _ in range(50))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("kept_step", "is_stopping") * 4]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert set(found) == {("kept_step", 3), ("is_stopping", False)}
    assert len(found) == 400
    assert len(worker._free) <= 8  # connections are used again
    with pytest.raises(TypeError, match="keep"):
        worker.ask("keep")


def test_a_worker_whose_driver_is_gone_trains_on_until_it_is_ended(tmp_path: Path) -> None:
    """The driver is a process of its own, which gets killed while a worker waits for its answer."""
    sent = tmp_path / "handle"

    def drive() -> None:
        queue: Any = EventsHere(EventQueue())
        queue._queue.hang = lambda: time.sleep(600)
        (tmp_path / "part").write_bytes(pickle.dumps(queue))
        (tmp_path / "part").rename(sent)
        time.sleep(600)

    driver = in_a_process(drive)
    while not sent.exists():
        time.sleep(0.01)
    worker = pickle.loads(sent.read_bytes())
    worker.tell("push", {"event": "step", "step": 1})
    assert worker.ask("is_stopping") is False
    threading.Timer(0.1, os.kill, (driver, signal.SIGKILL)).start()
    with pytest.raises(QueueGone):
        worker.ask("hang")
    os.waitpid(driver, 0)
    for _ in range(3):
        worker.tell("push", {"event": "step", "step": 2})
        with pytest.raises(QueueGone):
            worker.ask("is_stopping")
    fresh = pickle.loads(sent.read_bytes())
    fresh.tell("push", {"event": "step", "step": 2})
    with pytest.raises(QueueGone):
        fresh.ask("kept_step")


def test_nobody_connects_without_the_key_and_who_leaves_at_the_door_harms_nobody(here: EventsHere) -> None:
    address = pickle.loads(pickle.dumps(here))._address
    folder = Path(address).parent
    assert folder.stat().st_mode & 0o077 == 0
    with pytest.raises(AuthenticationError):
        Client(address, authkey=b"another")
    Client(address).close()
    assert there(here).ask("kept_step") == 0
    before = threading.active_count()
    here.close()
    for _ in range(500):
        if threading.active_count() < before:
            break
        time.sleep(0.01)
    assert threading.active_count() < before
    assert not Path(address).exists()


def test_a_machine_whose_temporary_folder_has_too_long_a_path_has_an_actor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "EventsOfActor", lambda facts: ("actor", facts))
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda: f"/tmp/{'a' * 100}")
    assert start_event_queue() == ("actor", {})
    assert "one more process runs beside them" in caplog.text
    assert start_event_queue({"run": "s3://b/r"}) == ("actor", {"run": "s3://b/r"})
