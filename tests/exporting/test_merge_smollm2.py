"""``rayswift export --merge_lora true`` on a real model: its logits beside the exact ones of base and adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import lora_args, randomise_lora

from rayswift.arguments import make_arguments
from rayswift.exporting import export
from rayswift.modeling.adapters import add_lora, load_adapter
from rayswift.modeling.loading import load_model, load_tokenizer

pytestmark = pytest.mark.slow

QUESTIONS = Path(__file__).parents[1] / "data" / "arc_challenge_24.jsonl"


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 1e-5), ("bfloat16", 1e-1)])
def test_a_merged_model_is_as_near_the_exact_logits_as_base_and_adapter(
    dtype: str, largest: float, smollm2_dir: str, tmp_path: Path
) -> None:
    """The exact logits are float64's. No weights of ``dtype`` come nearer than computing in ``dtype`` allows."""
    adapter, logits = _adapter(smollm2_dir, tmp_path), _logits_of(smollm2_dir)
    settings = {"adapters": [adapter], "model": smollm2_dir, "torch_dtype": dtype}
    merged = export(make_arguments("export", merge_lora=True, **settings))
    exact = logits(load_adapter(load_model(smollm2_dir, torch_dtype="float64"), adapter))
    found = logits(load_model(merged, torch_dtype=dtype)) - exact
    beside = logits(load_adapter(load_model(smollm2_dir, torch_dtype=dtype), adapter)) - exact
    moved = logits(load_model(smollm2_dir, torch_dtype=dtype)) - exact
    for name, off in {"merged": found, "base and adapter": beside, "base alone": moved}.items():
        print(f"{dtype}, {name}: off by at most {off.abs().max():.2e}, {off.abs().mean():.2e} in the mean")
    print(f"largest logit {exact.abs().max():.1f}")
    assert found.abs().mean() <= 1.2 * beside.abs().mean()
    assert found.abs().max() <= largest * exact.abs().max()
    assert moved.abs().mean() > 3 * found.abs().mean()


def _adapter(base: str, folder: Path) -> str:
    """A LoRA adapter of ``base`` that moves its answers as a training run does."""
    model = add_lora(load_model(base, torch_dtype="float32"), lora_args())
    randomise_lora(model, std=0.03)
    model.save_pretrained(folder / "checkpoint-3")
    return str(folder / "checkpoint-3")


def _logits_of(model_dir: str) -> Callable[[torch.nn.Module], torch.Tensor]:
    text = "\n".join(json.loads(line)["question"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines())
    ids = torch.tensor([load_tokenizer(model_dir)(text)["input_ids"][:256]])

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(ids).logits.double()

    return logits
