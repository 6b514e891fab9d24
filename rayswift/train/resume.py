"""``--resume_from_checkpoint``: which checkpoint, is it whole, and does the data still match."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from rayswift.console import say
from rayswift.data.files import filesystem_of
from rayswift.data.flow.cache import code_hash
from rayswift.errors import UserError
from rayswift.train.checkpoints import manifest as checkpoints


@dataclass(frozen=True)
class Resume:
    """A checkpoint and its position, and the run directory to go on in (None: a new one)."""

    checkpoint: str | None = None
    run_directory: str | None = None
    position: checkpoints.Position | None = None

    def check_data(self, fingerprint: str) -> None:
        """Refuse to go on in the middle of other data than the checkpoint's.

        Another version's code names the same data otherwise, so across versions nothing can be told; that is said.
        """
        if self.position is None or self.position.data == fingerprint:
            return
        if self.position.code == code_hash():
            raise UserError(
                "--resume_from_checkpoint: the data is not what the checkpoint was trained on (--dataset, its files, "
                "the template or the seed changed), so its position has no meaning; --ignore_data_skip true goes on "
                "anyway"
            )
        say("the checkpoint is of another version of RaySwift: that its data is the same cannot be checked")


def find_resume(wanted: Any, base: str) -> Resume:
    """``true``: the newest whole checkpoint below ``--output_dir``, and its own run directory goes on. A path: that
    checkpoint, in a new run directory, so that later checkpoints of the old run stay."""
    if not wanted or str(wanted).lower() == "false":
        return Resume()
    if str(wanted).lower() == "true":
        filesystem, inner = filesystem_of(base)
        found = checkpoints.latest_checkpoint(filesystem, inner)
        if found is None:
            raise UserError(f"--resume_from_checkpoint true: no whole checkpoint below --output_dir {base}")
        _check_bytes(base, filesystem, found.path)
        checkpoints.clean_unfinished(filesystem, found.run_directory, found.step)
        prefix = base[: len(base) - len(inner)] if "://" in base else ""
        return Resume(found.path, prefix + found.run_directory, checkpoints.read_position(filesystem, found.path))
    path = wanted if "://" in wanted else os.path.abspath(os.path.expanduser(wanted))
    filesystem, inner = filesystem_of(path)
    if not filesystem.get_file_info(inner).type.name == "Directory":
        raise UserError(f"--resume_from_checkpoint {wanted}: no such folder")
    if not checkpoints.read_manifest(filesystem, inner):
        raise UserError(
            f"--resume_from_checkpoint {wanted}: no whole checkpoint (its {checkpoints.MANIFEST} is missing or not "
            "true); give a checkpoint-N folder of a run, or `true` for the newest whole one"
        )
    _check_bytes(path, filesystem, inner)
    return Resume(inner, position=checkpoints.read_position(filesystem, inner))


def _check_bytes(uri: str, filesystem: Any, checkpoint: str) -> None:
    """Refuse a local checkpoint whose files are not the ones that were saved (a bucket checks its own)."""
    manifest = checkpoints.read_manifest(filesystem, checkpoint)
    damaged = checkpoints.verify(checkpoint, manifest) if manifest and "://" not in uri else None
    if damaged:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint}/{damaged} is not what was saved (its hash differs from the "
            "manifest); give an earlier checkpoint-N folder"
        )
