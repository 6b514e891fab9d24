"""Checkpoints are whole or are not there, in a folder of this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from rayswift.data.flow.cache import code_hash
from rayswift.errors import UserError
from rayswift.train.checkpoints import manifest as checkpoints
from rayswift.train.resume import Resume

LOCAL = LocalFileSystem()
FILES = {"adapter_model.safetensors": b"\x00" * 4096, "deep/optim_0.pt": b"state", "args.json": b"{}", "empty": b""}


def save(run: Path, step: int, whole: bool = True) -> Path:
    """A checkpoint as the workers write one; without its manifest it is the remains of a killed run."""
    folder = run / f"checkpoint-{step}"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if whole:
        checkpoints.write_manifest(LOCAL, str(folder), step, checkpoints.hash_files(str(folder)))
    return folder


def steps(run: Path) -> list[int]:
    return [found.step for found in checkpoints.list_checkpoints(LOCAL, str(run))]


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, 500)
    manifest = checkpoints.read_manifest(LOCAL, str(folder))
    assert manifest is not None
    assert manifest["step"] == 500
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {n: len(d) for n, d in FILES.items()}
    assert checkpoints.verify(str(folder), manifest) is None
    assert steps(tmp_path) == [500]


def test_shares_of_several_workers_make_one_manifest(tmp_path: Path) -> None:
    folder = str(save(tmp_path, 1, whole=False))
    shares = [checkpoints.hash_files(folder, share, 3) for share in range(3)]
    assert sum(len(share) for share in shares) == len(FILES)
    assert {**shares[0], **shares[1], **shares[2]} == checkpoints.hash_files(folder)


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "missing", "shorter", "longer", "not a manifest"])
def test_a_checkpoint_that_is_not_whole_is_not_listed(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path, 500)
    weights, manifest = folder / "adapter_model.safetensors", folder / checkpoints.MANIFEST
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:50])
    elif damage == "missing":
        weights.unlink()
    elif damage == "shorter":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "longer":
        weights.write_bytes(weights.read_bytes() + b"x")
    else:
        manifest.write_text("[1, 2]", encoding="utf-8")
    assert checkpoints.read_manifest(LOCAL, str(folder)) is None
    assert steps(tmp_path) == []
    assert checkpoints.find_checkpoints(LOCAL, str(tmp_path)) == []


def test_changed_bytes_of_the_same_size_are_found_by_hash(tmp_path: Path) -> None:
    folder = save(tmp_path, 500)
    manifest = checkpoints.read_manifest(LOCAL, str(folder))
    assert manifest is not None
    (folder / "deep" / "optim_0.pt").write_bytes(b"stale")
    assert checkpoints.verify(str(folder), manifest) == "deep/optim_0.pt"


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.read_manifest(LOCAL, str(tmp_path)) is None
    assert checkpoints.read_manifest(LOCAL, str(tmp_path / "nowhere")) is None
    assert checkpoints.list_checkpoints(LOCAL, str(tmp_path / "nowhere")) == []


def test_checkpoints_are_listed_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (1000, 500, 90):
        save(tmp_path, step)
    save(tmp_path, 2000, whole=False)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file", encoding="utf-8")
    assert steps(tmp_path) == [90, 500, 1000]


def test_the_latest_is_of_the_newest_run_that_has_one(tmp_path: Path) -> None:
    old, newer, newest = (tmp_path / f"v{n}-20250102-03040{n % 10}" for n in (9, 10, 11))
    save(old, 900)
    save(newer, 100)
    save(newer, 200)
    save(newer, 300, whole=False)
    save(newest, 50, whole=False)
    save(tmp_path / "other-folder", 5000)
    found = checkpoints.find_checkpoints(LOCAL, str(tmp_path))
    assert [(one.step, one.run_directory) for one in found] == [(200, str(newer)), (100, str(newer))]


def test_the_latest_without_version_folders(tmp_path: Path) -> None:
    save(tmp_path, 20)
    found = checkpoints.find_checkpoints(LOCAL, str(tmp_path))
    assert found == [checkpoints.FoundCheckpoint(str(tmp_path / "checkpoint-20"), 20)]
    assert checkpoints.find_checkpoints(LOCAL, str(tmp_path / "nowhere")) == []


def test_a_run_that_goes_on_deletes_only_what_it_was_writing(tmp_path: Path) -> None:
    for step in (10, 20, 40):
        save(tmp_path, step)
    for step in (15, 30, 99):
        save(tmp_path, step, whole=False)
    save(tmp_path, 25)
    (tmp_path / "checkpoint-25" / "deep" / "optim_0.pt").write_bytes(b"stale")  # a bit flip: the size is right
    (tmp_path / "runs").mkdir()
    (tmp_path / "checkpoint-99.aside").mkdir()
    checkpoints.begin_checkpoint(LOCAL, str(tmp_path), "checkpoint-30")
    moved = checkpoints.make_way(LOCAL, str(tmp_path), after_step=25)
    assert moved == [
        "checkpoint-99 → checkpoint-99.aside-1", "checkpoint-40 → checkpoint-40.aside",
        "checkpoint-25 → checkpoint-25.aside", "checkpoint-15 → checkpoint-15.aside",
    ]  # fmt: skip
    assert steps(tmp_path) == [10, 20]
    assert (tmp_path / "checkpoint-40.aside" / "deep" / "optim_0.pt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if "aside" not in path.name) == [
        "checkpoint-10", "checkpoint-20", "runs",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "best", "expected"),
    [
        (None, None, [100, 200, 300, 400, 500]),
        (5, None, [100, 200, 300, 400, 500]),
        (2, None, [400, 500]),
        (2, 200, [200, 500]),
        (3, 200, [200, 400, 500]),
        (3, 500, [300, 400, 500]),
        # The best and the newest always stay.
        (1, None, [500]),
        (1, 100, [100, 500]),
    ],
)
def test_save_total_limit(tmp_path: Path, limit: int | None, best: int | None, expected: list[int]) -> None:
    for step in (100, 200, 300, 400, 500):
        save(tmp_path, step)
    best_path = str(tmp_path / f"checkpoint-{best}") if best else None
    removed = checkpoints.keep_only(LOCAL, str(tmp_path), limit, best_path)
    assert steps(tmp_path) == expected
    kept = {f"checkpoint-{step}" for step in expected}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert kept.isdisjoint(removed)
    assert len(kept) + len(removed) == 5


def test_an_interrupted_deletion_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, 100)

    class DiesInTheMiddle:
        get_file_info = staticmethod(LOCAL.get_file_info)
        delete_file = staticmethod(LOCAL.delete_file)

        def delete_dir(self, path: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.delete_checkpoint(DiesInTheMiddle(), str(folder))  # type: ignore[arg-type]
    assert (folder / "adapter_model.safetensors").exists()
    assert steps(tmp_path) == []


def test_a_small_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    checkpoints.write_atomically(LOCAL, str(path), json.dumps({"n": 1}))
    checkpoints.write_atomically(LOCAL, str(path), json.dumps({"n": 2}))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.write_atomically(LOCAL, str(path), json.dumps({"n": 3}))
    assert json.loads(path.read_text(encoding="utf-8")) == {"n": 2}
    checkpoints.write_atomically(LOCAL, str(path), "中文")
    assert path.read_text(encoding="utf-8") == "中文"


def test_other_data_is_refused_and_another_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def resumed(data: str, code: str) -> Resume:
        return Resume("checkpoint-2", position=checkpoints.Position(8, data, code=code))

    resumed("same", "").check_data("same")
    resumed("same", code_hash()).check_data("same")
    Resume().check_data("any")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="the data is not what the checkpoint was trained on"):
        resumed("other", code_hash()).check_data("same")
    resumed("other", "").check_data("same")
    assert "of another version of RaySwift" in capsys.readouterr().out
