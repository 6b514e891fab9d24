"""ids → local folders on both hubs (`models`), data files of a repository (`datasets`), a folder → a hub (`push`)."""

from rayswift.hub.clients import open_filesystem
from rayswift.hub.models import is_remote_uri, resolve_adapter, resolve_dataset, resolve_model

__all__ = ["is_remote_uri", "open_filesystem", "resolve_adapter", "resolve_dataset", "resolve_model"]
