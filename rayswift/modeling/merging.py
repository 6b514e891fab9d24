"""Merge an adapter into its base model: ``--merge_lora true`` and ``rayswift export --merge_lora true``."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from rayswift.arguments import read_saved_arguments
from rayswift.errors import UserError
from rayswift.files import atomic_folder
from rayswift.modeling.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter
from rayswift.modeling.adapters import load_adapter
from rayswift.modeling.loading import (
    add_special_tokens,
    config_dtype,
    load_tokenizer,
    model_fingerprint,
    parameter_counts,
)
from rayswift.modeling.task_models import (
    classes_of_adapter,
    is_classifier,
    load_task_model,
    write_sentence_transformers_files,
)

logger = logging.getLogger("rayswift.modeling.merging")

#: In a merged model's folder: which weights it was made of, and how.
MADE_OF = "merged_from.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def merge_adapter(
    adapter_dir: str,
    model_dir: str,
    output_dir: str | None = None,
    torch_dtype: str | None = None,
    *,
    new_special_tokens: list[str] | None = None,
    positions: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write base + adapter as one plain model and return its folder.

    Args:
        output_dir: None means ``<adapter_dir>-merged``: a whole model there that was made of the same weights in the
            same way is reused, any other one replaced. A folder given here must be new or empty.
        torch_dtype: dtype of the merged weights; None takes the base model's.
        new_special_tokens: those that the adapter was trained with, when the checkpoint has no tokenizer of its own.
        positions: ``rope_scaling`` and ``max_model_len`` that it was trained with.

    The folder holds config, generation config, safetensors, tokenizer with chat template, and ``args.json`` of the
    checkpoint. It is whole or not there.
    UserError for a broken adapter or model, or when the folder cannot be written.
    """
    check_adapter(adapter_dir)
    adapter, target = Path(adapter_dir).resolve(), Path(output_dir or f"{adapter_dir.rstrip('/')}-merged").resolve()
    if output_dir is not None and target.exists() and any(target.iterdir()):
        raise UserError(f"--output_dir {output_dir}: exists and is not empty; name a new folder for the merged model")
    from transformers import GenerationConfig

    dtype = torch_dtype or config_dtype(model_dir)
    made_of = {
        "model": model_fingerprint(model_dir),
        "adapter": [hashlib.sha256((adapter / name).read_bytes()).hexdigest() for name in _ADAPTER_FILES],
        "dtype": dtype,
        "new_special_tokens": new_special_tokens or [],
        **(positions or {}),
    }
    if is_current(target, made_of):
        logger.info("merged model already there: %s", target)
        return str(target)
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter) if has_tokenizer else model_dir, trust_remote_code=trust_remote_code)
    saved = read_saved_arguments(adapter) or {}
    task, labels = str(saved.get("task_type") or "causal_lm"), classes_of_adapter(str(adapter))
    if labels is not None and not is_classifier(task):  # another program's
        task = "seq_cls"
    model = load_task_model(
        model_dir, task, labels, saved.get("problem_type"), tokenizer, torch_dtype=dtype,
        trust_remote_code=trust_remote_code, model_kwargs=positions,
    )  # fmt: skip
    if new_special_tokens:
        add_special_tokens(model, tokenizer, new_special_tokens)
    model = merged_model(load_adapter(model, str(adapter)))
    if (adapter / "generation_config.json").is_file():  # training knows where replies end
        model.generation_config.eos_token_id = GenerationConfig.from_pretrained(adapter).eos_token_id
    try:
        with atomic_folder(target) as folder:
            write_model(model, tokenizer, adapter, folder)
            if task == "embedding":
                write_sentence_transformers_files(folder, model_dir, model.config.get_text_config().hidden_size)
            (folder / MADE_OF).write_text(json.dumps(made_of, indent=1))
            if is_current(target, made_of):
                raise FileExistsError(f"{target}: another process has just merged it")
    except OSError as error:
        if not is_current(target, made_of):
            raise UserError(f"cannot write the merged model to {target} ({error.strerror or error})") from error
    logger.info("merged %s into %s", adapter, target)
    return str(target)


def is_current(merged: Path, made_of: dict[str, Any]) -> bool:
    """True when ``merged`` is a whole model that was made of these weights in this way."""
    try:
        known = json.loads((merged / MADE_OF).read_text())
        parameter_counts(str(merged))  # reads every header and compares it with the file's length
    except (OSError, ValueError, UserError):
        return False
    return bool(known == made_of)


def merged_model(model: Any) -> Any:
    """The plain model of a ``PeftModel``: every layer is merged in float32 and rounded once to the dtype it had.

    PEFT rounds a half-precision adapter's product, and then its sum with the weight. Embeddings and output head that
    share their weights are two afterwards where the adapter changes one of them.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    _part_tied_weights(model.get_base_model())
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
        merged: Any = model.merge_and_unload()
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = False
    return merged


def _part_tied_weights(model: Any) -> None:
    """Give the output head weights of its own where it shares those of the embeddings and one of them has an adapter:
    merged into both, the adapter would change what it was never trained on."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    adapted = isinstance(embeddings, BaseTunerLayer) or isinstance(head, BaseTunerLayer)
    if adapted and head is not None and head.weight is embeddings.weight:
        own: Any = getattr(head, "base_layer", head)
        own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)


def write_model(model: Any, tokenizer: Any, adapter: Path, folder: Path) -> None:
    """Save the merged ``model`` and its tokenizer to ``folder``, and copy the checkpoint's ``args.json``."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which would warn on standard output
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (adapter / "args.json").is_file():
        shutil.copyfile(adapter / "args.json", folder / "args.json")
