"""Arrow IPC files, memory-mapped; and the folder of this machine where they are kept."""

from __future__ import annotations

import hashlib
import os
import shutil
from typing import TYPE_CHECKING

from rayswift.data.files import filesystem_of
from rayswift.files import atomic_file

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def default_root() -> str:
    """The cache folder of this machine: ``RAYSWIFT_CACHE``, else ``~/.cache/rayswift``."""
    return os.path.abspath(os.path.expanduser(os.environ.get("RAYSWIFT_CACHE") or "~/.cache/rayswift"))


def open_arrow(path: str) -> pa.ipc.RecordBatchFileReader:
    """An Arrow IPC file, memory-mapped; one in a bucket is copied to this machine's cache first."""
    import pyarrow as pa

    if "://" in path:
        local = f"{default_root()}/fetched/{hashlib.sha256(path.encode()).hexdigest()[:40]}.arrow"
        if not os.path.exists(local):
            os.makedirs(os.path.dirname(local), exist_ok=True)
            filesystem, inner = filesystem_of(path)
            with atomic_file(local) as half, filesystem.open_input_stream(inner) as source, half.open("wb") as target:
                shutil.copyfileobj(source, target)
        path = local
    return pa.ipc.open_file(pa.memory_map(path))


def read_columns(path: str, names: list[str]) -> list[np.ndarray]:
    """Columns of numbers of an Arrow IPC file, whole; the others are not read."""
    import pyarrow as pa

    filesystem, inner = filesystem_of(path)
    with filesystem.open_input_file(inner) if "://" in path else pa.memory_map(path) as file:
        schema = pa.ipc.open_file(file).schema
        options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in names])
        table = pa.ipc.open_file(file, options=options).read_all()
    return [table[name].to_numpy() for name in names]
