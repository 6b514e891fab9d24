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
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from rayswift.errors import UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

logger = logging.getLogger("rayswift.hub")

T = TypeVar("T")
#: What a hub says of a file: its size in bytes (0: not known) and a text that changes with its content.
Files = dict[str, tuple[int, str]]
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
        folder, chosen = _fetch(_source("--dataset", "dataset", dataset_id, revision, use_hf, token), choose)
    return [os.path.join(folder, path) for path in chosen]


def open_filesystem(uri: str) -> tuple[FileSystem, str]:
    """The pyarrow file system of a URI and the path inside it.

    ``oss://`` is the S3 API of ``OSS_ENDPOINT`` (or ``AWS_ENDPOINT_URL``) with ``OSS_ACCESS_KEY_ID`` and
    ``OSS_ACCESS_KEY_SECRET`` (or the AWS ones); ``s3://`` follows the AWS variables, ``AWS_ENDPOINT_URL`` too.
    """
    from pyarrow import fs

    scheme, _, path = uri.partition("://")
    env = os.environ.get
    endpoint = env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    if scheme.lower() == "oss":
        endpoint = env("OSS_ENDPOINT") or endpoint
        if not endpoint:
            raise UserError(f"{uri}: set OSS_ENDPOINT, for example https://oss-cn-hangzhou.aliyuncs.com")
    elif scheme.lower() != "s3" or not endpoint:
        return fs.FileSystem.from_uri(uri)
    protocol, _, host = endpoint.rpartition("://")
    return fs.S3FileSystem(
        access_key=env("OSS_ACCESS_KEY_ID") if scheme.lower() == "oss" else None,
        secret_key=env("OSS_ACCESS_KEY_SECRET") if scheme.lower() == "oss" else None,
        region=(env("OSS_REGION") if scheme.lower() == "oss" else None) or env("AWS_REGION") or "us-east-1",
        scheme=protocol or "https",
        endpoint_override=host.rstrip("/"),
        # Alibaba's OSS refuses path-style addresses; MinIO and other S3 servers expect them.
        force_virtual_addressing="aliyuncs.com" in host,
    ), path.rstrip("/")


@dataclass
class _Source:
    """A repository at a hub, or a folder under a URI. The subclasses know how to list it and how to fetch files."""

    flag: str
    kind: str
    name: str
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    title: ClassVar[str] = ""
    #: How to ask the other hub; what to set for another cache folder, and for a mirror.
    elsewhere: ClassVar[str] = ""
    cache_variable: ClassVar[str] = "RAYSWIFT_CACHE"

    @property
    def label(self) -> str:
        return f"{self.flag} {self.name}"

    def cache_dir(self) -> str:
        return os.path.expanduser(os.environ.get("RAYSWIFT_CACHE") or "~/.cache/rayswift")

    def offline(self) -> bool:
        return False

    def listing(self) -> tuple[str, Files]:
        """The commit (empty where the hub has none) and every file of the repository."""
        raise NotImplementedError

    def download(self, files: Files) -> str:
        """Fetch these files whole, or raise; files that are there already are kept. Returns their folder."""
        raise NotImplementedError

    def cached_folder(self) -> str | None:
        """The folder that the hub's client has in its cache from elsewhere, without network."""
        return None


