"""The folder of one evaluation, ``eval_output/<backend>/<date>``: an unfinished one of the same settings goes on."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rayswift.errors import UserError
from rayswift.eval.results import write_json
from rayswift.journal import drop_half_row, run_identity

RUN_FILE = "run.json"


def folder_name(label: str) -> str:
    """What names a contender or a benchmark, as the name of a folder."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label)


@dataclass
class RunFolder:
    """An evaluation's folder, locked while it runs. ``resumed``: an earlier start has begun it."""

    path: Path
    identity: str
    resumed: bool

    def finish(self) -> None:
        """Mark it as done: the same command starts a new one."""
        write_json(self.path / RUN_FILE, {"run": self.identity, "finished": True})


@contextlib.contextmanager
def open_run(root: Path, settings: Mapping[str, Any]) -> Iterator[RunFolder]:
    """The folder below ``root`` for an evaluation with ``settings``: the unfinished one of the same, else a new one.

    Raises:
        UserError: the folder cannot be written.
    """
    identity = run_identity(settings, [])
    try:
        folder, lock, resumed = _claim(root, identity)
        if resumed:
            for file in folder.rglob("*.jsonl"):  # a kill in mid-write leaves half a row
                with file.open("r+b") as rows:
                    drop_half_row(rows)
        else:
            write_json(folder / RUN_FILE, {"run": identity, "finished": False})
    except OSError as error:
        raise UserError(f"--eval_output_dir {root}: cannot be written ({error.strerror or error})") from None
    try:
        yield RunFolder(folder, identity, resumed)
    finally:
        lock.release()


def _claim(root: Path, identity: str) -> tuple[Path, FileLock, bool]:
    """A folder that no other process works in, with its lock, and whether it was begun before."""
    root.mkdir(parents=True, exist_ok=True)
    for folder in sorted(root.iterdir(), reverse=True):
        lock = FileLock(folder / "run.lock")
        if _is_unfinished(folder, identity):
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                return folder, lock, True
    folder = _new_folder(root)
    lock = FileLock(folder / "run.lock")
    lock.acquire()
    return folder, lock, False


def _is_unfinished(folder: Path, identity: str) -> bool:
    try:
        state = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return state.get("run") == identity and not state.get("finished")


def _new_folder(root: Path) -> Path:
    """A folder named after the time; two of one second get different names."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        folder = root / (f"{stamp}-{number}" if number else stamp)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise UserError(f"--eval_output_dir {root}: no free name for a folder")
