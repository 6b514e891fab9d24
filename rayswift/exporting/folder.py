"""Result folders that are whole or not there: built beside their place, then moved to it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayswift.errors import UserError
from rayswift.files import atomic_folder

#: Weight files of an earlier export: left beside new ones of other names they would be loaded instead.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")


def check_target(target: str, exist_ok: bool, needed_bytes: int = 0) -> None:
    """Refuse a result folder that is there already, cannot be written, or would not fit; leaves nothing behind.

    Raises:
        UserError: names --output_dir and the mend.
    """
    path = Path(target)
    if path.is_file():
        raise UserError(f"--output_dir {target}: is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not exist_ok:
        raise UserError(f"--output_dir {target}: exists already; name another, or --exist_ok true to write into it")
    existing = path
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--output_dir {target}: cannot be written ({reason}); choose another folder") from None
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise UserError(
            f"--output_dir {target}: needs about {needed_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there"
        )


@contextmanager
def building(target: str) -> Iterator[str]:
    """A folder to write into; at the end of the block its content is at ``target``, after an exception nothing is.

    A target that exists (``--exist_ok true``) keeps its other files, but no weights of an earlier export.
    """
    path = Path(target)
    try:
        has_files = path.exists() and any(path.iterdir())
        beside = path.with_name(f".{path.name}-{os.getpid()}") if has_files else path
        with atomic_folder(beside) as built:
            yield str(built)
        if has_files:
            for pattern in _WEIGHTS:
                for old in path.glob(pattern):
                    old.unlink()
            # config.json last: without it no tool takes the folder for a model.
            for file in sorted(beside.iterdir(), key=lambda file: file.name == "config.json"):
                if (path / file.name).is_dir():
                    shutil.rmtree(path / file.name)
                os.replace(file, path / file.name)
            beside.rmdir()
    except OSError as error:
        raise UserError(f"--output_dir {target}: cannot be written ({error.strerror or error})") from error


def copy_files(source: str, target: str, patterns: tuple[str, ...]) -> None:
    """Copy the files of a folder that match one of the patterns and are not in the target."""
    for pattern in patterns:
        for file in Path(source).glob(pattern):
            if file.is_file() and not (Path(target) / file.name).exists():
                shutil.copyfile(file, Path(target) / file.name)