class _ModelScope(_Source):
    title, elsewhere, cache_variable = "ModelScope", "Hugging Face: --use_hf true, or HF::{}", "MODELSCOPE_CACHE"
    endpoint: str | None = None

    def _api(self) -> Any:
        # modelscope.hub delegates to this client, and importing it there costs seconds because it imports torch.
        from modelscope_hub import HubApi, HubConfig

        return HubApi(HubConfig(token=self.token or None, endpoint=self.endpoint))

    def cache_dir(self) -> str:
        from modelscope_hub import HubConfig

        return str(HubConfig().cache_dir)

    def offline(self) -> bool:
        return os.environ.get("MODELSCOPE_OFFLINE", "").lower() in ("1", "true", "yes", "on")

    def listing(self) -> tuple[str, Files]:
        from modelscope_hub import NotExistError

        api = self._api()
        try:
            entries = api.list_repo_files(self.name, self.kind, revision=self.revision)
        except NotExistError:
            # Not on modelscope.cn: perhaps on modelscope.ai (a configured endpoint is trusted, and comes back).
            endpoint = api.resolve_endpoint_for_read(self.name, repo_type=self.kind)
            if endpoint == api.legacy.endpoint:
                raise
            self.endpoint = endpoint
            entries = self._api().list_repo_files(self.name, self.kind, revision=self.revision)
        blobs = [entry for entry in entries if entry.type != "tree"]
        return "", {entry.path: (entry.size, entry.sha256 or entry.blob_id or "") for entry in blobs}

    def download(self, files: Files) -> str:
        wanted = [
            {"Path": path, "Size": size or None, "Sha256": digest if len(digest) == 64 else None}
            for path, (size, digest) in files.items()
        ]
        return str(self._api().download_repo(self.name, self.kind, revision=self.revision, file_list=wanted))

    def cached_folder(self) -> str | None:
        from modelscope_hub import CacheNotFound

        try:
            return str(self._api().download_repo(self.name, self.kind, revision=self.revision, local_files_only=True))
        except CacheNotFound:
            return None


class _HuggingFace(_Source):
    title, elsewhere, cache_variable = "Hugging Face", "ModelScope: --use_hf false, or MS::{}", "HF_HOME"

    def _common(self) -> dict[str, Any]:
        return {"repo_type": self.kind, "revision": self.revision}

    def _endpoint(self) -> dict[str, Any]:
        return {"endpoint": os.environ.get("HF_ENDPOINT") or None, "token": self.token or None}

    def cache_dir(self) -> str:
        from huggingface_hub import constants

        # The client's own lock folder, which its cache tools pass over.
        return os.path.join(constants.HF_HUB_CACHE, ".locks")

    def offline(self) -> bool:
        from huggingface_hub import constants

        return bool(constants.HF_HUB_OFFLINE)

    def listing(self) -> tuple[str, Files]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(**self._endpoint())
        commit = api.repo_info(self.name, **self._common()).sha
        assert commit is not None
        entries = api.list_repo_tree(self.name, repo_type=self.kind, revision=commit, recursive=True)
        blobs = [entry for entry in entries if isinstance(entry, RepoFile)]
        return commit, {entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id) for entry in blobs}

    def download(self, files: Files) -> str:
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(path) for path in files]
        return snapshot_download(self.name, **self._common(), **self._endpoint(), allow_patterns=patterns)

    def cached_folder(self) -> str | None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            # A pattern that nothing matches: completeness is judged here, for the files that are wanted.
            return snapshot_download(self.name, **self._common(), local_files_only=True, allow_patterns=["."])
        except LocalEntryNotFoundError:
            return None


class _Uri(_Source):
    title = "the file system"

    def listing(self) -> tuple[str, Files]:
        from pyarrow import fs

        filesystem, root = open_filesystem(self.name)
        if filesystem.get_file_info(root).type != fs.FileType.Directory:
            raise UserError(f"{self.label}: no such folder")
        entries = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        blobs = [entry for entry in entries if entry.type == fs.FileType.File]
        return "", {
            os.path.relpath(entry.path, root): (entry.size, f"{entry.size}-{entry.mtime_ns}") for entry in blobs
        }

    def download(self, files: Files) -> str:
        from concurrent.futures import ThreadPoolExecutor

        filesystem, root = open_filesystem(self.name)
        folder = os.path.join(self.cache_dir(), "uri", hashlib.sha256(self.name.encode()).hexdigest()[:16])
        # The folder's last component is the run's and the served model's default name.
        folder = os.path.join(folder, os.path.basename(root) or "root")

        def copy(path: str) -> None:
            target = os.path.join(folder, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with filesystem.open_input_stream(f"{root}/{path}", compression=None) as reader:
                with open(target + ".incomplete", "wb") as writer:
                    shutil.copyfileobj(reader, writer, 8 << 20)
            if os.path.getsize(target + ".incomplete") != files[path][0]:
                raise ConnectionError(f"{path}: cut short, or changed while it was copied")
            os.replace(target + ".incomplete", target)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(copy, files))
        return folder


@dataclass
class _State:
    """What was fetched of one source, kept beside its lock: files that are whole are not hashed or asked for again."""

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

    return _fetch(_source(flag, "model", name, revision, use_hf, token), choose)[0]


