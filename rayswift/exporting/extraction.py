"""``--to_peft_format true --base_model``: a merged model back as an adapter of its base model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayswift.errors import UserError, one_line
from rayswift.exporting.folder import building, copy_files
from rayswift.exporting.peft_format import PREFIX, SIDE_FILES
from rayswift.modeling.adapter_folder import ADAPTER_WEIGHTS
from rayswift.modeling.loading import read_safetensors_header, weight_files

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("rayswift.exporting")

#: Directions beyond the rank that the randomised decomposition computes, and its passes: enough for float32.
_OVERSAMPLING, _PASSES = 8, 4
#: A smaller share of the difference in the adapter is worth a warning.
_ENOUGH = 0.9


@dataclass(frozen=True)
class ModelPair:
    """A merged model and its base, as local folders; ``base_name``: the base's folder or id, noted in the adapter."""

    model_dir: str
    base_dir: str
    base_name: str
    trust_remote_code: bool = False


def extract_adapter(models: ModelPair, rank: int, target: str) -> str:
    """Write the difference of two models as a LoRA adapter; returns its folder and logs the share that it holds.

    Each Linear layer's difference is replaced by its nearest matrix of ``rank`` (truncated SVD, Eckart and Young 1936):
    exact, but for rounding, where a LoRA of at most that rank was merged.

    Raises:
        UserError: the models are not of one shape, they are equal, or they differ outside Linear layers.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    missed = whole = 0.0
    changed = set()
    for module, difference in _differences(models):
        a, b = low_rank(difference, rank)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        missed, whole = missed + float((difference - b @ a).norm() ** 2), whole + float(difference.norm() ** 2)
        if difference.any():
            changed.add(module.rpartition(".")[2])
    if not whole:
        raise UserError(f"--base_model {models.base_name}: has the same weights as the model: nothing to extract")
    share = 1 - (missed / whole) ** 0.5
    log = logger.info if share >= _ENOUGH else logger.warning
    log("the adapter of rank %d holds %.2f %% of the difference (--lora_rank)", rank, 100 * share)
    kept = {name: tensor for name, tensor in tensors.items() if name.split(".")[-3] in changed}
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(changed), task_type="CAUSAL_LM",
                        base_model_name_or_path=models.base_name, inference_mode=True)  # fmt: skip
    with building(target) as folder:
        save_file(kept, os.path.join(folder, ADAPTER_WEIGHTS), metadata={"format": "pt"})
        config.save_pretrained(folder)
        copy_files(models.model_dir, folder, SIDE_FILES)
    return target


def low_rank(difference: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA's A (rank, in) and B (out, rank), whose product is nearest to ``difference`` (out, in)."""
    import torch

    found = torch.svd_lowrank(difference, q=min(rank + _OVERSAMPLING, *difference.shape), niter=_PASSES)
    u, s, v = (part[..., :rank] for part in found)
    missing = rank - s.numel()  # a matrix with a side shorter than the rank: the rest is zeros
    a, b = ((part * s.sqrt()).contiguous() for part in (v, u))
    pad = torch.nn.functional.pad
    return pad(a, (0, missing)).T.contiguous(), pad(b, (0, missing))


def _differences(models: ModelPair) -> Iterator[tuple[str, torch.Tensor]]:
    """Each Linear layer's name and the difference of its weights, float32 of shape (out, in)."""
    own, other = _places(models.model_dir), _places(models.base_dir)
    linear, needed = _layers(models)
    base = f"--base_model {models.base_name}"
    for name in sorted(own.keys() | other.keys()):
        if name not in own or name not in other:
            if name in needed:
                raise UserError(f"{base}: only one of the two models has {name}; it is another model")
            continue  # a tied head or a buffer, which not every version stores
        a, b = _read(own[name], name), _read(other[name], name)
        if a.shape != b.shape:
            raise UserError(f"{base}: its {name} has another shape; it is another model")
        module, _, kind = name.rpartition(".")
        if module in linear and kind == "weight":
            yield module, a - b
        elif name in needed and not bool((a == b).all()):
            raise UserError(f"{base}: {name} differs too, and LoRA holds Linear layers' weights only")


def _layers(models: ModelPair) -> tuple[set[str], set[str]]:
    """Names of the Linear layers without the output head, and of all parameters that are not tied to another."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"trust_remote_code": models.trust_remote_code}
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(models.model_dir, **options)
            model = AutoModelForCausalLM.from_config(config, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"--model {models.model_dir}: its layers cannot be listed ({one_line(error)})") from error
    head = model.get_output_embeddings()
    linear = {name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and one is not head}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return linear, {name for name, _ in model.named_parameters()} - tied


def _places(model_dir: str) -> dict[str, str]:
    """Tensor name -> weight file."""
    return {name: str(path) for path in weight_files(model_dir) for name in read_safetensors_header(path)}


def _read(path: str, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(name).float()
