"""Checkpoints that are whole or do not exist.

A checkpoint folder counts only when its ``manifest.json`` (every file with its size and hash, written last and by
rename) is there and true. Everything here works on a ``pyarrow.fs`` file system, so a run directory may be local, on
NFS or in a bucket.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError, one_line
from rayswift.files import parse_json

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

MANIFEST = "manifest.json"
_POSITION = "position.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_RUN_NAME = re.compile(r"^v(\d+)-\d{8}-\d{6}$")


@dataclass(frozen=True)
class FoundCheckpoint:
    """A whole checkpoint: its path on its file system and the optimiser step it was taken after."""

    path: str
    step: int

    @property
    def run_directory(self) -> str:
        """The run directory it lies in."""
        return os.path.dirname(self.path)


@dataclass(frozen=True)
class Position:
    """How far a checkpoint's run has trained its data, on any number of workers; the step is in its name.

    Args:
        global_batch_size: items per step.
        data: fingerprint of the data in its order.
        stream: for each stream the ``(task, item)`` of its plan that comes next; None for a dataset of known length.
        code: hash of the code that made the data; empty in checkpoints of versions that did not note it.
        model: fingerprint of the model that training started from; empty in checkpoints that did not note it.
    """

    global_batch_size: int
    data: str
    stream: tuple[tuple[int, int], ...] | None = None
    code: str = ""
    model: str = ""

    def write(self, folder: str) -> None:
        """Put it into a local checkpoint folder."""
        (Path(folder) / _POSITION).write_text(json.dumps(asdict(self)))


def read_position(filesystem: FileSystem, checkpoint: str) -> Position | None:
    """The position in a checkpoint; None in one that another program wrote."""
    try:
        with filesystem.open_input_stream(f"{checkpoint}/{_POSITION}") as stream:
            found = parse_json(stream.read())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{checkpoint}/{_POSITION}: {error}; give another checkpoint") from None
    try:
        places = found["stream"] and tuple((int(task), int(item)) for task, item in found["stream"])
        size, data = int(found["global_batch_size"]), str(found["data"])
        return Position(size, data, places, str(found.get("code", "")), str(found.get("model", "")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{checkpoint}/{_POSITION}: not as it was saved ({one_line(error)}); give another checkpoint"
        ) from None


def hash_files(folder: str, share: int = 0, shares: int = 1, sync: bool = False) -> dict[str, dict[str, Any]]:
    """Size and BLAKE2b hash of every ``shares``-th file below a local folder, by its relative path; with ``sync`` the
    files and their folders are on the disk afterwards."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != MANIFEST)
    for inner in {path.parent for path in files} if sync else ():
        sync_folder(str(inner))
    entries = {}
    for path in files[share::shares]:
        digest = hashlib.blake2b(digest_size=20)
        with path.open("rb") as file:
            while data := file.read(1 << 22):
                digest.update(data)
            if sync:
                os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        entries[name] = {"size": path.stat().st_size, "blake2b": digest.hexdigest()}
    return entries


def write_atomically(filesystem: FileSystem, path: str, text: str) -> None:
    """Write a small file that is either the old one or the new one, never half of it."""
    from pyarrow import fs

    # A bucket shows an object only once it is complete; a file system needs the rename.
    target = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if isinstance(filesystem, fs.LocalFileSystem) else path
    try:
        with filesystem.open_output_stream(target) as stream:
            stream.write(text.encode())
        if target != path:
            with open(target, "rb") as file:
                os.fsync(file.fileno())
            os.replace(target, path)
            sync_folder(os.path.dirname(path))
    except OSError:  # a full disk
        if target != path:
            Path(target).unlink(missing_ok=True)
        raise


def sync_folder(path: str) -> None:
    """Have a local folder's names on the disk: a power cut then leaves no file that has lost its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(filesystem: FileSystem, checkpoint: str, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Make a checkpoint whole: the last thing that is written into it, when all else is on the disk."""
    write_atomically(filesystem, f"{checkpoint}/{MANIFEST}", json.dumps({"step": step, "files": files}, indent=1))


def write_scores(filesystem: FileSystem, checkpoint: str, scores: dict[str, float]) -> None:
    """Note what an evaluation of a checkpoint found; nothing where it is not there any more."""
    if manifest := read_manifest(filesystem, checkpoint):
        text = json.dumps({**manifest, "scores": scores}, indent=1)
        write_atomically(filesystem, f"{checkpoint}/{MANIFEST}", text)


