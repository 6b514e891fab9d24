"""What cannot be trained is refused before anything starts: one line with the mend, status 2, nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow.fs import LocalFileSystem
from tiny_models import llama, word_tokenizer
from transformers import AutoModelForCausalLM

from rayswift.arguments import make_arguments
from rayswift.cli.main import main
from rayswift.modeling.loading import model_fingerprint
from rayswift.train.checkpoints import manifest as checkpoints
from rayswift.train.resume import Resume


def rows(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def good(tmp_path: Path) -> str:
    return rows(tmp_path / "good.jsonl", *(json.dumps({"query": f"q{n}", "response": "r"}) for n in range(4)))


@pytest.fixture
def refused(
    tmp_path: Path, smollm2_dir: str, good: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs ``rayswift sft`` with these flags; its one line, after looking that it left nothing behind."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def run(**flags: str) -> str:
        given = {"model": smollm2_dir, "dataset": good, "output_dir": str(tmp_path / "out"), **flags}
        before = set(os.listdir(tmp_path))
        assert main(["sft", *(word for name, value in given.items() for word in (f"--{name}", value))]) == 2
        assert set(os.listdir(tmp_path)) == before
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert printed.out == ""
        return line.removeprefix("rayswift sft: error: ")

    return run


def test_models(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(model=str(tmp_path / "gone")).startswith(f"--model {tmp_path}/gone: ")
    assert refused(model=str(tmp_path / "empty")).startswith(f"--model {tmp_path}/empty: no config.json there")


def test_datasets(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(dataset="alpaca-gtp4").startswith("--dataset alpaca-gtp4: ")
    lines = [json.dumps({"query": f"q{n}", "response": "r"}) for n in range(30)]
    broken = rows(tmp_path / "broken.jsonl", *lines[:16], '{"query": ', *lines[16:])
    assert refused(dataset=broken).startswith(f"{broken}:17: broken JSON")
    textless = rows(tmp_path / "textless.jsonl", *('{"foo": 1}' for _ in range(3)))
    assert refused(dataset=textless).startswith(f"--dataset {textless}: no usable row: 3 rows dropped: no column holds")


def test_settings(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(deepspeed="zero9").startswith("--deepspeed zero9: choose from zero0, zero1")
    assert refused(torch_dtype="int7").startswith("--torch_dtype int7: choose from bfloat16")
    cpus = len(os.sched_getaffinity(0))
    message = refused(num_workers=str(cpus + 7), use_gpu="false")
    assert message.startswith(f"--num_workers {cpus + 7} needs {cpus + 7} CPUs and this machine has {cpus} CPUs")
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file" in refused(output_dir=str(tmp_path / "file" / "out"))


def test_checkpoints(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    message = refused(resume_from_checkpoint=str(folder))
    assert message == f"--resume_from_checkpoint {folder}: no such folder"
    folder.mkdir()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"0123456789")
    message = refused(resume_from_checkpoint=str(folder))
    assert message.startswith(f"--resume_from_checkpoint {folder}: no whole checkpoint")
    assert refused(resume_from_checkpoint="true").startswith("--resume_from_checkpoint true: no whole checkpoint below")
    # A folder of that name without versions: nothing in it is touched.
    message = refused(output_dir=str(tmp_path), add_version="false")
    assert message.startswith(f"--output_dir {tmp_path}: holds checkpoint-3 already; --resume_from_checkpoint true")
    # Whole, but for one flipped bit.
    checkpoints.write_manifest(LocalFileSystem(), str(folder), 3, checkpoints.hash_files(str(folder)))
    weights.write_bytes(b"0123456788")
    message = refused(resume_from_checkpoint=str(folder))
    assert message.startswith(f"--resume_from_checkpoint: {folder}/adapter_model.safetensors is not what was saved")
    message = refused(resume_from_checkpoint="true", output_dir=str(tmp_path))
    assert message.endswith(f"({folder}/adapter_model.safetensors is not what was saved)")
    assert weights.read_bytes() == b"0123456788"


def test_checkpoints_of_another_model(
    refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: dict[str, str] = {}
    for name in ("one", "other"):
        made[name] = str(tmp_path / name)
        model = llama()
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1 if name == "one" else 1.5)
        model.save_pretrained(made[name])
        word_tokenizer().save_pretrained(made[name])
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    make_arguments("sft", model=made["one"], dataset="d", lora_rank=4).save(folder)
    checkpoints.Position(16, "data", model=model_fingerprint(made["one"])).write(str(folder))
    checkpoints.write_manifest(LocalFileSystem(), str(folder), 3, checkpoints.hash_files(str(folder)))
    (folder.parent / "last").symlink_to("checkpoint-3")
    capsys.readouterr()  # the bars of saving
    message = refused(model=made["other"], resume_from_checkpoint=str(folder), lora_rank="4")
    assert message.startswith(f"--model {made['other']}: not the model that the checkpoint was trained from")
    message = refused(model=made["one"], resume_from_checkpoint=str(tmp_path / "last"))
    assert message.startswith("--lora_rank 8: the checkpoint was trained with 4; give that")
    message = refused(model=made["one"], resume_from_checkpoint="true", output_dir=str(tmp_path), train_type="full")
    assert message.startswith("--train_type full: the checkpoint was trained with lora")
    message = refused(model=made["one"], resume_from_checkpoint=str(tmp_path / "last"), lora_rank="4", optim="sgd")
    assert message.startswith("--optim sgd: the checkpoint was trained with adamw_torch; give that")
    # Other files, the same weights.
    llama_again = AutoModelForCausalLM.from_pretrained(made["one"])
    llama_again.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert model_fingerprint(str(tmp_path / "shards")) == model_fingerprint(made["one"])


@pytest.mark.parametrize(
    ("flags", "rows_per_step", "line"),
    [
        ({}, 4, ""),
        ({"gradient_accumulation_steps": 2}, 8, "going on with what the checkpoint has: 4 rows a step (not 8)"),
        ({"learning_rate": 1e-3, "seed": 1}, 16, "going on with what the checkpoint has: "
                                                  "--learning_rate 0.0001 (not 0.001), --seed 42 (not 1) "
                                                  "(--reset_scheduler true: what is given now)"),
        ({"learning_rate": 1e-3, "seed": 1, "reset_scheduler": True}, 16,
         "going on with what the checkpoint has: --seed 42 (not 1)"),
        ({"weight_decay": 0.5, "adam_beta2": 0.5, "reset_optimizer": True}, 16, ""),
        ({"learning_rate": 1e-3, "seed": 1, "weight_decay": 0.5, "resume_only_model": True}, 16, ""),
    ],
)  # fmt: skip
def test_what_a_resume_ignores_is_named(flags: dict[str, Any], rows_per_step: int, line: str, tmp_path: Path) -> None:
    make_arguments("sft", model="m", dataset="d").save(tmp_path)
    resume = Resume(str(tmp_path), None, checkpoints.Position(4, "data"), str(tmp_path))
    args = make_arguments("sft", model="m", dataset="d", **flags)
    assert resume.kept_line(args, rows_per_step) == line
    # The run's own args.json says what it trains with, so that the next resume does not take it for something else.
    for name in ("learning_rate", "seed", "weight_decay"):
        assert getattr(resume.with_kept(args), name) == (
            getattr(make_arguments("sft", model="m", dataset="d"), name) if f"--{name}" in line else getattr(args, name)
        )
    assert Resume().kept_line(make_arguments("sft", model="m", dataset="d", **flags), rows_per_step) == ""


def test_an_adapter_says_which_model_it_belongs_to(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --load_args true: what is refused is the dataset, after the model was found."""
    monkeypatch.chdir(tmp_path)
    flags = ["--adapters", checkpoint, "--load_args", "true", "--dataset", "gone.jsonl"]
    assert main(["sft", *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("rayswift sft: error: --dataset gone.jsonl")
    assert main(["sft", "--adapters", "gone", "--load_args", "true", "--dataset", "gone.jsonl"]) == 2
    assert "--adapters gone" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
