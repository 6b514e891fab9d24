"""Pre-training from a stream: ZeRO-2, ZeRO-3 and no DeepSpeed give the same losses; the same through a Ray job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import QUICK, losses, run, run_directory
from ray_head import ray_head
from safetensors.torch import load_file
from tiny_models import llama, word_tokenizer

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
