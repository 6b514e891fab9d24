"""Optimisers beside those of ``--optim``: Muon, GaLore, and LISA's layers that take turns."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg

_GALORE = {"use_galore=false": "only with --use_galore true"}
_Q_GALORE = "it is Q-GaLore's, whose quantised projections Transformers does not have"
_LISA = {"lisa_activated_layers=0": "only with --lisa_activated_layers"}


@dataclass(init=False, repr=False, eq=False)
class LargeModelOptimizers(Arguments):
    """Optimisers that need less memory, or fewer steps, than Adam."""

    topic: ClassVar[str] = "Optimisers"

    optimizer: str | None = arg(
        None, "optimiser instead of --optim: muon (matrices inside the model; Adam for the rest)",
        choices=("muon", "galore", "default"), shown="that of --optim", example="muon",
        swift_only={
            "muonclip": "PyTorch has Muon without the clipping of queries and keys; give --optimizer muon",
            "lorap": "--optim says which",
            "multimodal": "what reads pictures is not trained; leave it out",
        },
    )  # fmt: skip
    lisa_activated_layers: int = arg(
        0, "full training: so many layers, chosen at random, are trained at a time (LISA); 0 for all", ge=0,
        no_effect={"train_type!=full": "only with --train_type full"},
    )  # fmt: skip
    lisa_step_interval: int = arg(20, "steps until other layers take their turn", ge=1, no_effect=_LISA)
    use_galore: bool = arg(False, "full training: project gradients to few dimensions (GaLore)")
    galore_target_modules: list[str] = arg(
        [], "modules whose gradients are projected", no_effect=_GALORE, shown="all linear ones but the output head"
    )
    galore_rank: int = arg(128, "dimensions of a projected gradient", ge=1, no_effect=_GALORE)
    galore_update_proj_gap: int = arg(50, "steps until the projection is found anew", ge=1, no_effect=_GALORE)
    galore_scale: float = arg(1.0, "scale of what is projected back", gt=0, no_effect=_GALORE)
    galore_proj_type: str = arg(
        "std", "kind of projection", choices=("std", "reverse_std", "right", "left", "full"), no_effect=_GALORE
    )
    galore_optim_per_parameter: bool = arg(
        False, "update each weight as soon as it has its gradient",
        no_effect="it would update in every forward pass of a step: gradients are kept until its end",
    )  # fmt: skip
    galore_quantization: bool = arg(False, "8-bit states of the optimiser", no_effect=_GALORE)
    galore_with_embedding: bool = arg(
        False, "project the embeddings too", no_effect="Transformers projects linear layers"
    )
    galore_proj_quant: bool = arg(False, "quantise the projections", no_effect=_Q_GALORE)
    galore_proj_bits: int = arg(4, "their bits", no_effect=_Q_GALORE)
    galore_proj_group_size: int = arg(256, "their groups", no_effect=_Q_GALORE)
    galore_cos_threshold: float = arg(0.4, "when they stay", no_effect=_Q_GALORE)
    galore_gamma_proj: int = arg(2, "how much longer they then stay", no_effect=_Q_GALORE)
    galore_queue_size: int = arg(5, "how many are compared", no_effect=_Q_GALORE)

    def problems(self) -> Iterator[str]:
        sharded = getattr(self, "deepspeed", None) not in (None, "zero0")
        is_full = getattr(self, "train_type", "lora") in ("full", "dummy")
        if self.optimizer == "muon":
            if sharded:
                yield "--optimizer muon contradicts --deepspeed, which flattens the matrices it works on; drop one"
            if "optim" in self.given:
                yield f"--optimizer muon contradicts --optim {getattr(self, 'optim', '')}: give one of the two"
            if self.use_galore:
                yield "--optimizer muon contradicts --use_galore true: give one of the two"
        if self.lisa_activated_layers and is_full:
            if sharded:
                yield "--lisa_activated_layers contradicts --deepspeed, whose shards are those of one set; drop one"
            if self.use_galore or self.optimizer == "galore":
                yield "--lisa_activated_layers contradicts --use_galore true: give one of the two"
        if self.use_galore or self.optimizer == "galore":
            if not is_full:
                yield "--use_galore true needs --train_type full: an adapter's gradients are small already"
            if sharded:
                yield "--use_galore true contradicts --deepspeed, whose shards are no matrices; drop one"
            if "optim" in self.given:
                yield f"--use_galore true contradicts --optim {getattr(self, 'optim', '')}: give one of the two"

    def remarks(self) -> Iterator[str]:
        if self.galore_quantization and self.use_galore:
            yield "--galore_quantization true: the optimiser's states have 8 bits, the weights stay as they are"

    def resolve(self) -> None:
        if self.optimizer == "galore":
            self.use_galore, self.optimizer = True, None
        if self.optimizer == "default":
            self.optimizer = None
        if self.use_galore:
            self.optim = "galore_adamw_8bit" if self.galore_quantization else "galore_adamw"
