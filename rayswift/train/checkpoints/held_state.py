"""The state after a step of a LoRA run as it is held in memory: cheap to take, a checkpoint when it is wanted.

It is taken after every step, and wanted when a worker has died: names, files and formats are made then.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayswift.modeling.adapter_folder import ADAPTER_WEIGHTS
from rayswift.train.checkpoints.packed import unpacked

#: The values of a state that become files in ways of their own.
ADAPTER, FIRST, TRAINER = "adapter", "first values", "trainer"


@dataclass(frozen=True)
class HeldState:
    """What training goes on from.

    Args:
        files: small files of the checkpoint, by name.
        places: a pickle of the other state, with a `Part` in the place of each tensor.
        buffers: the bytes of its tensors.
    """

    files: dict[str, bytes]
    places: bytes
    buffers: list[Any]

    @classmethod
    def of(cls, files: dict[str, bytes], places: Any, buffers: list[Any]) -> HeldState:
        """Of a state that was `packed`."""
        import torch

        return cls(files, pickle.dumps(places), [buffer.view(torch.uint8).numpy() for buffer in buffers])

    def of_its_own(self) -> HeldState:
        """The same without memory that another process has lent (Ray does, to read)."""
        lent = [memoryview(buffer).readonly for buffer in self.buffers]
        found = zip(self.buffers, lent, strict=True)
        return replace(self, buffers=[bytes(buffer) if is_lent else buffer for buffer, is_lent in found])

    def write(self, folder: str) -> None:
        """Make it a checkpoint that training goes on from."""
        import torch
        from safetensors.torch import save_file

        from rayswift.modeling.part_of_base import write_plain

        os.makedirs(folder, mode=0o700)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)
        buffers = [torch.frombuffer(bytearray(buffer), dtype=torch.uint8) for buffer in self.buffers]
        places = pickle.loads(self.places)
        places.pop(TRAINER).save_to_json(os.path.join(folder, "trainer_state.json"))
        state = unpacked(places, buffers)
        save_file(state.pop(ADAPTER), os.path.join(folder, ADAPTER_WEIGHTS), metadata={"format": "pt"})
        if first := state.pop(FIRST):
            write_plain(folder, first)
        for name, value in state.items():
            torch.save(value, os.path.join(folder, name))
