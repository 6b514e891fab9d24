"""A run that goes on, as it is typed: the same command for every start, a copied checkpoint, parts of one; and what is
refused before the first step or not tried again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import QUICK, losses, read_rows, run, run_directory, start

pytestmark = pytest.mark.slow


def command(model: str, output: Path, *flags: str) -> list[str]:
    return [
        "sft", "--model", model, "--dataset", "identity", "--model_name", "swift-robot", "--model_author", "swift",
        "--num_workers", "1", "--use_gpu", "false", "--save_steps", "2", "--split_dataset_ratio", "0",
        "--torch_dtype", "float32", "--learning_rate", "1e-3", "--create_checkpoint_symlink", "true",
        "--output_dir", str(output), *QUICK, *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run of four steps that went on for four more, by one command."""
    place = tmp_path_factory.mktemp("auto")
    auto = command(tiny_dir, place / "out", "--resume_from_checkpoint", "auto")
    printed = run(*auto, "--max_steps", "4", log=place / "first.log")
    assert "no whole checkpoint below --output_dir" in printed and "a fresh start" in printed
    assert "saved checkpoint-4 (" in printed and "training waited" in printed
    folder = run_directory(place / "out")
    run(*auto, "--max_steps", "8", log=place / "second.log")
    assert run_directory(place / "out") == folder
    return folder


def test_one_command_for_every_start(tiny_dir: str, trained: Path, tmp_path: Path) -> None:
    rows = [row for row in read_rows(trained) if "loss" in row]
    assert [int(row["global_step/max_steps"].split("/")[0]) for row in rows] == list(range(1, 9))
    assert rows[4]["learning_rate"] == pytest.approx(5e-4)  # half way down its cosine; the old one had ended with 0
    # Once more, with nothing left to do.
    words = command(tiny_dir, trained.parent, "--resume_from_checkpoint", "auto", "--max_steps", "8")
    printed = run(*words, log=tmp_path / "third.log")
    assert f"last_model_checkpoint: {trained}/checkpoint-8" in printed


@pytest.mark.parametrize(("kind", "first"), [("copy", 7), ("link", 9)])
def test_a_copy_of_a_checkpoint_and_a_link_to_one(
    tiny_dir: str, trained: Path, tmp_path: Path, kind: str, first: int
) -> None:
    checkpoint = trained / "last"
    if kind == "copy":
        checkpoint = Path(shutil.copytree(trained / "checkpoint-6", tmp_path / "my-copy"))
    words = command(tiny_dir, tmp_path / "out", "--resume_from_checkpoint", str(checkpoint), "--max_steps", "9")
    run(*words, log=tmp_path / "log")
    assert [step for step in losses(run_directory(tmp_path / "out")) if step >= first] == list(range(first, 10))


def test_the_weights_alone_in_a_run_of_their_own(tiny_dir: str, trained: Path, tmp_path: Path) -> None:
    weights = ["--resume_from_checkpoint", str(trained / "last"), "--resume_only_model", "true"]
    anew = [*weights, "--ignore_data_skip", "true", "--max_steps", "2"]
    run(*command(tiny_dir, tmp_path / "out", *anew), log=tmp_path / "log")
    found = losses(run_directory(tmp_path / "out"))
    assert list(found) == [1, 2]
    assert found[1] < losses(trained)[1]  # the same rows, by a model that knows them


@pytest.mark.parametrize(("flags", "rate"), [([], 5e-4), (["--reset_scheduler", "true"], 2e-3)])
def test_another_learning_rate_is_taken_or_said_to_be_ignored(
    tiny_dir: str, trained: Path, tmp_path: Path, flags: list[str], rate: float
) -> None:
    faster = ["--resume_from_checkpoint", str(trained / "last"), "--learning_rate", "4e-3", "--max_steps", "16", *flags]
    printed = run(*command(tiny_dir, tmp_path / "out", *faster), log=tmp_path / "log")
    assert ("--learning_rate 0.001 (not 0.004)" in printed) == (not flags)
    (row,) = [row for row in read_rows(run_directory(tmp_path / "out")) if row.get("global_step/max_steps") == "9/16"]
    assert row["learning_rate"] == pytest.approx(rate)


def test_what_cannot_change_ends_a_run_at_once(tiny_dir: str, tmp_path: Path) -> None:
    log = tmp_path / "kwargs.log"
    words = command(tiny_dir, tmp_path / "a", "--max_steps", "4", "--lr_scheduler_kwargs", '{"nonsense": 1}')
    assert start(*words, log=log).wait(300) == 1
    printed = log.read_text()
    assert "training failed in worker 0 after step 0: TypeError: " in printed
    assert "nonsense" in printed.splitlines()[-1]
    assert printed.count("model_parameter_info") == 1 and "training goes on" not in printed  # one start of the workers

    model = shutil.copytree(tiny_dir, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.5, "do_sample": False}))
    words = command(str(model), tmp_path / "b", "--max_steps", "4", "--train_type", "full")
    log = tmp_path / "generation.log"
    assert start(*words, log=log).wait(300) == 2
    assert "generation_config.json: Transformers would refuse to save it" in log.read_text().splitlines()[-1]
    assert not [*(tmp_path / "b").rglob("checkpoint-*")]
