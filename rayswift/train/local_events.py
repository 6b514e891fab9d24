"""The event queue of a run on one machine: in the driver's process, where threads serve workers over a Unix socket.

An actor would be one more process of Ray's, which wakes a hundred times a second beside the training that it counts.
Who opens the socket must know the run's key, and the folder is the user's alone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import socket
import threading
import time
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

#: What a broken connection ends with.
BROKEN = (OSError, EOFError)
#: Seconds that `EventsHere.settle` waits for what has been sent.
SETTLE_SECONDS = 5.0


class QueueGone(Exception):
    """Nobody answers where the queue was."""


class EventsHere:
    """The queue, in the process that has it; what other processes of this machine get of it is an `EventsThere`.

    Args:
        queue: what is told and asked; one thread at a time.

    Raises:
        OSError: no socket can be opened.
    """

    def __init__(self, queue: Any) -> None:
        self._queue, self._lock, self._key = queue, threading.Lock(), secrets.token_bytes(32)
        # In multiprocessing's folder of this process.
        self._listener = Listener(family="AF_UNIX", backlog=64, authkey=self._key)
        self._address = str(self._listener.address)
        self._served: set[_Served] = set()
        self._is_closed = False
        threading.Thread(target=self._accept, name="rayswift-events", daemon=True).start()

    def tell(self, name: str, *args: Any) -> None:
        """Call a method of the queue."""
        self.ask(name, *args)

    def ask(self, name: str, *args: Any) -> Any:
        """What a method of the queue returns."""
        with self._lock:
            return getattr(self._queue, name)(*args)

    def settle(self) -> None:
        """Wait until what others have sent is in the queue."""
        end = time.monotonic() + SETTLE_SECONDS
        for one in list(self._served):
            while one.has_more() and time.monotonic() < end:
                time.sleep(0.001)

    def close(self) -> None:
        """Nobody connects any more."""
        self._is_closed = True
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as waker:
            waker.settimeout(1)
            waker.connect(self._address)  # a thread waits for one
        self._listener.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return EventsThere, (self._address, self._key)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                served = _Served(self._listener.accept())
            except Exception:  # one that went away, or has another key
                time.sleep(0.01)
                continue
            self._served.add(served)
            threading.Thread(target=self._serve, args=(served,), name="rayswift-events", daemon=True).start()

    def _serve(self, served: _Served) -> None:
        try:
            with served.connection:
                _send(served.connection, None)  # it is known here: `settle` waits for what comes
                while True:
                    served.answer(self.ask)
        except BROKEN:
            self._served.discard(served)


class _Served:
    """One connection, which belongs to a thread."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self._is_busy = connection, False

    def answer(self, ask: Any) -> None:
        """Wait for a call, make it, and send what it returned to who wants it."""
        self.connection.poll(None)
        self._is_busy = True  # before the first byte is read: see `has_more`
        try:
            is_asked, name, args = _receive(self.connection)
            try:
                answer = True, ask(name, *args)
            except Exception as error:
                answer = False, error
            if is_asked:
                _send(self.connection, answer)
        finally:
            self._is_busy = False

    def has_more(self) -> bool:
        """Whether something was sent that is not done."""
        try:
            return self.connection.poll(0) or self._is_busy
        except BROKEN:
            return False


class EventsThere:
    """The queue of another process of this machine: one connection for all that is told, in order, and one for each of
    those that ask at the same time."""

    def __init__(self, address: str, key: bytes) -> None:
        self._address, self._key = address, key
        self._telling: Connection | None = None
        self._lock, self._free = threading.Lock(), list[Connection]()

    def tell(self, name: str, *args: Any) -> None:
        """Call a method of the queue without waiting for it; nobody hears of it when the driver is gone."""
        try:
            with self._lock:
                self._telling = self._telling or self._connect()
                _send(self._telling, (False, name, args))
        except BROKEN:
            pass

    def ask(self, name: str, *args: Any) -> Any:
        """What a method of the queue returns.

        Raises:
            QueueGone: the driver is.
        """
        try:
            try:
                connection = self._free.pop()
            except IndexError:
                connection = self._connect()
            _send(connection, (True, name, args))
            is_well, answer = _receive(connection)
        except BROKEN as error:
            raise QueueGone from error
        self._free.append(connection)
        if not is_well:
            raise answer
        return answer

    def __reduce__(self) -> tuple[Any, ...]:
        return EventsThere, (self._address, self._key)

    def _connect(self) -> Connection:
        connection = Client(self._address, authkey=self._key)
        _receive(connection)
        return connection


def _send(connection: Connection, value: Any) -> None:
    """Send a value; the bytes of its arrays go from where they are."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    connection.send((text, [view.nbytes for view in views]))
    for view in views:
        while view.nbytes:
            view = view[os.write(connection.fileno(), view) :]


def _receive(connection: Connection) -> Any:
    """The next value; the bytes of its arrays go to where they stay."""
    text, sizes = connection.recv()
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        view = memoryview(buffer)
        while view.nbytes:
            if (count := os.readv(connection.fileno(), [view])) == 0:
                raise EOFError
            view = view[count:]
    return pickle.loads(text, buffers=buffers)
