"""The run directory: version folders, files, a bucket's copy, and output folders that cannot be written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.cluster import results_at
from rayswift.errors import UserError
from rayswift.train.run_directory import RunDirectory, check_writable


def base_of(**given: Any) -> str:
    args = make_arguments("sft", model="org/model", dataset=["x"], **given)
    return results_at(args, "output_dir", args.output_dir)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_versions_count_up_from_the_highest(tmp_path: Path) -> None:
    base = tmp_path / "output" / "model"
    made = [Path(RunDirectory.create(str(base), add_version=True).uri).name for _ in range(2)]
    assert [re.sub(r"-\d{8}-\d{6}$", "-DATE", name) for name in made] == ["v0-DATE", "v1-DATE"]
    (base / "v10-20250102-030405").mkdir()
    (base / "v99").mkdir()
    (base / "vx-20250102-030405").mkdir()
    assert Path(RunDirectory.create(str(base), add_version=True).uri).name.startswith("v11-")


def test_without_versions_the_folder_itself_is_the_run(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "out"), add_version=False)
    assert run.local == tmp_path / "out"
    assert run.local.is_dir()


def test_jsonl_files(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path), add_version=True)
    rows = [{"messages": [{"role": "user", "content": "你好\n"}]}, {"loss": 1.5}]
    run.write_jsonl("val_dataset.jsonl", rows[:1])
    run.append_jsonl("val_dataset.jsonl", rows[1])
    text = (run.local / "val_dataset.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == rows
    assert "你好" in text
    run.close()
    assert (run.local / "val_dataset.jsonl").exists()


def test_a_uri_gets_copies_of_what_is_written(tmp_path: Path) -> None:
    base = f"file://{tmp_path}/bucket"
    run = RunDirectory.create(base, add_version=True)
    assert run.uri.startswith(f"{base}/v0-")
    stored = Path(run.uri.removeprefix("file://"))
    run.append_jsonl("logging.jsonl", {"n": 1})
    (run.local / "images").mkdir()
    (run.local / "images" / "a.png").write_bytes(b"png")
    assert names(stored) == []
    run.sync()
    assert names(stored) == ["images", "images/a.png", "logging.jsonl"]
    run.append_jsonl("logging.jsonl", {"n": 2})
    staging = run.local
    run.close()
    assert (stored / "logging.jsonl").read_text(encoding="utf-8") == '{"n": 1}\n{"n": 2}\n'
    assert not staging.exists()

    resumed = RunDirectory(run.uri)
    resumed.fetch("logging.jsonl")
    resumed.fetch("not-there.jsonl")
    resumed.append_jsonl("logging.jsonl", {"n": 3})
    resumed.close()
    assert len((stored / "logging.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert RunDirectory.create(base, add_version=True).uri.startswith(f"{base}/v1-")


def test_where_output_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert base_of() == str(tmp_path / "output" / "model")
    assert base_of(output_dir="out/") == str(tmp_path / "out")
    assert base_of(output_dir="~/out") == str(tmp_path / "home" / "out")
    assert base_of(output_dir="s3://bucket/out/") == "s3://bucket/out"
    assert base_of(output_dir="out", storage_path="/nfs/runs/") == "/nfs/runs/out"
    assert base_of(output_dir="out", storage_path="s3://bucket/runs/") == "s3://bucket/runs/out"
    assert base_of(output_dir="/abs/out", storage_path="/nfs/runs") == "/abs/out"


def test_in_a_ray_job_a_relative_folder_lies_below_the_storage_path_or_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as Ray sets it for a job
    with pytest.raises(UserError, match=r"--output_dir output/model: Ray removes .*give an absolute --storage_path"):
        base_of()
    assert base_of(storage_path="/nfs/runs") == "/nfs/runs/output/model"
    assert base_of(output_dir="/nfs/out") == "/nfs/out"


@pytest.mark.parametrize("below", ["", "/deeper", "/a/b/c"])
def test_an_output_folder_below_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "notes.txt").write_text("keep me", encoding="utf-8")
    base = f"{tmp_path}/notes.txt{below}"
    with pytest.raises(UserError) as caught:
        check_writable(base)
    message = str(caught.value)
    assert message.startswith(f"--output_dir {base}: cannot be written (")
    assert "notes.txt is a file" in message
    assert names(tmp_path) == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "keep me"


def test_an_output_folder_that_the_system_refuses() -> None:
    with pytest.raises(UserError, match=r"--output_dir /proc/rayswift/out: cannot be written \("):
        check_writable("/proc/rayswift/out")


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "new" / "folder"))
    check_writable(str(tmp_path))
    assert names(tmp_path) == []
