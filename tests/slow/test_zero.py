"""Pre-training from a stream: ZeRO-2, ZeRO-3 and no DeepSpeed give the same losses; the same through a Ray job. Runs
with ZeRO go on from their checkpoints on any number of workers."""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
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


#: Steps of 16 rows in float32, of 96, without dropout: its random numbers would differ with the number of workers.
ELASTIC = [
    "sft", "--template", "chatml", "--torch_dtype", "float32", "--learning_rate", "1e-3", "--lr_scheduler_type",
    "constant", "--lora_dropout", "0", "--per_device_train_batch_size", "8", "--max_length", "64", "--logging_steps",
    "1", "--report_to", "none", "--split_dataset_ratio", "0", "--save_steps", "2", "--gradient_checkpointing", "false",
]  # fmt: skip
STEPS_OF_ALL = 24
#: The same sums in another order.
TOLERANCE = 1e-4


def drawn_rows(count: int) -> str:
    """Rows of which no two are alike, as lines of JSON."""
    drawn = random.Random(0)
    rows = [[" ".join(f"w{drawn.randint(3, 159)}" for _ in range(drawn.randint(4, 16))) for _ in range(2)]
            for _ in range(count)]  # fmt: skip
    return "\n".join(json.dumps({"query": query, "response": response}) for query, response in rows)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that trains a tiny model on rows of which no two are alike."""
    folder = tmp_path_factory.mktemp("words")
    llama().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "words.jsonl").write_text(drawn_rows(96))
    return [*ELASTIC, "--model", str(folder / "model"), "--dataset", str(folder / "words.jsonl")]


@pytest.fixture(scope="module")
def straight(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The run directory of an undisturbed run of two workers."""

    @functools.cache
    def trained(train_type: str, preset: str) -> Path:
        folder = tmp_path_factory.mktemp("straight")
        command = [*words, "--train_type", train_type, "--deepspeed", preset, "--num_workers", "2"]
        printed = run(
            *command, "--gradient_accumulation_steps", "1", "--max_steps", str(STEPS_OF_ALL),
            "--output_dir", str(folder / "out"), log=folder / "log",
        )  # fmt: skip
        assert "steps of 16 rows" in printed
        found = losses(run_directory(folder / "out"))
        assert list(found) == list(range(1, STEPS_OF_ALL + 1))
        assert len({round(loss, 3) for loss in found.values()}) > STEPS_OF_ALL - 4  # other rows are another loss
        return run_directory(folder / "out")

    return trained


