"""``--external_plugins FILE.py``: files of the user's that register datasets, run in every process that needs them.

A plugin travels as its path and text, never as pickled functions: the driver runs it to learn what it registers, and
a reading task on any node runs the same text to call what it registered. Nothing has to be on a shared disk, and
lambdas, closures and partial functions are as good as plain functions. The modules that it imports from its own folder
travel with it, and count as its text does where something is cached for what it registers.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rayswift.errors import UserError


@dataclass
class Registered:
    """What one plugin registered, in order: dataset entries, and the functions that belong to them."""

    entries: list[Any] = field(default_factory=list)
    functions: list[Callable[..., Any]] = field(default_factory=list)


#: The plugins that are being run in this moment, innermost last.
_RUNNING: list[tuple[PluginFile, Registered]] = []
#: Folders that plugins have put at the end of ``sys.path``, the latest first, and copies of folders of other machines.
_FOLDERS: list[str] = []
_COPIES: list[tempfile.TemporaryDirectory[str]] = []
#: The text of each module of a plugin's folder when it was last asked for.
_TEXTS: dict[str, str] = {}


@dataclass(frozen=True)
class PluginFile:
    """One file of ``--external_plugins``: where it was, its text, and the modules of its folder that it imports: their
    paths below the folder, and their texts."""

    path: str
    source: str
    modules: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, path: str) -> PluginFile:
        """Read a plugin.

        Raises:
            UserError: no such file, or not UTF-8 text.
        """
        try:
            source = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--external_plugins {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"--external_plugins {path}: not UTF-8 text") from None
        return cls(os.path.abspath(path), source, modules_beside(path, source))

    @property
    def texts(self) -> list[str]:
        """All that decides what it does: its own text, and its modules'."""
        return [self.source, *(text for _, text in self.modules)]

    def registered(self) -> Registered:
        """What the file registers; it is run once in each process.

        Raises:
            UserError: the file cannot be compiled, or raised while it ran; names file:line.
        """
        return _run(self)


@dataclass(frozen=True)
class PluginFunction:
    """A function that a plugin registers, by its number: called here or on another node."""

    file: PluginFile
    number: int

    def __call__(self, *arguments: Any) -> Any:
        """Call the user's function."""
        return self.file.registered().functions[self.number](*arguments)


class ScriptFunction:
    """A function registered outside of plugins, which Ray pickles by value.

    Two of them are equal, and spelled alike, if their code is the same: what is cached for a dataset depends on it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        """Call the user's function."""
        return self.function(*arguments)

    def __repr__(self) -> str:
        from ray import cloudpickle

        # What is pickled names the modules beside the script; their code counts too.
        digest = hashlib.sha256(cloudpickle.dumps(self.function))
        digest.update(repr(_script_modules(self.function)).encode())
        return f"ScriptFunction({digest.hexdigest()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScriptFunction) and (self.function is other.function or repr(self) == repr(other))

    def __hash__(self) -> int:
        return hash(repr(self))


def shippable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that can be sent to Ray tasks: inside a plugin its number there, elsewhere (a script) its code."""
    if not _RUNNING:
        return ScriptFunction(function)
    file, registered = _RUNNING[-1]
    registered.functions.append(function)
    return PluginFunction(file, len(registered.functions) - 1)


def note_entry(entry: Any) -> bool:
    """Note what the running plugin registers; False outside of plugins."""
    if _RUNNING:
        _RUNNING[-1][1].entries.append(entry)
    return bool(_RUNNING)


def modules_beside(path: str, source: str) -> tuple[tuple[str, str], ...]:
    """The modules in a file's folder that it imports, at its top or in a function, and those that these import: their
    paths below the folder and their texts, sorted."""
    folder = os.path.dirname(os.path.abspath(path))
    found: dict[str, str] = {}
    waiting = [("", source)]
    while waiting:
        for name in _imported(*waiting.pop()):
            parts = name.split(".")
            for end in range(1, len(parts) + 1 if _is_beside(parts[0], folder) else 0):
                base, package = "/".join(parts[:end]), ".".join(parts[: end - 1])
                for relative, inside in ((f"{base}/__init__.py", ".".join(parts[:end])), (f"{base}.py", package)):
                    if relative not in found and os.path.isfile(os.path.join(folder, relative)):
                        found[relative] = Path(folder, relative).read_text(encoding="utf-8", errors="replace")
                        waiting.append((inside, found[relative]))
    return tuple(sorted(found.items()))


def _imported(package: str, source: str) -> Iterator[str]:
    """The modules that a text of a package imports, and the names that may be modules of them."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # running it will say so
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}".strip(".") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def _is_beside(name: str, folder: str) -> bool:
    """Whether importing a top-level name takes the folder's: it stands last in ``sys.path``."""
    try:
        spec = importlib.util.find_spec(name) if name and name != "rayswift" else None
    except (ImportError, ValueError):
        spec = None
    where = (spec.origin or next(iter(spec.submodule_search_locations or ()), None)) if spec else folder
    known = tuple(f"{one}{os.sep}" for one in (folder, *_FOLDERS))
    return name != "rayswift" and f"{os.path.abspath(where or os.sep)}{os.sep}".startswith(known)


