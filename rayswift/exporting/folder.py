"""Result folders that are whole or not there: built beside their place, then moved to it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayswift.errors import UserError

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
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            built = Path(scratch) / path.name
            built.mkdir()
            yield str(built)
            for file in built.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes 0600, and servers have accounts
            _publish(built, path)
    except OSError as error:
        raise UserError(f"--output_dir {target}: cannot be written ({error.strerror or error})") from error


def _publish(built: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        if target.exists():
            target.rmdir()
        built.rename(target)
        return
    for pattern in _WEIGHTS:
        for old in target.glob(pattern):
            old.unlink()
    # config.json last: without it no tool takes the folder for a model.
    for file in sorted(built.iterdir(), key=lambda file: file.name == "config.json"):
        place = target / file.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(file, place)


def copy_files(source: str, target: str, patterns: tuple[str, ...]) -> None:
    """Copy the files of a folder that match one of the patterns and are not in the target."""
    for pattern in patterns:
        for file in Path(source).glob(pattern):
            if file.is_file() and not (Path(target) / file.name).exists():
                shutil.copyfile(file, Path(target) / file.name)
