"""Chat servers that take turns: started once, one of them loaded while the others sleep."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.environments import CACHE
from harness.measure import fail, side_environ

#: A server that does not answer by then has failed to start, seconds.
_PATIENCE = 420.0


@dataclass(frozen=True)
class Server:
    """A server of a side: its name, its address without a path, its root process and its log."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def tree(self) -> list[psutil.Process]:
        """Its processes that are alive, the root first."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Processor time that the living processes of the tree have used."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def idle_share(self, seconds: float = 10.0) -> float:
        """The share of one core that it uses while nobody asks it anything."""
        before, began = self.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        return (self.cpu_seconds() - before) / (time.monotonic() - began)

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Stop every process of the tree (SIGSTOP), so that it takes nothing from the server under load."""
        stopped = self.tree()
        for process in stopped:
            _signal(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in reversed(stopped):
                _signal(process, signal.SIGCONT)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(name: str, command: Sequence[str | Path], port: int, cache: Path, **environ: str) -> Iterator[Server]:
    """Start a server that will listen on ``port``, and stop it at the end."""
    log = CACHE / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command)], env={**side_environ(cache), **environ}, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        server = Server(name, f"http://127.0.0.1:{port}", process, log)
        try:
            yield server
        finally:
            _stop(server)


def wait_until_it_answers(server: Server, model: str) -> None:
    """Wait for a first answer of ``model``: a server may be up before the engine behind it.

    Raises:
        SystemExit: it ended, or does not answer; its last lines are in the message.
    """
    question = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}/v1/chat/completions", json.dumps(question).encode(), headers)
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if server.process.poll() is not None:
            fail(server.name, f"ended with status {server.process.returncode}", server.log)
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(request, timeout=end - time.monotonic()).status == 200:
                return
        time.sleep(0.5)
    fail(server.name, f"did not answer within {_PATIENCE:.0f} s", server.log)


def _stop(server: Server) -> None:
    """SIGTERM to the root, and SIGKILL to what is left of the tree after half a minute."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = server.tree()
        server.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(30)
        for process in tree:
            _signal(process, signal.SIGKILL)
    server.process.wait()


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if process.is_running():  # the same process still, not another one with its id
            os.kill(process.pid, number)