def _script_modules(function: Any) -> tuple[Any, ...]:
    """The texts of the modules beside a script that a function of it may call, with the function's own module where
    that is not the script itself."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    path = getattr(code, "co_filename", "")
    if not os.path.isfile(path) or "site-packages" in path:
        return ()
    source = Path(path).read_text(encoding="utf-8", errors="replace")
    own = source if getattr(function, "__module__", "") != "__main__" else ""
    return (own, *modules_beside(path, source))


def _use_modules(file: PluginFile) -> None:
    """Let the plugin's modules be found with the text that they travel with, and none that was loaded before it."""
    folder = os.path.dirname(file.path)
    if not all(_text_of(os.path.join(folder, path)) == text for path, text in file.modules):  # another machine's
        _COPIES.append(tempfile.TemporaryDirectory(prefix="rayswift-plugin-"))
        folder = _COPIES[-1].name
        for path, text in file.modules:
            copy = Path(folder, path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text, encoding="utf-8")
    names = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path, _ in file.modules}
    texts = dict(zip(names, (text for _, text in file.modules), strict=True))
    loaded = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    if not all(_is_loaded(at, os.path.join(folder, names[name]), texts[name], name) for name, at in loaded.items()):
        for name, path in names.items():  # all of them: they hold each other
            sys.modules.pop(name, None)
            # A file that is written twice in a second would be taken for the compiled one.
            Path(importlib.util.cache_from_source(os.path.join(folder, path))).unlink(missing_ok=True)
    _TEXTS.update(texts)
    importlib.invalidate_caches()
    # At the end: a neighbour called json.py must not become everybody's json.
    others = [path for path in sys.path if path not in _FOLDERS and path != folder]
    _FOLDERS[:] = [folder, *(known for known in _FOLDERS if known != folder)]
    sys.path[:] = [*others, *_FOLDERS]


def _is_loaded(at: str | None, path: str, text: str, name: str) -> bool:
    """Whether a module is not loaded yet, or from this path with this text."""
    return at is None or (os.path.realpath(at) == os.path.realpath(path) and _TEXTS.get(name, text) == text)


def _text_of(path: str) -> str | None:
    return Path(path).read_text(encoding="utf-8", errors="replace") if os.path.isfile(path) else None


@lru_cache(maxsize=256)
def _run(file: PluginFile) -> Registered:
    name = f"rayswift_plugin_{Path(file.path).stem}_{zlib.crc32(file.path.encode()):08x}"
    module = ModuleType(name)
    module.__file__ = file.path
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    _use_modules(file)
    registered = Registered()
    _RUNNING.append((file, registered))
    try:
        exec(compile(file.source, file.path, "exec"), module.__dict__)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"--external_plugins {error.filename}:{error.lineno}: {error.msg}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file.path]
        place = f"{file.path}:{lines[-1]}" if lines else file.path
        raise UserError(f"--external_plugins {place}: {type(error).__name__}: {error}") from None
    finally:
        _RUNNING.pop()
    return registered
