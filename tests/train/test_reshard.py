"""ZeRO's state cut anew for other numbers of workers, as both ways of ZeRO cut it, without a process."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from pyarrow.fs import LocalFileSystem
from safetensors.torch import load_file

from rayswift.errors import UserError
from rayswift.train.checkpoints.manifest import hash_files, write_manifest
from rayswift.train.checkpoints.reshard import (
    STATE,
    Layout,
    Piece,
    Shards,
    check_zero_resume,
    whole_parameters,
    write_shard,
)

#: Two groups of parameters, of odd sizes, one of a single number.
GROUPS: list[dict[str, list[int]]] = [{"a": [3, 7], "b": [1], "c": [5, 5, 2]}, {"norm": [13], "bias": [2]}]
SHAPES = {name: shape for group in GROUPS for name, shape in group.items()}
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
Vectors = list[dict[str, torch.Tensor]]


def zero12(rank: int, workers: int) -> tuple[Layout, list[int]]:
    """One vector a group, cut into equal parts of an even size: the last ends in padding."""
    layout, sizes = [], []
    for group in GROUPS:
        part = math.ceil(sum(math.prod(shape) for shape in group.values()) / (2 * workers)) * 2
        first, at = rank * part, 0
        layout.append([])
        for name, shape in group.items():
            begin, end = max(at, first), min(at + math.prod(shape), first + part)
            if begin < end:
                layout[-1].append(Piece(name, begin - first, begin - at, end - begin))
            at += math.prod(shape)
        sizes.append(part)
    return layout, sizes


def zero3(rank: int, workers: int) -> tuple[Layout, list[int]]:
    """Every parameter cut into equal parts, each with a padding of its own."""
    layout, sizes = [], []
    for group in GROUPS:
        place = 0
        layout.append([])
        for name, shape in group.items():
            part = math.ceil(math.prod(shape) / workers)
            if (size := min(part, math.prod(shape) - rank * part)) > 0:
                layout[-1].append(Piece(name, place, rank * part, size))
            place += part
        sizes.append(place)
    return layout, sizes


def whole(kind: str) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(KINDS.index(kind))
    return {name: torch.randn(math.prod(shape), generator=drawn) for name, shape in SHAPES.items()}


def save(folder: Path, cut: object, workers: int, source: Path | None = None) -> Path:
    """What so many workers write, who began with these numbers or went on from the checkpoint ``source``."""
    for rank in range(workers):
        layout, sizes = cut(rank, workers)  # type: ignore[operator]
        vectors: Vectors = [{} for _ in layout]
        for kind in KINDS:
            begun = whole(kind)
            for number, (pieces, size) in enumerate(zip(layout, sizes, strict=True)):
                vector = torch.zeros(size)
                if source is not None:
                    Shards(str(source)).fill(pieces, kind, vector)
                else:
                    for piece in pieces:
                        part = begun[piece.name][piece.start : piece.start + piece.size]
                        vector[piece.place : piece.place + piece.size] = part
                vectors[number][kind] = vector
        write_shard(str(folder), rank, workers, layout, vectors)
    (folder / STATE).write_text(json.dumps({"shapes": SHAPES}))
    return folder


@pytest.mark.parametrize("cut", [zero12, zero3])
@pytest.mark.parametrize("between", [1, 3, 9])
def test_there_and_back_is_the_same_to_the_bit(cut: object, between: int, tmp_path: Path) -> None:
    two = save(tmp_path / "two", cut, 2)
    other = save(tmp_path / "other", cut, between, two)
    back = save(tmp_path / "back", cut, 2, other)
    assert len(list((other / "optimizer").glob("*.safetensors"))) == between
    assert hash_files(str(back)) == hash_files(str(two))
    for name, tensor in whole_parameters(str(other)).items():
        assert torch.equal(tensor, whole("fp32")[name].reshape(SHAPES[name])), name


def test_another_stage_goes_on_from_it(tmp_path: Path) -> None:
    two = save(tmp_path / "two", zero12, 2)
    three = save(tmp_path / "three", zero3, 3, two)
    assert hash_files(str(three)) == hash_files(str(save(tmp_path / "begun", zero3, 3)))


def test_padding_is_not_kept_and_a_lost_shard_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, zero12, 2)
    last = load_file(folder / "optimizer/shard-00001-of-00002.safetensors")
    assert {name: len(tensor) for name, tensor in last.items() if "fp32" in name} == {"0/fp32": 36, "1/fp32": 7}
    (folder / "optimizer/shard-00000-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(folder))}/optimizer: has no fp32 of a; give another"):
        whole_parameters(str(folder))


OWN = ["optimizer/state.json", *(f"optimizer/shard-{rank:05}-of-00002.safetensors" for rank in range(2))]
DEEPSPEED = [f"global_step4/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
DEEPSPEED_3 = [*DEEPSPEED, *(f"global_step4/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2))]
PLAIN = ["optimizer.pt", "scheduler.pt"]


@pytest.mark.parametrize(
    ("files", "stage", "workers", "refused"),
    [
        (OWN, 2, 2, None),
        (OWN, 3, 1, None),
        (OWN, 1, (1, 8), None),
        (OWN, 0, 2, r"has the optimiser of a run with ZeRO.*give a --deepspeed with ZeRO"),
        (DEEPSPEED, 2, 2, None),
        (DEEPSPEED_3, 3, 2, None),
        (DEEPSPEED, 2, 1, r"--num_workers 1: .*own shards of 2 workers.*give --num_workers 2"),
        (DEEPSPEED_3, 3, (1, 2), r"--num_workers 1,2: .*own shards of 2 workers.*give --num_workers 2"),
        (DEEPSPEED, 0, 2, r"has the optimiser of a run with ZeRO"),
        (PLAIN, 0, 3, None),
        ([], 0, 1, None),
        (PLAIN, 2, 2, r"has no optimiser of a run with ZeRO.*--save_only_model true.*--adapters or --model"),
        ([], 3, 1, r"has no optimiser of a run with ZeRO"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_go_on_from_is_refused_by_the_manifest(
    files: list[str], stage: int, workers: int | tuple[int, int], refused: str | None, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write_manifest(LocalFileSystem(), str(tmp_path), 4, hash_files(str(tmp_path)))
    if refused is None:
        check_zero_resume(LocalFileSystem(), str(tmp_path), stage, workers)
        return
    with pytest.raises(UserError, match=refused) as caught:
        check_zero_resume(LocalFileSystem(), str(tmp_path), stage, workers)
    assert "\n" not in str(caught.value)
