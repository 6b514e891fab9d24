"""What a checkpoint holds, copied in the time of a memory copy, so that it is written while training goes on.

Measured (benchmarks/checkpoint_blocking.py): writing, hashing and syncing a checkpoint takes seconds, the copy some
milliseconds for LoRA. ``torch.distributed.checkpoint.async_save`` writes a format of its own, which neither PEFT nor
Transformers nor any engine reads.
"""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
from collections import defaultdict
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
#: Bytes that are copied together at most, a device's memory for the time of it.
TOGETHER = 2**26


def take_snapshot(trainer: StepTraining, of_all: Callable[[Any], list[Any]], bare: bool = False) -> Write | None:
    """What rank 0 may call on another thread to write the state that training has now; on other ranks nothing to call.
    None on all of them where the Trainer must write it by itself, at once.

    Args:
        trainer: of every rank.
        of_all: gathers a value of each rank.
        bare: of an adapter what training needs to go on, and no more.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not _is_copied(trainer.model):
        return None
    writes, optimizer = trainer.args.should_save, bare or not trainer.args.save_only_model
    room = bare or not writes or _has_room(trainer)  # a bare one is small, and taken often
    found = of_all((room, _rng_file(trainer) if optimizer else None))
    if not all(has_room for has_room, _ in found):
        return None
    trainer.store_flos()
    if not writes:
        return lambda folder: None
    copy_of = copied_together if bare else copied
    weights = _weights(trainer.model, copy_of)
    states: dict[str, Any] = {}
    if optimizer:
        for name in ("optimizer", "lr_scheduler"):
            states[f"{name.removeprefix('lr_')}.pt"] = copy_of(getattr(trainer, name).state_dict())
        if scaler := getattr(trainer.accelerator, "scaler", None):
            states["scaler.pt"] = copied(scaler.state_dict())
    state = trainer.exported_state()

    def write(folder: str) -> None:
        import torch

        (trainer.save_adapter if bare else trainer._save)(folder, weights)
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
    return _mapped(value, lambda tensor: tensor.detach().to("cpu", copy=True))


def copied_together(value: Any) -> Any:
    """The same with one copy of many tensors that are alike, each a part of it: for hundreds of small ones that takes
    a third of the time."""
    import torch

    tensors: list[Any] = []
    _mapped(value, tensors.append)
    alike: dict[Any, list[int]] = defaultdict(list)
    taken: dict[Any, int] = defaultdict(int)
    for number, tensor in enumerate(tensors):
        kind = tensor.device, tensor.dtype
        taken[kind] += tensor.numel() * tensor.element_size()
        alike[kind, taken[kind] // TOGETHER].append(number)
    parts: dict[int, Any] = {}
    for numbers in alike.values():
        flat = torch.cat([tensors[number].detach().reshape(-1) for number in numbers]).cpu()
        parts |= zip(numbers, flat.split([tensors[number].numel() for number in numbers]), strict=True)
    order = itertools.count()
    return _mapped(value, lambda tensor: parts[next(order)].view(tensor.shape))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a state with its tensors changed."""
    import torch

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((name, _mapped(one, change)) for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(one, change) for one in value)
    return copy.deepcopy(value)


def _is_copied(model: Any) -> bool:
    """Whether all that is saved of a model is in its state: other adapters than LoRA's may change their settings while
    they train, quantised weights are saved their own way."""
    from peft import PeftModel, PeftType

    if isinstance(model, PeftModel):
        return all(config.peft_type == PeftType.LORA for config in model.peft_config.values())
    return getattr(model, "hf_quantizer", None) is None


def _weights(model: Any, copy_of: Callable[[Any], Any] = copied) -> dict[str, Any]:
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
    copies = copy_of(changing)
    return {name: copies[value] if isinstance(value, tuple) else value for name, value in weights.items()}


def _has_room(trainer: StepTraining) -> bool:
    free = free_bytes()
    return free is None or checkpoint_bytes(trainer.model, trainer.args) < ROOM * free


def _rng_file(trainer: StepTraining) -> tuple[str, bytes]:
    """Name and content of the file of this rank's random numbers, as Transformers writes it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer._save_rng_state(folder)
        (file,) = Path(folder).iterdir()
        return file.name, file.read_bytes()
