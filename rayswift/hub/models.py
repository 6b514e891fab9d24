"""Model and dataset ids to local folders and files: ModelScope (default), Hugging Face, local paths, ``s3://`` …

In: what the user typed after ``--model``, ``--adapters`` or ``--dataset``. Out: absolute local paths. The two hubs'
own clients do the transfers (resume, checks, progress bars, caches that other tools share); this module decides which
files are wanted, lets one process per machine download while the others wait, works from the cache when the network
is away, and turns every failure into one line. Nothing from a repository is ever run.

Environment: ``MODELSCOPE_ENDPOINT`` (or ``MODELSCOPE_DOMAIN``), ``MODELSCOPE_CACHE``, ``MODELSCOPE_API_TOKEN``,
``MODELSCOPE_OFFLINE=1``; ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE=1`` (cache, token and offline
mode are read when huggingface_hub is imported); ``RAYSWIFT_CACHE`` (copies of ``s3://`` … folders).
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from rayswift.errors import UserError
from rayswift.files import parse_json, write_whole
from rayswift.hub.clients import (
    Files,
    HubRepo,
    HuggingFace,
    ModelScope,
    Uri,
    explained_error,
    first_line,
    is_transient,
    no_space_error,
    open_filesystem,
)
from rayswift.hub.datasets import choose_data_files

__all__ = ["is_remote_uri", "open_filesystem", "resolve_adapter", "resolve_dataset", "resolve_model"]

logger = logging.getLogger("rayswift.hub")

T = TypeVar("T")
#: Gets the listed paths and a reader of small text files; returns the paths that are wanted.
Chooser = Callable[[list[str], Callable[[str], str]], list[str]]

#: Tries per download, as in SWIFT. The ModelScope client makes four of its own per listing.
TRIES = 3
#: The pause after the first failed try; it doubles.
RETRY_SECONDS = 1.0
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: Other frameworks' weights and second copies of the same weights (the list of SWIFT's downloader, extended).
_OTHER_FRAMEWORKS = (
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "*.gguf", "*.zip", "*.nemo", "*.mlmodel"),
    *("consolidated*", "original/*", "onnx/*", "openvino/*", "coreml/*", "*.mlpackage/*", "metal/*"),
)


def is_remote_uri(path: str) -> bool:
    """Whether ``path`` names a file system by scheme: ``s3://``, ``oss://``, ``gs://``, ``hdfs://``, ``file://``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    use_hf: bool = False,
    token: str | None = None,
    ignore_patterns: list[str] | None = None,
) -> str:
    """The local folder, with a config.json, of a model id, path or URI (``--model``); downloads what is missing.

    Args:
        model: an existing folder (wins), ``[HF::|MS::]owner/name``, or a folder URI such as ``s3://bucket/folder``.
        revision: branch, tag or commit (``--model_revision``); None is the hub's default branch.
        use_hf: without a prefix, Hugging Face instead of ModelScope (``--use_hf``).
        token: ``--hub_token``; None takes the client's own (environment, or stored at login).
        ignore_patterns: more file patterns to leave out, e.g. ``["*.safetensors"]`` for a tokenizer alone.

    Raises:
        UserError: no such folder or id, no network, no permission, no space, not a model.
    """
    return _resolve_folder("--model", ("config.json",), model, revision, use_hf, token, ignore_patterns)


def resolve_adapter(
    adapter: str, *, revision: str | None = None, use_hf: bool = False, token: str | None = None
) -> str:
    """Like :func:`resolve_model` for ``--adapters``: a folder with adapter_config.json, or a full model's."""
    return _resolve_folder("--adapters", ("adapter_config.json", "config.json"), adapter, revision, use_hf, token, None)


def resolve_dataset(
    dataset_id: str,
    *,
    use_hf: bool = False,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    token: str | None = None,
) -> list[str]:
    """The local data files of one subset and split of a hub dataset, sorted (``--dataset``); downloads only those.

    What belongs to a subset and split is read from the ``configs`` of the README's front matter, else from a
    ModelScope ``<name>.json`` structure file, else from file and folder names. A local clone works as well.

    Raises:
        UserError: as :func:`resolve_model`; or no such subset or split, or no data file in the repository.
    """

    def choose(paths: list[str], read: Callable[[str], str]) -> list[str]:
        return choose_data_files(dataset_id, paths, read, subset=subset, split=split)

    local = _local_path(dataset_id)
    if local:
        folder, paths = os.path.split(local) if os.path.isfile(local) else (local, "")
        chosen = [paths] if paths else choose(sorted(_walk(local)), lambda path: _read_text(local, path))
    elif is_remote_uri(dataset_id):
        raise UserError(f"--dataset {dataset_id}: not a hub id; data under a URI is read in place")
    else:
        folder, chosen = _fetch(_repo("--dataset", "dataset", dataset_id, revision, use_hf, token), choose)
    return [os.path.join(folder, path) for path in chosen]


