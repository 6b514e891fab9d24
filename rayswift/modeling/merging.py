"""Merge an adapter into its base model: ``--merge_lora true`` and ``rayswift export --merge_lora true``."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from rayswift.errors import UserError
from rayswift.files import atomic_folder
from rayswift.modeling.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, load_adapter
from rayswift.modeling.loading import add_special_tokens, config_dtype, load_model, load_tokenizer, parameter_counts

logger = logging.getLogger("rayswift.modeling.merging")


def merge_adapter(
    adapter_dir: str,
    model_dir: str,
    output_dir: str | None = None,
    torch_dtype: str | None = None,
    *,
    new_special_tokens: list[str] | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write base + adapter as one plain model and return its folder.

    Args:
        output_dir: None means ``<adapter_dir>-merged``: a whole model there that is newer than the adapter is reused,
            a broken or older one replaced. A folder given here must be new or empty.
        torch_dtype: dtype of the merged weights; None takes the base model's.
        new_special_tokens: those that the adapter was trained with, when the checkpoint has no tokenizer of its own.

    The folder holds config, generation config, safetensors, tokenizer with chat template, and ``args.json`` of the
    checkpoint. It is whole or not there.
    UserError for a broken adapter or model, or when the folder cannot be written.
    """
    check_adapter(adapter_dir)
    adapter, target = Path(adapter_dir).resolve(), Path(output_dir or f"{adapter_dir.rstrip('/')}-merged").resolve()
    if output_dir is not None and target.exists() and any(target.iterdir()):
        raise UserError(f"--output_dir {output_dir}: exists and is not empty; name a new folder for the merged model")
    if is_current(target, adapter):
        logger.info("merged model already there: %s", target)
        return str(target)
    dtype = torch_dtype or config_dtype(model_dir)
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter) if has_tokenizer else model_dir, trust_remote_code=trust_remote_code)
    model = load_model(model_dir, torch_dtype=dtype, trust_remote_code=trust_remote_code)
    if new_special_tokens:
        add_special_tokens(model, tokenizer, new_special_tokens)
    model = merged_model(load_adapter(model, str(adapter)))
    try:
        with atomic_folder(target) as folder:
            write_model(model, tokenizer, adapter, folder)
            if is_current(target, adapter):
                raise FileExistsError(f"{target}: another process has just merged it")
    except OSError as error:
        if not is_current(target, adapter):
            raise UserError(f"cannot write the merged model to {target} ({error.strerror or error})") from error
    logger.info("merged %s into %s", adapter, target)
    return str(target)


def is_current(merged: Path, adapter: Path) -> bool:
    """True when ``merged`` is a whole model and not older than the adapter's files."""
    if not (merged / "config.json").is_file():
        return False
    try:
        parameter_counts(str(merged))  # reads every header and compares it with the file's length
    except UserError:
        return False
    written = (merged / "config.json").stat().st_mtime
    return all((adapter / name).stat().st_mtime <= written for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def merged_model(model: Any) -> Any:
    """The plain model of a ``PeftModel``: every layer is merged in float32 and rounded once to the dtype it had.

    PEFT rounds a half-precision adapter's product, and then its sum with the weight.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        # Quantised weights stay as they are: PEFT unpacks them itself.
        half = (torch.float16, torch.bfloat16)
        dtypes = {one: one.dtype for one in layer.get_base_layer().parameters() if one.dtype in half}
        for parameter in dtypes:
            parameter.data = parameter.data.float()
        layer.merge(safe_merge=True)
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return model.merge_and_unload()


def write_model(model: Any, tokenizer: Any, adapter: Path, folder: Path) -> None:
    """Save the merged ``model`` and its tokenizer to ``folder``, and copy the checkpoint's ``args.json``."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which would warn on standard output
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (adapter / "args.json").is_file():
        shutil.copyfile(adapter / "args.json", folder / "args.json")
