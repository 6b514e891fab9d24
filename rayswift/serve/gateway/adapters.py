"""LoRA adapters by name: those given at start, and any below ``--adapter_root``, loaded when somebody asks for one.

A name means, in this order: the adapter that the server was started with, what a client loaded under the name, the
folder below the root that is called so. What clients change of it is kept in `gateway.shared.GatewayState`, and nowhere
else; what a replica has of it, in its `replica.adapter_book.AdapterBook`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Container
from pathlib import Path

from rayswift import hub
from rayswift.modeling.adapter_folder import ADAPTER_CONFIG
from rayswift.serve.gateway.shared import SharedState
from rayswift.serve.replica.adapters import AdapterKey, AdapterRefused, check_name

#: Folders below the root that are looked at when adapters are listed: ``name`` and ``run/checkpoint-N``.
_LIST_DEPTH = 3


class AdapterRegistry:
    """The adapters that the clients of ``model`` may ask for.

    ``start``: name → folder; ``root``: folder or URI, or None; names that clients give are in ``shared``; ``models``:
    names of all models, which no adapter can have.
    """

    def __init__(
        self, model: str, start: dict[str, str], root: str | None, shared: SharedState, models: Container[str] = ()
    ) -> None:
        self._model, self._start, self._root, self._shared = model, dict(start), root, shared
        self._models = models

    async def key_of(self, name: str) -> AdapterKey | None:
        """What a replica is asked for; None for a name that nobody knows."""
        if name in self._start:
            return AdapterKey(name)
        if self._root is None or name in self._models:
            return None
        try:
            check_name(name)
        except AdapterRefused:
            return None
        path, version = await self._shared.ask("adapter", self._model, name)
        if path or await asyncio.to_thread(_exists, self._root, name):
            return AdapterKey(name, path or name, version)
        return None

    async def candidate(self, name: str, path: str | None, *, replace: bool) -> AdapterKey:
        """The key of the adapter ``path`` below the root under a name, for a replica to try; `name` makes it count.

        Without a path, or with that of a server's own adapter, what the name means already. Raises AdapterRefused.
        """
        if name in self._models:
            raise AdapterRefused(400, f"adapter {name}: a model is served under that name; choose another one")
        if name in self._start:
            if replace or path not in (None, self._start[name]):
                raise AdapterRefused(400, f"adapter {name}: the server was started with it; choose another name")
            return AdapterKey(name)
        if self._root is None:
            raise AdapterRefused(403, "no --adapter_root: this server loads no further adapters")
        check_name(name)
        if path is None and not replace:
            if now := await self.key_of(name):
                return now
            raise AdapterRefused(404, f"adapter {name}: not below the server's --adapter_root; give its lora_path")
        named, _ = await self._shared.ask("adapter", self._model, name)
        inside = await self._below_root((named or name) if path is None else path)
        is_taken = named or (inside != name and await asyncio.to_thread(_exists, self._root, name))
        if is_taken and not replace:
            raise _taken(name)
        return AdapterKey(name, inside, await self._shared.ask("next_version"))

    async def name(self, key: AdapterKey, *, replace: bool) -> None:
        """Let a candidate's name mean it from now on. Raises AdapterRefused."""
        is_named = key.name in self._start or await self._shared.ask("name_adapter", self._model, *key, replace)
        if not is_named:
            raise _taken(key.name)

    async def remove(self, key: AdapterKey) -> int:
        """Forget a name that `name` gave; versions up to the one returned are unloaded."""
        if key.name in self._start:
            return key.version
        return int(await self._shared.ask("forget_adapter", self._model, key.name))

    async def names(self) -> list[str]:
        """Every adapter that can be asked for, sorted."""
        given = await self._shared.ask("adapter_names", self._model) if self._root else []
        below = await asyncio.to_thread(_below, self._root) if self._root else []
        return sorted({*self._start, *(name for name in (*given, *below) if name not in self._models)})

    async def _below_root(self, path: object) -> str:
        """``path`` as one below the root. Raises AdapterRefused."""
        if not isinstance(path, str) or not path or "\0" in path:
            raise AdapterRefused(400, "lora_path: expected the path of a folder below the server's --adapter_root")
        assert self._root is not None
        inside = path.removeprefix(self._root.rstrip("/") + "/")
        if inside.startswith("/") or hub.is_remote_uri(inside):
            raise AdapterRefused(403, f"adapter {inside[:80]}: not below the server's --adapter_root")
        check_name(inside := inside.rstrip("/"))
        if not await asyncio.to_thread(_exists, self._root, inside):
            raise AdapterRefused(404, f"adapter {path}: not below the server's --adapter_root")
        return inside


def _taken(name: str) -> AdapterRefused:
    return AdapterRefused(400, f"adapter {name}: has been loaded already; with load_inplace: true it is replaced")


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