@dataclass
class _State:
    """What was fetched of one repo, kept beside its lock: files that are whole are not hashed or asked for again."""

    commit: str = ""
    folder: str = ""
    files: Files = field(default_factory=dict)
    #: Path → what identified the content that was downloaded and checked.
    have: dict[str, str] = field(default_factory=dict)

    def is_whole(self, path: str) -> bool:
        size, digest = self.files[path]
        target = os.path.join(self.folder, path)
        return self.have.get(path) == digest and os.path.isfile(target) and size in (0, os.path.getsize(target))


def _resolve_folder(
    flag: str,
    markers: tuple[str, ...],
    name: str,
    revision: str | None,
    use_hf: bool,
    token: str | None,
    ignore_patterns: list[str] | None,
) -> str:
    local = _local_path(name)
    if local:
        if not os.path.isdir(local):
            raise UserError(f"{flag} {name}: is a file; give the folder that holds {markers[0]}")
        _check_folder(f"{flag} {name}", _walk(local), markers)
        _check_shards(f"{flag} {name}", local)
        return local
    ignored = [*_OTHER_FRAMEWORKS, *(p + "*" if p.endswith("/") else p for p in ignore_patterns or [])]

    def choose(paths: list[str], read: Callable[[str], str]) -> list[str]:
        _check_folder(f"{flag} {name}", paths, markers)
        safe = {os.path.dirname(path) for path in paths if path.endswith(".safetensors")}
        return [
            path
            for path in paths
            if not any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
            and not (path.endswith(_PICKLES) and ("" in safe or os.path.dirname(path) in safe))
        ]

    return _fetch(_repo(flag, "model", name, revision, use_hf, token), choose)[0]


def _local_path(name: str) -> str | None:
    """The absolute path, if there is such a file or folder (``org/..`` without ``org`` is none)."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else None


def _repo(flag: str, kind: str, name: str, revision: str | None, use_hf: bool, token: str | None) -> HubRepo:
    """The repo that ``name`` means, or a UserError if it can be neither a hub id nor a URI."""
    if is_remote_uri(name):
        return Uri(flag, kind, name.rstrip("/"))
    prefix, _, rest = name.partition("::")
    if rest and prefix.upper() in ("HF", "MS"):
        name, use_hf = rest, prefix.upper() == "HF"
    if not name or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UserError(f"{flag} {name}: no such folder (and a hub id has the form owner/name)")
    if not _ID.fullmatch(name) or ".." in name:
        raise UserError(f"{flag} {name}: no such folder, and no hub id: owner/name of letters, digits and . _ - only")
    return (HuggingFace if use_hf else ModelScope)(flag, kind, name, revision, token)


def _fetch(repo: HubRepo, choose: Chooser) -> tuple[str, list[str]]:
    """The folder that holds the chosen files of a repo, and their sorted paths. One process per cache at a time."""
    with _lock(repo) as state_path:
        state, away = _refresh(repo, state_path)

        def ensure(paths: list[str]) -> None:
            missing = {path: state.files[path] for path in paths if not state.is_whole(path)}
            if missing and away:
                raise UserError(f"{away}; the cache lacks {', '.join(list(missing)[:3])}")
            if missing:
                _download(repo, state, missing)
                write_whole(state_path, json.dumps(asdict(state)))

        def read(path: str) -> str:
            ensure([path])
            return _read_text(state.folder, path)

        chosen = choose(sorted(state.files), read)
        ensure(chosen)
        if away:
            logger.warning("%s; using the copy in %s", away, state.folder)
            _check_shards(repo.label, state.folder)
        return state.folder, chosen


def _refresh(repo: HubRepo, state_path: str) -> tuple[_State, str]:
    """The state brought up to date with the hub's listing; with the cache alone, also a text that says why."""
    state = _read_state(state_path)
    away = f"{repo.label}: offline mode is set" if repo.offline() else ""
    if not away:
        try:
            # With a copy in the cache, a network that is away should not cost three rounds of waiting.
            commit, files = _with_retries(repo, repo.listing, 1 if state.files else TRIES)
        except UserError:
            raise
        except Exception as error:  # each client has its own classes of errors
            if not is_transient(error):
                raise explained_error(repo, error) from None
            away = f"{repo.label}: cannot reach {repo.title} ({first_line(repo, error)})"
        else:
            if commit != state.commit:
                state = _State(commit)
            # A listing comes from outside: a path must stay inside the folder.
            state.files = {path: file for path, file in files.items() if path[0] != "/" and ".." not in path.split("/")}
            return state, ""
    if not state.files:
        folder = repo.cached_folder()
        if folder is None:
            raise UserError(f"{away} and the cache has no copy; check network and proxy, or give a local folder")
        if glob.glob("**/*.incomplete", root_dir=folder, recursive=True):
            raise UserError(f"{away} and the copy in {folder} is unfinished; run again with the network")
        state = _State(folder=folder, files=_walk(folder))
        state.have = dict.fromkeys(state.files, "")
    return state, away


