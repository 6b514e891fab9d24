"""LoRA adapters by name: those given at start, and any below ``--adapter_root``, loaded when somebody asks for one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from rayswift import hub
from rayswift.modeling.adapters import ADAPTER_CONFIG
from rayswift.serve.gateway.shared import SharedState
from rayswift.serve.replica.adapters import AdapterRefused, check_name

#: Folders below the root that are looked at when adapters are listed: ``name`` and ``run/checkpoint-N``.
_LIST_DEPTH = 3


class AdapterRegistry:
    """The adapters that the clients of ``model`` may ask for.

    ``start``: name → folder; ``root``: folder or URI, or None; names that clients give are in ``shared``.
    """

    def __init__(self, model: str, start: dict[str, str], root: str | None, shared: SharedState) -> None:
        self._model, self._start, self._root, self._shared = model, dict(start), root, shared

    async def key_of(self, name: str) -> str | None:
        """What a replica is asked for (``name`` or ``name=path``); None for a name that nobody knows."""
        if name in self._start or self._root is None:
            return name if name in self._start else None
        if path := await self._shared.ask("adapter_path", self._model, name):
            return f"{name}={path}"
        try:
            check_name(name)
        except AdapterRefused:
            return None
        return name if await asyncio.to_thread(_exists, self._root, name) else None

    async def add(self, name: str, path: str) -> str:
        """Give the adapter ``path`` below the root a name; returns its key. Raises AdapterRefused."""
        if self._root is None:
            raise AdapterRefused(403, "no --adapter_root: this server loads no further adapters")
        check_name(name)
        if name in self._start:
            raise AdapterRefused(400, f"adapter {name}: the server was started with it; choose another name")
        if not isinstance(path, str) or not path or "\0" in path:
            raise AdapterRefused(400, "lora_path: expected the path of a folder below the server's --adapter_root")
        inside = path.removeprefix(self._root.rstrip("/") + "/")
        if inside.startswith("/") or hub.is_remote_uri(inside):
            raise AdapterRefused(403, f"adapter {inside[:80]}: not below the server's --adapter_root")
        check_name(inside := inside.rstrip("/"))
        if not await asyncio.to_thread(_exists, self._root, inside):
            raise AdapterRefused(404, f"adapter {path}: not below the server's --adapter_root")
        await self._shared.ask("name_adapter", self._model, name, inside)
        return f"{name}={inside}"

    async def remove(self, name: str) -> None:
        """Forget a name that `add` gave."""
        await self._shared.ask("forget_adapter", self._model, name)

    async def names(self) -> list[str]:
        """Every adapter that can be asked for, sorted."""
        given = await self._shared.ask("adapter_names", self._model) if self._root else []
        below = await asyncio.to_thread(_below, self._root) if self._root else []
        return sorted({*self._start, *given, *below})


def _below(root: str) -> list[str]:
    """The adapters in a folder (a bucket's are not listed)."""
    found = []
    if not hub.is_remote_uri(root):
        for folder, folders, files in os.walk(root):
            below = Path(folder).relative_to(root)
            is_adapter = bool(below.parts) and ADAPTER_CONFIG in files
            if is_adapter:
                found.append(str(below))
            if is_adapter or len(below.parts) >= _LIST_DEPTH:
                folders.clear()
    return found


def _exists(root: str, path: str) -> bool:
    if not hub.is_remote_uri(root):
        return Path(root, path, ADAPTER_CONFIG).is_file()
    from pyarrow import fs

    filesystem, base = hub.open_filesystem(root)
    return bool(filesystem.get_file_info(f"{base.rstrip('/')}/{path}/{ADAPTER_CONFIG}").type == fs.FileType.File)
