"""PyTorch's process group of workers on one machine, which meet in a file that only this user can open.

With Ray Train's own they meet in a store that listens on all addresses of the machine and takes what anybody writes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


class LocalTorchConfig(TorchConfig):
    """Ray Train's ``TorchConfig`` for workers that are all on this machine."""

    @property
    def backend_cls(self) -> type:
        return _LocalBackend


class _LocalBackend(_TorchBackend):
    _folder: str | None = None

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        self._remove_folder()
        self._folder = tempfile.mkdtemp(prefix="rayswift-group-")
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = backend_config.backend or ("nccl" if gpus else "gloo")
        worker_group.execute(join_group, os.path.join(self._folder, "store"), backend, backend_config.timeout_s,
                             secrets.randbelow(2**16))  # fmt: skip

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        try:
            super().on_shutdown(worker_group, backend_config)
        finally:
            self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def join_group(store: str, backend: str, timeout_s: int, port: int) -> None:
    """What each worker does: join the process group by the file ``store``, with connections inside this machine."""
    _set_torch_distributed_env_vars()
    # Nothing listens there: DeepSpeed names its shared memory after the two.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _setup_torch_process_group(backend, rank, world_size, f"file://{store}", timeout_s)
