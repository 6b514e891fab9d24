"""Push a folder to ModelScope (default) or Hugging Face: ``--push_to_hub true --hub_model_id owner/name``.

The hubs' own clients do the transfer. An upload that was interrupted goes on when the command is run again: large
files that arrived are not sent twice. The token is never printed, and every failure is one line with its mend.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rayswift.errors import UserError
from rayswift.hub.clients import HuggingFace, ModelScope, first_line, http_status, is_transient
from rayswift.redaction import redact_text

#: Never pushed: the state of training, editors' and tools' leftovers, and this machine's manifest of a checkpoint.
IGNORED = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin",
    "optimizer/*", "global_step*/*", "zero_to_fp32.py", "latest", "manifest.json", "position.json", "*.tmp", ".*",
    ".*/*", "__pycache__/*", "infer_result/*",
)  # fmt: skip
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a client's own log off the terminal: its dozen lines about one failure hide ours."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@dataclass
class Destination:
    """A model repository to push to.

    Args:
        name: ``owner/name``.
        use_hf: Hugging Face instead of ModelScope.
        token: ``--hub_token``; None takes the client's own (environment, or stored at login).
        private: what a repository that does not exist yet is made as.
    """

    name: str
    use_hf: bool
    token: str | None = field(default=None, repr=False)
    private: bool = False

    @classmethod
    def from_args(cls, args: Any) -> Destination:
        """Raises UserError for a name that can be no repository, an empty message, or a hub that is switched off."""
        name = args.hub_model_id
        if not _ID.fullmatch(name) or ".." in name:
            raise UserError(f"--hub_model_id {name}: expected owner/name of letters, digits and . _ - only")
        if not args.commit_message.strip():
            raise UserError("--commit_message: is empty; say what is pushed, or leave it out")
        destination = cls(name, args.use_hf, args.hub_token, args.hub_private_repo)
        if destination._repo().offline():
            raise UserError(f"--push_to_hub true: {destination.title} is switched off by its offline variable")
        return destination

    @property
    def title(self) -> str:
        """The hub's name."""
        return HuggingFace.title if self.use_hf else ModelScope.title

    def _repo(self) -> HuggingFace | ModelScope:
        return (HuggingFace if self.use_hf else ModelScope)("--hub_model_id", "model", self.name, None, self.token)

    def check_token(self) -> str:
        """The account that the token belongs to; asked before anything expensive starts.

        Raises:
            UserError: no token, a wrong one, or no network.
        """
        try:
            if self.use_hf:
                return str(self._huggingface().whoami()["name"])
            api = self._modelscope()
            if not api.legacy.token:
                raise UserError(self._no_token())
            return str(api.openapi.get_current_username())
        except Exception as error:  # each client has its own classes of errors
            raise self._explained(error, checking=True) from None

    def push(self, folder: str, origin: str, message: str) -> str:
        """Create the repository if need be, upload the folder, and return the repository's address.

        Args:
            folder: what is uploaded, all of it.
            origin: what names this upload when it is resumed (the folder may be a temporary one).
            message: of the commit.

        Raises:
            UserError: no rights, the name is taken, no network, the hub refuses something.
        """
        try:
            if self.use_hf:
                return self._push_huggingface(folder, message)
            return self._push_modelscope(folder, origin, message)
        except Exception as error:  # each client has its own classes of errors
            raise self._explained(error) from None

    def _huggingface(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=self.token or None)

    def _modelscope(self) -> Any:
        from modelscope_hub import HubApi, HubConfig

        return HubApi(HubConfig(token=self.token or None))

    def _push_huggingface(self, folder: str, message: str) -> str:
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        api = self._huggingface()
        url = str(api.create_repo(self.name, private=self.private or None, exist_ok=True))
        api.upload_folder(repo_id=self.name, folder_path=folder, commit_message=message)
        return url

    def _push_modelscope(self, folder: str, origin: str, message: str) -> str:
        from modelscope_hub.errors import AlreadyExistsError, APIError, StorageError

        # Where the client notes which files have arrived; outside the folder that is pushed.
        key = hashlib.sha256(f"{self.name}\0{os.path.abspath(origin)}".encode()).hexdigest()[:32]
        root = os.path.expanduser(os.environ.get("RAYSWIFT_CACHE") or "~/.cache/rayswift")
        tracker = os.path.join(root, "push", f"{key}.json")
        os.makedirs(os.path.dirname(tracker), exist_ok=True)
        api = self._modelscope()
        if not api.repo_exists(self.name, "model"):
            try:
                api.create_repo(self.name, "model", visibility="private" if self.private else "public")
            except AlreadyExistsError:
                raise UserError(self._taken()) from None
        failures: list[str] = []
        with _quiet("modelscope_hub"), contextlib.redirect_stdout(sys.stderr):
            try:
                api.upload_folder(
                    self.name, "model", folder, commit_message=message, use_cache=True, tracker_path=tracker,
                    disable_tqdm=not sys.stderr.isatty(),
                    progress_callback=lambda event: failures.append(str(event.get("error") or "")),
                )  # fmt: skip
            except StorageError as error:
                # Its text counts files; why they failed is only in the events.
                refused = re.search(r"\[(40[139])\]", " ".join(failures))
                if refused is None:
                    raise
                raise APIError(str(error), status_code=int(refused[1])) from None
        if os.path.exists(tracker):  # it is for resuming; a later push has to look at the hub anew
            os.remove(tracker)
        return f"{api.legacy.endpoint.rstrip('/')}/models/{self.name}"

    # What went wrong ------------------------------------------------------------------------------------------------

    def _no_token(self) -> str:
        own = "HF_TOKEN, or hf auth login" if self.use_hf else "MODELSCOPE_API_TOKEN, or modelscope login"
        return f"--push_to_hub true: needs a token of {self.title} with write rights: --hub_token, {own}"

    def _taken(self) -> str:
        return (
            f"--hub_model_id {self.name}: {self.title} has it already and this token may not write there;"
            " choose another name, or a token with write rights"
        )

    def _explained(self, error: Exception, *, checking: bool = False) -> UserError:
        """The one line for a failure of a client."""
        if isinstance(error, UserError):
            return error
        if type(error).__name__ == "LocalTokenNotFoundError":
            return UserError(self._no_token())
        status = http_status(error)
        reason = redact_text(first_line(self._repo(), error))
        for secret in (self.token, os.environ.get("HF_TOKEN"), os.environ.get("MODELSCOPE_API_TOKEN")):
            reason = reason.replace(secret, "***") if secret else reason
        if status == 401 or (checking and status in (400, 403)):
            page = "huggingface.co/settings/tokens" if self.use_hf else "modelscope.cn/my/myaccesstoken"
            return UserError(f"--hub_token: {self.title} does not know this token (HTTP {status}); see {page}")
        if status == 409:
            return UserError(self._taken())
        if status in (403, 404):
            return UserError(
                f"--hub_model_id {self.name}: {self.title} does not let this token write there (HTTP {status});"
                " use a token with write rights, or a name of your own account"
            )
        if is_transient(error):
            return UserError(
                f"--push_to_hub true: {self.title} cannot be reached or broke off ({reason}); check network and proxy"
                " and run the command again, what has arrived is not sent again"
            )
        return UserError(f"--push_to_hub true: {self.title} refuses it: {reason}")
