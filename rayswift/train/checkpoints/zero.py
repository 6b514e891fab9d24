"""The state of a DeepSpeed engine with ZeRO, saved and loaded by its workers in the form of :mod:`reshard`.

``optimizer/state.json`` says what is the same on all workers: settings of the optimiser's parameter groups, what it
keeps beside vectors (its step), counters, the loss scaler, and the shapes of the trained parameters.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from rayswift import private
from rayswift.errors import UserError
from rayswift.files import parse_json
from rayswift.train.checkpoints.reshard import STATE, Piece, Shards, write_shard

#: DeepSpeed's own counters that go with its state.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_NUMBER = (bool, int, float)


def has_zero_state(checkpoint: str) -> bool:
    """Whether a checkpoint holds what :func:`save_zero_state` writes."""
    return os.path.isfile(os.path.join(checkpoint, STATE))


def save_zero_state(engine: Any, checkpoint: str, rank: int, workers: int) -> bool:
    """Write this worker's part; every worker calls it. False, and nothing is written, where only DeepSpeed itself can
    save what the engine has."""
    found = private.zero_layout(engine)
    if found is None:
        return False
    layout, shapes = found
    state, masters, base = private.zero_state(engine)
    vectors: list[dict[str, torch.Tensor]] = []
    beside: dict[str, Any] = {}
    for number, master in enumerate(masters):
        vectors.append({"fp32": master})
        for kind, value in base["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                beside[kind] = {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
            elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == master.shape:
                vectors[-1][kind] = value
            elif isinstance(value, _NUMBER):
                beside[kind] = value
            else:  # quantised, or of another shape
                return False
    write_shard(checkpoint, rank, workers, [[Piece(*piece) for piece in pieces] for pieces in layout], vectors)
    if rank == 0:
        about = {
            "kinds": sorted({kind for vector in vectors for kind in vector} - {"fp32"}),
            "beside": beside,
            "groups": [_plain(group) for group in base["param_groups"]],
            "loss_scaler": _plain(vars(state["loss_scaler"])),
            "counters": {name: getattr(engine, name) for name in _COUNTERS},
            "shapes": shapes,
        }
        Path(checkpoint, STATE).write_text(json.dumps(about, indent=1))
    return True


def load_zero_state(engine: Any, checkpoint: str) -> None:
    """Give an engine the state that any number of workers saved with any ZeRO stage; every worker calls it."""
    found = private.zero_layout(engine)
    if found is None:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: its ZeRO state cannot be loaded into this kind of ZeRO; give the "
            "--deepspeed of the run that saved it"
        )
    about, shards = parse_json(Path(checkpoint, STATE).read_bytes()), Shards(checkpoint)
    state, masters, base = private.zero_state(engine)
    if len(about["groups"]) != len(base["param_groups"]):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: its optimiser has {len(about['groups'])} groups of parameters, "
            f"this one {len(base['param_groups'])}; give the flags of the run that saved it"
        )
    kept = {
        kind: torch.tensor(value["value"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) else value
        for kind, value in about["beside"].items()
    }
    for number, (master, pieces) in enumerate(zip(masters, found[0], strict=True)):
        named = [Piece(*piece) for piece in pieces]
        shards.fill(named, "fp32", master.data)
        base["state"][number] = {kind: value.clone() if isinstance(value, torch.Tensor) else value
                                 for kind, value in kept.items()}  # fmt: skip
        for kind in about["kinds"]:
            base["state"][number][kind] = shards.fill(named, kind, torch.zeros_like(master))
    for group, saved in zip(base["param_groups"], about["groups"], strict=True):
        group.update({name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    vars(state["loss_scaler"]).update(about["loss_scaler"])
    private.load_zero_state(engine, state)
    for name, value in about["counters"].items():
        setattr(engine, name, value)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What of a dict is numbers, or a few of them."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, _NUMBER)
        or (name != "params" and isinstance(value, (list, tuple)) and all(isinstance(one, _NUMBER) for one in value))
    }