@pytest.mark.parametrize(
    ("train_type", "presets"),
    [
        ("full", ("zero1", "zero1", "zero1")),
        ("lora", ("zero2", "zero2", "zero2")),
        ("full", ("zero3", "zero3", "zero3")),
        ("lora", ("zero2", "zero3_offload", "zero1")),
    ],
)
def test_two_workers_then_one_then_two_are_a_straight_run(
    train_type: str,
    presets: tuple[str, str, str],
    words: list[str],
    straight: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    begun = straight(train_type, presets[0])
    from_here, found = begun / "checkpoint-2", {}
    for workers, preset, steps in ((1, presets[1], 4), (2, presets[2], 6)):
        output = tmp_path / str(workers)
        run(
            *words, "--train_type", train_type, "--deepspeed", preset, "--num_workers", str(workers),
            "--max_steps", str(steps), "--resume_from_checkpoint", str(from_here), "--output_dir", str(output),
            log=tmp_path / f"{workers}.log",
        )  # fmt: skip
        found |= losses(run_directory(output))
        from_here = run_directory(output) / f"checkpoint-{steps}"
    expected = losses(begun)
    assert {3, 4, 5, 6} <= set(found)
    assert found == pytest.approx({step: expected[step] for step in found}, rel=TOLERANCE)
    manifest = read_manifest(LocalFileSystem(), str(from_here))
    assert manifest is not None
    assert {name for name in manifest["files"] if "optim" in name or "global_step" in name} == {
        "optimizer/state.json", *(f"optimizer/shard-{rank:05}-of-00002.safetensors" for rank in range(2))
    }  # fmt: skip


def shared_memory(driver: int) -> list[str]:
    """The names that DeepSpeed's shared memory of a run's workers had, as the kernel tells them."""
    maps = "".join(Path(f"/proc/{worker.pid}/maps").read_text() for worker in train_workers(driver))
    return sorted(set(re.findall(r"/dev/shm/deepspeed_allreduce_buffer_\S+(?: \(deleted\))?", maps)))


def test_a_killed_worker_leaves_no_shared_memory_and_the_run_goes_on(
    words: list[str], straight: Callable[[str, str], Path], tmp_path: Path
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    driver = start(
        *words, "--deepspeed", "zero2", "--num_workers", "2", "--gradient_accumulation_steps", "1",
        "--max_steps", str(STEPS_OF_ALL), "--output_dir", str(output), log=log,
    )  # fmt: skip
    wait_for(lambda: any(output.glob("v*/checkpoint-2/manifest.json")), 400, "the first checkpoint")
    mapped = shared_memory(driver.pid)
    train_workers(driver.pid)[-1].kill()
    assert driver.wait(400) == 0, log.read_text()[-4000:]
    assert len(mapped) == 2
    for name in mapped:
        assert name.endswith(" (deleted)")
        assert not Path(name.removesuffix(" (deleted)")).exists()
    assert "training goes on from step" in log.read_text()
    assert losses(run_directory(output)) == pytest.approx(losses(straight("lora", "zero2")), rel=TOLERANCE)


def test_shards_of_deepspeed_of_another_number_of_workers_are_refused_before_anything_starts(
    words: list[str], straight: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Checkpoints that DeepSpeed itself writes, as of a state on NVMe."""
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(straight("lora", "zero2") / "checkpoint-2", checkpoint)
    (checkpoint / "optimizer" / "state.json").unlink()
    (checkpoint / "optimizer").rename(checkpoint / "global_step2")
    for rank, shard in enumerate(sorted((checkpoint / "global_step2").iterdir())):
        shard.rename(shard.with_name(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    write_manifest(LocalFileSystem(), str(checkpoint), 2, hash_files(str(checkpoint)))
    log = tmp_path / "log"
    again = [*words, "--deepspeed", "zero2", "--num_workers", "1", "--max_steps", "4"]
    again += ["--resume_from_checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    assert start(*again, log=log).wait(120) == 2, log.read_text()
    lines = [line for line in log.read_text().splitlines() if "error:" in line]
    assert lines == [
        f"rayswift sft: error: --num_workers 1: {checkpoint} holds DeepSpeed's own shards of 2 workers, which no other "
        "number can take over; give --num_workers 2"
    ]
    assert "Traceback" not in log.read_text()


def test_a_node_goes_and_training_goes_on_with_the_worker_that_is_left(
    words: list[str], straight: Callable[[str, str], Path], tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    expected = losses(straight("lora", "zero2"))
    output, log = tmp_path / "out", tmp_path / "log"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        driver = start(
            *words, "--deepspeed", "zero2", "--num_workers", "1,2", "--resources_per_worker", '{"CPU": 1}',
            "--gradient_accumulation_steps", "1", "--max_steps", str(STEPS_OF_ALL), "--address", cluster.address,
            "--output_dir", str(output), log=log,
        )  # fmt: skip
        wait_for(lambda: any(output.glob("v*/checkpoint-2/manifest.json")), 400, "the first checkpoint")
        cluster.remove_node(second, allow_graceful=False)
        assert driver.wait(500) == 0, log.read_text()[-4000:]
    finally:
        cluster.shutdown()
    first, last = (
        json.loads((run_directory(output) / f"checkpoint-{step}/manifest.json").read_text())["files"]
        for step in (2, STEPS_OF_ALL)
    )
    assert "optimizer/shard-00001-of-00002.safetensors" in first
    assert "optimizer/shard-00000-of-00001.safetensors" in last
    assert "training goes on from step" in log.read_text()
    steps = [row["global_step/max_steps"] for row in read_rows(run_directory(output)) if "loss" in row]
    assert steps == [f"{step}/{STEPS_OF_ALL}" for step in range(1, STEPS_OF_ALL + 1)]
    assert losses(run_directory(output)) == pytest.approx(expected, rel=TOLERANCE)


def workers_of(checkpoint: Path) -> int:
    """How many workers wrote it; 0 where it is not whole."""
    manifest = read_manifest(LocalFileSystem(), str(checkpoint)) or {"files": []}
    return sum(name.startswith("optimizer/shard-") for name in manifest["files"])


def test_three_workers_then_one_then_two_train_every_sample_once(words: list[str], tmp_path: Path) -> None:
    """Two of three nodes are switched off at once; one comes back, and the worker that was left is killed. One epoch:
    all that a step trains is trained at no other."""
    from ray.cluster_utils import Cluster

    rows, steps = 96, 80
    data = tmp_path / "once.jsonl"
    data.write_text(drawn_rows(rows * steps))
    command = [
        *words, "--deepspeed", "zero2", "--dataset", str(data), "--per_device_train_batch_size", "2",
        "--num_train_epochs", "1", "--include_num_input_tokens_seen", "non_padding", "--max_failures", "10",
    ]  # fmt: skip
    output, log = tmp_path / "out", tmp_path / "log"

    def trained_by(workers: int) -> bool:
        return any(workers_of(found.parent) == workers for found in output.glob("v*/checkpoint-*/manifest.json"))

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    driver = None
    try:
        others = [cluster.add_node(num_cpus=1) for _ in range(2)]
        driver = start(
            *command, "--num_workers", "1,3", "--resources_per_worker", '{"CPU": 1}', "--address", cluster.address,
            "--gradient_accumulation_steps", "16", "--output_dir", str(output), log=log,
        )  # fmt: skip
        wait_for(lambda: trained_by(3), 400, "a checkpoint of three workers")
        for node in others:
            cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: trained_by(1), 200, "a checkpoint of the one that is left")
        cluster.add_node(num_cpus=1)
        time.sleep(22)  # Ray Train's view of the cluster is at most 20 s old
        raylet = cluster.head_node.all_processes["raylet"][0].process.pid
        for worker in train_workers(raylet):
            worker.kill()
        assert driver.wait(400) == 0, log.read_text()[-4000:]
    finally:
        if driver is not None and driver.poll() is None:
            driver.kill()
        cluster.shutdown()
    found = run_directory(output)
    assert f"{steps} steps of {rows} rows" in log.read_text()
    by_step = [workers_of(found / f"checkpoint-{step}") for step in range(2, steps + 1, 2)]
    assert list(dict.fromkeys(by_step)) == [3, 1, 2], by_step

    run(
        *command, "--num_workers", "1", "--gradient_accumulation_steps", "48", "--output_dir", str(tmp_path / "alone"),
        log=tmp_path / "alone.log",
    )  # fmt: skip
    alone = run_directory(tmp_path / "alone")
    assert list(losses(found)) == list(range(1, steps + 1))
    assert losses(found) == pytest.approx(losses(alone), rel=1e-3)
    seen = [[row["num_input_tokens_seen"] for row in read_rows(one) if "loss" in row] for one in (found, alone)]
    assert seen[0] == seen[1]
