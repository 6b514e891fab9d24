"""Pre-training from a stream: ZeRO-2, ZeRO-3 and no DeepSpeed give the same losses; the same through a Ray job. Runs
with ZeRO go on from their checkpoints on any number of workers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import QUICK, losses, read_rows, run, run_directory, start, train_workers, wait_for
from pyarrow.fs import LocalFileSystem
from ray_head import ray_head
from safetensors.torch import load_file
from tiny_models import llama, word_tokenizer

from rayswift.train.checkpoints.manifest import hash_files, read_manifest, write_manifest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 6
#: ZeRO-3 gathers every layer of the model in every step, over loopback: half a minute each on two cores.
ZERO3_STEPS = 3
SETTINGS = [
    "--dataset", str(REPOSITORY / "tests/data/pretrain_en.jsonl.gz"), "--streaming", "true", "--train_type", "full",
    "--num_workers", "2", "--truncation_strategy", "split", "--save_strategy", "no",
    "--learning_rate", "1e-4", "--lr_scheduler_type", "constant", *QUICK,
]  # fmt: skip


@pytest.fixture(scope="module")
def without_deepspeed(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of plain data parallel training."""
    folder = tmp_path_factory.mktemp("plain")
    training = ["pt", "--model", smollm2_dir, *SETTINGS, "--max_steps", str(STEPS)]
    run(*training, "--output_dir", str(folder / "out"), log=folder / "log")
    found = losses(run_directory(folder / "out"))
    assert list(found) == list(range(1, STEPS + 1))
    first, last = sum(found[step] for step in (1, 2)), sum(found[step] for step in (STEPS - 1, STEPS))
    assert last < first
    return found


@pytest.mark.parametrize(("preset", "steps"), [("zero2", STEPS), ("zero3", ZERO3_STEPS)])
def test_zero_gives_the_losses_of_plain_data_parallel_training(
    preset: str, steps: int, smollm2_dir: str, without_deepspeed: dict[int, float], tmp_path: Path
) -> None:
    run(
        "pt", "--model", smollm2_dir, *SETTINGS, "--max_steps", str(steps), "--deepspeed", preset,
        "--output_dir", str(tmp_path / "out"), log=tmp_path / "log",
    )  # fmt: skip
    expected = {step: loss for step, loss in without_deepspeed.items() if step <= steps}
    assert losses(run_directory(tmp_path / "out")) == pytest.approx(expected, rel=0.01)


def test_the_pretraining_job_runs_through_ray_job_submit_on_a_started_cluster(
    smollm2_dir: str, without_deepspeed: dict[int, float], tmp_path: Path
) -> None:
    job = ["python", str(REPOSITORY / "jobs/pt_qwen7b.py"), "--model", smollm2_dir, *SETTINGS,
           "--max_steps", str(STEPS)]  # fmt: skip
    with ray_head(num_cpus=2, log=tmp_path / "ray.log") as head:
        submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head.address, "--", *job]
        command = [*submit, "--output_dir", str(tmp_path / "out")]
        subprocess.run(command, check=True, timeout=540, cwd=tmp_path, env=head.environment)
    assert losses(run_directory(tmp_path / "out")) == pytest.approx(without_deepspeed, rel=0.01)


#: One short run of a tiny model in bfloat16, saved after every step.
TINY = [
    "--template", "chatml", "--dataset", "identity", "--model_name", "a", "--model_author", "b", "--num_workers", "1",
    "--torch_dtype", "bfloat16", "--learning_rate", "1e-3", "--lora_dropout", "0", "--save_steps", "1",
    "--split_dataset_ratio", "0", *QUICK,
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and in ``plain`` three steps of training it without DeepSpeed."""
    folder = tmp_path_factory.mktemp("tiny")
    llama().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    command = ["sft", "--model", str(folder / "model"), *TINY, "--max_steps", "3"]
    run(*command, "--output_dir", str(folder / "plain"), log=folder / "plain.log")
    return folder


def adapter(output_dir: Path, step: int) -> torch.Tensor:
    """All trained numbers of a checkpoint."""
    tensors = load_file(run_directory(output_dir) / f"checkpoint-{step}" / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if "lora_B" in name])


@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_a_preset_updates_as_plain_training_and_goes_on_from_its_shards(
    preset: str, tiny: Path, tmp_path: Path
) -> None:
    """The first three updates: an optimiser that starts wrongly is furthest off there. Shards are pickles, of which
    nothing but tensors and DeepSpeed's plain classes is read."""
    command = ["sft", "--model", str(tiny / "model"), *TINY, "--deepspeed", preset]
    command += ["--output_dir", str(tmp_path / "out")]
    run(*command, "--max_steps", "3", log=tmp_path / "first.log")
    for step in (1, 2, 3):
        found, expected = adapter(tmp_path / "out", step), adapter(tiny / "plain", step)
        assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.03), step
        assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.95, step
    printed = run(*command, "--max_steps", "4", "--resume_from_checkpoint", "true", log=tmp_path / "second.log")
    assert "training goes on from step 3" in printed
    assert list(losses(run_directory(tmp_path / "out"))) == [1, 2, 3, 4]


