"""Files and folders on this machine that are whole or not there: written beside their place, then moved to it."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Seconds after it was made in which a folder may not be locked yet by the process that made it.
_OWNED_WITHIN = 60


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` whose every refusal is a ValueError: also of text that is nested too deep, or not UTF-8."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def parse_yaml(text: str) -> Any:
    """``yaml.safe_load`` whose every refusal is a ``YAMLError`` or a ValueError: also of text that is nested too deep,
    and of what its tags say that it is and is not."""
    import yaml

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except (AttributeError, LookupError, OverflowError, TypeError) as error:
        raise ValueError(f"a value is not what its tag says ({error})") from None


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file to; at the end of the block it replaces ``path``, after an exception nothing is changed.

    It lies in the folder of ``path``, which must exist, and has its suffix (some writers look at it).
    """
    target = Path(path)
    half = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:12]}.tmp{target.suffix}")
    try:
        yield half
        os.replace(half, target)
    finally:
        half.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file (text as UTF-8) whole or not at all."""
    with atomic_file(path) as half:
        half.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder as this process's; False where another process that lives holds it, or nobody can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone meanwhile
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:  # another process's, or a file system without locks
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into; at the end of the block it is at ``path``, after an exception nothing is changed.

    What was at ``path`` before is removed only when the new folder is whole and in its place. Files get the mode 0644
    (safetensors writes 0600, and servers have accounts of their own). What a killed process left half-built beside
    ``path`` is removed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}-*"):
        with _locked(left) as is_ours:
            if is_ours and time.time() - left.stat().st_mtime > _OWNED_WITHIN:
                shutil.rmtree(left, ignore_errors=True)
    prefix = f".{target.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as scratch, _locked(Path(scratch)):
        built, before = Path(scratch, "new"), Path(scratch, "old")
        built.mkdir()
        yield built
        for file in built.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        if target.exists():
            os.rename(target, before)
        os.rename(built, target)
