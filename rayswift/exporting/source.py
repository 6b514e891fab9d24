"""What is exported: the model and adapter that the flags name, as local folders, and the checkpoint's settings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from rayswift import hub
from rayswift.modeling.adapter_folder import ADAPTER_CONFIG, base_model_of
from rayswift.modeling.resolved import completed

#: Where SWIFT's own tuner backend puts an adapter, below the checkpoint.
SWIFT_ADAPTER = "default"


@dataclass(frozen=True)
class ExportSource:
    """One model or adapter to export.

    Args:
        args: the command's arguments, completed from the checkpoint's ``args.json``.
        adapter: local folder of the adapter, or None.
        checkpoint: where the checkpoint's ``args.json`` and losses are looked for: adapter or model folder.
        name: folder that results are put beside, by name: a local folder as given, or the last part of a hub id.
    """

    args: Any
    adapter: str | None
    checkpoint: str
    name: str

    def model_dir(self) -> str:
        """The local folder of ``--model`` (the adapter's base); a hub id is downloaded."""
        args, folder = self.args, self.adapter or self.checkpoint
        lower = os.path.join(folder, SWIFT_ADAPTER)  # where SWIFT's own backend puts the adapter's configuration
        has_lower = os.path.isfile(os.path.join(lower, ADAPTER_CONFIG))
        model = args.model or base_model_of(lower if has_lower else folder)
        return hub.resolve_model(model, revision=args.model_revision, use_hf=args.use_hf, token=args.hub_token)


def find_source(args: Any) -> ExportSource:
    """Resolve ``--adapters`` or ``--model`` with ``args`` completed from the ``args.json`` there.

    Raises:
        UserError: no such folder or id, an adapter that does not say which model it belongs to.
    """
    given = args.adapters[0] if args.adapters else args.model
    adapter: str | None = None
    if args.adapters:
        own = os.path.expanduser(given)
        if args.to_peft_format and os.path.isfile(os.path.join(own, SWIFT_ADAPTER, ADAPTER_CONFIG)):
            adapter = os.path.abspath(own)
        else:
            adapter = hub.resolve_adapter(given, use_hf=args.use_hf, token=args.hub_token)
    where = adapter or os.path.expanduser(given)
    # What a QLoRA run loaded its base model with is no wish to quantise the result.
    args = completed(args, where, without="quant_")
    if adapter is not None:
        args.adapters = [adapter]
    own = os.path.normpath(os.path.expanduser(given))
    name = own if os.path.exists(own) else os.path.basename(own)
    return ExportSource(args, adapter, where, os.path.abspath(name) if name in (os.curdir, os.pardir) else name)
