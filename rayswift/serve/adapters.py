"""LoRA adapters by name: those given at start, and any below ``--adapter_root``, loaded when somebody asks for one.

The gateway turns what a client writes into a name (`AdapterBook`); a replica finds, checks and loads it
(`AdapterStore`). Refused with a reason: paths that leave the root (``..``, links), pickle weights, another base model,
a rank above the engine's, parts that the engine cannot apply.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift import hub
from rayswift.errors import UserError

if TYPE_CHECKING:
    from rayswift.generate.model_spec import ModelSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Folders below the root that are looked at when adapters are listed: ``name`` and ``run/checkpoint-N``.
_LIST_DEPTH = 3


class AdapterRefused(Exception):
    """An adapter cannot be used. ``status`` is the HTTP status for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_name(name: str) -> str:
    """``name`` if it may name an adapter. Raises AdapterRefused (400) for ``..``, absolute paths and the like."""
    if not isinstance(name, str) or len(name) > 200 or not _NAME.fullmatch(name):
        raise AdapterRefused(400, f"adapter {str(name)[:80]!r}: a name has letters, digits, '.', '_', '-' and '/'")
    return name


class AdapterBook:
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
        inside = _below(self._root, path)
        if not _exists(self._root, inside):
            raise AdapterRefused(404, f"adapter {path}: not below the server's --adapter_root")
        self._loaded[name] = inside
        return f"{name}={inside}"

    def remove(self, name: str) -> None:
        """Forget a name that `add` gave."""
        self._loaded.pop(name, None)

    def names(self) -> list[str]:
        """Every adapter that can be asked for, sorted."""
        found = set(self._start) | set(self._loaded)
        if self._root and not hub.is_remote_uri(self._root):
            found |= set(_adapters_below(self._root))
        return sorted(found)


def split_key(key: str) -> tuple[str, str]:
    """A key as (name, path below the root)."""
    name, _, path = key.partition("=")
    return name, path or name


class AdapterStore:
    """A replica's side: from a key to a checked folder."""

    def __init__(self, plan: ModelSpec) -> None:
        self._plan = plan
        self._base_shapes: dict[str, list[int]] = {}

    def read_base(self, model_dir: str) -> None:
        """Read the shapes of the base model's weights, for comparison."""
        from rayswift.modeling.loading import read_safetensors_header, weight_files

        if self._plan.takes_adapters:
            for path in weight_files(model_dir):
                self._base_shapes |= {name: entry["shape"] for name, entry in read_safetensors_header(path).items()}

    def fetch(self, key: str) -> str:
        """The local folder of an adapter; downloads it from a bucket. Raises AdapterRefused."""
        name, path = split_key(key)
        if name in self._plan.adapters:
            return self._plan.adapters[name]
        root = self._plan.adapter_root
        if root is None:
            raise AdapterRefused(404, f"adapter {name}: unknown")
        if hub.is_remote_uri(root):
            try:
                return hub.resolve_adapter(f"{root.rstrip('/')}/{check_name(path)}")
            except UserError as error:
                raise AdapterRefused(404, f"adapter {name}: {error}") from None
        folder = Path(root, check_name(path))
        for part in (folder, folder / _CONFIG, folder / _WEIGHTS):
            if part.exists() and not part.resolve().is_relative_to(Path(root).resolve()):
                raise AdapterRefused(403, f"adapter {name}: leads out of the server's --adapter_root")
        return str(folder)

    def check(self, key: str, folder: str) -> None:
        """Raises AdapterRefused (422) unless the engine can use the adapter with this base model."""
        from rayswift.modeling.adapters import check_adapter
        from rayswift.modeling.loading import read_safetensors_header

        name, _ = split_key(key)
        try:
            check_adapter(folder)
            shapes = read_safetensors_header(Path(folder) / _WEIGHTS)
        except UserError as error:
            raise AdapterRefused(422, f"adapter {name}: {str(error).partition(': ')[2] or error}") from None
        for problem in self._problems(_read_config(folder), shapes):
            raise AdapterRefused(422, f"adapter {name}: {problem}")

    def _problems(self, config: dict[str, Any], shapes: dict[str, dict[str, Any]]) -> Iterator[str]:
        if config.get("peft_type") != "LORA":
            yield f"is {config.get('peft_type')}, only LoRA is served; merge it with rayswift export --merge_lora true"
        if config.get("use_dora") or config.get("modules_to_save"):
            yield "has DoRA or whole layers (modules_to_save); merge it with rayswift export --merge_lora true"
        yield from _contradictions(config, shapes)
        ranks = [entry["shape"][0] for key, entry in shapes.items() if ".lora_A" in key]
        if ranks and max(ranks) > self._plan.max_lora_rank:
            yield f"rank {max(ranks)} is above the server's {self._plan.max_lora_rank} (--vllm_max_lora_rank)"
        for key, entry in shapes.items():
            base = self._base_shapes.get(_base_name(key))
            side = 1 if ".lora_A" in key else 0
            if base is None or len(base) != 2 or entry["shape"][side] != base[side]:
                yield f"was trained on another base model ({key.removeprefix('base_model.model.')} does not fit)"
                return


