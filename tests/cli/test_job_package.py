"""What ``rayswift submit`` refuses to send: results would be lost, files missing or too big."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayswift import private
from rayswift.arguments import make_arguments
from rayswift.cli import jobs
from rayswift.errors import UserError
from rayswift.inference.command import infer

SFT = ["sft", "--model", "m", "--output_dir", "/nfs/out", "--dataset"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder whose .gitignore names its data, and keeps one file of a folder."""
    (tmp_path / "work" / "data").mkdir(parents=True)
    (tmp_path / "work" / ".gitignore").write_text("*.jsonl\n/output\n!kept.jsonl\n")
    for name in ("work/rows.jsonl", "work/kept.jsonl", "work/data/a.csv", "work/data/b.jsonl", "outside.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "work" / "output").mkdir()
    return tmp_path / "work"


def submit(folder: Path, *words: str) -> list[str]:
    return jobs._checked(words, str(folder))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["rows.jsonl"],
            r"--dataset rows\.jsonl: a \.gitignore or \.rayignore keeps rows\.jsonl from the job; take it",
        ),
        (["kept.jsonl", "rows.jsonl#500"], r"--dataset rows\.jsonl: a \.gitignore"),
        (["data"], r"--dataset data: .* keeps data/b\.jsonl from the job"),
        (["../outside.jsonl"], r"--dataset \.\./outside\.jsonl: lies outside --working_dir"),
        (["org/set", "--val_dataset", "rows.jsonl"], r"--val_dataset rows\.jsonl: a \.gitignore"),
        (["org/set", "--external_plugins", "../outside.jsonl"], r"--external_plugins .*: lies outside"),
    ],
)
def test_a_file_that_the_job_would_not_have_is_refused_with_the_reason(
    folder: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        submit(folder, *SFT, *words)


def test_a_module_that_a_plugin_needs_is_looked_for_too(folder: Path) -> None:
    (folder / "plugins").mkdir()
    (folder / "plugins" / "plugin.py").write_text("def f():\n    from helper import g\n")
    (folder / "plugins" / "helper.py").write_text("g = 1\n")
    submit(folder, *SFT, "kept.jsonl", "--external_plugins", "plugins/plugin.py")
    (folder / ".rayignore").write_text("helper.py\n")
    with pytest.raises(UserError, match=r"--external_plugins plugins/helper\.py: a \.gitignore or \.rayignore keeps"):
        submit(folder, *SFT, "kept.jsonl", "--external_plugins", "plugins/plugin.py")


def test_what_is_sent_or_lies_elsewhere_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(folder, *SFT, "kept.jsonl", "data/a.csv#3", "org/set", "/nfs/rows.jsonl", "s3://b/rows.jsonl", "gone.jsonl")
    (folder / "config.json").write_text('{"model": "m", "dataset": "rows.jsonl", "output_dir": "/nfs/out"}')
    with pytest.raises(UserError, match=r"--dataset rows\.jsonl"):
        submit(folder, "sft", "config.json")
    (folder / ".rayignore").write_text("config.json\n")
    with pytest.raises(UserError, match=r"the file config\.json: a \.gitignore or \.rayignore keeps config\.json"):
        submit(folder, "sft", "config.json")
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    submit(folder, *SFT, "rows.jsonl")


def test_a_folder_too_big_for_ray_is_refused_with_its_largest_files(folder: Path) -> None:
    for name, size in (("big.bin", 70), ("bigger.bin", 80)):
        with (folder / name).open("wb") as file:
            file.truncate(size * 2**20)
    with pytest.raises(UserError, match=r"150 MiB would be sent, and Ray takes 100; the largest of \d files are "
                       r"bigger\.bin \(80\.0 MiB\), big\.bin \(70\.0 MiB\), .*Name in \.gitignore"):  # fmt: skip
        submit(folder, *SFT, "kept.jsonl")
    (folder / ".rayignore").write_text("big*.bin\n")
    submit(folder, *SFT, "kept.jsonl")


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["infer", "--model", "m", "--dataset", "kept.jsonl", "--result_path", "out.jsonl"], "--result_path out.jsonl"),
        (["sample", "--model", "m", "--dataset", "kept.jsonl"], "--output_dir sample_output"),
        (["eval", "--model", "m", "--eval_dataset", "arc"], "--eval_output_dir eval_output"),
        (["sft", "--model", "m", "--dataset", "kept.jsonl"], "--output_dir output/m"),
        (["export", "--model", "m", "--to_gguf", "q8_0", "--output_dir", "out"], "--output_dir out"),
    ],
)  # fmt: skip
def test_results_that_ray_would_remove_with_the_job_are_refused(folder: Path, words: list[str], flag: str) -> None:
    with pytest.raises(UserError, match=rf"{flag}: Ray removes the folder that a job runs in.*--storage_path"):
        submit(folder, *words)
    with pytest.raises(UserError, match="give an absolute --storage_path"):
        submit(folder, *words, "--storage_path", "runs")
    submit(folder, *words, "--storage_path", "/nfs/runs")
    if words[0] != "sft":
        with pytest.raises(UserError, match=rf"--\w+ s3://b/{flag.split()[1]}: rayswift {words[0]} writes to a file"):
            submit(folder, *words, "--storage_path", "s3://b")


def test_a_job_writes_its_answers_to_the_storage_path_or_not_at_all(
    folder: Path, tiny_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(folder)
    (folder / "kept.jsonl").write_text('{"query": "hi"}\n')
    args = {"model": tiny_dir, "val_dataset": ["kept.jsonl"], "max_new_tokens": 2, "use_gpu": False}
    for path in ({"result_path": "out.jsonl"}, {}):
        with pytest.raises(UserError, match="Ray removes the folder"):
            infer(make_arguments("infer", **path, **args))
    storage = folder.parent / "storage"
    infer(make_arguments("infer", result_path="out.jsonl", storage_path=str(storage), **args))
    assert (storage / "out.jsonl").is_file()
    assert f"The answers are in {storage}/out.jsonl" in capsys.readouterr().out


def test_without_rays_list_the_folder_is_sent_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "job_package", lambda folder: None)
    submit(folder, *SFT, "rows.jsonl")


def test_a_configuration_file_with_secrets_that_others_can_read_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = folder / "sft.json"
    config.write_text('{"model": "m", "dataset": "kept.jsonl", "output_dir": "/o", "hub_token": "X"}')
    for mode, said in ((0o644, True), (0o600, False)):
        config.chmod(mode)
        caplog.clear()
        submit(folder, "sft", "sft.json")
        assert ("sft.json: holds secrets, and other users can read it" in caplog.text) == said
