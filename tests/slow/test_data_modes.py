"""Ways to feed a training that must not change what it learns: mixed streams on any number of workers, lazy rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import QUICK, losses, run, run_directory

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parents[1] / "data"


def trained(folder: Path, *words: str) -> tuple[dict[int, float], str]:
    """Losses of a run by step, and what it printed."""
    printed = run(*words, "--output_dir", str(folder / "out"), log=folder / "log")
    return losses(run_directory(folder / "out")), printed


def test_mixed_streams_give_the_same_losses_on_one_worker_and_on_two(
    smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mixed = [
        "pt", "--model", smollm2_dir, "--dataset", str(DATA / "pretrain_en.jsonl.gz"), str(DATA / "gsm8k_40.jsonl"),
        "--interleave_prob", "0.7", "0.3", "--streaming", "true", "--max_steps", "3", "--lora_dropout", "0",
        "--truncation_strategy", "split", "--save_strategy", "no", "--learning_rate", "1e-3", *QUICK,
    ]  # fmt: skip
    two, _ = trained(tmp_path_factory.mktemp("two"), *mixed, "--num_workers", "2")
    words = [*mixed, "--num_workers", "1", "--gradient_accumulation_steps", "2"]
    one, _ = trained(tmp_path_factory.mktemp("one"), *words)
    assert list(one) == [1, 2, 3]
    assert one == pytest.approx(two, rel=1e-4)
    assert len({round(loss, 3) for loss in one.values()}) == 3


def test_lazy_rows_give_the_losses_of_encoded_ones_and_the_best_checkpoint_is_the_result(
    smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = [
        "sft", "--model", smollm2_dir, "--dataset", "identity", "--model_name", "swift-robot", "--model_author",
        "swift", "--max_steps", "4", "--save_steps", "2", "--split_dataset_ratio", "0.05", "--learning_rate", "1e-3",
        "--load_best_model_at_end", "true", *QUICK[2:], "--max_length", "512",  # every row is short enough
    ]  # fmt: skip
    encoded, printed = trained(tmp_path_factory.mktemp("encoded"), *words)
    lazy, lazy_printed = trained(tmp_path_factory.mktemp("lazy"), *words, "--lazy_tokenize", "true")
    assert list(lazy) == [1, 2, 3, 4]
    assert lazy == pytest.approx(encoded, rel=1e-5)
    assert "Dataset Token Length" in printed
    (best,) = [line.split()[1] for line in lazy_printed.splitlines() if line.startswith("best_model_checkpoint:")]
    assert f"  rayswift infer --adapters {best} --stream true" in lazy_printed.splitlines()
    assert "memory: at least 0." in lazy_printed
