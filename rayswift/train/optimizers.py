"""Optimisers that Transformers does not have by name (Muon), and LISA's layers that take turns."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from rayswift.errors import UserError

#: What ``--optim_args`` may say to Muon, and how it is read.
_MUON_ARGS: dict[str, Callable[[str], Any]] = {
    "momentum": float,
    "ns_steps": int,
    "nesterov": lambda text: text.lower() == "true",
}


def trainer_settings(args: Any) -> dict[str, Any]:
    """What the command's arguments add to any trainer: ``callbacks`` and ``own_optimizer``."""
    lisa = Lisa(args.lisa_activated_layers, args.lisa_step_interval, args.seed)
    takes_turns = args.lisa_activated_layers and args.train_type == "full"
    if args.use_galore:  # in a checkpoint's optimiser state, which may hold nothing else
        from galore_torch.galore_projector import GaLoreProjector

        torch.serialization.add_safe_globals([GaLoreProjector])
    muon = (_make_muon, muon_arguments(args)) if args.optimizer == "muon" else None
    return {"callbacks": [lisa] if takes_turns else [], "own_optimizer": muon}


def muon_arguments(args: Any) -> dict[str, Any]:
    """Keywords of :class:`MuonWithAdam`. UserError for ``--optim_args`` that Muon does not have."""
    own = {}
    for part in filter(None, (args.training_args.get("optim_args") or "").replace(" ", "").split(",")):
        name, _, text = part.partition("=")
        try:
            own[name] = _MUON_ARGS[name](text)
        except (KeyError, ValueError):
            raise UserError(f"--optim_args {part}: Muon has momentum=0.95,ns_steps=5,nesterov=true") from None
    betas = (args.adam_beta1, args.adam_beta2)
    return {
        "lr": args.learning_rate, "weight_decay": args.weight_decay, "betas": betas, "adam_eps": args.adam_epsilon,
        "own": own,
    }  # fmt: skip


def _make_muon() -> Any:
    """What the Trainer calls with the model."""
    return MuonWithAdam


class MuonWithAdam(torch.optim.Optimizer):
    """PyTorch's Muon for the matrices inside a model, AdamW for embeddings, output head, vectors and all else.

    Muon's step is scaled to the size of AdamW's (Moonshot's rule), so that both share one learning rate.
    """

    def __init__(
        self,
        model: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        adam_eps: float,
        own: dict[str, Any],
    ) -> None:
        ends = {layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
        decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                inside = parameter.ndim == 2 and parameter not in ends and "lora_embedding" not in name
                groups.setdefault((inside, name in decayed), []).append(parameter)
        self.inner: dict[bool, torch.optim.Optimizer] = {}
        for is_muon in (True, False):
            found = [
                {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "is_muon": is_muon}
                for (inside, decays), parameters in groups.items()
                if inside is is_muon
            ]
            if found and is_muon:
                self.inner[True] = torch.optim.Muon(found, lr=lr, adjust_lr_fn="match_rms_adamw", **own)
            elif found:
                self.inner[False] = torch.optim.AdamW(found, lr=lr, betas=betas, eps=adam_eps)
        super().__init__([group for inner in self.inner.values() for group in inner.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update by both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for is_muon, inner in self.inner.items():
            # Groups and state are those of this optimiser, also after a checkpoint was loaded into it.
            inner.state = self.state
            inner.param_groups = [group for group in self.param_groups if group["is_muon"] is is_muon]
            inner.step()
        return loss


class Lisa(TrainerCallback):
    """All but ``count`` layers are frozen; others take their turn every ``interval`` steps. What is not in a layer
    (embeddings, last norm, output head) is always trained. Which layers is a matter of seed and step alone, so all
    workers, and a run that goes on, choose the same."""

    def __init__(self, count: int, interval: int, seed: int) -> None:
        self.count, self.interval, self.seed = count, interval, seed
        self.layers: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """When the optimiser has all weights."""
        lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
        self.layers = next(lists, [])
        if self.count > len(self.layers):
            raise UserError(f"--lisa_activated_layers {self.count}: the model has {len(self.layers)} layers")
        self._choose(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first micro-batch of a step."""
        if state.global_step % self.interval == 0:
            self._choose(state.global_step)

    def _choose(self, step: int) -> None:
        turn = random.Random(f"{self.seed} {step // self.interval}")
        chosen = set(turn.sample(range(len(self.layers)), self.count))
        for number, layer in enumerate(self.layers):
            layer.requires_grad_(number in chosen)
