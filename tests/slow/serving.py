"""Run ``rayswift deploy`` as a user does: start it, wait until it answers, look at its processes, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from command_line import start, wait_for

#: What all servers of these tests share: the engine of the CPU, small, and exact enough to compare texts.
ENGINE = [
    "--infer_backend", "vllm", "--torch_dtype", "float32", "--vllm_enforce_eager", "true",
    "--vllm_max_model_len", "2048",
]  # fmt: skip
#: Keys of the server that tests share; what is sent with the second must be answered as well.
KEYS = ("sk-first-key-of-the-tests", "sk-second-key-of-the-tests")
#: The name under which that server serves the model.
MODEL = "small"
#: Seconds from starting the command to its first answer: imports, Ray, vLLM, on a busy machine.
START_TIMEOUT = 400.0
#: Seconds from SIGTERM to the end of the command and of everything it started.
STOP_TIMEOUT = 150.0


@dataclass(frozen=True)
class Deployment:
    """A running ``rayswift deploy``: its command's process, its port, its output, Ray's folder with its logs."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    ray_folder: Path
    api_key: str | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """What OpenAI clients call ``base_url``."""
        return f"{self.address}/v1"

    # --- processes ----------------------------------------------------------------------------------------------

    def tree(self) -> list[psutil.Process]:
        """The command and all its living descendants: Ray, its workers, the engines."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def named(self, *words: str) -> list[psutil.Process]:
        """Processes of the tree whose title has all the words."""
        found = []
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                named = title(process)
                if all(word in named for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def replicas(self) -> list[psutil.Process]:
        """The processes of the engine replicas (not the engine cores below them)."""
        return self.named("ray::ServeReplica:", "LLMServer")

    def gateways(self) -> list[psutil.Process]:
        """The process that listens on the public port."""
        return [process for process in self.named("ray::ServeReplica:") if process not in self.replicas()]

    def controllers(self) -> list[psutil.Process]:
        """Ray Serve's controller."""
        return self.named("ray::ServeController")

    def engine_cores(self) -> list[psutil.Process]:
        """vLLM's EngineCore processes, children of the replicas."""
        return self.named("EngineCore")

    def essential(self) -> dict[str, list[int]]:
        """Ids of the processes that bad requests must not be able to end."""
        groups = {"replica": self.replicas, "gateway": self.gateways, "core": self.engine_cores}
        return {name: sorted(process.pid for process in find()) for name, find in groups.items()}

    # --- requests -----------------------------------------------------------------------------------------------

    def get(self, path: str, timeout: float = 10) -> tuple[int, bytes]:
        """Status and body of a GET with the key."""
        return self.request("GET", path, timeout=timeout)

    def request(self, method: str, path: str, body: Any = None, timeout: float = 120) -> tuple[int, bytes]:
        """Status and body; ``body`` is sent as JSON."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=timeout) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def answers(self) -> bool:
        """Whether the endpoint is healthy now."""
        with contextlib.suppress(OSError):
            return self.get("/health", timeout=5)[0] == 200
        return False

    def texts_of_logs(self) -> Iterator[tuple[Path, str]]:
        """Everything that was written down: the command's output and Ray's log files."""
        for path in [self.log, *self.ray_folder.glob("**/session_2*/logs/**/*")]:
            if path.is_file():
                yield path, path.read_text(errors="replace")


def listening(processes: list[psutil.Process]) -> dict[tuple[str, int], str]:
    """Addresses on which processes listen, with the process."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections(kind="inet"):
                if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and not connection.raddr:
                    found[connection.laddr.ip, connection.laddr.port] = title(process)[:90]
    return found


