"""A Ray cluster as ``ray start --head`` starts one, beside any other on the machine."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

GCS = "127.0.0.1:6391"
PORTS = [
    "--node-ip-address", "127.0.0.1", "--port", "6391", "--dashboard-port", "8271", "--ray-client-server-port", "9391",
    # Every Ray of a machine but an embedded one wants 52365: the second one's agent listens nowhere and takes no job.
    "--dashboard-agent-listen-port", "0",
]  # fmt: skip
DASHBOARD = "http://127.0.0.1:8271"


class Head(NamedTuple):
    """Where a cluster's Jobs API listens, the environment that lets a client in, and where Ray keeps its files."""

    address: str
    environment: dict[str, str]
    folder: Path

    def metrics(self) -> str:
        """What Ray's Prometheus endpoint of the node says; its port stands in the file for Prometheus' discovery. So do
        those of dashboard and autoscaler, which are the same for every Ray of a machine: only one of them listens."""
        [targets] = json.loads((self.folder / "prom_metrics_service_discovery.json").read_text())
        found = []
        for target in targets["targets"]:
            with contextlib.suppress(httpx.ConnectError):
                found.append(httpx.get(f"http://{target}/metrics", timeout=30).text)
        return "".join(found)


@contextlib.contextmanager
def ray_head(num_cpus: int, log: Path) -> Iterator[Head]:
    """A head of its own that asks for a token, ended with all its processes."""
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",  # jobs call `rayswift`
        "RAY_raylet_start_wait_time_s": "150",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short path: sockets lie in it
    command = [f"{binaries}/ray", "start", "--head", *PORTS, "--num-cpus", str(num_cpus), "--block"]
    command += ["--temp-dir", str(folder)]
    with log.open("w") as output:
        head = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield Head(DASHBOARD, environment, folder)
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
