"""What a checkpoint holds, copied in the time of a memory copy, so that it is written while training goes on.

Measured (benchmarks/checkpoint_blocking.py): writing, hashing and syncing a checkpoint takes seconds, the copy some
milliseconds for LoRA. ``torch.distributed.checkpoint.async_save`` writes a format of its own, which neither PEFT nor
Transformers nor any engine reads.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.plan.memory import free_bytes

if TYPE_CHECKING:
    from rayswift.train.trainers.step import StepTraining

#: Writes the files of a checkpoint into a folder.
Write = Callable[[str], None]
#: The share of the free memory that a copy may take.
ROOM = 0.5


def take_snapshot(trainer: StepTraining, of_all: Callable[[Any], list[Any]]) -> Write | None:
    """What rank 0 may call on another thread to write the state that training has now; on other ranks nothing to call.
    None on all of them where the Trainer must write it by itself, at once.

    Args:
        trainer: of every rank.
        of_all: gathers a value of each rank.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not _is_copied(trainer.model):
        return None
    writes, optimizer = trainer.args.should_save, not trainer.args.save_only_model
    found = of_all((not writes or _has_room(trainer), _rng_file(trainer) if optimizer else None))
    if not all(room for room, _ in found):
        return None
    trainer.store_flos()
    if not writes:
        return lambda folder: None
    weights = _weights(trainer.model)
    states: dict[str, Any] = {}
    if optimizer:
        for name in ("optimizer", "lr_scheduler"):
            states[f"{name.removeprefix('lr_')}.pt"] = copied(getattr(trainer, name).state_dict())
        if scaler := getattr(trainer.accelerator, "scaler", None):
            states["scaler.pt"] = copied(scaler.state_dict())
    state = trainer.exported_state()

    def write(folder: str) -> None:
        import torch

        trainer._save(folder, state_dict=weights)
        for name, value in states.items():
            torch.save(value, os.path.join(folder, name))
        for name, content in dict(rng for _, rng in found if rng).items():
            (Path(folder) / name).write_bytes(content)
        state.save_to_json(os.path.join(folder, "trainer_state.json"))

    return write


def checkpoint_bytes(model: Any, args: Any) -> int:
    """What a checkpoint takes at least: trained weights (of full training all of them) and two moments of each."""
    from peft import PeftModel

    def size(weight: Any) -> int:  # also of one that ZeRO-3 has taken apart
        return int(getattr(weight, "ds_numel", weight.numel()) * weight.element_size())

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    saved = trained if isinstance(model, PeftModel) else model.parameters()
    return sum(map(size, saved)) + (0 if args.save_only_model else 2) * sum(map(size, trained))


def copied(value: Any) -> Any:
    """A state in which every tensor is a copy in the CPU's memory."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((name, copied(one)) for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(copied(one) for one in value)
    return copy.deepcopy(value)


def _is_copied(model: Any) -> bool:
    """Whether all that is saved of a model is in its state: other adapters than LoRA's may change their settings while
    they train, quantised weights are saved their own way."""
    from peft import PeftModel, PeftType

    if isinstance(model, PeftModel):
        return all(config.peft_type == PeftType.LORA for config in model.peft_config.values())
    return getattr(model, "hf_quantizer", None) is None


def _weights(model: Any) -> dict[str, Any]:
    """The model's state: what training changes as copies (one of what is shared), the rest as it is."""
    from peft import PeftModel

    of_adapter = isinstance(model, PeftModel)
    trained, frozen = ({weight.data_ptr() for weight in model.parameters() if weight.requires_grad is which}
                       for which in (True, False))  # fmt: skip
    copies: dict[tuple[Any, ...], Any] = {}
    weights = {}
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), value.shape, value.stride())
        # Beside weights there are buffers; those of the model below an adapter (a quantised one has many) stay.
        changes = key[0] in trained or (key[0] not in frozen and (not of_adapter or "modules_to_save" in name))
        if changes and key not in copies:
            copies[key] = copied(value)
        weights[name] = copies[key] if changes else value
    return weights


def _has_room(trainer: StepTraining) -> bool:
    free = free_bytes()
    return free is None or checkpoint_bytes(trainer.model, trainer.args) < ROOM * free


def _rng_file(trainer: StepTraining) -> tuple[str, bytes]:
    """Name and content of the file of this rank's random numbers, as Transformers writes it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer._save_rng_state(folder)
        (file,) = Path(folder).iterdir()
        return file.name, file.read_bytes()