def _local_path(name: str) -> str | None:
    """The absolute path, if there is such a file or folder (``org/..`` without ``org`` is none)."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else None


def _source(flag: str, kind: str, name: str, revision: str | None, use_hf: bool, token: str | None) -> _Source:
    """The source that ``name`` means, or a UserError if it can be neither a hub id nor a URI."""
    if is_remote_uri(name):
        return _Uri(flag, kind, name.rstrip("/"))
    prefix, _, rest = name.partition("::")
    if rest and prefix.upper() in ("HF", "MS"):
        name, use_hf = rest, prefix.upper() == "HF"
    if not name or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UserError(f"{flag} {name}: no such folder (and a hub id has the form owner/name)")
    if not _ID.fullmatch(name) or ".." in name:
        raise UserError(f"{flag} {name}: no such folder, and no hub id: owner/name of letters, digits and . _ - only")
    return (_HuggingFace if use_hf else _ModelScope)(flag, kind, name, revision, token)


def _fetch(source: _Source, choose: Chooser) -> tuple[str, list[str]]:
    """The folder that holds the chosen files of a source, and their sorted paths. One process per cache at a time."""
    with _lock(source) as state_path:
        state, away = _refresh(source, state_path)

        def ensure(paths: list[str]) -> None:
            missing = {path: state.files[path] for path in paths if not state.is_whole(path)}
            if missing and away:
                raise UserError(f"{away}; the cache lacks {', '.join(list(missing)[:3])}")
            if missing:
                _download(source, state, missing)
                _write_json(state_path, asdict(state))

        def read(path: str) -> str:
            ensure([path])
            return _read_text(state.folder, path)

        chosen = choose(sorted(state.files), read)
        ensure(chosen)
        if away:
            logger.warning("%s; using the copy in %s", away, state.folder)
            _check_shards(source.label, state.folder)
        return state.folder, chosen


def _refresh(source: _Source, state_path: str) -> tuple[_State, str]:
    """The state brought up to date with the hub's listing; with the cache alone, also a text that says why."""
    state = _read_state(state_path)
    away = f"{source.label}: offline mode is set" if source.offline() else ""
    if not away:
        try:
            # With a copy in the cache, a network that is away should not cost three rounds of waiting.
            commit, files = _with_retries(source, source.listing, 1 if state.files else TRIES)
        except UserError:
            raise
        except Exception as error:  # each client has its own classes of errors
            if not _is_transient(error):
                raise _explain(source, error) from None
            away = f"{source.label}: cannot reach {source.title} ({_first_line(source, error)})"
        else:
            if commit != state.commit:
                state = _State(commit)
            # A listing comes from outside: a path must stay inside the folder.
            state.files = {path: file for path, file in files.items() if path[0] != "/" and ".." not in path.split("/")}
            return state, ""
    if not state.files:
        folder = source.cached_folder()
        if folder is None:
            raise UserError(f"{away} and the cache has no copy; check network and proxy, or give a local folder")
        if glob.glob("**/*.incomplete", root_dir=folder, recursive=True):
            raise UserError(f"{away} and the copy in {folder} is unfinished; run again with the network")
        state = _State(folder=folder, files=_walk(folder))
        state.have = dict.fromkeys(state.files, "")
    return state, away


