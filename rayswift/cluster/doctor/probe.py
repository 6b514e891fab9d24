"""What `rayswift doctor` asks of each node. An actor of `NodeProbe` runs there, without a CPU of its own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from rayswift import private

#: Versions that have to be the same on every node: what crosses nodes is pickled by these, or computed.
PACKAGES = (
    "ray", "torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "vllm", "datasets", "pyarrow", "numpy",
    "safetensors", "tokenizers",
)  # fmt: skip
_BLOCK = 2**20


class NodeProbe:
    """One node's answers."""

    def __init__(self) -> None:
        self._made: list[str] = []  # local folders that were not there, the inmost first

    def facts(self) -> dict[str, Any]:
        """What the node is and has. Bytes are free ones, of this process's view."""
        from rayswift import __version__

        return {
            "python": platform.python_version(), "packages": {"rayswift": __version__, **_versions()},
            "gpus": _gpus(), "open_files": _open_files(), "shm": _free("/dev/shm"),
            "tmp": _free(private.session_folder()),
        }  # fmt: skip

    def clock(self) -> float:
        """The node's time."""
        return time.time()

    def reaches(self, places: list[tuple[str, int]], seconds: float = 3) -> list[str]:
        """Those of the places where nothing answers, with the reason."""
        found = []
        for host, port in places:
            try:
                socket.create_connection((host, port), seconds).close()
            except OSError as error:
                found.append(f"{host}:{port} ({error.strerror or error})")
        return found

    def reaches_hub(self, url: str, seconds: float = 10) -> str:
        """Why a hub cannot be asked; empty where it answers, with whatever status."""
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            return ""
        except (OSError, ValueError) as error:
            return str(getattr(error, "reason", error))
        return ""

    # --- storage ---

    def write(self, folder: str, name: str, text: str) -> str:
        """Write a file below a folder or URI; why it failed, else empty."""
        try:
            filesystem, path = _open(folder)
            parent = os.path.dirname(path)
            while "://" not in folder and not os.path.exists(parent):
                self._made.append(parent)
                parent = os.path.dirname(parent)
            filesystem.create_dir(path, recursive=True)
            with filesystem.open_output_stream(f"{path}/{name}") as file:
                file.write(text.encode())
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    def missing(self, folder: str, names: list[str], text: str) -> list[str]:
        """Those of the files that are not there, or hold something else."""
        filesystem, path = _open(folder)
        found = []
        for name in names:
            try:
                with filesystem.open_input_stream(f"{path}/{name}") as file:
                    if file.read() != text.encode():
                        found.append(name)
            except OSError:
                found.append(name)
        return found

    def remove(self, folder: str) -> None:
        """Take a folder away, and what was made to hold it."""
        filesystem, path = _open(folder)
        with contextlib.suppress(OSError):  # another node was first
            filesystem.delete_dir(path)
        with contextlib.suppress(OSError):  # somebody else uses it by now
            for parent in self._made:
                os.rmdir(parent)

    def free(self, folder: str) -> int | None:
        """Bytes that may still be written at a path; None for a bucket."""
        return None if "://" in folder else _free(folder)[0]

    # --- network ---

    def listen(self) -> int:
        """Take what one sender sends to the port that this gives."""
        server = socket.create_server(("", 0))

        def take() -> None:
            server.settimeout(60)
            with server, server.accept()[0] as connection:
                while connection.recv(_BLOCK):
                    pass

        threading.Thread(target=take, daemon=True).start()
        return int(server.getsockname()[1])

    def send(self, host: str, port: int, seconds: float = 1.0) -> float:
        """Bytes per second to a listening node."""
        block, sent = bytes(_BLOCK), 0
        with socket.create_connection((host, port), 10) as connection:
            started = time.monotonic()
            while time.monotonic() - started < seconds:
                connection.sendall(block)
                sent += len(block)
            return sent / (time.monotonic() - started)

    def free_port(self) -> int:
        """A port that nobody listens at."""
        with socket.create_server(("", 0)) as server:
            return int(server.getsockname()[1])

    def all_reduce(self, rank: int, size: int, address: str, backend: str, seconds: float = 60) -> float:
        """Bytes per second and rank on the wire of an all-reduce among so many ranks (NCCL's ``busbw``).

        Raises:
            RuntimeError: the sum is wrong, or the group does not come together in time.
        """
        from datetime import timedelta

        import torch
        import torch.distributed as group

        device = "cuda" if backend == "nccl" else "cpu"
        numbers, rounds = (2**26 if backend == "nccl" else 2**22), 3
        limit = timedelta(seconds=seconds)
        group.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=size, timeout=limit)
        try:
            values = torch.full((numbers,), 1.0, device=device)
            group.all_reduce(values)
            if values[0].item() != size or values[-1].item() != size:
                raise RuntimeError(f"the sum of {size} ones is {values[0].item()}")
            started = time.monotonic()
            for _ in range(rounds):
                group.all_reduce(values)
            if backend == "nccl":
                torch.cuda.synchronize()
            return rounds * 4 * numbers / (time.monotonic() - started) * 2 * (size - 1) / size
        finally:
            group.destroy_process_group()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _gpus() -> list[dict[str, str]]:
    """What the driver shows: name, memory, driver's version."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return [dict(zip(("name", "memory", "driver"), row, strict=True)) for row in rows if len(row) == 3]


def _open_files() -> int | None:
    try:
        import resource

        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, ValueError):
        return None


def _free(path: str) -> tuple[int, int] | tuple[None, None]:
    """Free and all bytes of the disk that a path is on, or will be."""
    while path and not os.path.exists(path):
        path = os.path.dirname(path.rstrip("/")) or "/"
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None, None
    return usage.free, usage.total


def _open(folder: str) -> tuple[Any, str]:
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(folder)
    return filesystem, path
