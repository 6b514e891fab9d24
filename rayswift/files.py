"""Files and folders on this machine that are whole or not there: written beside their place, then moved to it."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into; at the end of the block it is at ``path``, after an exception nothing is changed.

    What was at ``path`` before is removed only when the new folder is whole and in its place. Files get the mode 0644
    (safetensors writes 0600, and servers have accounts of their own).
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        built, before = Path(scratch, "new"), Path(scratch, "old")
        built.mkdir()
        yield built
        for file in built.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        if target.exists():
            os.rename(target, before)
        os.rename(built, target)
