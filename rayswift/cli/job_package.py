"""What a job gets of the folder that it is submitted from, checked before anything is sent."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from rayswift import private
from rayswift.arguments.parsing import read_config
from rayswift.cluster.results import results_at, results_folder
from rayswift.errors import UserError
from rayswift.redaction import redact

logger = logging.getLogger("rayswift.cli.jobs")

#: Settings that name what a job reads.
_INPUTS = (
    "config_file", "dataset", "val_dataset", "cached_dataset", "cached_val_dataset", "custom_dataset_info",
    "external_plugins", "custom_register_path", "cache_files", "local_dataset", "model", "adapters", "base_model",
    "ref_model", "ref_adapters", "reward_model", "teacher_model", "orm_model", "prm_model", "deepspeed", "fsdp",
    "resume_from_checkpoint",
)  # fmt: skip
#: Settings that name where a job writes.
_RESULTS = {"infer": "result_path", "eval": "eval_output_dir"}
#: Commands that write their results to buckets too.
_TO_BUCKETS = ("pt", "sft", "rlhf")
_MIB = 2**20


def check_job(args: Any, working_dir: str) -> None:
    """Refuse a job whose results would be lost, whose folder is too big for Ray, or that would miss a file.

    Args:
        args: the command's arguments, read in ``working_dir``.
        working_dir: the folder that is sent.

    Raises:
        UserError: names the flag or the files, and what to do.
    """
    flag = _RESULTS.get(args.command, "output_dir")
    if path := getattr(args, flag, None):
        (results_at if args.command in _TO_BUCKETS else results_folder)(args, flag, path, in_job=True)
    package = private.job_package(working_dir)
    if package is None:
        return
    sizes, most = package
    total = sum(sizes.values())
    if total > most:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        named = ", ".join(f"{name} ({sizes[name] / _MIB:.1f} MiB)" for name in largest)
        raise UserError(f"--working_dir {working_dir}: {total / _MIB:.0f} MiB would be sent, and Ray takes "
                        f"{most / _MIB:.0f}; the largest of {len(sizes)} files are {named}. Name in .gitignore or "
                        ".rayignore what the job does not need, put data and models where every node reaches them "
                        "(shared storage, a bucket, a hub), or give --working_dir none")  # fmt: skip
    for flag, value in _named_inputs(args):
        _check_input(flag, value, working_dir, sizes)
    if args.config_file and os.path.isfile(args.config_file) and os.stat(args.config_file).st_mode & 0o077:
        settings = read_config(args.config_file)
        if redact(settings) != settings:
            logger.warning("%s: holds secrets, and other users can read it, here and on the nodes: chmod 600 it",
                           args.config_file)  # fmt: skip


def _named_inputs(args: Any) -> Iterator[tuple[str, str]]:
    """Flags and the paths that they may name, as far as these are relative."""
    from rayswift.data.names import parse_spec
    from rayswift.data.plugins import PluginFile

    for name in _INPUTS:
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            if not isinstance(value, str):
                continue
            path = parse_spec(value).name if "dataset" in name else value
            if name == "adapters":
                path = path.rpartition("=")[2]
            if path and "://" not in path and not os.path.isabs(os.path.expanduser(path)):
                yield name, path
                if name == "external_plugins":
                    for module, _ in PluginFile.read(path).modules:
                        yield name, os.path.join(os.path.dirname(path), module)


def _check_input(flag: str, path: str, working_dir: str, sent: dict[str, int]) -> None:
    """Refuse a path that is here and not in the package."""
    here, folder = os.path.join(working_dir, path), os.path.abspath(working_dir)
    if not os.path.exists(here):
        return  # a hub's name, or a mistake that the job will name
    inside = os.path.relpath(os.path.abspath(here), folder)
    name = "the file" if flag == "config_file" else f"--{flag}"
    if inside.split(os.sep)[0] == os.pardir:
        raise UserError(f"{name} {path}: lies outside --working_dir {working_dir}, which is all that the job gets; "
                        "give a --working_dir that holds it, or put it where every node reaches it")  # fmt: skip
    files = [inside] if os.path.isfile(here) else [
        os.path.relpath(os.path.join(parent, file), folder)
        for parent, _, names in os.walk(here) for file in names if not file.startswith(".")
    ]  # fmt: skip
    if missing := [file for file in files if file not in sent]:
        raise UserError(f"{name} {path}: a .gitignore or .rayignore keeps {missing[0]} from the job; take it out there "
                        "(RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1 sends what .gitignore names), or put it where every node "
                        "reaches it")  # fmt: skip