def test_an_adapter_that_begins_as_a_part_of_the_base_is_the_same_in_shards(tiny: Path, tmp_path: Path) -> None:
    found = {}
    for name, flags in (("plain", []), ("zero3", ["--deepspeed", "zero3"])):
        command = ["sft", "--model", str(tiny / "model"), *TINY, "--init_weights", "olora", "--max_steps", "2", *flags]
        run(*command, "--output_dir", str(tmp_path / name), log=tmp_path / f"{name}.log")
        found[name] = load_file(run_directory(tmp_path / name) / "checkpoint-2" / "adapter_model.safetensors")
    assert found["plain"].keys() == found["zero3"].keys()
    for name, tensor in found["plain"].items():
        assert tensor.shape == found["zero3"][name].shape
        assert torch.nn.functional.cosine_similarity(tensor.flatten(), found["zero3"][name].flatten(), 0) > 0.99, name


#: Steps of distinct losses in float32 without dropout, whose numbers would differ with the number of workers; the 91
#: rows of the first epoch and the beginning of the second.
ELASTIC = [
    "sft", "--template", "chatml", "--dataset", "identity", "--model_name", "a", "--model_author", "b",
    "--torch_dtype", "float32", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--lora_dropout", "0",
    "--per_device_train_batch_size", "8", "--max_length", "64", "--logging_steps", "1", "--report_to", "none",
    "--split_dataset_ratio", "0", "--num_train_epochs", "2", "--save_steps", "2",
]  # fmt: skip
#: The same sums in another order.
TOLERANCE = 1e-4
#: After which step which number of workers goes on.
TURNS = ((2, 2), (1, 4), (2, 8))


@pytest.mark.parametrize(
    ("train_type", "presets"),
    [
        ("full", ("zero1", "zero1", "zero1")),
        ("lora", ("zero2", "zero2", "zero2")),
        ("full", ("zero2", "zero2", "zero2")),
        ("lora", ("zero3", "zero3", "zero3")),
        ("full", ("zero3", "zero3", "zero3")),
        ("lora", ("zero2", "zero3_offload", "zero1")),
    ],
)
def test_two_workers_then_one_then_two_are_a_straight_run(
    train_type: str, presets: tuple[str, str, str], tiny: Path, tmp_path: Path
) -> None:
    command = [*ELASTIC, "--model", str(tiny / "model"), "--train_type", train_type]
    straight = [*command, "--deepspeed", presets[0], "--num_workers", "2", "--gradient_accumulation_steps", "1"]
    run(*straight, "--max_steps", "8", "--output_dir", str(tmp_path / "straight"), log=tmp_path / "straight.log")
    for (workers, steps), preset in zip(TURNS, presets, strict=True):
        on_now = ["--deepspeed", preset, "--num_workers", str(workers), "--max_steps", str(steps)]
        on_now += ["--gradient_accumulation_steps", "1"] if steps == 2 else ["--resume_from_checkpoint", "true"]
        printed = run(*command, *on_now, "--output_dir", str(tmp_path / "out"), log=tmp_path / f"{steps}.log")
        assert "16 rows" in printed
    found, expected = losses(run_directory(tmp_path / "out")), losses(run_directory(tmp_path / "straight"))
    assert list(expected) == list(range(1, 9))
    assert len({round(loss, 4) for loss in expected.values()}) == 8
    assert found == pytest.approx(expected, rel=TOLERANCE)
    last = run_directory(tmp_path / "out") / "checkpoint-8"
    manifest = read_manifest(LocalFileSystem(), str(last))
    assert manifest is not None
    assert {name for name in manifest["files"] if "optim" in name or "global_step" in name} == {
        "optimizer/state.json", *(f"optimizer/shard-{rank:05}-of-00002.safetensors" for rank in range(2))
    }  # fmt: skip


