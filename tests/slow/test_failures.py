"""A killed worker, a killed driver: training goes on from the last whole checkpoint as if nothing had happened."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import QUICK, losses, read_rows, run, run_directory, start, train_workers, wait_for

pytestmark = pytest.mark.slow

STEPS = 8
#: Two workers, dropout on (the RNG must be restored), a checkpoint every 2 steps.
SFT = [
    "sft", "--dataset", "identity", "--model_name", "swift-robot", "--model_author", "swift", "--num_workers", "2",
    "--max_steps", str(STEPS), "--save_steps", "2", "--learning_rate", "1e-3", "--split_dataset_ratio", "0", *QUICK,
]  # fmt: skip
#: Of one checkpoint of these runs, once there is one.
CHECKPOINT_BYTES: list[int] = []
#: The same operations on the same data in the same order: only what gloo's reduction may round differently.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def undisturbed(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(*SFT, "--model", smollm2_dir, "--output_dir", str(folder / "out"), log=folder / "log")
    files = (run_directory(folder / "out") / "checkpoint-2").rglob("*")
    CHECKPOINT_BYTES.append(sum(path.stat().st_size for path in files))
    found = losses(run_directory(folder / "out"))
    assert list(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1]
    return found


def test_a_killed_worker_is_replaced_and_the_losses_are_those_of_an_undisturbed_run(
    smollm2_dir: str, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    driver = start(*SFT, "--model", smollm2_dir, "--output_dir", str(output), log=log)
    wait_for(lambda: any(output.glob("v*/checkpoint-2/manifest.json")), 400, "the first checkpoint")
    wait_for(lambda: len(losses(run_directory(output))) >= 3, 100, "step 3")
    train_workers(driver.pid)[-1].kill()
    assert driver.wait(400) == 0, log.read_text()[-4000:]
    assert "training goes on from step" in log.read_text()
    assert losses(run_directory(output)) == pytest.approx(undisturbed, rel=TOLERANCE)


def test_a_killed_driver_resumes_in_its_run_directory_with_the_same_losses(
    smollm2_dir: str, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [*SFT, "--model", smollm2_dir, "--output_dir", str(output)]
    driver = start(*command, log=tmp_path / "killed.log")
    wait_for(lambda: any(output.glob("v*/checkpoint-4/manifest.json")), 400, "checkpoint-4")
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait(30)
    killed = run_directory(output)
    half_written = killed / "checkpoint-6"
    half_written.mkdir(exist_ok=True)
    (half_written / "adapter_config.json").write_text("{}")

    printed = run(*command, "--resume_from_checkpoint", "true", log=tmp_path / "resumed.log")

    assert "training goes on from step" in printed
    assert run_directory(output) == killed
    assert losses(killed) == pytest.approx(undisturbed, rel=TOLERANCE)
    assert (killed / "checkpoint-6" / "manifest.json").exists()
    assert read_rows(killed)[-1]["last_model_checkpoint"] == f"{killed}/checkpoint-{STEPS}"


def test_sigterm_saves_what_was_trained_and_the_run_goes_on_from_there(
    smollm2_dir: str, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    """Two workers, which stop at the same step; no checkpoint of the schedule is near."""
    output, log = tmp_path / "out", tmp_path / "log"
    command = [*SFT, "--save_steps", "100", "--model", smollm2_dir, "--output_dir", str(output)]
    driver = start(*command, log=log)
    wait_for(lambda: any(output.glob("v*")) and len(losses(run_directory(output))) >= 2, 400, "step 2")
    os.kill(driver.pid, signal.SIGTERM)
    assert driver.wait(60) == 143, log.read_text()[-4000:]
    printed = log.read_text()
    (saved,) = run_directory(output).glob("checkpoint-*/manifest.json")
    name = saved.parent.name
    assert 2 <= int(name.removeprefix("checkpoint-")) < STEPS
    assert "SIGTERM: the workers stop after this step and save it" in printed
    assert f"stopped; {name} in " in printed
    assert "is whole. Go on with the same command and --resume_from_checkpoint true" in printed
    assert printed.rstrip().endswith("rayswift sft: stopped")
    assert "Traceback" not in printed
    run(*command, "--resume_from_checkpoint", "true", log=tmp_path / "resumed.log")
    assert losses(run_directory(output)) == pytest.approx(undisturbed, rel=TOLERANCE)


def test_a_second_sigterm_waits_for_no_step(smollm2_dir: str, tmp_path: Path) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    slow = ["--max_steps", "4", "--gradient_accumulation_steps", "512"]
    driver = start(*SFT, *slow, "--model", smollm2_dir, "--output_dir", str(output), log=log)
    wait_for(lambda: "model_parameter_info" in log.read_text(), 400, "the first step")
    os.kill(driver.pid, signal.SIGTERM)
    wait_for(lambda: "SIGTERM: the workers stop" in log.read_text(), 20, "the first signal's line")
    os.kill(driver.pid, signal.SIGTERM)
    assert driver.wait(15) == 143, log.read_text()[-4000:]  # before the time that the workers have
    assert "stopped before the first checkpoint" in log.read_text()


@pytest.mark.parametrize(("room", "kept"), [(0.7, []), (1.5, ["checkpoint-2"])])
def test_a_full_disk_ends_no_training(
    smollm2_dir: str, undisturbed: dict[int, float], tmp_path: Path, room: float, kept: list[str]
) -> None:
    """A file system of its own, with room for that many checkpoints."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    size = CHECKPOINT_BYTES[0]
    output = tmp_path / "small"
    output.mkdir()
    command = [sys.executable, "-m", "rayswift", *SFT, "--model", smollm2_dir, "--output_dir", str(output)]
    mounted = f"mount -t tmpfs -o size={int(room * size) + 2**20} none {output} && {shlex.join(command)}; " \
              f"echo status $?; find {output}"  # fmt: skip
    done = subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True, text=True, check=False)
    assert "status 0" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stdout + done.stderr
    last = kept[-1] if kept else "there is none yet"
    for step in (4, 6, 8):
        line = f"checkpoint-{step} was not saved (No space left on device); training goes on, the last whole "
        assert f"{line}checkpoint: {last}" in done.stdout
    assert f"'global_step/max_steps': '{STEPS}/{STEPS}'" in done.stdout
    found = done.stdout.partition("status 0")[2]
    assert [
        name for name in ("checkpoint-2", "checkpoint-4", "checkpoint-8") if f"{name}/manifest.json" in found
    ] == kept
    assert "/checkpoint-8" not in found  # nothing half-done stays


