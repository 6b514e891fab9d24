"""Adapters whose weights are only in DeepSpeed's shards: ZeRO-3 without ``stage3_gather_16bit_weights_on_model_save``.

Checkpoints of the presets hold the gathered adapter and need none of this. RaySwift's own shards are safetensors; those
of DeepSpeed are pickle files, which could run code: only tensors and DeepSpeed's own plain classes are read from them.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayswift import private
from rayswift.errors import UserError, one_line
from rayswift.exporting.peft_format import peft_name
from rayswift.modeling.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rayswift.modeling.loading import read_safetensors_header

logger = logging.getLogger("rayswift.exporting")

_LATEST = "latest"  # DeepSpeed's note of the newest shard folder
_TRAINED_WITH = (".lora_", ".modules_to_save.")


def needs_gathering(adapter: str) -> bool:
    """Whether the adapter's weights are not in its safetensors file but in shards beside it."""
    folder = Path(adapter)
    if not (folder / ADAPTER_CONFIG).is_file() or not ((folder / _LATEST).is_file() or _has_own_shards(adapter)):
        return False
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        return True
    shapes = [tensor["shape"] for tensor in read_safetensors_header(weights).values()]
    return not shapes or any(0 in shape for shape in shapes)  # partitioned tensors are saved as empty ones


@contextmanager
def gathered(adapter: str) -> Iterator[str]:
    """The adapter's folder, or a temporary one with its weights put together from the shards.

    Raises:
        UserError: shards that hold more than tensors, or cannot be read.
    """
    if not needs_gathering(adapter):
        yield adapter
        return
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="rayswift-adapter-") as folder:
        save_file(_read_shards(adapter), os.path.join(folder, ADAPTER_WEIGHTS), metadata={"format": "pt"})
        for file in Path(adapter).iterdir():
            if file.suffix in (".json", ".jinja") or file.name.startswith("tokenizer"):
                shutil.copyfile(file, Path(folder) / file.name)
        yield folder


def _has_own_shards(adapter: str) -> bool:
    from rayswift.train.checkpoints.reshard import STATE

    return Path(adapter, STATE).is_file()


def _read_shards(adapter: str) -> dict[str, Any]:
    import torch

    if _has_own_shards(adapter):
        from rayswift.train.checkpoints.reshard import whole_parameters

        return _adapter_of(whole_parameters(adapter))
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    logger.info("putting the adapter together from the shards in %s", adapter)
    try:
        with private.no_pickled_code():
            state = get_fp32_state_dict_from_zero_checkpoint(adapter)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--adapters {adapter}: its weights are in DeepSpeed shards (pickle) that hold more than tensors, which "
            "could run code; train with stage3_gather_16bit_weights_on_model_save true"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"--adapters {adapter}: its DeepSpeed shards cannot be read ({one_line(error)})") from error
    return _adapter_of(state)


def _adapter_of(state: dict[str, Any]) -> dict[str, Any]:
    return {
        peft_name(name).replace(".modules_to_save.default", ""): tensor.contiguous()
        for name, tensor in state.items()
        if any(part in name for part in _TRAINED_WITH)
    }