def shared_memory(driver: int) -> list[str]:
    """The names that DeepSpeed's shared memory of a run's workers had, as the kernel tells them."""
    maps = "".join(Path(f"/proc/{worker.pid}/maps").read_text() for worker in train_workers(driver))
    return sorted(set(re.findall(r"/dev/shm/deepspeed_allreduce_buffer_\S+(?: \(deleted\))?", maps)))


def test_a_killed_worker_leaves_no_shared_memory_and_the_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    command = [*ELASTIC, "--model", str(tiny / "model"), "--deepspeed", "zero2", "--num_workers", "2"]
    command += ["--gradient_accumulation_steps", "1", "--max_steps", "60", "--save_steps", "20"]
    run(*command, "--output_dir", str(tmp_path / "straight"), log=tmp_path / "straight.log")
    output, log = tmp_path / "out", tmp_path / "log"
    driver = start(*command, "--output_dir", str(output), log=log)
    wait_for(lambda: any(output.glob("v*/checkpoint-20/manifest.json")), 400, "the first checkpoint")
    mapped = shared_memory(driver.pid)
    train_workers(driver.pid)[-1].kill()
    assert driver.wait(400) == 0, log.read_text()[-4000:]
    assert len(mapped) == 2
    for name in mapped:
        assert name.endswith(" (deleted)")
        assert not Path(name.removesuffix(" (deleted)")).exists()
    assert "training goes on from step" in log.read_text()
    assert losses(run_directory(output)) == pytest.approx(losses(run_directory(tmp_path / "straight")), rel=TOLERANCE)


def test_shards_of_deepspeed_of_another_number_of_workers_are_refused_before_anything_starts(
    tiny: Path, tmp_path: Path
) -> None:
    """Checkpoints that DeepSpeed itself writes, as of a state on NVMe."""
    command = [*ELASTIC, "--model", str(tiny / "model"), "--deepspeed", "zero2", "--output_dir", str(tmp_path / "out")]
    run(*command, "--num_workers", "2", "--max_steps", "2", log=tmp_path / "first.log")
    checkpoint = run_directory(tmp_path / "out") / "checkpoint-2"
    (checkpoint / "global_step2").mkdir()
    for rank, shard in enumerate(sorted((checkpoint / "optimizer").iterdir())[:2]):
        shard.rename(checkpoint / f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    for left in (checkpoint / "optimizer").iterdir():
        left.unlink()
    write_manifest(LocalFileSystem(), str(checkpoint), 2, hash_files(str(checkpoint)))
    log = tmp_path / "second.log"
    again = [*command, "--num_workers", "1", "--max_steps", "4", "--resume_from_checkpoint", "true"]
    assert start(*again, log=log).wait(120) == 2
    lines = [line for line in log.read_text().splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("rayswift sft: error: --num_workers 1: ")
    assert lines[0].endswith("DeepSpeed's own shards of 2 workers, which no other number can take over; give "
                             "--num_workers 2")  # fmt: skip
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("preset", ["zero2", "zero3"])
def test_a_node_goes_and_training_goes_on_with_the_worker_that_is_left(preset: str, tiny: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    command = [*ELASTIC, "--model", str(tiny / "model"), "--deepspeed", preset, "--max_steps", "60"]
    command += ["--gradient_accumulation_steps", "1", "--save_steps", "20"]
    run(*command, "--num_workers", "2", "--output_dir", str(tmp_path / "straight"), log=tmp_path / "straight.log")
    output, log = tmp_path / "out", tmp_path / "log"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        elastic = ["--num_workers", "1,2", "--resources_per_worker", '{"CPU": 1}', "--address", cluster.address]
        driver = start(*command, *elastic, "--output_dir", str(output), log=log)
        wait_for(lambda: any(output.glob("v*/checkpoint-20/manifest.json")), 400, "the first checkpoint")
        cluster.remove_node(second, allow_graceful=False)
        assert driver.wait(500) == 0, log.read_text()[-4000:]
    finally:
        cluster.shutdown()
    first, last = (
        json.loads((run_directory(output) / f"checkpoint-{step}/manifest.json").read_text())["files"]
        for step in (20, 60)
    )
    assert "optimizer/shard-00001-of-00002.safetensors" in first
    assert "optimizer/shard-00000-of-00001.safetensors" in last
    assert "training goes on from step" in log.read_text()
    steps = [row["global_step/max_steps"] for row in read_rows(run_directory(output)) if "loss" in row]
    assert steps == [f"{step}/60" for step in range(1, 61)]
    assert losses(run_directory(output)) == pytest.approx(losses(run_directory(tmp_path / "straight")), rel=TOLERANCE)
