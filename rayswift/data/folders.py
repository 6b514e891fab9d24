"""The data files of a path or URI: a file itself, or what the rules of the hubs choose of a folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rayswift.data.files import filesystem_of, formats_line, split_format
from rayswift.errors import UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def list_data_files(path: str, subset: str | None = None, split: str | None = None) -> list[str]:
    """The file itself, or the files of one subset and split of a folder, sorted by name.

    A folder is read as a repository of a hub is: by the ``configs`` of its README, else by a structure file, else by
    the names of files and folders. Hidden files and folders are never read.

    Args:
        path: a file, a folder, or the URI of one.
        subset: a subset of a folder; None: the default one.
        split: a split of a folder; None: ``train``, or the only split where there is no other.

    Raises:
        UserError: nothing there, a folder without any data file, no such subset or split.
    """
    from pyarrow import fs

    from rayswift.hub.datasets import choose_data_files

    local = "://" not in path
    filesystem, inner = filesystem_of(os.path.abspath(os.path.expanduser(path)) if local else path)
    try:
        info = filesystem.get_file_info(inner)
    except OSError as error:
        raise UserError(f"--dataset {path}: cannot be read ({str(error).splitlines()[0]})") from None
    if info.type == fs.FileType.NotFound:
        raise UserError(f"--dataset {path}: no such file or folder")
    if info.type == fs.FileType.File:
        found = [inner] if split_format(inner) else []
    else:
        inner = inner.rstrip("/")
        names = _visible_files(filesystem, inner)
        found = []
        if any(split_format(name) for name in names):
            chosen = choose_data_files(
                path.rstrip("/"),
                names,
                lambda name: _read_text(filesystem, f"{inner}/{name}"),
                subset=subset,
                split=split or "train",
                only_split=split is None,
            )
            found = [f"{inner}/{name}" for name in chosen]
    if not found:
        raise UserError(f"--dataset {path}: no data file there ({formats_line()})")
    return found if local else [path.split("://", 1)[0] + "://" + name for name in found]


def _visible_files(filesystem: FileSystem, folder: str) -> list[str]:
    """Paths below a folder, without ``.ipynb_checkpoints``, ``.cache`` and their like."""
    from pyarrow import fs

    listed = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    names = sorted(entry.path[len(folder) + 1 :] for entry in listed if entry.type == fs.FileType.File)
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def _read_text(filesystem: FileSystem, path: str) -> str:
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read()).decode("utf-8", "replace")