def beyond_this_machine(addresses: dict[tuple[str, int], str]) -> list[str]:
    """Those of :func:`listening` that other machines reach."""
    local = ("127.0.0.1", "::1", "::ffff:127.0.0.1")  # the last is how gRPC writes the first
    return [f"{host}:{port}  {who}" for (host, port), who in addresses.items() if host not in local]


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def deployed(model: str, folder: Path, *flags: str, api_key: str | None = None) -> Iterator[Deployment]:
    """``rayswift deploy`` of a model on a free port, ready; at the end it is stopped, and nothing of it may be left.

    Args:
        model: the model's folder.
        folder: where the command's output goes, as ``deploy.log``.
        flags: further flags; of one given twice the later counts.
        api_key: the key that requests of the ``Deployment`` carry (the flag is among ``flags``).
    """
    # A folder of its own for Ray: the logs in it are this server's. Short, because socket paths are limited.
    ray_folder = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
    port, log = free_port(), folder / "deploy.log"
    process = start(
        "deploy", "--model", model, "--port", str(port), *ENGINE, *flags,
        log=log, RAY_TMPDIR=str(ray_folder), VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    server = Deployment(process, port, log, ray_folder, api_key)
    seen: dict[int, psutil.Process] = {}
    try:
        wait_for(lambda: ready(server), START_TIMEOUT, "the ready line")
        yield server
        seen = {found.pid: found for found in server.tree()}
        titles = {found.pid: title(found) for found in seen.values()}
        stop(server)
        left = still_there(list(seen.values()))
        assert not left, f"still there after the command's end: {[titles[found.pid] for found in left]}"
    finally:
        end_by_force(server, seen)
        with contextlib.suppress(OSError, shutil.Error):  # for whoever reads a failure
            shutil.copytree(ray_folder / "ray/session_latest/logs", folder / "ray-logs", dirs_exist_ok=True)
        shutil.rmtree(ray_folder, ignore_errors=True)


def ready(server: Deployment) -> bool:
    """Whether the command has said so; fails when it has ended instead."""
    text = server.log.read_text(errors="replace")
    assert server.process.poll() is None, f"rayswift deploy ended: {text[-4000:]}"
    return f"ready: {server.base_url}" in text


def stop(server: Deployment) -> None:
    """SIGTERM, as a person's Ctrl-C or a service manager does; the command ends by itself, with status 0."""
    os.kill(server.process.pid, signal.SIGTERM)
    status = server.process.wait(STOP_TIMEOUT)
    assert status == 0, f"status {status}: {server.log.read_text(errors='replace')[-4000:]}"


def title(process: psutil.Process) -> str:
    """The command line of a process, which Ray and vLLM set to what it does; empty for one that has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()) or process.name()
    return ""


def still_there(processes: list[psutil.Process], patience: float = 15) -> list[psutil.Process]:
    """Those that have not ended after some seconds: who is told to end last may outlive the command a little."""

    def living(found: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return found.is_running() and found.status() != psutil.STATUS_ZOMBIE
        return False

    end = time.monotonic() + patience
    while any(map(living, processes)) and time.monotonic() < end:
        time.sleep(0.2)
    return [found for found in processes if living(found)]


def end_by_force(server: Deployment, seen: dict[int, psutil.Process]) -> None:
    """SIGKILL to what a failed test left behind."""
    with contextlib.suppress(psutil.NoSuchProcess):
        seen |= {found.pid: found for found in server.tree()}
    for found in seen.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.kill()
    server.process.wait(30)


def chat_body(model: str, text: str, **options: Any) -> dict[str, Any]:
    """A chat request under greedy decoding."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **options}


def wait_until_idle(server: Deployment, timeout: float = 60) -> None:
    """Wait until the engine runs nothing: whatever clients gave up on has been freed."""
    wait_for(lambda: running_requests(server) == 0, timeout, "an idle engine")


def running_requests(server: Deployment) -> float:
    """Requests that vLLM runs or queues, from its metrics."""
    status, text = server.get("/metrics")
    assert status == 200
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    lines = [line for line in text.decode().splitlines() if line.startswith(names)]
    assert lines, "vLLM's metrics are not there"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def sleep_until(moment: float) -> None:
    """Sleep until ``time.monotonic()`` has that value."""
    time.sleep(max(0.0, moment - time.monotonic()))
