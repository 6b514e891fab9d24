"""A fresh adapter changes nothing: a run checks, before its first step, that what it starts to train is the model."""

from __future__ import annotations

from typing import Any

import torch

from rayswift.errors import UserError

#: Difference of a layer's output, relative to its size. Measured: up to 0.004 in bfloat16 (PiSSA, whose base is
#: rounded anew), 1e-6 in float32; with an adapter that does not belong to its base 0.3 and more.
TOLERANCE = 0.05


Probes = dict[str, tuple[torch.Tensor, torch.Tensor]]


def probe_layers(model: Any) -> Probes:
    """A fixed input of each linear layer and embedding of a model, and what comes out."""
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and layer.weight.is_floating_point()
    }
    inputs = {name: _input(layer) for name, layer in layers.items()}
    return {name: (inputs[name], _output(layer, inputs[name])) for name, layer in layers.items()}


def check_first_policy(model: Any, probes: Probes, init_weights: str) -> None:
    """Compare a new `PeftModel` with the :func:`probe_layers` of its base before.

    Raises:
        UserError: a layer gives something else; training would start from another model.
    """
    was_training = model.training
    model.eval()
    for name, (given, expected) in probes.items():
        found = _output(model.get_base_model().get_submodule(name), given)
        difference = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
        if not difference <= TOLERANCE:
            raise UserError(
                f"--init_weights {init_weights}: the adapter changes {name} by {difference:.0%} before the first step, "
                "so training would not start from the model; choose another one"
            )
    model.train(was_training)


def _output(layer: Any, given: torch.Tensor) -> torch.Tensor:
    from peft.utils.integrations import gather_params_ctx

    with torch.no_grad(), gather_params_ctx(list(layer.parameters()), modifier_rank=None):
        return layer(given).float()


def _input(layer: Any) -> torch.Tensor:
    """The same for every layer of this width."""
    weight = layer.weight
    if isinstance(layer, torch.nn.Embedding):
        return torch.arange(min(layer.num_embeddings, 16), device=weight.device)[None]
    width = layer.in_features if isinstance(layer, torch.nn.Linear) else layer.nx
    generator = torch.Generator().manual_seed(width)  # one of its own: the run's random numbers stay as they are
    return torch.randn(1, width, generator=generator).to(weight.device, weight.dtype)
