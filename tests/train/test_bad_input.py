"""What cannot be trained is refused before anything starts: one line with the mend, status 2, nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from rayswift.cli.main import main
from rayswift.train.checkpoints import manifest as checkpoints


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
    # Whole, but for one flipped bit.
    checkpoints.write_manifest(LocalFileSystem(), str(folder), 3, checkpoints.hash_files(str(folder)))
    weights.write_bytes(b"0123456788")
    message = refused(resume_from_checkpoint=str(folder))
    assert message.startswith(f"--resume_from_checkpoint: {folder}/adapter_model.safetensors is not what was saved")
