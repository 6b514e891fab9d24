"""The optimiser's state of a run with ZeRO, in files that any number of workers and any ZeRO stage go on from.

A worker's part are flat vectors: the trained numbers in float32 (kind ``fp32``), and as long ones for each thing that
the optimiser keeps of them (``exp_avg``, …). ``optimizer/shard-R-of-W.safetensors`` holds those of worker R, and of
which parameters they are: :class:`Piece`. Whoever reads asks for numbers of a parameter by its name, and gets them from
whatever shards have them. Nothing is gathered: every worker writes and reads its part alone.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rayswift.errors import UserError
from rayswift.files import parse_json
from rayswift.train.checkpoints.manifest import read_manifest

if TYPE_CHECKING:
    import torch
    from pyarrow.fs import FileSystem

FOLDER = "optimizer"
STATE = f"{FOLDER}/state.json"
_SHARD = re.compile(rf"^{FOLDER}/shard-(\d+)-of-(\d+)\.safetensors$")
#: One worker's part as DeepSpeed writes it.
_DEEPSPEED_SHARD = re.compile(r"^global_step\d+/.*zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt$")


class Piece(NamedTuple):
    """``size`` numbers of a parameter from its ``start``-th on, ``place`` numbers into a flat vector."""

    name: str
    place: int
    start: int
    size: int


#: For each flat vector of a worker what lies in it.
Layout = Sequence[Sequence[Piece]]


def write_shard(
    checkpoint: str, rank: int, workers: int, layout: Layout, vectors: Sequence[dict[str, torch.Tensor]]
) -> None:
    """Write what worker ``rank`` of ``workers`` holds: by kind the vectors that ``layout`` describes."""
    from safetensors.torch import save_file

    ends = [max((piece.place + piece.size for piece in pieces), default=0) for pieces in layout]
    tensors = {
        f"{number}/{kind}": vector.detach()[:end].cpu().contiguous()
        for number, (kinds, end) in enumerate(zip(vectors, ends, strict=True))
        for kind, vector in kinds.items()
    }
    folder = Path(checkpoint, FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"pieces": json.dumps(layout)}
    save_file(tensors, folder / f"shard-{rank:05}-of-{workers:05}.safetensors", metadata=metadata)


class Shards:
    """The shards of a checkpoint, open for reading."""

    def __init__(self, checkpoint: str) -> None:
        from safetensors import safe_open

        self._checkpoint = checkpoint
        self._pieces: dict[str, list[tuple[Piece, Any, int]]] = defaultdict(list)
        for path in sorted(Path(checkpoint, FOLDER).glob("shard-*.safetensors")):
            file = safe_open(path, "pt")
            for number, pieces in enumerate(json.loads(file.metadata()["pieces"])):
                for piece in pieces:
                    self._pieces[piece[0]].append((Piece(*piece), file, number))
        for found in self._pieces.values():
            found.sort(key=lambda one: one[0].start)

    def read(self, name: str, kind: str, into: torch.Tensor, start: int = 0) -> None:
        """Copy the numbers of a parameter from its ``start``-th on into a flat tensor.

        Raises:
            UserError: not all of them are there.
        """
        at, end = start, start + into.numel()
        for piece, file, number in self._pieces.get(name, ()):
            if piece.start <= at < piece.start + piece.size and at < end:
                until, shift = min(end, piece.start + piece.size), piece.place - piece.start
                into[at - start : until - start] = file.get_slice(f"{number}/{kind}")[at + shift : until + shift]
                at = until
        if at < end:
            raise UserError(f"{self._checkpoint}/{FOLDER}: has no {kind} of {name}; give another checkpoint")

    def fill(self, pieces: Sequence[Piece], kind: str, vector: torch.Tensor) -> torch.Tensor:
        """A flat vector with all of its pieces; the rest of it, which nothing trains, stays as it is."""
        for piece in pieces:
            self.read(piece.name, kind, vector[piece.place : piece.place + piece.size], piece.start)
        return vector


def whole_parameters(checkpoint: str) -> dict[str, torch.Tensor]:
    """The trained parameters of a checkpoint by their names in the model, in float32."""
    import torch

    shards, shapes = Shards(checkpoint), parse_json(Path(checkpoint, STATE).read_bytes())["shapes"]
    found = {name: torch.empty(shape) for name, shape in shapes.items()}
    for name, tensor in found.items():
        shards.read(name, "fp32", tensor.view(-1))
    return found


def check_zero_resume(filesystem: FileSystem, checkpoint: str, stage: int, num_workers: int | tuple[int, int]) -> None:
    """Refuse a checkpoint whose optimiser a run of this ZeRO ``stage`` (0: none) cannot take over on so many workers,
    by the names in its manifest.

    Raises:
        UserError: says why, and what to give.
    """
    files = (read_manifest(filesystem, checkpoint) or {}).get("files", {})
    any_number = any(_SHARD.match(file) for file in files)
    shards = sum(bool(_DEEPSPEED_SHARD.match(file)) for file in files)
    if stage == 0 and (any_number or shards):
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} has the optimiser of a run with ZeRO, which training without it "
            "cannot take over; give a --deepspeed with ZeRO (zero1, zero2, zero3)"
        )
    if stage == 0 or any_number:
        return
    if not shards:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} has no optimiser of a run with ZeRO (it was trained without, or "
            "with --save_only_model true); begin a new run on what it trained (--adapters or --model)"
        )
    fewest, most = num_workers if isinstance(num_workers, tuple) else (num_workers, num_workers)
    if not fewest == most == shards:
        asked = most if fewest == most else f"{fewest},{most}"
        raise UserError(
            f"--num_workers {asked}: {checkpoint} holds DeepSpeed's own shards of {shards} workers, which no other "
            f"number can take over; give --num_workers {shards}"
        )