def _download(source: _Source, state: _State, missing: Files) -> None:
    needed = sum(size for size, _ in missing.values())
    os.makedirs(source.cache_dir(), exist_ok=True)
    if needed > (free := shutil.disk_usage(source.cache_dir()).free):
        raise _no_space(source, f"needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
    logger.info("%s: downloading %d files (%.2f GB) from %s", source.label, len(missing), needed / 1e9, source.title)
    try:
        state.folder = _with_retries(source, lambda: source.download(missing), TRIES)
    except UserError:
        raise
    except Exception as error:  # each client has its own classes of errors
        raise _explain(source, error) from None
    state.have.update((path, digest) for path, (_, digest) in missing.items())


@contextmanager
def _lock(source: _Source) -> Iterator[str]:
    """Hold the lock of this source in the cache folder; gives the path of its state file."""
    from filelock import FileLock, Timeout

    key = "\0".join((source.title, source.kind, source.name, source.revision or ""))
    path = os.path.join(source.cache_dir(), ".rayswift", hashlib.sha256(key.encode()).hexdigest()[:32] + ".json")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lock = FileLock(path.removesuffix("json") + "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s: waiting for another process on this machine that downloads it", source.label)
            lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise _explain(source, error) from None
        yield path  # a shared cache that may only be read needs no lock
        return
    try:
        yield path
    finally:
        lock.release()


def _with_retries(source: _Source, call: Callable[[], T], tries: int) -> T:
    for attempt in range(1, tries):
        try:
            return call()
        except Exception as error:  # each client has its own classes of errors
            if not _is_transient(error):
                raise
            logger.warning("%s: %s; try %d of %d", source.label, _first_line(source, error), attempt + 1, tries)
            time.sleep(RETRY_SECONDS * 2 ** (attempt - 1))
    return call()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what failed inside it (ModelScope's failed_files), and its causes."""
    while error is not None:
        yield error
        for inner in getattr(error, "failed_files", {}).values():
            yield from _chain(inner)
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of either client, or behind pyarrow's text of an S3 error."""
    for part in _chain(error):
        status = getattr(part, "status_code", None) or getattr(getattr(part, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        if match := re.search(r"(?:HTTP status|response code:?) (\d{3})|(ACCESS_DENIED)|(NO_SUCH_BUCKET)", str(part)):
            return int(match[1]) if match[1] else 403 if match[2] else 404
    return None


def _is_transient(error: BaseException) -> bool:
    if (status := _status(error)) is not None:
        return status in (408, 425, 429) or status >= 500
    parts = list(_chain(error))
    if any(isinstance(part, OSError) and part.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES) for part in parts):
        return False
    network = ("httpx2", "httpx", "requests", "urllib3")
    return any(
        isinstance(part, (ConnectionError, TimeoutError))
        or type(part).__module__.partition(".")[0] in network
        or getattr(part, "retryable", False)
        or "Consistency check failed" in str(part)  # huggingface_hub, when a body ends early
        or "NETWORK_CONNECTION" in str(part)  # pyarrow's S3
        for part in parts
    )


def _first_line(source: _Source, error: BaseException) -> str:
    """A short reason without secrets: the first line, without the token and without query strings."""
    parts = [part for part in _chain(error) if not hasattr(part, "failed_files")]
    codes = [part.errno for part in parts if isinstance(part, OSError) and part.errno]
    text = os.strerror(codes[-1]) if codes else next(iter(str(parts[0]).splitlines()), "") or type(parts[0]).__name__
    text = re.sub(r"\?[^\s'\")]*", "", text)
    return (text.replace(source.token, "***") if source.token else text)[:200]


def _no_space(source: _Source, reason: str) -> UserError:
    return UserError(f"{source.label}: {reason} at {source.cache_dir()}; free space or set {source.cache_variable}")


def _explain(source: _Source, error: BaseException) -> UserError:
    """The one line for a failure of a client; names the flag and the mend."""
    status, reason = _status(error), _first_line(source, error)
    codes = {part.errno for part in _chain(error) if isinstance(part, OSError)}
    at = f" at revision {source.revision}" if source.revision else ""
    if errno.ENOSPC in codes:
        return _no_space(source, "no space left")
    if status == 404 or (status == 401 and type(error).__name__ == "RepositoryNotFoundError" and source.token):
        other = f", or try {source.elsewhere.format(source.name)}" if source.elsewhere else ""
        return UserError(f"{source.label}: {source.title} has no such {source.kind}{at}; check the spelling{other}")
    if status in (401, 403):
        mend = "this --hub_token may not read it" if source.token else "check the spelling, or give --hub_token"
        return UserError(
            f"{source.label}: {source.title} refuses it{at} (HTTP {status}: private or gated); {mend}"
            " (a gated one also wants its terms accepted on its page)"
        )
    if codes & {errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST}:
        return UserError(f"{source.label}: cannot write to {source.cache_dir()}; set {source.cache_variable}")
    again = "; run the command again, whole files are kept" if _is_transient(error) else ""
    return UserError(f"{source.label}: {source.title} failed: {reason}{again}")


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
            shards = set(json.loads(_read_text(folder, "model.safetensors.index.json"))["weight_map"].values())
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
        values = json.loads(_read_text("", path))
        values["files"] = {name: (size, digest) for name, (size, digest) in values["files"].items()}
        return _State(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return _State()


def _write_json(path: str, value: Any) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(path + ".tmp", path)


# Which files of a dataset repository are a subset and a split. ---------------------------------------------------

#: Data formats, the preferred first where a repository holds as many files of each.
_FORMATS = {"parquet": (".parquet",), "json": (".jsonl", ".json"), "csv": (".csv",), "txt": (".txt",)}
_NOT_DATA = re.compile(r"(dataset_infos?|dataset_dict|configuration|config|state|requirements|licen[sc]e|readme)\.\w+")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass
class _Config:
    """One subset as the repository declares it: split → patterns, or None where only its folder is given."""

    name: str
    is_default: bool = False
    folder: str = ""
    splits: dict[str, list[str]] | None = None


def choose_data_files(
    dataset_id: str, paths: list[str], read: Callable[[str], str], *, subset: str | None = None, split: str = "train"
) -> list[str]:
    """The data files among ``paths`` that are this subset and split, sorted; see :func:`resolve_dataset`."""
    label = f"--dataset {dataset_id}"
    data = [path for path in paths if _format_of(path) and not _NOT_DATA.fullmatch(os.path.basename(path).lower())]
    configs = _front_matter_configs(label, read("README.md")) if "README.md" in paths else []
    structure = dataset_id.rpartition("::")[2].rpartition("/")[2] + ".json"
    if not configs and structure in paths:
        configs = _structure_configs(read(structure))
        data = [path for path in data if not configs or path != structure]
    if not data:
        script = any(path.endswith(".py") for path in paths)
        why = "its data is behind a loading script, which is never run" if script else "no data file there"
        raise UserError(f"{label}: {why}; give files in .jsonl .json .csv .txt or .parquet (plain, .gz or .zst)")
    if configs:
        config = _choose_config(label, dataset_id, configs, subset)
        if config.splits is not None:
            return _declared_files(label, config, data, split)
        data = [path for path in data if path.startswith(config.folder)]
    elif subset and subset != "default":
        data = _subset_by_name(label, data, subset)
    return _one_format(label, _split_by_name(label, data, split))


def _format_of(path: str) -> str | None:
    base = re.sub(r"\.(gz|zst)$", "", path.lower())
    return next((name for name, suffixes in _FORMATS.items() if base.endswith(suffixes)), None)


def _front_matter_configs(label: str, readme: str) -> list[_Config]:
    """``configs`` of the YAML between the ``---`` lines that open a README (Hugging Face's and ModelScope's format)."""
    import yaml

    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme, re.DOTALL)
    try:
        listed = (yaml.safe_load(match[1]) or {}).get("configs") if match else None
    except (yaml.YAMLError, AttributeError):
        logger.warning("%s: the YAML at the head of its README.md is broken; going by file names", label)
        return []
    configs = []
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, dict) or not (entry.get("data_files") or entry.get("data_dir")):
            continue
        folder = str(entry.get("data_dir") or "").removeprefix("./").rstrip("/")
        config = _Config(str(entry.get("config_name", "default")), bool(entry.get("default")), folder and folder + "/")
        for given_split, path in _split_items(entry.get("data_files")):
            config.splits = config.splits or {}
            config.splits.setdefault(given_split, []).append(config.folder + path.removeprefix("./"))
        configs.append(config)
    return configs


def _split_items(data_files: Any) -> Iterator[tuple[str, str]]:
    """``data_files`` in each of its spellings: a pattern, patterns, {split: patterns}, [{split, path}]."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for item in data_files if isinstance(data_files, list) else [data_files] if data_files else []:
        path = item.get("path") if isinstance(item, dict) else item
        for pattern in path if isinstance(path, list) else [path]:
            yield str(item.get("split", "train")) if isinstance(item, dict) else "train", str(pattern)


def _structure_configs(text: str) -> list[_Config]:
    """ModelScope's ``<name>.json``: ``{subset: {split: {"meta": data file, "file": archive}}}``; else no configs."""
    try:
        return [
            _Config(name, name == "default", "", {split: [entry["meta"]] for split, entry in splits.items()})
            for name, splits in json.loads(text).items()
        ]
    except (ValueError, AttributeError, TypeError, KeyError):
        return []  # a data file that happens to carry the repository's name


def _choose_config(label: str, dataset_id: str, configs: list[_Config], subset: str | None) -> _Config:
    names = ", ".join(config.name for config in configs)
    if subset:
        chosen = [config for config in configs if config.name == subset]
        if not chosen and subset != "default":
            raise UserError(f"{label}: no subset {subset!r}; there are {names}")
    else:
        chosen = []
    chosen = chosen or [c for c in configs if c.is_default] or [c for c in configs if c.name == "default"]
    if not chosen and len(configs) > 1:
        raise UserError(f"{label}: has several subsets; choose one as {dataset_id}:NAME from {names}")
    return (chosen or configs)[0]


def _declared_files(label: str, config: _Config, data: list[str], split: str) -> list[str]:
    assert config.splits is not None
    if split not in config.splits:
        raise UserError(f"{label}: subset {config.name!r} has no split {split!r}; there are {', '.join(config.splits)}")
    patterns = [_glob_regex(pattern) for pattern in config.splits[split]]
    found = [path for path in data if any(pattern.fullmatch(path) for pattern in patterns)]
    if not found:
        raise UserError(
            f"{label}: {', '.join(config.splits[split])} of subset {config.name!r} are not in the repository as"
            " .jsonl .json .csv .txt or .parquet; choose another subset or give the files"
        )
    return found


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """Hub globs: ``*`` stays in a folder, ``**`` does not, a folder means everything in it."""
    parts = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern.rstrip("/"))
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(known.get(part) or (part if len(part) > 1 else re.escape(part)) for part in parts)
    is_folder = not set(pattern.rpartition("/")[2]) & set("*?[")
    return re.compile(regex + "(?:/.*)?" if is_folder else regex)


def _subset_by_name(label: str, data: list[str], subset: str) -> list[str]:
    """Files in a folder of the subset's name, else files named after it (``name.jsonl``, ``name-00000.parquet``)."""
    named = re.compile(rf"(?:.*/)?{re.escape(subset)}[-_.][^/]*")
    found = [path for path in data if subset in path.split("/")[:-1]] or [p for p in data if named.fullmatch(p)]
    if not found:
        known = sorted({path.split("/")[-2] for path in data if "/" in path} or {path.split(".")[0] for path in data})
        raise UserError(f"{label}: no subset {subset!r}; there are {', '.join(known[:20])}")
    return found


def _split_by_name(label: str, data: list[str], split: str) -> list[str]:
    """Files whose name, or else nearest folder, says the split; files that say none are the train split."""
    words = {split: _SPLIT_WORDS.get(split, (split,)), **{k: v for k, v in _SPLIT_WORDS.items() if k != split}}
    alternatives = {name: "|".join(map(re.escape, spelt)) for name, spelt in words.items()}
    patterns = {name: re.compile(rf"(?<![a-z0-9])(?:{spelt})(?![a-z])") for name, spelt in alternatives.items()}

    def split_of(path: str) -> str | None:
        for part in reversed(path.lower().split("/")):
            for name, pattern in patterns.items():
                if pattern.search(part):
                    return name
        return None

    found = [path for path in data if split_of(path) == split]
    if not found and split == "train":
        found = [path for path in data if split_of(path) is None]
    if not found:
        known = sorted({split_of(path) or "train" for path in data})
        raise UserError(f"{label}: no split {split!r}; there are {', '.join(known)}")
    return found


def _one_format(label: str, data: list[str]) -> list[str]:
    """The same rows are often there in several formats: keep the one with most files, and .txt only if alone."""
    groups: dict[str, list[str]] = {name: [p for p in data if _format_of(p) == name] for name in _FORMATS}
    ranked = sorted((n for n in groups if groups[n]), key=lambda n: (n == "txt", -len(groups[n])))
    if len(ranked) > 1:
        logger.warning("%s: holds %s; taking the %s files", label, " and ".join(ranked), ranked[0])
    return sorted(groups[ranked[0]])
