"""The writing half of the hub of the tests: accounts, new repositories, large files and commits, as the unchanged
clients of ModelScope and Hugging Face ask for them."""

from __future__ import annotations

import base64
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from hub_server import HubServer, Repo


@dataclass
class Account:
    """Whom a token belongs to, and whether it may write (to the account's own name and organisations)."""

    name: str
    write: bool = True
    organisations: tuple[str, ...] = ()

    def owns(self, repository: str) -> bool:
        return self.write and repository.split("/")[0] in (self.name, *self.organisations)


@dataclass
class Uploads:
    """What was sent: large files by sha256, requests by kind, commit messages; and when to break off."""

    accounts: dict[str, Account] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    #: How often the body of each large file arrived whole.
    sent: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    #: After this many large files every further request with a body is cut (None: never).
    cut_after: int | None = None
    _begun: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def cuts(self, is_large: bool) -> bool:
        """Whether a request is cut. Large files are counted as they begin: clients send several at a time."""
        if self.cut_after is None:
            return False
        with self._lock:
            self._begun += is_large
            return self._begun > self.cut_after if is_large else len(self.sent) >= self.cut_after


class UploadRoutes:
    """Mixed into the server's handler, which answers with ``_json`` and knows tokens."""

    server_hub: HubServer
    path: str
    headers: Any
    rfile: Any

    def _route_upload(self) -> None:
        uploads = self.server_hub.uploads
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if uploads.cuts(is_large=parts[0] == "blobs"):
            self.close_connection = True
            self.connection.close()  # type: ignore[attr-defined]
            return
        body = self._body()
        if parts[0] == "blobs":
            self._take_blob(parts[1], body)
        elif parts[:2] == ["api", "v1"]:
            self._modelscope_write(parts[2:], json.loads(body or b"{}"))
        elif parts == ["api", "validate-yaml"]:
            self._json(200, {"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            self._huggingface_create(json.loads(body))
        elif parts[0] == "api":
            self._huggingface_write("/".join(parts[2:4]), parts[4], body)
        else:  # /owner/name.git/info/lfs/objects/batch
            self._lfs_batch("/".join(parts[:2]).removesuffix(".git"), json.loads(body), wrapped=False)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return bytes(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _account(self) -> Account | None:
        return self.server_hub.uploads.accounts.get(self._token() or "")  # type: ignore[attr-defined]

    def _writable(self, name: str) -> Repo | None:
        """The repository, or None after the refusal that a hub answers."""
        account, repo = self._account(), self.server_hub.repos.get(("model", name))
        if account is None:
            self._json(401, {"error": "Invalid credentials", "Code": 401, "Message": "user not logged in"})
        elif repo is None:
            self._json(404, {"error": "Repository not found", "Message": "not found"}, {"X-Error-Code": "RepoNotFound"})
        elif not account.owns(name):
            self._json(403, {"error": f"no write access to {name}", "Code": 403, "Message": "no permission"})
        else:
            return repo
        return None

    # Large files ------------------------------------------------------------------------------------------------

    def _lfs_batch(self, name: str, request: dict[str, Any], *, wrapped: bool) -> None:
        if self._writable(name) is None:
            return
        objects = []
        for entry in request["objects"]:
            href = f"{self.server_hub.url}/blobs/{entry['oid']}"
            known = entry["oid"] in self.server_hub.uploads.blobs
            objects.append({**entry, **({} if known else {"actions": {"upload": {"href": href}}})})
        answer = {"transfer": "basic", "objects": objects}
        self._json(200, {"Code": 200, "Success": True, "Data": answer} if wrapped else answer)

    def _take_blob(self, oid: str, body: bytes) -> None:
        import hashlib

        assert hashlib.sha256(body).hexdigest() == oid
        with self.server_hub.lock:
            self.server_hub.uploads.blobs[oid] = body
            self.server_hub.uploads.sent[oid] += 1
        self._json(200, {"Code": 200})

    # Hugging Face -----------------------------------------------------------------------------------------------

    def _whoami(self) -> None:
        account = self._account()
        if account is None:
            return self._json(401, {"error": "Invalid username or password."})
        self._json(200, {"name": account.name, "type": "user", "orgs": []})

    def _huggingface_create(self, request: dict[str, Any]) -> None:
        account = self._account()
        name = f"{request.get('organization') or (account.name if account else '')}/{request['name']}"
        if account is None:
            return self._json(401, {"error": "Invalid username or password."})
        if ("model", name) in self.server_hub.repos:
            return self._json(409, {"error": "You already created this model repo", "url": self._page(name)})
        if not account.owns(name):
            return self._json(403, {"error": f"You don't have the rights to create a model under {name}"})
        self._new_repo(name, request.get("private") is True or request.get("visibility") == "private")
        self._json(200, {"url": self._page(name), "name": name})

    def _page(self, name: str) -> str:
        return f"{self.server_hub.url}/{name}"

    def _huggingface_write(self, name: str, verb: str, body: bytes) -> None:
        repo = self._writable(name)
        if repo is None:
            return
        if verb == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["size"] > 4096 else "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json(200, {"files": files})
        for line in filter(None, body.splitlines()):
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.server_hub.uploads.messages.append(value["summary"])
            elif item["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repo.files[value["path"]] = self.server_hub.uploads.blobs[value["oid"]]
        commit = {"commitUrl": f"{self._page(name)}/commit/{repo.commit}", "commitOid": repo.commit, "success": True}
        self._json(200, {**commit, "pullRequestUrl": None})

    # ModelScope -------------------------------------------------------------------------------------------------

    def _openapi(self, parts: list[str]) -> None:
        account = self._account()
        if parts == ["users", "me"]:
            if account is None:
                return self._json(401, {"success": False, "code": "InvalidAuthentication", "message": "invalid token"})
            return self._json(200, {"success": True, "data": {"username": account.name}})
        self._json(404, {"success": False, "code": "ResourceNotFound", "message": "not found"})

    def _modelscope_write(self, parts: list[str], request: dict[str, Any]) -> None:
        if parts == ["models"]:
            return self._modelscope_create(request)
        name, verb = "/".join(parts[2:4]), parts[4]
        if verb == "info":
            return self._lfs_batch(name, request, wrapped=True)
        repo = self._writable(name)
        if repo is None:
            return
        self.server_hub.uploads.messages.append(request["commit_message"])
        for action in request["actions"]:
            large = action["type"] == "lfs"
            body = self.server_hub.uploads.blobs[action["sha256"]] if large else base64.b64decode(action["content"])
            repo.files[action["path"]] = body
        self._json(200, {"Code": 200, "Success": True, "Data": {"oid": repo.commit}})

    def _modelscope_create(self, request: dict[str, Any]) -> None:
        account, name = self._account(), f"{request['Path']}/{request['Name']}"
        if account is None:
            return self._json(401, {"Code": 401, "Message": "user not logged in", "Success": False})
        if ("model", name) in self.server_hub.repos:
            return self._json(400, {"Code": 10010101001, "Message": "already exists", "Success": False})
        if not account.owns(name):
            return self._json(403, {"Code": 403, "Message": "no permission", "Success": False})
        self._new_repo(name, request["Visibility"] == 1)
        self._json(200, {"Code": 200, "Success": True, "Data": {"Path": request["Path"], "Name": request["Name"]}})

    def _new_repo(self, name: str, private: bool) -> None:
        from hub_server import Repo

        token = self._token() if private else None  # type: ignore[attr-defined]
        self.server_hub.repos["model", name] = Repo({}, token=token)
        self.server_hub.uploads.private[name] = private
