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


def test_one_command_for_every_start(tiny_dir: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    auto = command(tiny_dir, output, "--resume_from_checkpoint", "auto")
    printed = run(*auto, "--max_steps", "4", log=tmp_path / "first.log")
    assert "no whole checkpoint below --output_dir" in printed and "a fresh start" in printed
    folder = run_directory(output)
    assert "saved checkpoint-4 (" in printed and "training waited" in printed
    # Longer: it goes on, and no step has the learning rate that its old schedule ended with.
    run(*auto, "--max_steps", "8", log=tmp_path / "second.log")
    assert run_directory(output) == folder
    rows = [row for row in read_rows(folder) if "loss" in row]
    assert [int(row["global_step/max_steps"].split("/")[0]) for row in rows] == list(range(1, 9))
    assert rows[4]["learning_rate"] == pytest.approx(5e-4)  # half way down its cosine
    # Once more, with nothing left to do.
    printed = run(*auto, "--max_steps", "8", log=tmp_path / "third.log")
    assert f"last_model_checkpoint: {folder}/checkpoint-8" in printed

    # A copy, and a link.
    shutil.copytree(folder / "checkpoint-6", tmp_path / "my-copy")
    for name, checkpoint in (("copy", tmp_path / "my-copy"), ("link", folder / "last")):
        target = tmp_path / name
        words = command(tiny_dir, target, "--resume_from_checkpoint", str(checkpoint), "--max_steps", "9")
        run(*words, log=tmp_path / f"{name}.log")
        first = 7 if name == "copy" else 9
        assert [step for step in losses(run_directory(target)) if step >= first] == list(range(first, 10))
    # Its weights alone, in a run of its own.
    anew = [
        "--resume_from_checkpoint",
        str(folder / "last"),
        "--resume_only_model",
        "true",
        "--ignore_data_skip",
        "true",
    ]
    run(*command(tiny_dir, tmp_path / "anew", *anew, "--max_steps", "2"), log=tmp_path / "anew.log")
    found = losses(run_directory(tmp_path / "anew"))
    assert list(found) == [1, 2]
    assert found[1] < losses(folder)[1]  # the same rows, by a model that knows them
    # Another learning rate.
    faster = ["--resume_from_checkpoint", str(folder / "last"), "--learning_rate", "4e-3", "--max_steps", "16"]
    for name, flags, rate in (("kept", [], 5e-4), ("reset", ["--reset_scheduler", "true"], 2e-3)):
        printed = run(*command(tiny_dir, tmp_path / name, *faster, *flags), log=tmp_path / f"{name}.log")
        assert ("--learning_rate 0.001 (not 0.004)" in printed) == (name == "kept")
        row = next(row for row in read_rows(run_directory(tmp_path / name))
                   if row.get("global_step/max_steps") == "9/16")  # fmt: skip
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