def _download(repo: HubRepo, state: _State, missing: Files) -> None:
    needed = sum(size for size, _ in missing.values())
    os.makedirs(repo.cache_dir(), exist_ok=True)
    if needed > (free := shutil.disk_usage(repo.cache_dir()).free):
        raise no_space_error(repo, f"needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
    logger.info("%s: downloading %d files (%.2f GB) from %s", repo.label, len(missing), needed / 1e9, repo.title)
    try:
        state.folder = _with_retries(repo, lambda: repo.download(missing), TRIES)
    except UserError:
        raise
    except Exception as error:  # each client has its own classes of errors
        raise explained_error(repo, error) from None
    state.have.update((path, digest) for path, (_, digest) in missing.items())


@contextmanager
def _lock(repo: HubRepo) -> Iterator[str]:
    """Hold the lock of this repo in the cache folder; gives the path of its state file."""
    from filelock import FileLock, Timeout

    key = "\0".join((repo.title, repo.kind, repo.name, repo.revision or ""))
    path = os.path.join(repo.cache_dir(), ".rayswift", hashlib.sha256(key.encode()).hexdigest()[:32] + ".json")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lock = FileLock(path.removesuffix("json") + "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s: waiting for another process on this machine that downloads it", repo.label)
            lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise explained_error(repo, error) from None
        yield path  # a shared cache that may only be read needs no lock
        return
    try:
        yield path
    finally:
        lock.release()


def _with_retries(repo: HubRepo, call: Callable[[], T], tries: int) -> T:
    for attempt in range(1, tries):
        try:
            return call()
        except Exception as error:  # each client has its own classes of errors
            if not is_transient(error):
                raise
            logger.warning("%s: %s; try %d of %d", repo.label, first_line(repo, error), attempt + 1, tries)
            time.sleep(RETRY_SECONDS * 2 ** (attempt - 1))
    return call()


def _check_folder(label: str, paths: Any, markers: tuple[str, ...]) -> None:
    if any(marker in paths for marker in markers):
        return
    checkpoints = sorted({path.split("/")[0] for path in paths if path.startswith("checkpoint-")})
    hint = f"; did you mean its {checkpoints[-1]}?" if checkpoints else ""
    raise UserError(
        f"{label}: no {' or '.join(markers)} there{hint} (a model folder holds config.json, tokenizer files and"
        " *.safetensors; an adapter folder adapter_config.json and adapter_model.safetensors)"
    )


def _check_shards(label: str, folder: str) -> None:
    """A copy that was interrupted lacks shards that its own index lists."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(index):
        try:
            shards = set(parse_json(_read_text(folder, "model.safetensors.index.json"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{label}: model.safetensors.index.json is broken; copy it again") from None
        missing = sorted(shard for shard in shards if not os.path.isfile(os.path.join(folder, shard)))
        if missing:
            raise UserError(f"{label}: {len(missing)} of {len(shards)} weight files are missing, such as {missing[0]}")


def _walk(folder: str) -> Files:
    """The files below a folder, without hidden ones and unfinished downloads."""
    found: Files = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(parent, name)
            if not name.startswith(".") and not name.endswith(".incomplete") and os.path.isfile(path):
                found[os.path.relpath(path, folder)] = (os.path.getsize(path), "")
    return found


def _read_text(folder: str, path: str) -> str:
    with open(os.path.join(folder, path), encoding="utf-8", errors="replace") as file:
        return file.read()


def _read_state(path: str) -> _State:
    """The state file; an absent or broken one means that everything is looked at anew."""
    try:
        values = parse_json(_read_text("", path))
        values["files"] = {name: (size, digest) for name, (size, digest) in values["files"].items()}
        return _State(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return _State()
