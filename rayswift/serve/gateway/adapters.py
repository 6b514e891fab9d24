"""LoRA adapters by name: those given at start, and any below ``--adapter_root``, loaded when somebody asks for one."""

from __future__ import annotations

import os
from pathlib import Path

from rayswift import hub
from rayswift.modeling.adapters import ADAPTER_CONFIG
from rayswift.serve.replica.adapters import AdapterRefused, check_name

#: Folders below the root that are looked at when adapters are listed: ``name`` and ``run/checkpoint-N``.
_LIST_DEPTH = 3


class AdapterRegistry:
    """The adapters that a model's clients may ask for. ``start``: name → folder; ``root``: folder or URI, or None."""

    def __init__(self, start: dict[str, str], root: str | None) -> None:
        self._start, self._root = dict(start), root
        self._loaded: dict[str, str] = {}  # name → path below the root, as a client asked for it

    def key_of(self, name: str) -> str | None:
        """What a replica is asked for (``name`` or ``name=path``); None for a name that nobody knows."""
        if name in self._start:
            return name
        if name in self._loaded:
            return f"{name}={self._loaded[name]}"
        try:
            return name if self._root and check_name(name) and _exists(self._root, name) else None
        except AdapterRefused:
            return None

    def add(self, name: str, path: str) -> str:
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
        if not _exists(self._root, inside):
            raise AdapterRefused(404, f"adapter {path}: not below the server's --adapter_root")
        self._loaded[name] = inside
        return f"{name}={inside}"

    def remove(self, name: str) -> None:
        """Forget a name that `add` gave."""
        self._loaded.pop(name, None)

    def names(self) -> list[str]:
        """Every adapter that can be asked for, sorted."""
        found = {*self._start, *self._loaded}
        if self._root and not hub.is_remote_uri(self._root):
            for folder, folders, files in os.walk(self._root):
                below = Path(folder).relative_to(self._root)
                is_adapter = bool(below.parts) and ADAPTER_CONFIG in files
                if is_adapter:
                    found.add(str(below))
                if is_adapter or len(below.parts) >= _LIST_DEPTH:
                    folders.clear()
        return sorted(found)


def _exists(root: str, path: str) -> bool:
    if not hub.is_remote_uri(root):
        return Path(root, path, ADAPTER_CONFIG).is_file()
    from pyarrow import fs

    filesystem, base = hub.open_filesystem(root)
    return bool(filesystem.get_file_info(f"{base.rstrip('/')}/{path}/{ADAPTER_CONFIG}").type == fs.FileType.File)
