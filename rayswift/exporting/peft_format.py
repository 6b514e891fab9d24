"""``--to_peft_format``: an adapter of SWIFT's own tuners as PEFT reads it; or a PEFT adapter alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rayswift.errors import UserError
from rayswift.exporting.folder import building, copy_files
from rayswift.exporting.source import SWIFT_ADAPTER
from rayswift.files import parse_json
from rayswift.modeling.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter

PREFIX = "base_model.model."
SIDE_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "args.json")


def to_peft_format(adapter: str, target: str) -> str:
    """Write the adapter as PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``; returns the folder.

    Raises:
        UserError: no adapter there, pickle weights, or a tuner that PEFT has no LoRA for.
    """
    from safetensors.torch import load_file, save_file

    inner = os.path.join(adapter, SWIFT_ADAPTER)
    swift = inner if os.path.isfile(os.path.join(inner, ADAPTER_CONFIG)) else None
    config = _peft_config(Path(swift or adapter) / ADAPTER_CONFIG)
    weights = Path(swift or adapter) / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise UserError(f"--adapters {adapter}: no {ADAPTER_WEIGHTS} in {weights.parent} (pickle weights are not read)")
    if swift is None:
        check_adapter(adapter)
    tensors = {peft_name(name): tensor for name, tensor in load_file(weights).items()}
    with building(target) as folder:
        save_file(tensors, os.path.join(folder, ADAPTER_WEIGHTS), metadata={"format": "pt"})
        with open(os.path.join(folder, ADAPTER_CONFIG), "w", encoding="utf-8") as file:
            json.dump(config, file, ensure_ascii=False, indent=2)
        copy_files(adapter, folder, SIDE_FILES)
    return target


def peft_name(name: str) -> str:
    """A weight's name as PEFT saves it: its prefix in front, the adapter's name left out."""
    name = name if name.startswith(PREFIX) else PREFIX + name
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        name = name.replace(f".{part}.{SWIFT_ADAPTER}", f".{part}")
    return name


def _peft_config(path: Path) -> dict[str, Any]:
    """The adapter's configuration with the fields that PEFT's LoraConfig knows."""
    from dataclasses import fields

    from peft import LoraConfig

    try:
        saved = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    kind = saved.get("peft_type") or saved.get("swift_type")
    if kind != "LORA":
        raise UserError(f"--to_peft_format true: {path} is a {kind} adapter; only LORA has a PEFT form here")
    known = {field.name for field in fields(LoraConfig)} - {"runtime_config"}
    kept = {name: value for name, value in saved.items() if name in known}
    return {"task_type": "CAUSAL_LM", **kept, "peft_type": "LORA", "inference_mode": True}