def _contradictions(config: dict[str, Any], shapes: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Where configuration and weights do not belong together: an engine would scale or apply them wrongly."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    rank, patterns, wanted = config.get("r"), config.get("rank_pattern") or {}, config.get("target_modules")
    if type(rank) is not int or rank < 1:
        yield f"its {_CONFIG}: r is {str(rank)[:20]!r}, expected a whole number above 0"
        return
    if not isinstance(patterns, dict) or not all(type(value) is int for value in patterns.values()):
        yield f"its {_CONFIG}: rank_pattern gives patterns whole numbers"
        return
    if not (wanted is None or _is_pattern(wanted) or (isinstance(wanted, list) and all(map(_is_pattern, wanted)))):
        yield f"its {_CONFIG}: target_modules is a list of names or one pattern"
        return
    targets = None if wanted in (None, "all-linear") else LoraConfig(target_modules=wanted)
    for key, entry in shapes.items():
        module = _base_name(key).removesuffix(".weight")
        said = patterns.get(get_pattern_key(list(patterns), module), rank)
        if ".lora_A" in key and entry["shape"][0] != said:
            yield f"its {_CONFIG} says rank {said}, its weights have {entry['shape'][0]}"
        if targets is not None and not check_target_module_exists(targets, module):
            yield f"its {_CONFIG} does not name {module} in target_modules, its weights have it"


def _is_pattern(value: Any) -> bool:
    """Whether a value is text that is a regular expression (a plain name is one)."""
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _base_name(key: str) -> str:
    """The weight that an adapter's tensor changes."""
    return re.sub(r"\.lora_[AB](\.[^.]+)?\.weight$", ".weight", key.removeprefix("base_model.model."))


def _read_config(folder: str) -> dict[str, Any]:
    return dict(json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8")))


def _below(root: str, path: str) -> str:
    """``path`` (relative to the root, or absolute inside it) relative to the root. Raises AdapterRefused."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise AdapterRefused(400, "lora_path: expected the path of a folder below the server's --adapter_root")
    if path.startswith(root.rstrip("/") + "/"):
        path = path[len(root.rstrip("/")) + 1 :]
    if path.startswith("/") or hub.is_remote_uri(path):
        raise AdapterRefused(403, f"adapter {path[:80]}: not below the server's --adapter_root")
    return check_name(path.rstrip("/"))


def _exists(root: str, path: str) -> bool:
    if not hub.is_remote_uri(root):
        return Path(root, path, _CONFIG).is_file()
    from pyarrow import fs

    filesystem, base = hub.open_filesystem(root)
    return bool(filesystem.get_file_info(f"{base.rstrip('/')}/{path}/{_CONFIG}").type == fs.FileType.File)


def _adapters_below(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        if _CONFIG in files and depth:
            yield str(Path(folder).relative_to(root))
            folders.clear()
        elif depth >= _LIST_DEPTH:
            folders.clear()
