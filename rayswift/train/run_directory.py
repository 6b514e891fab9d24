"""The run directory as SWIFT lays it out, on any ``pyarrow.fs`` file system.

``<output_dir>/v{N}-{YYYYMMDD-HHMMSS}/`` holds args.json, val_dataset.jsonl, logging.jsonl, runs/ (TensorBoard),
images/*.png and checkpoint-N/. The driver writes everything but the checkpoints.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.data.files import filesystem_of
from rayswift.errors import UserError
from rayswift.files import write_whole
from rayswift.train.checkpoints.manifest import run_versions

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def check_writable(base: str) -> None:
    """Refuse an output folder that cannot be written; leaves nothing behind.

    Raises:
        UserError: names --output_dir and why.
    """
    if "://" in base:
        return
    existing = Path(base)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(20, f"{existing} is a file")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--output_dir {base}: cannot be written ({reason}); choose another folder") from None


class RunDirectory:
    """One run's folder. Local files are written in place; a bucket's are kept here and copied by :meth:`sync`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.filesystem: FileSystem
        self.filesystem, self.path = filesystem_of(uri)
        self._staging = tempfile.mkdtemp(prefix="rayswift-run-") if "://" in uri else None
        self.local = Path(self._staging or uri)

    @classmethod
    def create(cls, base: str, add_version: bool) -> RunDirectory:
        """A new ``vN-date`` folder below ``base``, N one above the highest there; ``base`` itself without versions."""
        filesystem, inner = filesystem_of(base)
        uri = base
        if add_version:
            number = max(run_versions(filesystem, inner), default=-1) + 1
            uri = f"{base}/v{number}-{datetime.now():%Y%m%d-%H%M%S}"
        run = cls(uri)
        run.filesystem.create_dir(run.path, recursive=True)
        return run

    def write_jsonl(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write rows as one JSON object a line."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(self.local / name, text)

    def append_jsonl(self, name: str, row: dict[str, Any]) -> None:
        """Add one line, complete or not at all."""
        with (self.local / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def fetch(self, name: str) -> None:
        """Bring a file of a resumed run in a bucket here, if it is there."""
        if self._staging and self.filesystem.get_file_info(f"{self.path}/{name}").is_file:
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as source:
                (self.local / name).write_bytes(source.read())

    def sync(self) -> None:
        """Copy what was written here to the bucket; nothing to do on a file system."""
        if self._staging:
            from pyarrow import fs

            fs.copy_files(self._staging, self.path, destination_filesystem=self.filesystem)

    def close(self) -> None:
        """Copy the last writes and remove the local copy."""
        if self._staging:
            self.sync()
            shutil.rmtree(self._staging, ignore_errors=True)
