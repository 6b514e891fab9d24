"""Which model a command works with: what its flags name, found, and completed by what the checkpoint says.

Every command that has a model begins with it and hands the result on; nothing later looks up the same again.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayswift import hub
from rayswift.arguments import read_saved_arguments
from rayswift.cluster import address_of
from rayswift.errors import UserError
from rayswift.modeling.adapter_folder import base_model_of, check_adapter
from rayswift.modeling.loading import folder_fingerprint
from rayswift.modeling.merging import merge_adapter


@dataclass(frozen=True)
class ResolvedModel:
    """A model, its adapters and its settings.

    ``args``: the command's arguments, completed from the checkpoint's ``args.json`` (template, system, dtype, …); those
    that were given stay as they are. ``name``: what the model is called after. ``adapters``: name → local folder;
    ``default_adapter`` is the one that was given without a name, and answers for the model.
    """

    args: Any
    name: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    default_adapter: str | None = None

    @property
    def adapter(self) -> str | None:
        """The folder of the adapter that answers for the model."""
        return None if self.default_adapter is None else self.adapters[self.default_adapter]

    def folder(self) -> str:
        """The model's folder on this machine; a hub's or a bucket's is downloaded.

        Raises:
            UserError: there is no such model, or it cannot be downloaded.
        """
        args = self.args
        return hub.resolve_model(
            args.model or "", revision=args.model_revision, use_hf=args.use_hf, token=args.hub_token
        )

    def sources(self) -> dict[str, str]:
        """Model and adapters as the user knows them (``--model DIR``) → what tells their content from another's, of
        those on this machine (a cluster's nodes have their own copies of a hub's models)."""
        folders = {f"--adapters {path}": path for path in self.adapters.values()}
        if self.args.model and (os.path.isdir(os.path.expanduser(self.args.model)) or address_of(self.args) is None):
            folders[f"--model {self.args.model}"] = self.folder()
        return {name: folder_fingerprint(folder) for name, folder in folders.items()}

    def merged(self) -> ResolvedModel:
        """With ``--merge_lora true`` the model that base and default adapter make; else this one."""
        if not self.args.merge_lora or self.adapter is None:
            return self
        args = copy.copy(self.args)
        args.model = merge_adapter(
            self.adapter, self.folder(), torch_dtype=args.torch_dtype, new_special_tokens=args.new_special_tokens,
            positions=args.positions, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
        args.adapters = []
        return ResolvedModel(args, self.name)


def resolve_model(args: Any) -> ResolvedModel:
    """Find what ``--model`` and ``--adapters`` (``DIR`` or ``NAME=DIR``) name; adapters are downloaded and looked at.

    Training goes on with one adapter, ``infer`` and ``sample`` have one answer to a prompt: they take one, without a
    name.

    Raises:
        UserError: no such adapter, a broken one, two of one name, none or several where one is needed.
    """
    takes_one = args.command in ("infer", "sample", "pt", "sft", "rlhf")
    if takes_one and len(args.adapters) > 1:
        raise UserError(f"--adapters: rayswift {args.command} takes one adapter; merge them one after the other first")
    adapters: dict[str, str] = {}
    default = None
    for text in args.adapters:
        given, _, path = ("", "", text) if takes_one else text.rpartition("=")
        folder = hub.resolve_adapter(path, use_hf=args.use_hf, token=args.hub_token)
        check_adapter(folder)
        name = given or os.path.basename(folder.rstrip("/"))
        if name in adapters:
            raise UserError(f"--adapters {text}: the name {name} is taken; write NAME={path}")
        adapters[name] = os.path.abspath(folder)
        default = default if given else name
    if default is not None and len(adapters) > 1:
        raise UserError("--adapters: several adapters need names, for example --adapters a=DIR b=DIR")
    where = next(iter(adapters.values()), args.model)
    if where is None:
        raise UserError("--model or --adapters is needed: which model should answer?")
    args = completed(args, os.path.expanduser(where))
    if default is not None:
        args.adapters = [adapters[default]]
    # Earlier versions wrote a relative path into args.json as it was typed; PEFT's own file has the absolute one.
    lost = "model" in args.restored and adapters and _is_path(args.model) and not os.path.exists(args.model)
    if args.model is None or lost:
        args.model = base_model_of(where)
    return ResolvedModel(args, args.model_suffix, adapters, default)


def _is_path(model: str) -> bool:
    """Whether it is spelled as no hub's id is."""
    return "://" not in model and (model.startswith((".", "/")) or model.count("/") != 1)


def completed(args: Any, folder: str, *, without: str | None = None) -> Any:
    """A copy of ``args``, completed from the ``args.json`` of a checkpoint's folder, where that is one.

    ``without``: settings whose names start so are not taken from it.
    """
    saved = read_saved_arguments(folder) if os.path.isdir(folder) else None
    if saved is None:
        return copy.copy(args)
    if without:
        saved = {name: value for name, value in saved.items() if not name.startswith(without)}
    return copy.copy(args.with_saved(saved))
