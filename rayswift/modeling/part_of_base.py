"""Adapters that begin as a part of the base's weights (PiSSA, OLoRA), and what they are as plain LoRA.

PEFT takes such an adapter's first product off the base: W' = W - s·B₀·A₀. What is trained on it, W' + s·B·A, is
W + s·[B, -B₀]·[A; A₀]: on the model as it is a plain LoRA of twice the rank. So every checkpoint holds it (PEFT's
`path_initial_model_for_weight_conversion`, which would leave out all but A and B), and as both halves are in there,
training goes on from it exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rayswift.errors import UserError, one_line
from rayswift.modeling.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config

Tensors = dict[str, torch.Tensor]


def first_values(model: Any, way: str) -> Tensors:
    """The A and B that a new `PeftModel` begins with by PEFT's initialisation ``way``, under the names they are saved
    by. The model stays as it is.

    Raises:
        UserError: a layer that this initialisation is not for.
    """
    first: Tensors = {}
    for name, layer, weight in _layers(model):
        if "default" not in layer.lora_A:
            raise UserError(f"--init_weights {way}: is for linear layers, and {name} is none; see --target_modules")
        kept = weight.data.clone()  # PEFT takes the product off, in its own rounding
        sides = {side: getattr(layer, f"lora_{side}")["default"].weight for side in "AB"}
        planned = {side: (lora.dtype, lora.shape) for side, lora in sides.items()}
        try:
            layer.pissa_init("default", way) if way.startswith("pissa") else layer.olora_init("default")
        except (TypeError, ValueError) as error:
            raise UserError(f"--init_weights {way}: is not for {name} ({one_line(error)})") from None
        weight.data = kept
        for side, lora in sides.items():
            dtype, shape = planned[side]
            if lora.shape != shape:  # OLoRA does not transpose GPT-2's layers
                raise UserError(f"--init_weights {way}: is not for {name}, whose weights lie the other way; use pissa")
            first[f"{name}.lora_{side}.weight"] = lora.data.to(dtype, copy=True)
    return first


def write_plain(folder: str, first: Tensors) -> None:
    """Rewrite the adapter that PEFT saved in ``folder`` as plain LoRA on the unchanged base."""
    weights, config = Path(folder, ADAPTER_WEIGHTS), read_adapter_config(folder)
    tensors = load_file(weights)
    for name, start in first.items():
        sign, axis = (1, 0) if _side(name) == "A" else (-1, 1)
        start = start.to("cpu")
        tensors[name] = torch.cat([tensors[name].to(start.dtype), sign * start], axis).contiguous()
    save_file(tensors, weights, {"format": "pt"})
    # The scale stays what it is: alpha / r, or alpha / sqrt(r).
    factor = 2**0.5 if config["use_rslora"] else 2
    config |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}
    Path(folder, ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def read_plain(folder: str, rank: int) -> tuple[Tensors, Tensors]:
    """What :func:`write_plain` wrote: the trained adapter with all that is saved beside it, and its first values.

    Raises:
        UserError: the checkpoint holds no such adapter.
    """
    trained: Tensors = load_file(Path(folder, ADAPTER_WEIGHTS))
    first: Tensors = {}
    for name in [name for name in trained if _side(name)]:
        sign, axis = (1, 0) if _side(name) == "A" else (-1, 1)
        if trained[name].shape[axis] != 2 * rank:
            raise UserError(
                f"--resume_from_checkpoint {folder}: its adapter is not the trained and the first values that "
                "--init_weights pissa and olora save; begin anew, or go on with the run's own flags"
            )
        trained[name], start = (half.contiguous() for half in trained[name].split(rank, axis))
        first[name] = sign * start
    return trained, first


def take_off(model: Any, first: Tensors) -> None:
    """Make ``first`` the adapter of a `PeftModel` on an unchanged base, and take it off the base."""
    for name, layer, weight in _layers(model):
        product = torch.tensor(layer.scaling["default"], device=weight.device)
        for side in "BA":
            values = first[f"{name}.lora_{side}.weight"].to(weight.device)
            getattr(layer, f"lora_{side}")["default"].weight.data = values.clone()
            product = product @ values.float() if side == "A" else product * values.float()
        product = product.T if layer.fan_in_fan_out else product
        weight.data = (weight.data.float() - product).to(weight.dtype)


def _layers(model: Any) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Name, LoRA layer and base weight; of sharded ones (ZeRO-3) the whole weight, and what it becomes is kept."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import gather_params_ctx

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            weight = base.weight
            with gather_params_ctx(weight):
                yield name, layer, weight


def _side(name: str) -> str | None:
    return next((side for side in "AB" if name.endswith(f".lora_{side}.weight")), None)
