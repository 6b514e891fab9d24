"""``--push_to_hub``: a result folder and its model card on a hub."""

from __future__ import annotations

import fnmatch
import os
import tempfile
from pathlib import Path

from rayswift.errors import UserError
from rayswift.exporting.model_card import model_card, needs_card
from rayswift.hub.push import IGNORED, Destination


def publish(folder: str, destination: Destination, message: str, checkpoint: str) -> str:
    """Push the folder and return the repository's address; the folder itself is not changed.

    Raises:
        UserError: nothing to push there, or see :meth:`Destination.push`.
    """
    files = [
        path
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not any(fnmatch.fnmatch(os.path.relpath(path, folder), pattern) for pattern in IGNORED)
    ]
    if not files:
        raise UserError(f"--push_to_hub true: {folder} holds nothing to push")
    with tempfile.TemporaryDirectory(prefix="rayswift-push-") as staging:
        for path in files:
            link = Path(staging) / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        if needs_card(folder):
            card = Path(staging) / "README.md"
            card.unlink(missing_ok=True)
            card.write_text(model_card(folder, destination.name, checkpoint), encoding="utf-8")
        return destination.push(staging, folder, message)
