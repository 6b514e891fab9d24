"""AdaLoRA in training: ranks are chosen after every step, and kept apart by a loss of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from rayswift.modeling.adapter_folder import read_adapter_config

#: Beside the adapter, which has lost the ranks that are not in use: all of them, and what they were worth so far.
STATE = "adalora_state.safetensors"


class Ranks(TrainerCallback):
    """What PEFT leaves to the training loop. The loss that keeps ranks apart does not depend on the rows, so its
    gradient is taken once a step; the log shows the loss of the tokens alone."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        config = trainer.model.peft_config["default"]
        # PEFT would add it to the loss of every micro-batch, and only where the model computes that itself.
        self.weight, config.orth_reg_weight = config.orth_reg_weight, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first micro-batch of a step."""
        if self.weight:
            self.trainer.accelerator.backward(self.weight * orthogonality(self.trainer.model))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the update, while its gradients are there."""
        self.trainer.model.base_model.update_and_allocate(state.global_step + 1)


def orthogonality(model: Any) -> torch.Tensor:
    """How far the rank directions are from orthonormal: PEFT's mean over all of its matrices."""
    distances = []
    for name, matrix in model.named_parameters():
        if matrix.requires_grad and (".lora_A." in name or ".lora_B." in name):
            product = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
            distances.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
    return torch.stack(distances).mean()


def _trained(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The adapter's matrices, under the names that PEFT's allocator knows them by."""
    return ((name, p) for name, p in model.base_model.model.named_parameters() if p.requires_grad)


def save_state(model: Any, folder: str) -> None:
    """Write what training needs to go on exactly."""
    allocator = model.base_model.rankallocator
    parts = {"weight": dict(_trained(model)), "mean": allocator.exp_avg_ipt, "spread": allocator.exp_avg_unc}
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    save_file(tensors, Path(folder, STATE))


def load_state(model: Any, folder: str) -> None:
    """Take over what :func:`save_state` wrote."""
    allocator, trained = model.base_model.rankallocator, dict(_trained(model))
    for key, tensor in load_file(Path(folder, STATE)).items():
        part, _, name = key.partition(".")
        if part == "weight":
            trained[name].data.copy_(tensor)
        else:
            kept = allocator.exp_avg_ipt if part == "mean" else allocator.exp_avg_unc
            kept[name] = tensor.to(trained[name].device)
            allocator.ipt.setdefault(name, torch.zeros_like(kept[name]))
    model.peft_config["default"].rank_pattern = read_adapter_config(folder).get("rank_pattern")