def read_manifest(filesystem: FileSystem, checkpoint: str) -> dict[str, Any] | None:
    """The manifest of a folder when it is there and every file it names has its size; else None."""
    try:
        with filesystem.open_input_stream(f"{checkpoint}/{MANIFEST}") as stream:
            manifest = parse_json(stream.read())
        infos = filesystem.get_file_info([f"{checkpoint}/{name}" for name in manifest["files"]])
        sizes = [entry["size"] for entry in manifest["files"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if [info.size for info in infos] == sizes else None


def verify(folder: str, manifest: dict[str, Any], filesystem: FileSystem | None = None) -> str | None:
    """The first file of a local checkpoint whose bytes are not what the manifest says; None if all are (a bucket checks
    its own)."""
    from pyarrow import fs

    if not isinstance(filesystem, fs.LocalFileSystem | None):
        return None
    found = hash_files(folder)
    return next((name for name, entry in manifest["files"].items() if found.get(name) != entry), None)


def list_checkpoints(filesystem: FileSystem, run_directory: str) -> list[FoundCheckpoint]:
    """The whole checkpoints of a run directory, oldest step first."""
    found = []
    for name in _folders(filesystem, run_directory):
        match = _NAME.match(name)
        path = f"{run_directory}/{name}"
        if match and read_manifest(filesystem, path):
            found.append(FoundCheckpoint(path, int(match.group(1))))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_checkpoints(filesystem: FileSystem, output_dir: str) -> list[FoundCheckpoint]:
    """The whole checkpoints below ``--output_dir``, newest first: of the newest run that has one, or of the folder
    itself."""
    matches = filter(None, map(_RUN_NAME.match, _folders(filesystem, output_dir)))
    runs = sorted(matches, key=lambda match: int(match[1]))
    for folder in [f"{output_dir}/{match.string}" for match in reversed(runs)] + [output_dir]:
        if checkpoints := list_checkpoints(filesystem, folder):
            return checkpoints[::-1]
    return []


def checkpoint_names(filesystem: FileSystem, run_directory: str) -> list[str]:
    """Every folder named ``checkpoint-N``, whole or not, of whatever program, latest step first."""
    matches = filter(None, map(_NAME.match, _folders(filesystem, run_directory)))
    return [match.string for match in sorted(matches, key=lambda match: -int(match[1]))]


def begin_checkpoint(filesystem: FileSystem, run_directory: str, name: str) -> None:
    """Note that this program writes a checkpoint, until its manifest is there: what it leaves half-done is its own."""
    write_atomically(filesystem, f"{run_directory}/.writing-{name}", "")


def end_checkpoint(filesystem: FileSystem, run_directory: str, name: str) -> None:
    """Take the note of :func:`begin_checkpoint` away."""
    if filesystem.get_file_info(f"{run_directory}/.writing-{name}").is_file:
        filesystem.delete_file(f"{run_directory}/.writing-{name}")


def make_way(filesystem: FileSystem, run_directory: str, after_step: int) -> list[str]:
    """Leave only whole checkpoints up to ``after_step`` under their names, for a run that goes on from there.

    What this program was writing when it died is deleted. Everything else may be of worth to somebody: later
    checkpoints, damaged ones, those of other programs are renamed to ``checkpoint-N.aside``.

    Returns:
        For each of these its old and its new name.
    """
    moved, proven = [], False
    for name in checkpoint_names(filesystem, run_directory):
        path = f"{run_directory}/{name}"
        manifest = read_manifest(filesystem, path)
        if manifest and int(name.removeprefix("checkpoint-")) <= after_step:
            # Hashing takes time: of those before the one that the run goes on from, their sizes are enough.
            if proven or verify(path, manifest, filesystem) is None:
                proven = True
                end_checkpoint(filesystem, run_directory, name)  # whole already when its writer died
                continue
        elif not manifest and filesystem.get_file_info(f"{run_directory}/.writing-{name}").is_file:
            filesystem.delete_dir(path)
            end_checkpoint(filesystem, run_directory, name)
            continue
        moved.append(f"{name} → {_set_aside(filesystem, path)}")
    return moved


def _set_aside(filesystem: FileSystem, path: str) -> str:
    from pyarrow import fs

    names = (f"{path}.aside" + (f"-{number}" if number else "") for number in itertools.count())
    target = next(name for name in names if filesystem.get_file_info(name).type == fs.FileType.NotFound)
    if isinstance(filesystem, fs.LocalFileSystem):
        filesystem.move(path, target)
    else:  # a bucket has no folders to rename
        fs.copy_files(path, target, source_filesystem=filesystem, destination_filesystem=filesystem)
        filesystem.delete_dir(path)
    return os.path.basename(target)


def delete_checkpoint(filesystem: FileSystem, path: str) -> None:
    """Delete a checkpoint, manifest first, so that an interrupted deletion leaves nothing that looks whole."""
    if filesystem.get_file_info(f"{path}/{MANIFEST}").is_file:
        filesystem.delete_file(f"{path}/{MANIFEST}")
    filesystem.delete_dir(path)


def keep_only(
    filesystem: FileSystem, run_directory: str, limit: int | None, best: str | None, also: Collection[str] = ()
) -> list[str]:
    """``--save_total_limit``: keep the newest ``limit`` checkpoints, of which one place is the best's (SWIFT); those
    named in ``also`` beside them."""
    checkpoints = [one for one in list_checkpoints(filesystem, run_directory) if os.path.basename(one.path) not in also]
    if not limit or len(checkpoints) <= limit:
        return []
    best_name = os.path.basename(best) if best else None
    protected = [c for c in checkpoints if os.path.basename(c.path) == best_name or c is checkpoints[-1]]
    others = [c for c in checkpoints if c not in protected]
    surplus = others[: max(0, len(checkpoints) - max(limit, len(protected)))]
    for checkpoint in surplus:
        delete_checkpoint(filesystem, checkpoint.path)
    return [os.path.basename(checkpoint.path) for checkpoint in surplus]


def _folders(filesystem: FileSystem, path: str) -> list[str]:
    from pyarrow import fs

    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return [info.base_name for info in infos if info.type == fs.FileType.Directory]


def run_versions(filesystem: FileSystem, output_dir: str) -> list[int]:
    """The N of every ``vN-date`` run directory below ``--output_dir``."""
    return [int(match[1]) for match in map(_RUN_NAME.match, _folders(filesystem, output_dir)) if match]
