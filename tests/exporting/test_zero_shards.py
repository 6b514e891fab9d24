"""Adapters that are only in DeepSpeed's shards are put together, and only those of a whole checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from safetensors.torch import load_file, save_file

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.exporting import export
from rayswift.exporting.zero_shards import needs_gathering
from rayswift.train.checkpoints.manifest import hash_files, write_manifest


def test_a_gathered_checkpoint_is_merged_as_it_is(base_and_adapter: tuple[str, str]) -> None:
    _, adapter = base_and_adapter
    (Path(adapter) / "latest").write_text("global_step3")  # a ZeRO run that gathered has both
    assert not needs_gathering(adapter)


class RunsCode:
    """What a stranger puts into a pickle: opening it calls a function."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return (Path.touch, (self.target,))


def test_shards_never_run_code_whatever_manifest_lies_beside_them(
    base_and_adapter: tuple[str, str], tmp_path: Path
) -> None:
    base, adapter = base_and_adapter
    shards = Path(adapter, "global_step3")
    shards.mkdir()
    (Path(adapter) / "latest").write_text("global_step3")
    torch.save({"module": {}, "x": RunsCode(tmp_path / "ran")}, shards / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save(
        {"optimizer_state_dict": RunsCode(tmp_path / "ran")}, shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    weights = Path(adapter) / "adapter_model.safetensors"
    save_file({name: torch.empty(0) for name in load_file(weights)}, weights)
    write_manifest(fs.LocalFileSystem(), adapter, 3, hash_files(adapter))
    assert needs_gathering(adapter)
    with pytest.raises(UserError, match=r"hold more than tensors.*stage3_gather_16bit_weights_on_model_save"):
        export(make_arguments("export", adapters=[adapter], model=base, merge_lora=True))
    assert not (tmp_path / "ran").exists()
    assert not Path(adapter + "-merged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["own", "deepspeed"])
def test_a_zero3_checkpoint_that_was_not_gathered_merges_to_the_same_model(
    shards: str, base_and_adapter: tuple[str, str], tmp_path: Path
) -> None:
    base, _ = base_and_adapter
    checkpoint, expected = tmp_path / "checkpoint-1", tmp_path / "expected"
    script = Path(__file__).with_name("zero3_checkpoint.py")
    command = [sys.executable, str(script), base, str(checkpoint), str(expected), shards]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert needs_gathering(str(checkpoint))
    merged = [
        export(make_arguments("export", adapters=[str(folder)], model=base, merge_lora=True))
        for folder in (checkpoint, expected)
    ]
    found, wanted = (load_file(Path(folder) / "model.safetensors") for folder in merged)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    plain = load_file(Path(base) / "model.safetensors")
    assert any(not torch.equal(plain[name], tensor) for name, tensor in found.items())
