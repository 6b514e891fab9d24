"""``--external_plugins FILE.py``: files of the user's that register datasets, run in every process that needs them.

A plugin travels as its path and text, never as pickled functions: the driver runs it to learn what it registers, and
a reading task on any node runs the same text to call what it registered. Nothing has to be on a shared disk, and
lambdas, closures and partial functions are as good as plain functions.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
import zlib
from collections.abc import Callable
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


@dataclass(frozen=True)
class PluginFile:
    """One file of ``--external_plugins``: where it was, and its text."""

    path: str
    source: str

    @classmethod
    def read(cls, path: str) -> PluginFile:
        """Read a plugin.

        Raises:
            UserError: no such file, or not UTF-8 text.
        """
        try:
            return cls(os.path.abspath(path), Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--external_plugins {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"--external_plugins {path}: not UTF-8 text") from None

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

        return f"ScriptFunction({hashlib.sha256(cloudpickle.dumps(self.function)).hexdigest()})"

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


@lru_cache(maxsize=256)
def _run(file: PluginFile) -> Registered:
    name = f"rayswift_plugin_{Path(file.path).stem}_{zlib.crc32(file.path.encode()):08x}"
    module = ModuleType(name)
    module.__file__ = file.path
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    folder = os.path.dirname(file.path)
    if folder not in sys.path:
        sys.path.append(folder)  # at the end: a neighbour called json.py must not become everybody's json
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
