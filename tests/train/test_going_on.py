"""What a run that goes on takes from a checkpoint: which one it is, its optimiser, its schedule, its random numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyarrow.fs import LocalFileSystem
from test_trainer import Run, fast, plain_steps  # noqa: F401 -- a fixture

from rayswift.errors import UserError
from rayswift.train.checkpoints import manifest as checkpoints
from rayswift.train.checkpoints.reshard import STATE
from rayswift.train.checkpoints.store import CheckpointStore
from rayswift.train.loader import Rank
from rayswift.train.resume import Resume, find_resume

ADAM = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 2}


def rates(run: Run) -> list[float]:
    return [row["learning_rate"] for row in run.log]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two steps, whose schedule has come to its end."""
    return Run(tmp_path_factory.mktemp("ended"), plain_steps(2), **ADAM)


def test_the_first_resumed_step_has_the_learning_rate_of_its_schedule(ended: Run, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", plain_steps(8), **ADAM)
    assert rates(ended) != rates(whole)[:2]
    checkpoint = Path(ended.trainer.args.output_dir) / "checkpoint-2"
    longer = Run(tmp_path / "longer", plain_steps(8), resume=str(checkpoint), **ADAM)
    assert rates(longer) == rates(whole)[2:]
    # The same run: nothing has changed, to the bit.
    same = Run(tmp_path / "same", plain_steps(8), resume=str(tmp_path / "whole" / "checkpoint-4"), **ADAM)
    assert [row["loss"] for row in same.log] == [row["loss"] for row in whole.log][4:]
    assert rates(same) == rates(whole)[4:]
    for name, value in whole.trainer.model.state_dict().items():
        assert torch.equal(value, same.trainer.model.state_dict()[name])


@pytest.mark.parametrize(
    ("flags", "rate", "kept"),
    [
        ({}, 0.1, True),  # said to be ignored: tests/train/test_bad_input.py
        ({"reset_scheduler": True}, 0.02, True),
        ({"reset_optimizer": True}, 0.1, False),
        ({"resume_only_model": True}, 0.02, False),
    ],
)
def test_what_is_left_behind(ended: Run, tmp_path: Path, flags: dict[str, Any], rate: float, kept: bool) -> None:
    checkpoint = str(Path(ended.trainer.args.output_dir) / "checkpoint-2")
    settings = {**ADAM, "lr_scheduler_type": "constant", "learning_rate": 0.02, **flags}
    run = Run(tmp_path, plain_steps(3), resume=checkpoint, **settings)
    assert [row["global_step"] for row in run.log] == [3]
    assert rates(run) == [pytest.approx(rate)]
    (step,) = {int(state["step"]) for state in run.trainer.optimizer.state.values()}
    assert step == (3 if kept else 1)


def test_a_checkpoint_without_optimiser_goes_on_at_its_place_in_the_schedule(tmp_path: Path) -> None:
    Run(tmp_path / "one", plain_steps(4), **ADAM, save_only_model=True)
    whole = Run(tmp_path / "whole", plain_steps(4), **ADAM)
    run = Run(tmp_path / "two", plain_steps(4), resume=str(tmp_path / "one" / "checkpoint-2"), **ADAM)
    assert rates(run) == rates(whole)[2:]


def save(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * step)
    checkpoints.write_manifest(LocalFileSystem(), str(folder), step, checkpoints.hash_files(str(folder)))
    return folder


def test_auto_is_the_newest_whole_checkpoint_or_a_fresh_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "out"
    assert find_resume("auto", str(base), True).checkpoint is None
    assert f"no whole checkpoint below --output_dir {base}: a fresh start" in capsys.readouterr().out
    old = save(base / "v0-20250101-000000" / "checkpoint-2", 2)
    found = find_resume("auto", str(base), True)
    assert (found.checkpoint, found.run_directory, found.step) == (str(old), str(old.parent), 2)
    assert found == find_resume("true", str(base), True)
    # In a bucket, as on a file system.
    assert find_resume("auto", f"file://{base}", True).step == 2
    new = save(old.with_name("checkpoint-4"), 4)
    (new / "weights").write_bytes(b"yyyy")  # its size is right
    assert find_resume("auto", str(base), True).step == 2
    said = f"{new}/weights is not what was saved; going on from checkpoint-2, the newest whole one"
    assert said in capsys.readouterr().out
    (old / "weights").write_bytes(b"yy")
    assert find_resume("auto", str(base), True).checkpoint is None
    assert f"({new}/weights is not what was saved): a fresh start" in capsys.readouterr().out
    # What stands in the way in a folder without versions is the worker's to set aside.
    assert find_resume("auto", str(old.parent), False).run_directory is None
    with pytest.raises(UserError, match="no whole checkpoint"):
        find_resume("true", str(base), True)


def test_a_checkpoint_goes_on_under_any_name_and_through_its_links(tmp_path: Path) -> None:
    run = tmp_path / "v0-20250101-000000"
    folder = save(run / "checkpoint-20", 20)
    (run / "last").symlink_to("checkpoint-20")
    copied = save(tmp_path / "my-best", 7)
    found = find_resume(str(run / "last"), str(tmp_path / "out"), True)
    assert (found.checkpoint, found.step, found.run_directory) == (str(folder), 20, None)
    found = find_resume(f"{copied}/", str(tmp_path / "out"), True)
    assert (found.checkpoint, found.step, found.run_directory) == (str(copied), 7, None)


def test_a_restarted_worker_takes_the_newest_of_its_run_or_what_it_was_told(tmp_path: Path) -> None:
    told = save(tmp_path / "other" / "any-name", 8)
    run = tmp_path / "run"
    run.mkdir()

    def found(resume: Path | None, step: int) -> tuple[str | None, int, bool]:
        config: Any = SimpleNamespace(run_uri=str(run), resume=resume and str(resume), resume_step=step)
        return CheckpointStore(config, Rank(0, 1), 0, 1).resume_from()

    assert found(None, 0) == (None, 0, False)
    assert found(told, 8) == (str(told), 8, True)
    own = save(run / "checkpoint-4", 4)
    (run / ".writing-checkpoint-4").write_text("")  # its writer died when it was whole
    assert found(told, 0) == (str(own), 4, False)  # which began at step 0, with the weights of what it was told
    assert found(told, 8) == (str(told), 8, True)  # a copy in the run directory, later than what lies there
    assert found(own, 4) == (str(own), 4, True)
    later = save(run / "checkpoint-10", 10)
    assert found(told, 8) == found(own, 4) == (str(later), 10, False)
    assert not [*run.glob(".writing-*")]


@pytest.mark.parametrize(("file", "found"), [("optimizer.pt", True), (STATE, True), ("global_step2/a.pt", True),
                                             ("weights", False)])  # fmt: skip
def test_every_kind_of_optimiser_state_is_known(tmp_path: Path, file: str, found: bool) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"x")
    checkpoints.write_manifest(LocalFileSystem(), str(tmp_path), 2, checkpoints.hash_files(str(tmp_path)))
    assert Resume(str(tmp_path), uri=str(tmp_path))._has_optimizer() == found
