"""The places that models and datasets come from, each behind its own client: two hubs, and file systems by URI.

In: a checked id or URI. Out: what there is (:meth:`HubRepo.listing`), the files (:meth:`HubRepo.download`), what the
client's cache has, and what its errors mean. Which files are wanted, locks and retries: :mod:`rayswift.hub`.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rayswift.errors import UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

#: What a hub says of a file: its size in bytes (0: not known) and a text that changes with its content.
Files = dict[str, tuple[int, str]]


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
class HubRepo:
    """A repository at a hub, or a folder under a URI. The subclasses know how to list it and how to fetch files."""

    flag: str
    kind: str
    name: str
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    title: ClassVar[str] = ""
    #: How to ask the other hub; what to set for another cache folder.
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


class ModelScope(HubRepo):
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


class HuggingFace(HubRepo):
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


class Uri(HubRepo):
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
            reader = filesystem.open_input_stream(f"{root}/{path}", compression=None)
            with reader, open(target + ".incomplete", "wb") as writer:
                shutil.copyfileobj(reader, writer, 8 << 20)
            if os.path.getsize(target + ".incomplete") != files[path][0]:
                raise ConnectionError(f"{path}: cut short, or changed while it was copied")
            os.replace(target + ".incomplete", target)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(copy, files))
        return folder


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what failed inside it (ModelScope's failed_files), and its causes."""
    while error is not None:
        yield error
        for inner in getattr(error, "failed_files", {}).values():
            yield from _chain(inner)
        error = error.__cause__ or error.__context__


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error of either client, or behind pyarrow's text of an S3 error."""
    for part in _chain(error):
        status = getattr(part, "status_code", None) or getattr(getattr(part, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        if match := re.search(r"(?:HTTP status|response code:?) (\d{3})|(ACCESS_DENIED)|(NO_SUCH_BUCKET)", str(part)):
            return int(match[1]) if match[1] else 403 if match[2] else 404
    return None


def is_transient(error: BaseException) -> bool:
    if (status := http_status(error)) is not None:
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


def first_line(repo: HubRepo, error: BaseException) -> str:
    """A short reason without secrets: the first line, without the token and without query strings."""
    parts = [part for part in _chain(error) if not hasattr(part, "failed_files")]
    codes = [part.errno for part in parts if isinstance(part, OSError) and part.errno]
    text = os.strerror(codes[-1]) if codes else next(iter(str(parts[0]).splitlines()), "") or type(parts[0]).__name__
    text = re.sub(r"\?[^\s'\")]*", "", text)
    return (text.replace(repo.token, "***") if repo.token else text)[:200]


def no_space_error(repo: HubRepo, reason: str) -> UserError:
    return UserError(f"{repo.label}: {reason} at {repo.cache_dir()}; free space or set {repo.cache_variable}")


def explained_error(repo: HubRepo, error: BaseException) -> UserError:
    """The one line for a failure of a client; names the flag and the mend."""
    status, reason = http_status(error), first_line(repo, error)
    codes = {part.errno for part in _chain(error) if isinstance(part, OSError)}
    at = f" at revision {repo.revision}" if repo.revision else ""
    if errno.ENOSPC in codes:
        return no_space_error(repo, "no space left")
    if status == 404 or (status == 401 and type(error).__name__ == "RepositoryNotFoundError" and repo.token):
        other = f", or try {repo.elsewhere.format(repo.name)}" if repo.elsewhere else ""
        return UserError(f"{repo.label}: {repo.title} has no such {repo.kind}{at}; check the spelling{other}")
    if status in (401, 403):
        mend = "this --hub_token may not read it" if repo.token else "check the spelling, or give --hub_token"
        return UserError(
            f"{repo.label}: {repo.title} refuses it{at} (HTTP {status}: private or gated); {mend}"
            " (a gated one also wants its terms accepted on its page)"
        )
    if codes & {errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST}:
        return UserError(f"{repo.label}: cannot write to {repo.cache_dir()}; set {repo.cache_variable}")
    again = "; run the command again, whole files are kept" if is_transient(error) else ""
    return UserError(f"{repo.label}: {repo.title} failed: {reason}{again}")
