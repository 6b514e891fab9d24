"""A hub on 127.0.0.1: what ModelScope, Hugging Face and S3 answer to their own clients when files are downloaded.

(Uploads: hub_uploads.py.)
Enough of the three HTTP interfaces that the unchanged clients list, download, resume and fail as they do outside:
listings, file bodies with ``Range``, tokens, gated and missing repositories, a connection cut in mid-file.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from hub_uploads import UploadRoutes, Uploads


@dataclass
class Repo:
    """One repository: its files, who may read it, and whether the first body of a file is cut half-way."""

    files: dict[str, bytes]
    token: str | None = None
    gated: bool = False
    cut_once: set[str] = field(default_factory=set)
    #: Seconds that each body takes, so that two processes surely overlap.
    delay: float = 0.0
    #: Sizes that the listing claims, where they are not the bodies' own.
    listed_sizes: dict[str, int] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for path, body in sorted(self.files.items()):
            digest.update(path.encode() + b"\0" + body)
        return digest.hexdigest()


class HubServer:
    """``repos[("model", "owner/name")]`` and ``buckets["name"]``, served until :meth:`close`."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.uploads = Uploads()
        #: Bodies sent, by path in the repository; and the Range headers that came with them.
        self.bodies: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.listings = 0
        #: How many of the next requests get status 503 (a hub under maintenance).
        self.unavailable = 0
        self.lock = threading.Lock()
        self.connections: list[socket.socket] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Go away as a machine does: no new connections, and those that clients kept open are cut."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(UploadRoutes, BaseHTTPRequestHandler):
    """Routes one request; ``server_hub`` is set by :class:`HubServer`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_hub: HubServer

    def setup(self) -> None:
        super().setup()
        self.server_hub.connections.append(self.connection)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route_upload()

    def do_PUT(self) -> None:
        self._route_upload()

    def _route(self) -> None:
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        if self.server_hub.unavailable:
            self.server_hub.unavailable -= 1
            self._send(503, b"down")
        elif parts[0] in self.server_hub.buckets:
            self._s3(parts[0], "/".join(parts[1:]), query)
        elif parts[:2] == ["openapi", "v1"]:
            self._openapi(parts[2:])
        elif parts == ["api", "whoami-v2"]:
            self._whoami()
        elif parts[:2] == ["api", "v1"]:
            self._modelscope(parts[2:], query)
        elif parts[0] == "api":
            self._huggingface_api(parts[1:])
        elif "resolve" in parts:
            self._huggingface_file(parts)
        else:
            self._send(404, b"{}")

    # ModelScope -------------------------------------------------------------------------------------------------

    def _modelscope(self, parts: list[str], query: dict[str, str]) -> None:
        if len(parts) == 3 and parts[0] == "models":
            found = self.server_hub.repos.get(("model", "/".join(parts[1:])))
            if found is None or (found.token and found.token != self._token()):
                return self._json(404, {"Code": 404, "Message": "not found", "Success": False})
        if len(parts) < 4 or parts[0] not in ("models", "datasets"):
            return self._json(200, {"Data": {}})
        repo = self.server_hub.repos.get((parts[0][:-1], "/".join(parts[1:3])))
        if repo is None or query.get("Revision", "master") != "master":
            return self._json(404, {"Code": 404, "Message": "not found", "Success": False})
        if repo.token and self._token() != repo.token:
            return self._json(403 if self._token() else 401, {"Code": 401, "Message": "no access", "Success": False})
        if parts[3:] == ["repo"]:
            path = query["FilePath"]
            return self._file(repo, path, {}) if path in repo.files else self._json(404, {"Code": 404})
        self.server_hub.listings += 1
        files = [
            {"Path": path, "Type": "blob", "Size": repo.listed_sizes.get(path, len(body)), "Sha256": _sha256(body)}
            for path, body in repo.files.items()
        ]
        size, page = int(query.get("PageSize", 0)), int(query.get("PageNumber", 1))
        if size:
            files = files[(page - 1) * size : page * size]
        self._json(200, {"Code": 200, "Success": True, "Data": {"Files": files}})

    # Hugging Face -----------------------------------------------------------------------------------------------

    def _huggingface_repo(self, kind: str, name: str, revision: str) -> Repo | None:
        """The repository, or None after the error that the hub would answer."""
        repo = self.server_hub.repos.get((kind, name))
        if repo is None or (repo.token and not repo.gated and self._token() != repo.token):
            self._send(404 if self._token() else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repo.token and self._token() != repo.token:
            self._send(403 if self._token() else 401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", repo.commit):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def _huggingface_api(self, parts: list[str]) -> None:
        name, verb = "/".join(parts[1:3]), parts[3] if len(parts) > 3 else ""
        repo = self._huggingface_repo(parts[0][:-1], name, parts[4] if len(parts) > 4 else "main")
        if repo is None:
            return
        self.server_hub.listings += 1
        if verb == "tree":
            return self._json(200, [_tree_entry(path, body) for path, body in repo.files.items()])
        self._json(200, {"id": name, "sha": repo.commit, "siblings": [{"rfilename": path} for path in repo.files]})

    def _huggingface_file(self, parts: list[str]) -> None:
        kind = "dataset" if parts[0] == "datasets" else "model"
        at = parts.index("resolve")
        repo = self._huggingface_repo(kind, "/".join(parts[at - 2 : at]), parts[at + 1])
        path = "/".join(parts[at + 2 :])
        if repo is None:
            return
        if path not in repo.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
        self._file(repo, path, {"X-Repo-Commit": repo.commit, "ETag": f'"{_etag(path, repo.files[path])}"'})

    # S3 ---------------------------------------------------------------------------------------------------------

    def _s3(self, bucket: str, key: str, query: dict[str, str]) -> None:
        objects = self.server_hub.buckets[bucket]
        if "list-type" in query:
            return self._s3_list(objects, bucket, query)
        if not key:
            return self._send(200, b"")
        if key not in objects:
            return self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        dated = {"ETag": f'"{_sha256(objects[key])[:32]}"', "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        self._file(Repo(objects), key, dated)

    def _s3_list(self, objects: dict[str, bytes], bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys = [key for key in sorted(objects) if key.startswith(prefix)]
        folders = set()
        if delimiter:
            folders = {prefix + key[len(prefix) :].split("/")[0] + "/" for key in keys if "/" in key[len(prefix) :]}
            keys = [key for key in keys if "/" not in key[len(prefix) :]]
        dated = "<LastModified>2025-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass>"
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(objects[key])}</Size>{dated}</Contents>" for key in keys
        )
        commons = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
        body = (
            f'<?xml version="1.0"?><ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>'
            f"<KeyCount>{len(keys) + len(folders)}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
            f"{contents}{commons}</ListBucketResult>"
        )
        self._send(200, body.encode(), {"Content-Type": "application/xml"})

    # Bodies -----------------------------------------------------------------------------------------------------

    def _token(self) -> str | None:
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        cookie = self.headers.get("Cookie", "")
        return bearer or (cookie.split("m_session_id=")[1].split(";")[0] if "m_session_id=" in cookie else None)

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _file(self, repo: Repo, path: str, headers: dict[str, str]) -> None:
        body, start, end = repo.files[path], 0, len(repo.files[path])
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, end) if last else end
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        if self.command != "GET":
            return self._send(200, body, {**headers, "Accept-Ranges": "bytes"})
        with self.server_hub.lock:
            self.server_hub.bodies[path] += 1
            self.server_hub.ranges += [wanted] if wanted else []
            cut = path in repo.cut_once
            repo.cut_once.discard(path)
        time.sleep(repo.delay)
        self.send_response(206 if wanted else 200)
        for name, value in {"Content-Length": str(end - start), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[start : start + (end - start) // 2] if cut else body[start:end])
        if cut:
            self.close_connection = True


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _etag(path: str, body: bytes) -> str:
    """Large files are named by sha256, text files by their git blob id, as on the hub."""
    return _sha256(body) if path.endswith(".safetensors") else hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _tree_entry(path: str, body: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(body), "oid": _etag(path, body)[:40]}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": _sha256(body), "size": len(body), "pointerSize": 134}
    return entry


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A server for the length of a ``with`` block."""
    server = HubServer()
    try:
        yield server
    finally:
        server.close()