#: A packed stream, four packs a step, without dropout: its random numbers would differ with the number of workers.
STREAM = [
    "pt", "--dataset", str(Path(__file__).resolve().parents[1] / "data/pretrain_en.jsonl.gz"), "--streaming", "true",
    "--packing", "true", "--max_length", "64", "--truncation_strategy", "split", "--lora_dropout", "0",
    "--max_steps", "5", "--save_steps", "2", "--gradient_accumulation_steps", "4", "--logging_steps", "1",
    "--gradient_checkpointing", "false", "--report_to", "none", "--learning_rate", "1e-3",
]  # fmt: skip


def test_a_killed_stream_goes_on_at_its_place_with_another_number_of_workers(smollm2_dir: str, tmp_path: Path) -> None:
    alone = [*STREAM, "--model", smollm2_dir, "--num_workers", "1"]
    run(*alone, "--output_dir", str(tmp_path / "undisturbed"), log=tmp_path / "undisturbed.log")
    output = tmp_path / "out"
    driver = start(*alone, "--output_dir", str(output), log=tmp_path / "killed.log")
    wait_for(lambda: any(output.glob("v*/checkpoint-2/manifest.json")), 400, "checkpoint-2")
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(30)

    two = [*STREAM, "--model", smollm2_dir, "--num_workers", "2", "--output_dir", str(output)]
    printed = run(*two, "--resume_from_checkpoint", "true", log=tmp_path / "resumed.log")

    assert "5 steps of 4 packs (2 workers × 1 packs × 2 accumulated)" in printed
    found, expected = (losses(run_directory(folder)) for folder in (output, tmp_path / "undisturbed"))
    assert list(expected) == [1, 2, 3, 4, 5]
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert len({round(loss, 3) for loss in expected.values()}) == 5
