"""PyTorch's process group of workers on one machine, which meet in a file that only this user can open.

With Ray Train's own they meet in a store that listens on all addresses of the machine and takes what anybody writes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

from rayswift.train.deepspeed import unlink_shared_memory

ADDRESS = "127.0.0.1"
#: Seconds for workers to leave, one of which may hang.
_LEAVE_SECONDS = 30


@dataclass
class LocalTorchConfig(BackendConfig):
    """What Ray Train's ``TorchConfig`` is, for workers that are all on this machine. ``alone``: one worker, which needs
    no group (gloo's thread wakes a hundred times a second)."""

    backend: str
    timeout_s: int
    alone: bool = False

    @property
    def backend_cls(self) -> type:
        return _LocalBackend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        return _on_own_device


def _on_own_device() -> AbstractContextManager[None]:
    """What a worker trains within: of several GPUs that it sees its own is the current one."""
    from ray.train.torch import TorchConfig

    context: AbstractContextManager[None] = TorchConfig().train_func_context()
    return context


class _LocalBackend(Backend):
    _folder: str | None = None
    _shared_memory: tuple[int, int] = (0, 0)  # the port that DeepSpeed names it after, and how many workers

    def on_start(self, worker_group: Any, backend_config: LocalTorchConfig) -> None:
        self._clean_up()
        self._folder = tempfile.mkdtemp(prefix="rayswift-group-")
        self._shared_memory = secrets.randbelow(2**16), len(worker_group)
        backend = None if backend_config.alone else backend_config.backend
        store = os.path.join(self._folder, "store")
        worker_group.execute(join_group, store, backend, backend_config.timeout_s, self._shared_memory[0])

    def on_shutdown(self, worker_group: Any, backend_config: LocalTorchConfig) -> None:
        try:
            if len(worker_group) > 1:
                ray.get(worker_group.execute_async(leave_group), timeout=_LEAVE_SECONDS)
        except GetTimeoutError:
            pass
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        port, workers = self._shared_memory
        for rank in range(workers):  # of workers that died before they could
            unlink_shared_memory(ADDRESS, str(port), rank)


def join_group(store: str, backend: str | None, timeout_s: int, port: int) -> None:
    """What each worker does: join the process group by the file ``store``, with connections inside this machine, and
    without a ``backend`` only learn which worker it is."""
    import torch.distributed
    from ray.train.torch import get_device

    own = ray.train.get_context()
    os.environ |= {
        "RANK": str(own.get_world_rank()), "WORLD_SIZE": str(own.get_world_size()),
        "LOCAL_RANK": str(own.get_local_rank()), "LOCAL_WORLD_SIZE": str(own.get_local_world_size()),
        "NODE_RANK": str(own.get_node_rank()), "ACCELERATE_TORCH_DEVICE": str(get_device()),
        # Nothing listens there: DeepSpeed names its shared memory after the two.
        "MASTER_ADDR": ADDRESS, "MASTER_PORT": str(port),
    }  # fmt: skip
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
    if backend is None:
        return
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=own.get_world_rank(), world_size=own.get_world_size(),
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip


def leave_group() -> None:
    """What each worker does at the end."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
