"""What a checkpoint holds, copied in the time of a memory copy, so that it is written while training goes on.

Measured (benchmarks/checkpoint_blocking.py): writing, hashing and syncing a checkpoint takes seconds, the copy some
milliseconds for LoRA. ``torch.distributed.checkpoint.async_save`` writes a format of its own, which neither PEFT nor
Transformers nor any engine reads.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.plan.memory import free_bytes
from rayswift.train.checkpoints.packed import mapped

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
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not is_copied(trainer.model):
        return None
    writes, optimizer = trainer.args.should_save, not trainer.args.save_only_model
    with tempfile.TemporaryDirectory() as folder:
        rng = rng_file(trainer, folder) if optimizer else None
    found = of_all((not writes or _has_room(trainer), rng))
    if not all(has_room for has_room, _ in found):
        return None
    trainer.store_flos()
    if not writes:
        return lambda folder: None
    weights = _weights(trainer.model)
    states = copied(optimizer_states(trainer)) if optimizer else {}
    state = trainer.exported_state()

    def write(folder: str) -> None:
        import torch

        trainer._save(folder, weights)
        for name, value in states.items():
            torch.save(value, os.path.join(folder, name))
        for name, content in dict(one for _, one in found if one).items():
            (Path(folder) / name).write_bytes(content)
        state.save_to_json(os.path.join(folder, "trainer_state.json"))

    return write


def optimizer_states(trainer: StepTraining) -> dict[str, Any]:
    """What the optimiser and those around it go on from, by their files in a checkpoint; its tensors go on changing."""
    parts: dict[str, Any] = {"optimizer.pt": trainer.optimizer, "scheduler.pt": trainer.lr_scheduler}
    if scaler := getattr(trainer.accelerator, "scaler", None):
        parts["scaler.pt"] = scaler
    return {name: part.state_dict() for name, part in parts.items()}


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

    return mapped(value, torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))


def is_copied(model: Any) -> bool:
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
    trained: set[int] = set()
    frozen: set[int] = set()
    for weight in model.parameters():
        (trained if weight.requires_grad else frozen).add(weight.data_ptr())
    changing: dict[tuple[Any, ...], Any] = {}
    weights = {}
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), value.shape, value.stride())
        # Beside weights there are buffers; those of the model below an adapter (a quantised one has many) stay.
        changes = key[0] in trained or (key[0] not in frozen and (not of_adapter or "modules_to_save" in name))
        if changes:
            changing.setdefault(key, value)
        weights[name] = key if changes else value
    copies = copied(changing)
    return {name: copies[value] if isinstance(value, tuple) else value for name, value in weights.items()}


def _has_room(trainer: StepTraining) -> bool:
    free = free_bytes()
    return free is None or checkpoint_bytes(trainer.model, trainer.args) < ROOM * free


def rng_file(trainer: StepTraining, folder: str) -> tuple[str, bytes]:
    """Name and content of the file of this rank's random numbers, as Transformers writes it into an empty folder."""
    trainer._save_rng_state(folder)
    (file,) = Path(folder).iterdir()
    content = file.read_bytes()
    file.unlink()
    return file.name, content
