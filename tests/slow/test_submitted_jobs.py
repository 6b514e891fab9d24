"""How `ray job submit` and `rayswift submit` end: a wrong token, none, a folder of 2 GB, a program that raises."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import Head, ray_head

pytestmark = pytest.mark.slow

RAY = [str(Path(sys.executable).parent / "ray"), "job", "submit"]
RAYSWIFT = [sys.executable, "-m", "rayswift", "submit"]
SFT = ["sft", "--model", "/nfs/m", "--dataset", "/nfs/d.jsonl", "--output_dir", "/nfs/out"]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(num_cpus=1, log=tmp_path_factory.mktemp("ray") / "ray.log") as started:
        yield started


def submit(head: Head, folder: Path, *command: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A command at the head's address in a folder, in the head's environment with changes (None: without it)."""
    changed = {**head.environment, "HOME": str(folder), **environment}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=folder,
        env={name: value for name, value in changed.items() if value is not None},
    )  # fmt: skip


@pytest.mark.parametrize("token", ["0" * 64, None])
def test_a_wrong_token_or_none_is_refused_by_both(head: Head, token: str | None, tmp_path: Path) -> None:
    environment = {"RAY_AUTH_TOKEN": token, **({} if token else {"RAY_AUTH_MODE": None})}
    at = ["--address", head.address]
    done = submit(head, tmp_path, *RAY, *at, "--", "python", "-c", "print('ran')", **environment)
    assert done.returncode == 1
    assert "ran" not in done.stdout
    done = submit(head, tmp_path, *RAYSWIFT, *at, "--working_dir", "none", *SFT, **environment)
    assert done.returncode == 2
    [error] = done.stderr.splitlines()
    assert "the cluster wants its token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in error


def test_a_folder_of_two_gigabytes_is_refused_before_it_is_read(head: Head, tmp_path: Path) -> None:
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(2 * 2**30)
    at = ["--address", head.address]
    done = submit(head, tmp_path, *RAY, *at, "--working-dir", ".", "--", "python", "-c", "print('ran')")
    assert done.returncode == 1
    assert "exceed" in done.stderr
    done = submit(head, tmp_path, *RAYSWIFT, *at, *SFT)
    assert done.returncode == 2
    [error] = done.stderr.splitlines()
    assert "2048 MiB would be sent, and Ray takes 100" in error
    assert "weights.bin (2048.0 MiB)" in error
    assert "--working_dir none" in error or ".gitignore" in error


def test_a_program_that_raises_ends_both_with_its_status(head: Head, tiny_dir: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("raise ValueError('broken here')\n")
    at = ["--address", head.address]
    done = submit(head, tmp_path, *RAY, *at, "--working-dir", ".", "--", sys.executable, "job.py")
    assert done.returncode == 1
    assert "ValueError: broken here" in done.stdout
    plugin = ["--external_plugins", "job.py"]
    (tmp_path / "rows.jsonl").write_text('{"query": "a", "response": "b"}\n')
    sft = ["sft", "--model", tiny_dir, "--dataset", "rows.jsonl", "--output_dir", str(tmp_path / "out"), *plugin]
    done = submit(head, tmp_path, *RAYSWIFT, *at, *sft)
    print(done.stdout, done.stderr)
    assert done.returncode == 2
    assert "job.py" in done.stdout and "ValueError: broken here" in done.stdout
    assert "Traceback" not in done.stdout
