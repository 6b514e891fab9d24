"""Where the results of a command go, here and in a Ray job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rayswift import private
from rayswift.errors import UserError


def results_at(args: Any, flag: str, path: str, *, in_job: bool | None = None) -> str:
    """Where results with this path go: a relative one below ``--storage_path`` where that is given, else below the
    current folder, absolute.

    Args:
        args: the command's arguments.
        flag: what the path is named by, for messages.
        path: a path or a URI.
        in_job: whether the command runs as a Ray job; None asks the environment.

    Raises:
        UserError: a relative path in a Ray job without ``--storage_path``: Ray removes the folder of a job.
    """
    path = path if "://" in path else os.path.expanduser(path)
    if "://" in path or os.path.isabs(path):
        return path.rstrip("/") or "/"
    base = os.path.expanduser(args.storage_path or "")
    if "://" in base:
        return f"{base.rstrip('/')}/{path.rstrip('/')}"
    if not os.path.isabs(base) and (private.in_ray_job() if in_job is None else in_job):
        raise UserError(f"--{flag} {path}: Ray removes the folder that a job runs in, with what is written there; give "
                        "an absolute --storage_path or path, on storage that the nodes share")  # fmt: skip
    return os.path.abspath(os.path.join(base, path))


def results_folder(args: Any, flag: str, path: str, *, in_job: bool | None = None) -> Path:
    """As :func:`results_at`, for results that are written to a file system.

    Raises:
        UserError: also where they would go to a bucket.
    """
    found = results_at(args, flag, path, in_job=in_job)
    if "://" in found:
        raise UserError(f"--{flag} {found}: rayswift {args.command} writes to a file system; give --{flag} an absolute "
                        "path there, which may be storage that the nodes share")  # fmt: skip
    return Path(found)
